"""Inpainting with a latent diffusion model that was trained for it.

Rombach et al., arXiv 2112.10752, section 4.5; original: CompVis/latent-diffusion@a506df5:scripts/inpaint.py (code and
weights MIT). Differences: see `base.py`; masks are binary, not made so.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ...conditions.images import image_batch
from ...conditions.inpainting import composite
from ...conditions.masks import mask_batch
from ...models.unet_ldm import LDMUNet
from ..callbacks import Callback, callback_tensor_names
from ..checks import check_integer, check_parts
from .base import Generators, LDMBasePipeline
from .checks import check_components, check_count, check_mask
from .denoising import LDMCondition
from .first_stage import encode_masked_image, first_stage_channels
from .tiling import Tiles


class LDMInpaintPipeline(LDMBasePipeline):
    """Fills the holes of a picture; what is known stays as it is.

    Example:

        pipe(Image.open("picture.png"), Image.open("mask.png"))          # white in the mask: filled

    Args:
        vqvae, unet, scheduler, latent_scale, default_guidance_scale: see `LDMBasePipeline`. The U-Net takes the
            latents, the encoding of the masked picture and the mask, in this order: 7 channels with 3 latent ones.
        null_condition: whether the network also learnt zeros in place of picture and mask, which guidance needs.
    """

    _pipeline_tag = "image-to-image"
    _card_tags = ("inpainting",)
    _example = """from diffusers.utils import load_image

picture, mask = load_image("picture.png"), load_image("mask.png").convert("L")  # white: to draw
image = pipe(image=picture, mask_image=mask).images[0]"""

    def __init__(
        self,
        vqvae: AutoencoderKL | VQModel,
        unet: UNet2DModel | LDMUNet,
        scheduler: Any,
        null_condition: bool = False,
        latent_scale: float | None = None,
        default_guidance_scale: float | None = None,
    ):
        super().__init__(
            {"vqvae": vqvae, "unet": unet, "scheduler": scheduler},
            {
                "null_condition": null_condition,
                "latent_scale": latent_scale,
                "default_guidance_scale": default_guidance_scale,
            },
        )

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        mask_image: Any,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        tile_size: int | tuple[int, int] | None = None,
        tile_stride: int | tuple[int, int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples pictures.

        Args:
            image: the picture, or several of one size (see `conditions.images.image_batch`). Its sides are multiples
                of the first stage's factor times the network's.
            mask_image: of the picture's size, black and white: white (1) is filled, black (0) kept. One for all
                pictures or one a picture.
            num_images_per_prompt: results for each picture; those of the first come first.
            output_type: "latent" gives the sampled latents, without what is known.

        The other arguments and the result are those of `LDMClassConditionalPipeline.__call__`.
        """
        callback_names = callback_tensor_names(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        scale = self._resolve_scale(guidance_scale)

        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        check_components(self, concat_channels=None if self.vqvae is None else first_stage_channels(self.vqvae) + 1)
        pictures, mask = image_batch(image), mask_batch(mask_image)
        check_mask(mask, pictures)
        check_count("mask_image", len(mask), len(pictures), "pictures")
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        batch_size = len(pictures) * num_images_per_prompt
        size = (pictures.shape[2], pictures.shape[3])
        tiles = self.check_inputs(
            batch_size,
            *size,
            size_names=("image.height", "image.width"),
            num_inference_steps=num_inference_steps,
            guidance_scale=scale,
            eta=eta,
            generator=generator,
            latents=latents,
            tile_size=tile_size,
            tile_stride=tile_stride,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_names,
        )
        timesteps = self._begin_run(num_inference_steps, scale)

        # 2. Condition and initial noise
        device = timesteps.device
        pictures = 2 * pictures.to(device) - 1
        mask = mask.to(device)[:, None].expand(len(pictures), -1, -1, -1)  # (n, 1, H, W)

        def encode() -> LDMCondition:
            return self.encode_masked(pictures, mask, num_images_per_prompt, tiles=tiles)

        noise = self.prepare_latents(batch_size, *size, generator=generator, latents=latents, device=timesteps.device)

        # 3. Denoise
        sampled = self._sample(
            timesteps,
            noise,
            encode(),
            eta=eta,
            generator=generator,
            tiles=tiles,
            callback=callback_on_step_end,
            callback_names=callback_names,
            encode=encode,
        )

        # 4. Latents to pixels
        def put_in(pixels: Tensor) -> Tensor:
            image, hole = (tensor.repeat_interleave(num_images_per_prompt, dim=0) for tensor in (pictures, mask))
            return 2 * composite(image, hole, pixels.float()) - 1

        return self._end_run(sampled, output_type, return_dict, tiles=tiles, finish=put_in)

    def encode_masked(
        self, pictures: Tensor, mask: Tensor, num_images_per_prompt: int = 1, *, tiles: Tiles | None = None
    ) -> LDMCondition:
        """Pictures (n, 3, H, W) in [-1, 1] and masks (n, 1, H, W), 1 in the hole, to channels beside the latents."""
        check_parts(self, "a picture with a hole", "vqvae")
        maps = encode_masked_image(self.vqvae, pictures, mask, grid=None if tiles is None else tiles.encode)
        maps = maps.repeat_interleave(num_images_per_prompt, dim=0)
        return LDMCondition(concat=maps, null_concat=self._null_maps(maps))
