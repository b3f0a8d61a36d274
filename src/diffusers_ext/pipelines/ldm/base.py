"""What the latent-diffusion pipelines share: components, sizes, tiles, the sampling loop. No pipeline by itself.

Rombach, Blattmann, Lorenz, Esser, Ommer, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv
2112.10752; original: CompVis/latent-diffusion@a506df5 (code and weights MIT). Differences: any scheduler of diffusers
that has such betas; exactly as many steps as asked for; one generator for each image if wanted; tiles cover the
image whatever its size, and the sides of tiles on the image's border do not count.

Shapes: b samples, c x h x w latents, H x W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...guidance import both_branches
from ...models.blocks.wrappers import unwrap
from ...schedulers.gaussian import (
    check_gaussian_scheduler,
    guided_step,
    set_steps,
    split_prediction,
    step_arguments,
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
    check_pair,
    check_parts,
    check_predictions,
    check_side,
    check_steps,
    check_timesteps,
)
from .denoising import KnownRegion, LDMCondition, call_unet, call_unet_in_tiles
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
Encode = Callable[[torch.device, Tiles | None], LDMCondition]  # makes the condition, on a device


class LDMBasePipeline(HousePipeline):
    """Components and run of the latent-diffusion pipelines. Each adds its conditioner and its options.

    Args:
        vqvae: the first stage, an `AutoencoderKL` or a `VQModel`. Its config holds the scale of the latents.
        unet: predicts the noise.
        scheduler: any of diffusers that knows `scale_model_input`, `step` and `add_noise`.
        latent_scale: by what latents are multiplied before diffusion, in place of `vqvae.config.scaling_factor`.
    """

    model_cpu_offload_seq = "unet->vqvae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "pred_original_sample"]
    _usual_guidance_scale = 1.0  # the authors', for networks that were trained with dropped conditions

    vqvae: Any
    unet: Any
    scheduler: Any

    def __init__(self, vqvae: Any, unet: Any, scheduler: Any, latent_scale: float | None = None):
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)
        self.register_to_config(latent_scale=latent_scale)
        self.vae_scale_factor = 8 if vqvae is None else first_stage_factor(vqvae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        if vqvae is not None and has_unset_scale(vqvae) and latent_scale is None:
            logging.get_logger(type(self).__module__).warning(
                f"vqvae.config.scaling_factor is {vqvae.config['scaling_factor']}, the default of diffusers' VQModel,"
                " which no released VQ model was trained with: latents are not scaled. If it is meant, pass"
                f" latent_scale={vqvae.config['scaling_factor']} to `from_pretrained` or to the constructor."
            )

    @property
    def latent_scale(self) -> float:
        """By what latents are multiplied before diffusion."""
        given = self.config["latent_scale"]
        if given is not None:
            return float(given)
        check_parts(self, "the scale of the latents", "vqvae")
        first_stage: Any = self.vqvae
        return latent_scale(first_stage)

    @property
    def size_multiple(self) -> int:
        """Valid sides are multiples of this many pixels."""
        check_parts(self, "the size of pictures", "unet")
        # a U-Net with cross-attention resizes on its way up to what it met on its way down
        resizes = "cross_attention_dim" in self.unet.config
        halvings = 0 if resizes else len(self.unet.config["block_out_channels"]) - 1
        return self.vae_scale_factor * 2**halvings

    @property
    def has_null_condition(self) -> bool:
        """Whether the network can be guided: it was also trained without its condition."""
        return bool(self.config.get("null_condition", False))

    @property
    def no_guidance_because(self) -> str:
        """Why the network cannot be guided, for messages."""
        return (
            "the network was not trained without its condition (the pipeline's `null_condition` is False): leave it at"
            " 1, or train with conditions dropped at times"
        )

    @property
    def context_width(self) -> int | None:
        """Width of the condition's sequences for cross-attention; None without any."""
        return None

    @property
    def concat_channels(self) -> int:
        """How many channels of the condition lie behind the latents."""
        return 0

    def check_components(self) -> None:
        """All components are there, and the U-Net takes what the first stage and the conditioner give it.

        Raises:
            ValueError: naming the components that do not fit.
        """
        missing = [
            name for name, part in self.components.items() if part is None and name not in self._optional_components
        ]
        if missing:
            raise ValueError(f"The pipeline was built without {', '.join(missing)}; sampling needs them.")
        check_gaussian_scheduler(self.scheduler, type(self).__name__)
        width = self.context_width
        if ("cross_attention_dim" in self.unet.config) != (width is not None):
            wanted = "a UNet2DModel" if width is None else "a UNet2DConditionModel, for its cross-attention"
            raise ValueError(
                f"`unet` is a {type(unwrap(self.unet)).__name__}, {type(self).__name__} needs {wanted}: the checkpoint"
                " is that of another task, load it with that task's pipeline."
            )
        channels, config = first_stage_channels(self.vqvae), self.unet.config
        if config["out_channels"] != channels:
            raise ValueError(
                f"The first stage does not match the U-Net: latents of `vqvae` have {channels} channels, `unet`"
                f" predicts {config['out_channels']}. Load the first stage that the U-Net was trained with."
            )
        concat = self.concat_channels
        if config["in_channels"] != channels + concat:
            raise ValueError(
                f"`unet` takes {config['in_channels']} channels, {type(self).__name__} gives it {channels + concat}:"
                f" {channels} of the latents and {concat} of the condition. The checkpoint is that of another task, or"
                " its first stage was exchanged."
            )
        if width is not None and config["cross_attention_dim"] != width:
            raise ValueError(
                f"`unet` attends to vectors of width {config['cross_attention_dim']}, the condition has {width}: load"
                " the conditioner that it was trained with."
            )
        scale = self.latent_scale
        if not math.isfinite(scale) or scale <= 0:
            raise ValueError(f"The scale of the latents must be positive, but is {scale}: see `latent_scale`.")

    def check_inputs(
        self,
        batch_size: int,
        height: int,
        width: int,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        tile_size: int | tuple[int, int] | None = None,
        tile_stride: int | tuple[int, int] | None = None,
        output_type: str = "pil",
        can_guide: bool | None = None,
        size_names: tuple[str, str] = ("height", "width"),
    ) -> None:
        """Refuses what cannot work, before any model runs.

        Args:
            batch_size: number of samples, those of all conditions together.
            can_guide: whether there is something to be guided away from; by default, whether the network knows it.
            size_names: what messages call the two sides.

        Raises:
            TypeError, ValueError: naming the argument, its value and what is allowed.
        """
        check_steps(self.scheduler, num_inference_steps)
        check_guidance_scale(guidance_scale)
        if guidance_scale != 1.0 and not (self.has_null_condition if can_guide is None else can_guide):
            raise ValueError(f"`guidance_scale` is {guidance_scale}, but {self.no_guidance_because}.")
        self.check_rescale(guidance_rescale)
        check_fraction("eta", eta, "0 is deterministic, 1 is as noisy as DDPM")
        check_output_type(output_type)
        factor, multiple = self.vae_scale_factor, self.size_multiple
        because = f"first stage {factor} x network {multiple // factor}"
        for name, side in zip(size_names, (height, width), strict=True):
            check_side(name, side, multiple, multiple, because=because)
        if generator is not None:
            check_generator(generator, batch_size, self._execution_device)
        if latents is not None:
            check_noise(latents, (batch_size, first_stage_channels(self.vqvae), height // factor, width // factor))
        if tile_size is not None:
            for length, side in zip(check_pair("tile_size", tile_size), (height, width), strict=True):
                if length < side:  # a longer one is cut to the image
                    check_side("tile_size", length, multiple, multiple, because=because)
        if tile_stride is not None:
            self._check_tile_stride(tile_stride, tile_size, (height, width))

    def _check_tile_stride(self, tile_stride: Any, tile_size: Any, size: tuple[int, int]) -> None:
        if tile_size is None:
            raise ValueError(f"`tile_stride` is {tile_stride}, but there is no `tile_size`: pass both, or neither.")
        factor, steps, tile = (
            self.vae_scale_factor,
            check_pair("tile_stride", tile_stride),
            check_pair("tile_size", tile_size),
        )
        for step, length, side in zip(steps, tile, size, strict=True):
            check_side("tile_stride", step, factor, factor, because="whole latents")
            if step > length and length < side:
                raise ValueError(
                    f"`tile_stride` is {step} with tiles of {length} pixels: tiles must overlap or touch, so it is at"
                    " most `tile_size`; half of it is usual."
                )

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
            height: Height of the image in pixels.
            width: Width of the image in pixels.
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
        """Scaled latents (b, c, h, w) to images (b, 3, H, W), nominally in [-1, 1]."""
        return decode_first_stage(
            self.vqvae, latents / self.latent_scale, grid=None if tiles is None else tiles.decode
        )

    def run(
        self,
        batch_size: int,
        size: tuple[int, int],
        encode: Encode,
        *,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        eta: float,
        generator: Generators,
        latents: Tensor | None,
        tile_size: int | tuple[int, int] | None,
        tile_stride: int | tuple[int, int] | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callback | None,
        callback_on_step_end_tensor_inputs: list[str] | None,
        can_guide: bool | None = None,
        size_names: tuple[str, str] = ("height", "width"),
        known: Callable[[torch.device, Tiles | None], KnownRegion] | None = None,
        guidance_fn: GuidanceFn | None = None,
        guidance_fn_scale: float = 1.0,
        overlay: Callable[[Tensor], Tensor] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """What the seven pipelines do once they have read their inputs, from the checks to the images.

        The arguments that are not listed here are those of their calls.

        Args:
            batch_size: number of samples, those of all conditions together.
            size: height and width of the image in pixels.
            encode: makes the condition, with its null branch if the run is guided. It is called again when a callback
                turns guidance on.
            can_guide, size_names: as in `check_inputs`.
            known: makes the region of the image that has to stay.
            overlay: from decoded images (b, 3, H, W), nominally in [-1, 1], to what is shown of them in [-1, 1].

        Order of the draws of each generator: the initial noise, then for each step the noise of the known region if
        there is one, and those of `scheduler.step`.
        """
        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        names = self.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        start_scale: float = self.resolve_scale(guidance_scale)
        can_guide = self.has_null_condition if can_guide is None else can_guide
        self.check_inputs(
            batch_size,
            *size,
            num_inference_steps=num_inference_steps,
            guidance_scale=start_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            generator=generator,
            latents=latents,
            tile_size=tile_size,
            tile_stride=tile_stride,
            output_type=output_type,
            can_guide=can_guide,
            size_names=size_names,
        )
        set_steps(self.scheduler, int(num_inference_steps), self._execution_device)
        check_timesteps(self.scheduler, num_inference_steps)
        timesteps: Tensor = self.scheduler.timesteps
        self.start_run(timesteps, start_scale, guidance_rescale)

        # 2. Tiles, initial noise, what is known, and the condition
        device = timesteps.device  # asking a pipeline for its device takes milliseconds
        tiles = None if tile_size is None else Tiles.build(size, tile_size, tile_stride, self.vae_scale_factor)
        noisy = self.prepare_latents(batch_size, *size, generator=generator, latents=latents, device=device)
        region = None if known is None else known(device, tiles)
        condition = encode(device, tiles)
        decode = partial(self.decode_latents, tiles=tiles)
        network = partial(call_unet, self.unet)
        if tiles is not None:
            network = partial(call_unet_in_tiles, self.unet, tiles.latents)
        if guidance_fn is not None:
            network = partial(guide_prediction, network, decode, guidance_fn, guidance_fn_scale, self.scheduler)

        # 3. Denoise
        generator = as_generators(generator)
        arguments = step_arguments(self.scheduler, eta=eta, generator=generator)
        finite: list[Tensor] = []  # whether each step's prediction is
        for index, t in self.steps(timesteps):
            if region is not None:
                noise = randn_tensor(noisy.shape, generator=generator, device=device, dtype=noisy.dtype)
                noisy = region.put_back_noisy(noisy, noise, self.scheduler, t)
            scaled = self.scheduler.scale_model_input(noisy, t)
            scale = self._guidance_scale
            cond, uncond = both_branches(partial(network, t), *condition.branches(scaled), scale)
            noisy, prediction = guided_step(
                self.scheduler, cond, uncond, scale, t, noisy, mix=self.guidance_mix, **arguments
            )
            finite.append(torch.isfinite(prediction).all())
            if callback_on_step_end is not None:
                tensors = self._callback_tensors(names, noisy, condition, prediction, scaled, t)
                changed = report_step(self, callback_on_step_end, names, index, t, tensors)
                noisy = changed.get("latents", noisy)
                condition = self._changed_condition(condition, changed, can_guide, partial(encode, device, tiles))
        check_predictions(finite, timesteps, self)
        noisy = noisy if region is None else region.put_back(noisy)

        # 4. Latents to images
        if overlay is None:
            return self.finish(noisy, output_type, return_dict, decode)
        return self.finish(noisy, output_type, return_dict, lambda clean: overlay(decode(clean).float()))

    def _callback_tensors(
        self,
        names: list[str],
        latents: Tensor,
        condition: LDMCondition,
        prediction: Tensor,
        scaled: Tensor,
        t: Tensor,
    ) -> dict[str, Any]:
        """What a callback may ask for, and what it asked for."""
        named: dict[str, Any] = {"latents": latents}
        if "prompt_embeds" in self._callback_tensor_inputs:
            named |= {"prompt_embeds": condition.embeds, "negative_prompt_embeds": condition.null_embeds}
        if "pred_original_sample" in names:
            named["pred_original_sample"] = split_prediction(self.scheduler, prediction, scaled, t)[0]
        return named

    def _changed_condition(
        self,
        condition: LDMCondition,
        changed: dict[str, Tensor],
        can_guide: bool,
        encode: Callable[[], LDMCondition],
    ) -> LDMCondition:
        """The condition after a callback, with a null branch if the callback turned guidance on."""
        condition = condition.replace_embeds(changed.get("prompt_embeds"), changed.get("negative_prompt_embeds"))
        if not self.do_classifier_free_guidance or condition.null_embeds is not None:
            return condition
        if not can_guide:
            raise ValueError(f"`guidance_scale` is {self.guidance_scale}, but {self.no_guidance_because}.")
        null = encode()
        return replace(condition, null_context=null.null_context, null_concat=null.null_concat)

    def _null_maps(self, maps: Tensor) -> Tensor | None:
        """What stands for "no condition" behind the latents: zeros; None without guidance."""
        return torch.zeros_like(maps) if self.do_classifier_free_guidance else None
