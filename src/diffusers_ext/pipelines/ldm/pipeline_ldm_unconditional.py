"""Images from noise alone with latent diffusion; filling what is unknown, and guidance without re-training.

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
from ..callbacks import Callback
from ..checks import check_integer, check_mask, check_one_or_each
from ..listed_options import record_sample_size
from .base import Generators, LDMBasePipeline
from .denoising import KnownRegion, LDMCondition
from .first_stage import encode_first_stage
from .picture_guidance import GuidanceFn, check_guidance_fn
from .tiling import Tiles


class LDMUnconditionalPipeline(LDMBasePipeline):
    """Draws images of the kind that it was trained on.

    A part of an image may be given (`image`, `mask_image`), and any differentiable function of the image may guide
    (`guidance_fn`), without training for it.

    Example:

        pipe(batch_size=4, num_inference_steps=100, eta=1.0)
        pipe(image=picture, mask_image=mask)                                         # white in the mask: drawn
        pipe(guidance_fn=low_resolution_guidance(small_picture))                     # see picture_guidance.py
        pipe(guidance_fn=lambda x: lpips(x, target).flatten(), guidance_fn_scale=10) # perceptual
        pipe(guidance_fn=lambda x: -clip_similarity(x, "a face"), guidance_fn_scale=100)
        pipe(height=1024, width=1024, tile_size=512)                                 # in tiles

    Args:
        vqvae: The first stage, an `AutoencoderKL` or a `VQModel`. Its config holds the scale of the latents.
        unet: Predicts the noise.
        scheduler: Any scheduler of diffusers that denoises with betas.
        latent_scale: By what latents are multiplied before diffusion, in place of `vqvae.config.scaling_factor`.
        default_sample_size: Side or (height, width) of the latents when a call names no size, in place of
            `unet.config.sample_size`.
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
        super().__init__(vqvae, unet, scheduler, latent_scale)
        self.register_to_config(default_sample_size=record_sample_size(default_sample_size, None, None))

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
        """Draws images.

        Args:
            batch_size: Number of images.
            height: Height of the image in pixels, a multiple of the first stage's factor times the network's. The
                default is that of `image` or `latents`, else the height that the network was trained on.
            width: Width of the image in pixels, a multiple of the first stage's factor times the network's. The
                default is that of `image` or `latents`, else the width that the network was trained on.
            num_inference_steps: Number of sampling steps, at least 1. The authors use 20 to 250 with DDIM.
            eta: Noise of DDIM's steps in [0, 1]; 0 adds none. Schedulers without it ignore it.
            generator: One generator for the batch, or a list with one for each image. With a list, image k depends on
                generator k alone.
            latents: Standard normal noise (b, c, h, w) in place of a draw. The scheduler scales it.
            image: The image of which a part is known, one for all samples or one for each (see
                `conditions.images.image_batch`). The first stage sees the nearest known pixels go on into the hole, so
                that nothing of what it held shines through at its border.
            mask_image: The mask of the image's size, black and white: white (1) is drawn, black (0) is kept. A latent
                is drawn if any of its pixels is.
            apply_overlay: Whether the known pixels of the result are those of `image` instead of decoded ones.
            guidance_fn: A differentiable loss (b,), or the sum of it, of the predicted clean images (b, 3, H, W) as
                the first stage decodes them: floats, nominally in [-1, 1], not clamped. The loss is small where an
                image is as wanted, and its gradient guides each step. It costs the memory of a backward pass through
                the network.
            guidance_fn_scale: Factor of that gradient.
            tile_size: Side or (height, width) in pixels of the tiles in which the network and the first stage see the
                image. Tiles are blended by the distance from their borders. They are for images that are larger than
                those of the training, or than the memory holds. None means one piece.
            tile_stride: Pixels from tile to tile, one number or (down, across). The default is half a tile.
            output_type: "pil"; "np" (b, H, W, 3) or "pt" (b, 3, H, W), both in [0, 1]; or "latent" for the latents as
                the network sees them, scaled and not decoded.
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`, called after each step. Tensors
                that it returns replace those of the loop. `pipe._interrupt = True` skips the remaining steps.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets, by default `["latents"]`.
                `pred_original_sample` holds the clean latents that the step's prediction amounts to, for reading only.

        Returns:
            `ImagePipelineOutput` with the `images`, or a tuple that holds them.

        Order of the draws of each generator: the initial noise, then in each step the noise of the known part if there
        is one, and those of `scheduler.step`.
        """
        self.check_components()
        check_integer("batch_size", batch_size, 1)
        check_guidance_fn(guidance_fn, guidance_fn_scale)
        source = self._read_source(image, mask_image, batch_size, height, width, apply_overlay, output_type)
        size = self.resolve_size(height, width, latents) if source is None else tuple(source[0].shape[-2:])

        def known(device: torch.device, tiles: Tiles | None) -> KnownRegion:
            assert source is not None
            return self._known_region(*source, tiles, device)

        def put_back(pixels: Tensor) -> Tensor:
            assert source is not None
            picture, mask = (tensor.to(pixels.device) for tensor in source)
            return torch.where(mask[:, None], pixels, 2 * picture - 1)

        return self.run(
            batch_size,
            (size[0], size[1]),
            lambda device, tiles: LDMCondition(),
            num_inference_steps=num_inference_steps,
            eta=eta,
            generator=generator,
            latents=latents,
            tile_size=tile_size,
            tile_stride=tile_stride,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            size_names=("height", "width") if source is None else ("image.height", "image.width"),
            known=None if source is None else known,
            guidance_fn=guidance_fn,
            guidance_fn_scale=guidance_fn_scale,
            overlay=put_back if apply_overlay else None,
        )

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
        """Images (1 or b, 3, H, W) in [0, 1] and masks, bool (1 or b, H, W), True where to draw."""
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
        check_one_or_each("image", len(picture), batch_size, "samples")
        check_one_or_each("mask_image", len(mask), batch_size, "samples")
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
