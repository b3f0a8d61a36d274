"""What the latent-diffusion pipelines share: components, sizes, tiles, the sampling loop. No pipeline by itself.

Rombach, Blattmann, Lorenz, Esser, Ommer, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv
2112.10752; original: CompVis/latent-diffusion@a506df5 (code and weights MIT). Differences: any scheduler of diffusers
that has such betas; exactly as many steps as asked for; one generator for each picture if wanted; tiles cover the
picture whatever its size, and the sides of tiles on the picture's border do not count.

Shapes: b samples, c x h x w latents, H x W pixels.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...models.blocks.wrappers import unwrap
from ...schedulers.gaussian import split_prediction, step_arguments
from ..base import HousePipeline
from ..callbacks import Callback, report_step, start_scale
from ..checks import (
    as_generators,
    check_callback_tensors,
    check_decoded,
    check_eta,
    check_generator,
    check_guidance_scale,
    check_output_type,
    check_parts,
    check_predictions,
    check_steps,
    check_timesteps,
)
from ..listed_options import record_option, record_sample_size, sample_sides
from .checks import check_latents, check_no_guidance, check_size, check_tiles
from .denoising import KnownRegion, LDMCondition
from .first_stage import (
    decode_first_stage,
    first_stage_channels,
    first_stage_factor,
    has_unset_scale,
    latent_scale,
)
from .picture_guidance import GuidanceFn, guide_prediction
from .tiling import Tiles

Generators = torch.Generator | list[torch.Generator] | None


class LDMBasePipeline(HousePipeline):
    """Components and loop of the latent-diffusion pipelines.

    Args:
        components: what the pipeline registers. All have these: `vqvae`, the first stage, an `AutoencoderKL` or a
            `VQModel`, whose scale of the latents is in its config; `unet`, which predicts the noise; `scheduler`, any
            of diffusers that knows `scale_model_input`, `step` and `add_noise`.
        options: what it registers in its config. Common ones: `latent_scale`, by what latents are multiplied before
            diffusion, in place of `vqvae.config.scaling_factor`; `default_sample_size`, side of the latents when a
            call names no size, in place of `unet.config.sample_size`; `default_guidance_scale`, in place of the one
            that the authors used for the task; `null_condition`, whether the network was also trained without its
            condition, which classifier-free guidance needs.
    """

    model_cpu_offload_seq = "unet->vqvae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "pred_original_sample"]
    _usual_guidance_scale = 1.0  # the authors', for networks that were trained with dropped conditions

    vqvae: Any
    unet: Any
    scheduler: Any

    def __init__(self, components: dict[str, Any], options: dict[str, Any]):
        super().__init__()
        self.register_modules(**components)
        if options.get("default_sample_size") is not None:
            options["default_sample_size"] = record_sample_size(options["default_sample_size"], None, None)
        self.register_to_config(**{name: record_option(name, value) for name, value in options.items()})
        vqvae: Any = components["vqvae"]
        self.vae_scale_factor = 8 if vqvae is None else first_stage_factor(vqvae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False
        if vqvae is not None and has_unset_scale(vqvae) and options.get("latent_scale") is None:
            logging.get_logger(type(self).__module__).warning(
                f"vqvae.config.scaling_factor is {vqvae.config['scaling_factor']}, the default of diffusers' VQModel,"
                " which no released VQ model was trained with: latents are not scaled. If it is meant, pass"
                f" latent_scale={vqvae.config['scaling_factor']} to `from_pretrained` or to the constructor."
            )

    @property
    def latent_scale(self) -> float:
        """By what latents are multiplied before diffusion."""
        given = self.config["latent_scale"]
        if given is None:
            check_parts(self, "the scale of the latents", "vqvae")
        return latent_scale(self.vqvae) if given is None else float(given)

    @property
    def size_multiple(self) -> int:
        """Valid sides are multiples of this many pixels."""
        check_parts(self, "the size of pictures", "unet")
        # a U-Net with cross-attention resizes on its way up to what it met on its way down
        resizes = isinstance(unwrap(self.unet), UNet2DConditionModel)
        halvings = 0 if resizes else len(self.unet.config["block_out_channels"]) - 1
        return self.vae_scale_factor * 2**halvings

    @property
    def has_null_condition(self) -> bool:
        """Whether the network can be guided: it was also trained without its condition."""
        return bool(self.config.get("null_condition", False))

    @property
    def no_guidance_because(self) -> str:
        """Why not, for messages."""
        return (
            "the network was not trained without its condition (the pipeline's `null_condition` is False): leave it at"
            " 1, or train with conditions dropped at times"
        )

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        # u + s * (c - u): the null branch cancels exactly at s = 1 and only there
        return self._guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_inputs(
        self,
        batch_size: int,
        height: int,
        width: int,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        tile_size: int | tuple[int, int] | None = None,
        tile_stride: int | tuple[int, int] | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        can_guide: bool | None = None,
        size_names: tuple[str, str] = ("height", "width"),
    ) -> Tiles | None:
        """Refuses what cannot work, before any model runs, and prepares the tiles.

        Args:
            batch_size: number of samples, those of all conditions together.
            can_guide: whether there is something to be guided away from; by default, whether the network knows it.
            size_names: what messages call the two sides.

        Raises:
            TypeError, ValueError: naming the argument, its value and what is allowed.
        """
        check_steps(self.scheduler, num_inference_steps)
        check_guidance_scale(guidance_scale)
        if not (self.has_null_condition if can_guide is None else can_guide):
            check_no_guidance(guidance_scale, self.no_guidance_because)
        check_eta(eta)
        check_output_type(output_type)
        check_callback_tensors(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        grid = check_size(self, height, width, size_names)
        if generator is not None:
            check_generator(generator, batch_size, self._execution_device)
        if latents is not None:
            check_latents(latents, (batch_size, first_stage_channels(self.vqvae), *grid))
        tiles = check_tiles(self, (height, width), tile_size, tile_stride)
        return None if tiles is None else Tiles.build((height, width), *tiles, self.vae_scale_factor)

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
        """The initial latents (b, c, h, w): standard normal noise, times what the scheduler starts with.

        Args:
            batch_size: b.
            height: Pixels; so is `width`.
            generator: One for the whole batch or a list with one a sample.
            latents: Standard normal noise in place of a draw.
        """
        device, dtype = torch.device(device if device is not None else self._execution_device), self.unet.dtype
        if latents is None:
            factor = self.vae_scale_factor
            shape = (batch_size, first_stage_channels(self.vqvae), height // factor, width // factor)
            latents = randn_tensor(shape, generator=as_generators(generator), device=device, dtype=dtype)
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    def decode_latents(self, latents: Tensor, tiles: Tiles | None = None) -> Tensor:
        """Scaled latents (b, c, h, w) to pictures (b, 3, H, W), nominally in [-1, 1]."""
        return decode_first_stage(
            self.vqvae, latents / self.latent_scale, grid=None if tiles is None else tiles.decode
        )

    def _null_maps(self, maps: Tensor) -> Tensor | None:
        """What stands for "no condition" behind the latents: zeros; None without guidance."""
        return torch.zeros_like(maps) if self.do_classifier_free_guidance else None

    def _resolve_scale(self, guidance_scale: Any) -> Any:
        """The scale of the call, else the checkpoint's, else the authors'; 1 where guidance is impossible."""
        if guidance_scale is not None:
            return guidance_scale
        default = self.config.get("default_guidance_scale")
        if default is not None:
            return default
        return self._usual_guidance_scale if self.has_null_condition else 1.0

    def _resolve_size(self, height: Any, width: Any, latents: Any = None) -> tuple[Any, Any]:
        """Fills in the sizes that the caller left out; checks nothing else."""
        sides = self.config.get("default_sample_size")
        sides = self.unet.config["sample_size"] if sides is None else sides
        if isinstance(latents, Tensor) and latents.ndim == 4:
            sides = tuple(latents.shape[-2:])
        if height is not None and width is not None:
            return height, width
        if sides is None:
            raise ValueError(
                "`height` and `width` are needed: neither the pipeline's `default_sample_size` nor"
                " unet.config.sample_size says what size the network was trained on."
            )
        rows, columns = sample_sides("default_sample_size", sides)
        return (
            rows * self.vae_scale_factor if height is None else height,
            columns * self.vae_scale_factor if width is None else width,
        )

    def _begin_run(self, num_inference_steps: int, guidance_scale: float) -> Tensor:
        """Lays out the steps and returns the timestep of each, on the device of the run.

        Asking a pipeline for its device takes milliseconds, so the run takes it from them.
        """
        self.scheduler.set_timesteps(int(num_inference_steps), device=self._execution_device)
        check_timesteps(self.scheduler, num_inference_steps)
        self._guidance_scale = start_scale(guidance_scale)
        self._num_timesteps = len(self.scheduler.timesteps)
        self._interrupt = False
        return self.scheduler.timesteps

    def _sample(
        self,
        timesteps: Tensor,
        latents: Tensor,
        condition: LDMCondition,
        *,
        eta: float = 0.0,
        generator: Generators = None,
        tiles: Tiles | None = None,
        known: KnownRegion | None = None,
        guidance_fn: GuidanceFn | None = None,
        guidance_fn_scale: float = 1.0,
        callback: Callback | None = None,
        callback_names: list[str],
        encode: Callable[[], LDMCondition] | None = None,
        can_guide: bool | None = None,
    ) -> Tensor:
        """Denoises `latents` (b, c, h, w) and returns them, scaled.

        Args:
            encode: makes the condition again, for its null branch, when a callback turns guidance on.
            can_guide: as in `check_inputs`.

        Order of the draws of each generator, in each step: the noise of the known region if there is one, then those
        of `scheduler.step`.
        """
        generator = as_generators(generator)
        arguments = step_arguments(self.scheduler, eta=eta, generator=generator)
        finite: list[Tensor] = []  # whether each step's prediction is
        with self.progress_bar(total=len(timesteps)) as progress_bar:  # pyright: ignore[reportAttributeAccessIssue]
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                if known is not None:
                    noise = randn_tensor(
                        latents.shape, generator=generator, device=latents.device, dtype=latents.dtype
                    )
                    latents = known.put_back(latents, noise, self.scheduler, t)
                scaled = self.scheduler.scale_model_input(latents, t)
                prediction = self._predict(scaled, t, condition, tiles, guidance_fn, guidance_fn_scale)
                finite.append(torch.isfinite(prediction).all())
                latents = self.scheduler.step(prediction, t, latents, **arguments, return_dict=False)[0]
                if callback is not None:
                    named = self._callback_tensors(callback_names, latents, condition, prediction, scaled, t)
                    changed = report_step(self, callback, callback_names, i, t, named)
                    latents = changed.get("latents", latents)
                    null = changed.get("negative_prompt_embeds")
                    condition.replace(changed.get("prompt_embeds"), null)
                    self._add_null(condition, encode, can_guide)
                progress_bar.update()
        check_predictions(finite, timesteps, self)
        return latents if known is None else known.put_back(latents)

    def _add_null(
        self, condition: LDMCondition, encode: Callable[[], LDMCondition] | None, can_guide: bool | None
    ) -> None:
        """The null branch of a run that began without guidance, once a callback has turned it on."""
        if not self.do_classifier_free_guidance or condition.null_embeds is not None:
            return
        if encode is None or not (self.has_null_condition if can_guide is None else can_guide):
            check_no_guidance(self.guidance_scale, self.no_guidance_because)
        else:
            null = encode()
            condition.null_context, condition.null_concat = null.null_context, null.null_concat

    def _predict(
        self,
        scaled: Tensor,
        t: Tensor,
        condition: LDMCondition,
        tiles: Tiles | None,
        guidance_fn: GuidanceFn | None,
        guidance_fn_scale: float,
    ) -> Tensor:
        """What the network predicts for `scaled` latents, guided by the condition and by `guidance_fn`."""
        grid = None if tiles is None else tiles.latents

        def predict(scaled: Tensor) -> Tensor:
            return condition.predict(self.unet, scaled, t, guidance_scale=self.guidance_scale, grid=grid)

        if guidance_fn is None:
            return predict(scaled)

        def decode(clean: Tensor) -> Tensor:
            return self.decode_latents(clean, tiles)

        return guide_prediction(predict, decode, guidance_fn, guidance_fn_scale, scaled, t, self.scheduler)

    def _callback_tensors(
        self,
        names: list[str],
        latents: Tensor,
        condition: LDMCondition,
        prediction: Tensor,
        scaled: Tensor,
        t: Tensor,
    ) -> dict[str, Any]:
        """What a callback asked for."""
        named: dict[str, Any] = {"latents": latents}
        if "prompt_embeds" in self._callback_tensor_inputs:
            named |= {"prompt_embeds": condition.embeds, "negative_prompt_embeds": condition.null_embeds}
        if "pred_original_sample" in names:
            named["pred_original_sample"] = split_prediction(self.scheduler, prediction, scaled, t)[0]
        return named

    def _end_run(
        self,
        latents: Tensor,
        output_type: str,
        return_dict: bool,
        *,
        tiles: Tiles | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Scaled latents to what the caller asked for.

        Args:
            finish: of decoded pictures (b, 3, H, W), nominally in [-1, 1], to what is shown of them in [-1, 1].
        """
        images: Any = latents
        if output_type != "latent":
            pixels = self.decode_latents(latents, tiles).float()
            check_decoded(pixels, "pictures", self)
            pixels = pixels if finish is None else finish(pixels)
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
