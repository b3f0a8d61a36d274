"""What GLIDE and PITI share: two stages in pixels, a U-Net with a condition in front of its self-attention.

Nichol et al., "GLIDE", arXiv 2112.10741; original: openai/glide-text2im@69b5307 (code and weights MIT). PITI (arXiv
2205.12952) keeps GLIDE's networks and changes what they are told.

Shapes: b images, c = 3 channels, h x w pixels of a stage; conditions are l tokens of width d.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional as F

from ...guidance import Inputs, both_branches
from ...schedulers.gaussian import (
    check_gaussian_scheduler,
    check_predicted_channels,
    guided_step,
    join_prediction,
    scheduler_setting,
    set_steps,
    signal_and_noise,
    split_prediction,
    step_arguments,
    takes_learned_variance,
    takes_respacing,
)
from ..base import HousePipeline
from ..callbacks import Callback, report_step
from ..checks import (
    as_generators,
    check_fraction,
    check_generator,
    check_guidance_scale,
    check_noise,
    check_output_type,
    check_predictions,
    check_steps,
    check_temperature,
    check_timesteps,
    sample_sides,
)

Generators = torch.Generator | list[torch.Generator] | None
CHANNELS = 3  # of an image
_TEMPERATURES = "the large image's noise is multiplied by it, in the authors' code by 0.997"


@dataclass(frozen=True)
class GlideCondition:
    """What a U-Net is told in a stage besides the noisy image.

    Args:
        embeds: tokens and behind them the vector for the time embedding, (b, l + 1, d).
        null_embeds: the same for "no condition", or None without guidance.
        maps: images (b, c', h, w) behind the noisy one, or None.
    """

    embeds: Tensor
    null_embeds: Tensor | None = None
    maps: Tensor | None = None

    def branches(self, sample: Tensor) -> tuple[Inputs, Inputs | None]:
        """The inputs (noisy image, maps, embeds) of both branches, for `both_branches`."""
        null = None if self.null_embeds is None else (sample, self.maps, self.null_embeds)
        return (sample, self.maps, self.embeds), null


def call_unet(unet: Any, timestep: Tensor, sample: Tensor, maps: Tensor | None, embeds: Tensor) -> Tensor:
    """The prediction (b, c or 2 c, h, w) of a stock `UNet2DConditionModel`."""
    sample = sample if maps is None else torch.cat([sample, maps], dim=1)
    embeds = embeds.to(sample.dtype)
    tokens, vector = embeds[:, :-1], embeds[:, -1]
    return unet(sample, timestep, encoder_hidden_states=tokens, class_labels=vector, return_dict=False)[0]


@dataclass(frozen=True)
class Stage:
    """A U-Net with its sampler, and how a run starts it.

    Args:
        name: "base" or "upscale": what `pipe.stage` says while it runs.
        unet: predicts the noise.
        scheduler: its sampler, with the steps set.
        condition: what the U-Net is told.
        noise: standard normal (b, c, h, w), times the temperature.
        guidance_scale: of the stage.
        known: the image (b, c, h, w) in [-1, 1] of which a part has to stay, or None.
        keep: 1 where it has to stay, (b, 1, h, w), or None.
        null_embeds: makes the null condition when a callback turns guidance on.
    """

    name: str
    unet: Any
    scheduler: Any
    condition: GlideCondition
    noise: Tensor
    guidance_scale: float
    known: Tensor | None = None
    keep: Tensor | None = None
    null_embeds: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Run:
    """What a call says of the stages. The arguments are those of a call.

    Args:
        guidance_scale: of the first stage; the second one is not guided.
        callback, callback_tensors: `callback_on_step_end` and `callback_on_step_end_tensor_inputs`.
    """

    guidance_scale: float
    eta: float = 0.0
    generator: Generators = None
    latents: Tensor | None = None
    upscale_latents: Tensor | None = None
    upscale_temperature: float = 0.997
    callback: Callback | None = None
    callback_tensors: list[str] | None = None
    num_inference_steps: int | str | None = None
    upscale_num_inference_steps: int | str | None = None


class GlideBasePipeline(HousePipeline):
    """The run of the GLIDE and PITI pipelines. Each adds how its condition is read. No pipeline by itself."""

    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "pred_original_sample"]

    unet: Any
    scheduler: Any
    upscale_unet: Any
    upscale_scheduler: Any
    to_8_bits: Callable[[Tensor], Tensor]  # the small image as the second stage sees it, as the authors save it

    def __init__(self, unet: Any, scheduler: Any, upscale_unet: Any, upscale_scheduler: Any):
        super().__init__()
        self.register_modules(
            unet=unet, scheduler=scheduler, upscale_unet=upscale_unet, upscale_scheduler=upscale_scheduler
        )
        self.vae_scale_factor = 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._stage = "base"

    @property
    def stage(self) -> str:
        """The stage that runs, "base" or "upscale"."""
        return self._stage

    @property
    def upscales(self) -> bool:
        """Whether the pipeline has its second stage."""
        return self.upscale_unet is not None

    def stage_parts(self) -> list[tuple[str, Any, Any]]:
        """(name, U-Net, scheduler) of each stage."""
        parts = [("base", self.unet, self.scheduler)]
        return [*parts, ("upscale", self.upscale_unet, self.upscale_scheduler)] if self.upscales else parts

    def check_stages(self) -> None:
        """The components of each stage are there, fit each other and can be run."""
        for name, unet, scheduler in self.stage_parts():
            prefix = "" if name == "base" else "upscale_"
            if unet is None or scheduler is None:
                missing = f"{prefix}unet" if unet is None else f"{prefix}scheduler"
                raise ValueError(
                    f"The pipeline was built without {missing}; the stage {name} needs it. Pass `{missing}=...` to"
                    " `from_pretrained` or to the constructor."
                )
            sample_sides(f"{prefix}unet.config.sample_size", unet.config["sample_size"])
            check_gaussian_scheduler(scheduler, type(self).__name__)
            check_predicted_channels(unet, scheduler, CHANNELS, prefix)

    def check_run(self, run: Run, batch_size: int, output_type: Any) -> None:
        """The arguments that both pipelines have; the schedules are set."""
        check_guidance_scale(run.guidance_scale)
        check_fraction("eta", run.eta, "0 is deterministic, 1 is as noisy as DDPM")
        check_output_type(output_type)
        check_temperature(run.upscale_temperature, "upscale_temperature", _TEMPERATURES)
        check_generator(run.generator, batch_size, self._execution_device)
        self.callback_names(run.callback, run.callback_tensors)
        given = {
            "base": (run.num_inference_steps, run.latents),
            "upscale": (run.upscale_num_inference_steps, run.upscale_latents),
        }
        if not self.upscales and any(one is not None for one in given["upscale"]):
            raise ValueError(
                "`upscale_num_inference_steps` or `upscale_latents` is given, but the pipeline has no `upscale_unet`:"
                " load one, or leave them out."
            )
        for name, unet, scheduler in self.stage_parts():
            steps, noise = given[name]
            if noise is not None:
                check_noise(noise, (batch_size, CHANNELS, *self.sides(unet)), _argument(name, "latents"))
            self.set_stage_steps(name, scheduler, steps)

    def set_stage_steps(self, stage: str, scheduler: Any, steps: Any) -> None:
        """A number of steps, for `RespacedScheduler` also a respacing, or what the checkpoint's config says."""
        device = self._execution_device
        respaces = takes_respacing(scheduler)
        if steps is None and not (respaces and scheduler_setting(scheduler, "timestep_respacing")):
            steps = 100 if stage == "base" else 27  # the authors'
        if steps is None or (isinstance(steps, str) and respaces):
            set_steps(scheduler, steps, device)
            return
        argument = _argument(stage, "num_inference_steps")
        check_steps(scheduler, steps, argument)
        count = int(steps)
        set_steps(scheduler, count, device)
        check_timesteps(scheduler, count, argument)

    @staticmethod
    def sides(unet: Any) -> tuple[int, int]:
        """Height and width of the images of a U-Net."""
        return sample_sides("unet.config.sample_size", unet.config["sample_size"])

    def draw_noise(
        self, unet: Any, batch_size: int, generator: Any, noise: Tensor | None, temperature: float
    ) -> Tensor:
        """The initial image of a stage, in the scheduler's units of a deviation of 1."""
        shape = (batch_size, CHANNELS, *self.sides(unet))
        device, dtype = self._execution_device, unet.dtype
        if noise is None:
            noise = randn_tensor(shape, generator=as_generators(generator), device=device, dtype=dtype)
        return temperature * noise.to(device=device, dtype=dtype)

    def prepare_stage(
        self,
        name: str,
        run: Run,
        embeds: Tensor,
        null_embeds: Callable[[], Tensor],
        drawn: Tensor | None,
        images: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Stage:
        """A stage with all that its U-Net is told; draws its noise, and sets its scheduler, which both may share.

        Args:
            name: "base" or "upscale".
            run: what the call says.
            embeds: of the condition, (b, l + 1, d).
            null_embeds: makes those of the null condition.
            drawn: what the first stage drew, (b, c, h, w), where it is the second one's turn.
            images: images (n, c, H, W) in [-1, 1] of which a part stays, if any.
            keep: 1 where it stays, (n, 1, H, W).
        """
        if name == "base":
            unet, scheduler, scale = self.unet, self.scheduler, float(run.guidance_scale)
            noise = self.draw_noise(unet, len(embeds), run.generator, run.latents, 1.0)
            self.set_stage_steps(name, scheduler, run.num_inference_steps)
        else:
            unet, scheduler, scale = self.upscale_unet, self.upscale_scheduler, 1.0
            noise = self.draw_noise(unet, len(embeds), run.generator, run.upscale_latents, run.upscale_temperature)
            self.set_stage_steps(name, scheduler, run.upscale_num_inference_steps)
        maps: list[Tensor] = []
        if images is not None and keep is not None:
            images = F.interpolate(images, noise.shape[-2:], mode="bilinear", antialias=True).clamp(-1, 1)
            keep = F.interpolate(keep, noise.shape[-2:], mode="nearest")
            images, keep = (one.repeat_interleave(len(noise) // len(one), dim=0).to(noise) for one in (images, keep))
            maps = [images * keep, keep]
        if drawn is not None:
            maps.append(upsample(self.to_8_bits(drawn), self.sides(unet)).to(noise))
        condition = GlideCondition(
            embeds, null_embeds() if scale != 1.0 else None, torch.cat(maps, dim=1) if maps else None
        )
        return Stage(name, unet, scheduler, condition, noise, scale, images, keep, null_embeds)

    def run_stage(self, stage: Stage, run: Run) -> Tensor:
        """Denoises one stage: images (b, c, h, w), nominally in [-1, 1], not clamped.

        Order of the draws of each generator: those of `scheduler.step` in each step.
        """
        scheduler, condition, callback = stage.scheduler, stage.condition, run.callback
        timesteps: Tensor = scheduler.timesteps
        self._stage = stage.name
        self.start_run(timesteps, stage.guidance_scale)
        names = self.callback_names(callback, run.callback_tensors)
        arguments = step_arguments(scheduler, eta=run.eta, generator=as_generators(run.generator))
        channels = 2 * CHANNELS if takes_learned_variance(scheduler) else CHANNELS  # that the scheduler reads
        noisy, finite = stage.noise * scheduler.init_noise_sigma, []
        for index, t in self.steps(timesteps):
            scaled = scheduler.scale_model_input(noisy, t)
            scale = self.guidance_scale
            branches = both_branches(partial(call_unet, stage.unet, t), *condition.branches(scaled), scale)
            cond, uncond = (
                None if one is None else _keep_known(stage, one[:, :channels], scaled, t) for one in branches
            )
            noisy, guided = guided_step(scheduler, cond, uncond, scale, t, noisy, channels=CHANNELS, **arguments)
            finite.append(torch.isfinite(guided).all())
            if callback is not None:
                tensors: dict[str, Any] = {
                    "latents": noisy,
                    "prompt_embeds": condition.embeds,
                    "negative_prompt_embeds": condition.null_embeds,
                }
                if "pred_original_sample" in names:
                    tensors["pred_original_sample"] = split_prediction(scheduler, guided[:, :CHANNELS], scaled, t)[0]
                changed = report_step(self, callback, names, index, t, tensors)
                noisy = changed.get("latents", noisy)
                condition = replace(
                    condition,
                    embeds=changed.get("prompt_embeds", condition.embeds),
                    null_embeds=changed.get("negative_prompt_embeds", condition.null_embeds),
                )
                null = stage.null_embeds if condition.null_embeds is None else None
                if null is not None and self.do_classifier_free_guidance:
                    condition = replace(condition, null_embeds=null().to(condition.embeds))
        check_predictions(finite, timesteps, self)
        return noisy

    @torch.no_grad()
    def run_upsampler(
        self,
        images: Tensor,
        embeds: Tensor,
        *,
        num_inference_steps: int | str | None = None,
        generator: Generators = None,
        temperature: float = 0.997,
    ) -> Tensor:
        """The second stage alone: large images (b, 3, H, W) of given small ones, nominally in [-1, 1], not clamped.

        Args:
            images: Small images (b, 3, h, w) in [-1, 1], on the grid of 8 bits, as the first stage hands them on.
            embeds: What the second stage is told of them besides, (b, l + 1, d): tokens and the vector behind them.
            num_inference_steps: As `upscale_num_inference_steps` of a call.
            generator: As in a call. Order of the draws: the noise of the image, then that of its steps.
            temperature: What the noise is multiplied by.

        Raises:
            TypeError, ValueError: For a pipeline without its second stage, images of other channels, and a number of
                steps or a temperature out of range.
        """
        if not self.upscales:
            raise ValueError("The pipeline has no `upscale_unet`: load one with it.")
        check_temperature(temperature, meaning=_TEMPERATURES)
        if images.ndim != 4 or images.shape[1] != CHANNELS or not images.is_floating_point():
            raise ValueError(
                f"`images` is {images.dtype} of shape {tuple(images.shape)}: expected floating-point values in [-1, 1]"
                f" of shape (b, {CHANNELS}, h, w)."
            )
        unet, scheduler = self.upscale_unet, self.upscale_scheduler
        self.set_stage_steps("upscale", scheduler, num_inference_steps)
        noise = self.draw_noise(unet, len(images), generator, None, temperature)
        condition = GlideCondition(embeds, maps=upsample(images, self.sides(unet)).to(noise))
        stage = Stage("upscale", unet, scheduler, condition, noise, 1.0, null_embeds=lambda: embeds)
        return self.run_stage(stage, Run(1.0, generator=generator))

    def finish_images(self, images: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """As `finish`, from the samples of the last stage."""
        return self.finish(images, output_type, return_dict, lambda drawn: drawn.clamp(-1, 1))


def _argument(stage: str, name: str) -> str:
    """What an argument of a call is called for a stage."""
    return name if stage == "base" else f"{stage}_{name}"


def _keep_known(stage: Stage, prediction: Tensor, scaled: Tensor, timestep: Tensor) -> Tensor:
    """A branch's prediction, in whose place stands that of the known image where it has to stay."""
    if stage.known is None or stage.keep is None:
        return prediction
    # the noise that leads from the known image to the sample: the original sets the clean prediction instead
    signal, level = signal_and_noise(stage.scheduler, timestep)
    known = stage.known.float()
    kept = join_prediction(stage.scheduler, known, (scaled.float() - signal * known) / level, timestep)
    mixed = torch.where(stage.keep > 0, kept.to(prediction.dtype), prediction[:, :CHANNELS])
    return torch.cat([mixed, prediction[:, CHANNELS:]], dim=1)


def upsample(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Low-resolution images at the size of the next stage: bilinear, without anti-aliasing, as in the training."""
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
