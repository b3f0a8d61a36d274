"""What the two kinds of stages of a cascade share: network, scheduler, classes, the sampling loop. No pipeline itself.

Ho, Saharia, Chan, Fleet, Norouzi, Salimans, "Cascaded Diffusion Models for High Fidelity Image Generation", arXiv
2106.15282. Its authors released no code. The sampler of a stage is that of openai/guided-diffusion@22e0df8 (MIT) with
`RespacedScheduler` or `DDPMScheduler`; any other Gaussian scheduler of diffusers does as well.

Shapes: b images, c channels, H x W pixels. Images are the samples themselves, in [-1, 1].
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...conditions.named_boxes import find_class
from ...guidance import both_branches
from ...models.blocks.wrappers import unwrap
from ...schedulers.gaussian import (
    check_gaussian_scheduler,
    check_predicted_channels,
    guided_step,
    scheduler_attribute,
    scheduler_setting,
    set_steps,
    split_prediction,
    step_arguments,
    takes_learned_variance,
)
from ...schedulers.scheduling_truncated_conditioning import TruncatedConditioningScheduler
from ..base import Config, ConfigOf, HousePipeline
from ..callbacks import Callback, report_step
from ..checks import (
    as_generators,
    check_fraction,
    check_generator,
    check_guidance_scale,
    check_noise,
    check_output_type,
    check_parts,
    check_predictions,
    check_side,
    check_steps,
    check_timesteps,
)
from ..listed_options import read_option
from .denoising import StageCondition, predict

Generators = torch.Generator | list[torch.Generator] | None
StopLevel = float | Sequence[float] | None
Encode = Callable[[torch.device], StageCondition]  # makes the condition, on a device


class CascadedStage(HousePipeline):
    """Network, scheduler and run of a stage."""

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "pred_original_sample"]
    _pipeline_tag = "unconditional-image-generation"  # the Hub has no task for classes
    vae_scale_factor = 1

    unet: Any
    scheduler: Any

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes 0, 1, ..."""
        return read_option(self.config["class_names"])

    @property
    def num_classes(self) -> int | None:
        """How many classes the network knows, without the null class; None for an unconditional network."""
        check_parts(self, "a class", "unet")
        rows, null = self.unet.config["num_class_embeds"], self.unet.config["null_class"]
        return None if rows is None else rows - (null == rows - 1)

    @property
    def has_null_condition(self) -> bool:
        """Whether the network can be guided: it was also trained without its class."""
        check_parts(self, "guidance", "unet")
        return self.unet.config["null_class"] is not None

    @property
    def no_guidance_because(self) -> str:
        """Why the network cannot be guided, for messages."""
        return (
            "the network was trained without a null class (unet.config.null_class is None), so nothing can be guided"
            " away from: leave it at 1, or train with labels dropped at times"
        )

    @property
    def usual_stop_level(self) -> float:
        """Where a run stops that does not say: the scheduler's own level, or the last one that was trained."""
        check_parts(self, "a run", "scheduler")
        return max(scheduler_setting(self.scheduler, "stop_level", 0), self.config.get("min_timestep", 0))

    @classmethod
    def idle_arguments(cls, index: Config, config_of: ConfigOf) -> set[str]:
        return {"class_labels"} if config_of("unet").get("num_class_embeds") is None else set()

    def get_label_ids(self, class_labels: Any) -> list[int] | None:
        """Class numbers of names, numbers, or a mixture of them; None for a network without classes.

        Raises:
            TypeError, ValueError: For anything else, an unknown class, none at all, and any where there are none.
        """
        if self.num_classes is None:
            if class_labels is not None:
                raise ValueError(
                    f"`class_labels` is {class_labels!r}, but the network of this stage knows no classes"
                    " (unet.config.num_class_embeds is None): leave it out."
                )
            return None
        if class_labels is None:
            raise ValueError(
                f"`class_labels` is missing: this stage draws classes, by number from 0 to {self.num_classes - 1}"
                + (f" or by name ({', '.join(self.class_names[:5])} ...)." if self.class_names else ".")
            )
        labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        labels = list(labels) if isinstance(labels, (list, tuple)) else [labels]
        if not labels:
            raise ValueError("`class_labels` is empty; pass at least one class.")
        return [find_class(label, self.num_classes, self.class_names, "class_labels") for label in labels]

    def encode_labels(
        self, labels: list[int] | None, num_images_per_prompt: int = 1, *, device: torch.device | str | None = None
    ) -> StageCondition:
        """Class numbers, and the null class's if the network has one, one for each image."""
        if labels is None:
            return StageCondition()
        device = device if device is not None else self._execution_device
        numbers = torch.tensor(labels, device=device).repeat_interleave(num_images_per_prompt)
        null = self.unet.config["null_class"]
        return StageCondition(numbers, None if null is None else torch.full_like(numbers, null))

    def check_components(self) -> None:
        """All components are there, and they fit.

        Raises:
            ValueError: Naming the components that do not.
        """
        check_parts(self, "sampling", "unet", "scheduler")
        check_gaussian_scheduler(self.scheduler, type(self).__name__)
        check_predicted_channels(self.unet, self.scheduler, self.unet.config["in_channels"])

    def check_inputs(
        self,
        batch_size: int,
        height: int,
        width: int,
        *,
        num_inference_steps: int = 100,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> None:
        """Refuses what cannot work, before any model runs.

        Raises:
            TypeError, ValueError: Naming the argument, its value and what is allowed.
        """
        check_steps(self.scheduler, num_inference_steps)
        check_guidance_scale(guidance_scale)
        if guidance_scale != 1.0 and not self.has_null_condition:
            raise ValueError(f"`guidance_scale` is {guidance_scale}, but {self.no_guidance_because}.")
        check_fraction("eta", eta, "0 is deterministic, 1 is as noisy as DDPM")
        check_output_type(output_type)
        factor = unwrap(self.unet).downsample_factor
        for name, side in (("height", height), ("width", width)):
            check_side(name, side, factor, factor, because=f"network {factor}")
        check_generator(generator, batch_size, self._execution_device)
        if latents is not None:
            check_noise(latents, (batch_size, self.unet.config["in_channels"], height, width))

    def check_stop_level(self, stop_level: StopLevel) -> list[float]:
        """The levels at which a run stops, at least those that the network was trained down to.

        Raises:
            ValueError: For a level below `min_timestep`.
        """
        levels: list[Any] = list(stop_level) if isinstance(stop_level, (list, tuple)) else [stop_level]
        levels = [self.usual_stop_level if level is None else level for level in levels]
        lowest = self.config.get("min_timestep", 0)
        below = [level for level in levels if isinstance(level, (int, float)) and level < lowest]
        if below:
            raise ValueError(
                f"`stop_level` is {below[0]}, but the network of this stage was trained from timestep {lowest} on"
                f" (`min_timestep`): it stops at {lowest} or above, and the next stage has to take that much noise."
            )
        return levels

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        *,
        generator: Generators = None,
        latents: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The initial noise (b, c, h, w): standard normal, times what the scheduler starts with.

        Args:
            batch_size: b.
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            generator: One for the whole batch or a list with one an image.
            latents: Standard normal noise in place of a draw.
        """
        device, dtype = torch.device(device if device is not None else self._execution_device), self.unet.dtype
        if latents is None:
            shape = (batch_size, self.unet.config["in_channels"], height, width)
            latents = randn_tensor(shape, generator=as_generators(generator), device=device, dtype=dtype)
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    def run(
        self,
        batch_size: int,
        size: tuple[int, int],
        encode: Encode,
        *,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        stop_level: StopLevel = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        owner: HousePipeline | None = None,
    ) -> Tensor | list[Tensor]:
        """What both kinds of stages do once they have read their inputs, from the checks to the last step.

        The arguments that are not listed here are those of their calls.

        Args:
            batch_size: Number of images, those of all conditions together.
            size: Height and width of the image in pixels.
            encode: Makes the condition. It may draw.
            owner: The pipeline that was called, which keeps the state of the run and which callbacks get. By default
                this one.

        Returns:
            Images (b, c, H, W), nominally in [-1, 1], neither clamped nor rounded; noisy at a stop level above 0. A
            list with one for each level where `stop_level` is a list.

        Order of the draws of each generator: the initial noise, those of `encode`, then those of `scheduler.step` in
        each step.
        """
        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        state: Any = self if owner is None else owner
        names = self.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        start_scale: float = self.resolve_scale(guidance_scale)
        self.check_inputs(
            batch_size,
            *size,
            num_inference_steps=num_inference_steps,
            guidance_scale=start_scale,
            eta=eta,
            generator=generator,
            latents=latents,
            output_type=output_type,
        )
        scheduler, levels = self.set_timesteps(num_inference_steps, stop_level)
        timesteps: Tensor = scheduler.timesteps
        state.start_run(timesteps, start_scale)

        # 2. Initial noise and condition
        device = timesteps.device  # asking a pipeline for its device takes milliseconds
        noisy = self.prepare_latents(batch_size, *size, generator=generator, latents=latents, device=device)
        condition = encode(device)

        # 3. Denoise
        generator = as_generators(generator)
        arguments = step_arguments(scheduler, eta=eta, generator=generator)
        channels = noisy.shape[1]
        learned = takes_learned_variance(scheduler)
        network = partial(predict, self.unet)
        finite: list[Tensor] = []  # whether each step's prediction is
        for index, t in state.steps(timesteps):
            scaled = scheduler.scale_model_input(noisy, t)
            scale = state.guidance_scale
            run_network = partial(network, t, 2 * channels if learned else channels)
            cond, uncond = both_branches(run_network, *condition.branches(scaled), scale)
            noisy, prediction = guided_step(
                scheduler, cond, uncond, scale, t, noisy, channels=channels if learned else None, **arguments
            )
            finite.append(torch.isfinite(prediction).all())
            if callback_on_step_end is not None:
                tensors = self._callback_tensors(names, scheduler, noisy, condition, prediction, scaled, t)
                changed = report_step(state, callback_on_step_end, names, index, t, tensors)
                noisy = changed.get("latents", noisy)
                condition = condition.replace_embeds(changed)
                if state.do_classifier_free_guidance and not self.has_null_condition:
                    raise ValueError(f"`guidance_scale` is {state.guidance_scale}, but {self.no_guidance_because}.")
        check_predictions(finite, timesteps, self)

        # 4. The samples at the levels
        last = noisy if levels == [0] else scheduler_attribute(scheduler, "to_vp")(noisy)
        if not isinstance(stop_level, (list, tuple)):
            return last
        return [scheduler_attribute(scheduler, "captured").get(level, last) for level in levels]

    def finish_levels(
        self, samples: Tensor | list[Tensor], output_type: str, return_dict: bool
    ) -> ImagePipelineOutput | tuple:
        """The samples of a run as the caller wants them; those of several levels as a list."""
        if not isinstance(samples, list):
            return self.finish(samples, output_type, return_dict, lambda images: images)
        images: Any = [self.finish(one, output_type, False, lambda images: images)[0] for one in samples]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def set_timesteps(
        self, num_inference_steps: int, stop_level: StopLevel, *, device: torch.device | str | None = None
    ) -> tuple[Any, list[float]]:
        """The scheduler with its steps set: one that stops, if there is something to stop at; and the levels.

        Raises:
            ValueError: For levels at which the scheduler does not stop, and steps that leave the training.
        """
        levels, scheduler = self.check_stop_level(stop_level), self.scheduler
        device = self._execution_device if device is None else device
        if scheduler_attribute(scheduler, "corrupt") is not None:
            set_steps(scheduler, int(num_inference_steps), device, stop_level=levels)
        elif isinstance(stop_level, (list, tuple)) or levels[0] != 0:
            scheduler = TruncatedConditioningScheduler(scheduler)
            set_steps(scheduler, int(num_inference_steps), device, stop_level=levels)
        else:
            set_steps(scheduler, int(num_inference_steps), device)
        check_timesteps(scheduler, num_inference_steps)
        return scheduler, levels

    def _callback_tensors(
        self,
        names: list[str],
        scheduler: Any,
        noisy: Tensor,
        condition: StageCondition,
        prediction: Tensor,
        scaled: Tensor,
        t: Tensor,
    ) -> dict[str, Any]:
        """What a callback may ask for, and what it asked for."""
        named: dict[str, Any] = {"latents": noisy}
        if condition.labels is not None:
            named |= {"prompt_embeds": condition.labels, "negative_prompt_embeds": condition.null_labels}
        if "pred_original_sample" in names:
            noise = prediction[:, : noisy.shape[1]]
            named["pred_original_sample"] = split_prediction(scheduler, noise, scaled, t)[0]
        return named
