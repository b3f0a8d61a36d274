"""Inpainting with a latent diffusion model that was trained for it.

Rombach et al., arXiv 2112.10752, section 4.5; original: CompVis/latent-diffusion@a506df5:scripts/inpaint.py (code and
weights MIT). Differences: see `base.py`; masks that are not binary are refused.
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
from ..callbacks import Callback
from ..checks import check_integer, check_mask, check_one_or_each, check_parts
from .base import Generators, LDMBasePipeline
from .denoising import LDMCondition
from .first_stage import encode_masked_image, first_stage_channels
from .tiling import Tiles


class LDMInpaintPipeline(LDMBasePipeline):
    """Fills the holes of an image. What is known stays as it is.

    Example:

        pipe(Image.open("picture.png"), Image.open("mask.png"))          # white in the mask: filled

    Args:
        vqvae: The first stage, an `AutoencoderKL` or a `VQModel`. Its config holds the scale of the latents.
        unet: Predicts the noise from the latents and, behind them, the encoding of the masked image and the mask, in
            this order. It takes 7 channels with 3 latent ones.
        scheduler: Any scheduler of diffusers that denoises with betas.
        null_condition: Whether the network also learnt zeros in place of image and mask, which guidance needs.
        latent_scale: By what latents are multiplied before diffusion, in place of `vqvae.config.scaling_factor`.
        default_guidance_scale: Guidance scale when a call names none, in place of the one that the authors used.
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
        super().__init__(vqvae, unet, scheduler, latent_scale)
        self.register_to_config(null_condition=null_condition, default_guidance_scale=default_guidance_scale)

    @property
    def concat_channels(self) -> int:
        check_parts(self, "a picture with a hole", "vqvae")
        return first_stage_channels(self.vqvae) + 1

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
        guidance_rescale: float = 0.0,
    ) -> ImagePipelineOutput | tuple:
        """Fills the holes of images.

        Args:
            image: The image, or several of one size (see `conditions.images.image_batch`). Its sides are multiples of
                the first stage's factor times the network's.
            mask_image: The mask of the image's size, black and white: white (1) is filled, black (0) is kept. One for
                all images or one for each.
            num_inference_steps: Number of sampling steps, at least 1. The authors use 20 to 250 with DDIM.
            guidance_scale: s in u + s * (c - u), finite and at least 0. 1 is the plain conditional prediction at half
                the cost, a larger scale follows the condition more closely, and 0 ignores it. The default is the
                checkpoint's scale, else the authors'. A scale other than 1 needs a network that was also trained
                without its condition.
            eta: Noise of DDIM's steps in [0, 1]; 0 adds none. Schedulers without it ignore it.
            num_images_per_prompt: Number of images for each image. The images of the first image come first.
            generator: One generator for the batch, or a list with one for each image. With a list, image k depends on
                generator k alone.
            latents: Standard normal noise (b, c, h, w) in place of a draw. The scheduler scales it.
            tile_size: Side or (height, width) in pixels of the tiles in which the network and the first stage see the
                image. Tiles are blended by the distance from their borders. They are for images that are larger than
                those of the training, or than the memory holds. None means one piece.
            tile_stride: Pixels from tile to tile, one number or (down, across). The default is half a tile.
            output_type: "pil"; "np" (b, H, W, 3) or "pt" (b, 3, H, W), both in [0, 1]; or "latent" for the latents as
                the network sees them, scaled and not decoded, without what is known.
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`, called after each step. Tensors
                that it returns replace those of the loop. `pipe._interrupt = True` skips the remaining steps.
                `pipe._guidance_scale` may be set; 1 turns guidance off, and so does 0, which diffusers' callbacks set.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets, by default `["latents"]`.
                `prompt_embeds` and `negative_prompt_embeds` are the maps of the condition and of the null branch.
                `pred_original_sample` holds the clean latents that the step's prediction amounts to, for reading only.
            guidance_rescale: Share in [0, 1] of normalised guidance (PITI, arXiv 2205.12952): 1 gives the guided
                prediction the mean and the standard deviation of the conditional one, sample by sample, against the
                oversaturation of large scales; 0 is plain guidance. The argument of diffusers (arXiv 2305.08891)
                corrects the standard deviation alone.

        Returns:
            `ImagePipelineOutput` with the `images`, or a tuple that holds them.

        Order of the draws of each generator: the initial noise, then those of `scheduler.step` in each step.
        """
        self.check_components()
        images, mask = image_batch(image), mask_batch(mask_image)
        check_mask(mask, images)
        check_one_or_each("mask_image", len(mask), len(images), "pictures")
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        images, mask = 2 * images - 1, mask[:, None].expand(len(images), -1, -1, -1)  # mask (n, 1, H, W)

        def encode(device: torch.device, tiles: Tiles | None) -> LDMCondition:
            return self.encode_masked(images.to(device), mask.to(device), num_images_per_prompt, tiles=tiles)

        def put_in(pixels: Tensor) -> Tensor:
            known, hole = (
                tensor.to(pixels.device).repeat_interleave(num_images_per_prompt, dim=0) for tensor in (images, mask)
            )
            return 2 * composite(known, hole, pixels) - 1

        return self.run(
            len(images) * num_images_per_prompt,
            (images.shape[2], images.shape[3]),
            encode,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            generator=generator,
            latents=latents,
            tile_size=tile_size,
            tile_stride=tile_stride,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            guidance_rescale=guidance_rescale,
            size_names=("image.height", "image.width"),
            overlay=put_in,
        )

    def encode_masked(
        self, images: Tensor, mask: Tensor, num_images_per_prompt: int = 1, *, tiles: Tiles | None = None
    ) -> LDMCondition:
        """Images (n, 3, H, W) in [-1, 1] and masks (n, 1, H, W), 1 in the hole, to channels beside the latents."""
        check_parts(self, "a picture with a hole", "vqvae")
        maps = encode_masked_image(self.vqvae, images, mask, grid=None if tiles is None else tiles.encode)
        maps = maps.repeat_interleave(num_images_per_prompt, dim=0)
        return LDMCondition(concat=maps, null_concat=self._null_maps(maps))
