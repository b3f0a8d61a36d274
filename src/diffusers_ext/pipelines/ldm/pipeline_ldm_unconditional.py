"""Pictures from noise alone with latent diffusion; filling what is unknown, and guidance without re-training.

Rombach et al., arXiv 2112.10752, section 4.1 and appendix C; original: CompVis/latent-diffusion@a506df5
:scripts/sample_diffusion.py and ldm/models/diffusion/ddim.py (code and weights MIT). Differences: see
`base.py`.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ...conditions.images import image_batch
from ...conditions.inpainting import continue_pixels
from ...conditions.masks import mask_batch, mask_to_tokens
from ...models.unet_ldm import LDMUNet
from ..callbacks import Callback, callback_tensor_names
from ..checks import check_integer
from .base import Generators, LDMBasePipeline
from .checks import check_components, check_count, check_guidance_fn, check_mask
from .denoising import KnownRegion, LDMCondition
from .first_stage import encode_first_stage
from .picture_guidance import GuidanceFn
from .tiling import Tiles


class LDMUnconditionalPipeline(LDMBasePipeline):
    """Draws pictures of the kind that it was trained on.

    A part of a picture may be given (`image`, `mask_image`), and any differentiable function of the picture may guide
    (`guidance_fn`), without training for it.

    Example:

        pipe(batch_size=4, num_inference_steps=100, eta=1.0)
        pipe(image=picture, mask_image=mask)                                         # white in the mask: drawn
        pipe(guidance_fn=low_resolution_guidance(small_picture))                     # see picture_guidance.py
        pipe(guidance_fn=lambda x: lpips(x, target).flatten(), guidance_fn_scale=10) # perceptual
        pipe(guidance_fn=lambda x: -clip_similarity(x, "a face"), guidance_fn_scale=100)
        pipe(height=1024, width=1024, tile_size=512)                                 # in tiles

    Args:
        vqvae, unet, scheduler, latent_scale, default_sample_size: see `LDMBasePipeline`.
    """

    _pipeline_tag = "unconditional-image-generation"
    _example = "images = pipe(batch_size=4).images"

    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(
        self,
        vqvae: AutoencoderKL | VQModel,
        unet: UNet2DModel | LDMUNet,
        scheduler: Any,
        latent_scale: float | None = None,
        default_sample_size: int | tuple[int, int] | dict[str, int] | None = None,
    ):
        super().__init__(
            {"vqvae": vqvae, "unet": unet, "scheduler": scheduler},
            {"latent_scale": latent_scale, "default_sample_size": default_sample_size},
        )

    @property
    def no_guidance_because(self) -> str:
        return (
            "an unconditional network has no condition to guide by: leave the scale at 1, and guide with `guidance_fn`"
        )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        image: Any = None,
        mask_image: Any = None,
        apply_overlay: bool = False,
        guidance_fn: GuidanceFn | None = None,
        guidance_fn_scale: float = 1.0,
        tile_size: int | tuple[int, int] | None = None,
        tile_stride: int | tuple[int, int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples pictures.

        Args:
            batch_size: how many.
            height: pixels, a multiple of the first stage's factor times the network's; `width` alike. By default those
                of `image` or `latents`, else what the network was trained on.
            image: the picture whose part is known, one for all samples or one a sample (see
                `conditions.images.image_batch`). The first stage sees the nearest known pixels go on into the hole,
                so that nothing of what it held shines through at its border.
            mask_image: of the picture's size, black and white: white (1) is drawn, black (0) kept. A latent is drawn
                if any of its pixels is.
            apply_overlay: whether known pixels of the result are those of `image` instead of decoded ones.
            guidance_fn: a differentiable loss (b,), or the sum of it, of the predicted clean pictures (b, 3, H, W) as
                the first stage decodes them: in [-1, 1] but not clamped, float. It is small where a picture is as
                wanted, and its gradient guides each step. Costs the memory of a backward pass through the network.
            guidance_fn_scale: factor of that gradient.

        The other arguments and the result are those of `LDMClassConditionalPipeline.__call__`.
        """
        callback_names = callback_tensor_names(self, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        check_components(self)
        check_integer("batch_size", batch_size, 1)
        check_guidance_fn(guidance_fn, guidance_fn_scale)
        source = self._read_source(image, mask_image, batch_size, height, width, apply_overlay, output_type)
        size = self._resolve_size(height, width, latents) if source is None else tuple(source[0].shape[-2:])
        tiles = self.check_inputs(
            batch_size,
            *size,
            num_inference_steps=num_inference_steps,
            eta=eta,
            generator=generator,
            latents=latents,
            tile_size=tile_size,
            tile_stride=tile_stride,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_names,
            size_names=("height", "width") if source is None else ("image.height", "image.width"),
        )
        timesteps = self._begin_run(num_inference_steps, 1.0)

        # 2. What is known, and the initial noise
        known = None if source is None else self._known_region(*source, tiles, timesteps.device)
        noise = self.prepare_latents(batch_size, *size, generator=generator, latents=latents, device=timesteps.device)

        # 3. Denoise
        sampled = self._sample(
            timesteps,
            noise,
            LDMCondition(),
            eta=eta,
            generator=generator,
            tiles=tiles,
            known=known,
            guidance_fn=guidance_fn,
            guidance_fn_scale=guidance_fn_scale,
            callback=callback_on_step_end,
            callback_names=callback_names,
        )

        # 4. Latents to pixels
        def overlay(pixels: Tensor) -> Tensor:
            assert source is not None
            picture, mask = (tensor.to(pixels.device) for tensor in source)
            return torch.where(mask[:, None], pixels.float(), 2 * picture - 1)

        return self._end_run(sampled, output_type, return_dict, tiles=tiles, finish=overlay if apply_overlay else None)

    def _read_source(
        self,
        image: Any,
        mask_image: Any,
        batch_size: int,
        height: Any,
        width: Any,
        apply_overlay: Any,
        output_type: Any,
    ) -> tuple[Tensor, Tensor] | None:
        """Pictures (1 or b, 3, H, W) in [0, 1] and masks, bool (1 or b, H, W), True where to draw."""
        if (image is None) != (mask_image is None):
            given, missing = ("image", "mask_image") if mask_image is None else ("mask_image", "image")
            raise ValueError(f"`{given}` was given without `{missing}`: a known region needs both, or neither.")
        if image is None:
            if apply_overlay:
                raise ValueError("`apply_overlay=True` puts pixels of `image` back, but there is no `image`.")
            return None
        if apply_overlay and output_type == "latent":
            raise ValueError("`apply_overlay=True` puts pixels back; `output_type='latent'` has none.")
        picture, mask = image_batch(image), mask_batch(mask_image)
        check_mask(mask, picture)
        check_count("image", len(picture), batch_size, "samples")
        check_count("mask_image", len(mask), batch_size, "samples")
        for name, side, own in (("height", height, picture.shape[2]), ("width", width, picture.shape[3])):
            if side is not None and side != own:
                raise ValueError(f"`{name}` is {side}, but that of `image` is {own}: leave `{name}` out, or resize.")
        return picture, mask

    def _known_region(self, picture: Tensor, mask: Tensor, tiles: Tiles | None, device: torch.device) -> KnownRegion:
        dtype = self.unet.dtype
        encoded = encode_first_stage(
            self.vqvae, 2 * continue_pixels(picture, mask).to(device) - 1, grid=None if tiles is None else tiles.encode
        )
        keep = ~mask_to_tokens(mask.to(device), self.vae_scale_factor)
        return KnownRegion((encoded * self.latent_scale).to(dtype), keep[:, None].to(dtype))
