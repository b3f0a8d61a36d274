"""Super-resolution with latent diffusion.

Rombach et al., arXiv 2112.10752, section 4.4; original: CompVis/latent-diffusion@a506df5
:models/ldm/bsr_sr/config.yaml and its notebook (code and weights MIT). Differences: see `base.py`; sizes
are never corrected silently.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ...conditions.images import image_batch
from ...models.unet_ldm import LDMUNet
from ..callbacks import Callback
from ..checks import check_integer, check_side
from .base import Generators, LDMBasePipeline
from .denoising import LDMCondition


class LDMUpscalePipeline(LDMBasePipeline):
    """Draws images that are larger than the given ones by the first stage's factor.

    The small image lies behind the latents as it is.

    Example:

        pipe(Image.open("small.png"), num_inference_steps=100, eta=1.0)
        pipe(Image.open("photograph.png"), tile_size=512)                # of any size, in tiles

    Args:
        vqvae: The first stage, an `AutoencoderKL` or a `VQModel`. Its config holds the scale of the latents.
        unet: Predicts the noise from the latents and, behind them, the small image.
        scheduler: Any scheduler of diffusers that denoises with betas.
        null_condition: Whether the network also learnt zeros in place of the small image, which guidance needs.
        latent_scale: By what latents are multiplied before diffusion, in place of `vqvae.config.scaling_factor`.
        default_guidance_scale: Guidance scale when a call names none, in place of the one that the authors used.
    """

    _pipeline_tag = "image-to-image"
    _card_tags = ("super-resolution",)
    _example = """from diffusers.utils import load_image

larger = pipe(image=load_image("small.png")).images[0]"""

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
        return 3

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_inference_steps: int = 100,
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
        """Draws images that are larger than the given ones.

        Args:
            image: The small image, or several of one size (see `conditions.images.image_batch`). Its sides are
                multiples of the network's factor.
            num_inference_steps: Number of sampling steps, at least 1. The authors use 100.
            guidance_scale: s in u + s * (c - u), finite and at least 0. 1 is the plain conditional prediction at half
                the cost, a larger scale follows the condition more closely, and 0 ignores it. The default is the
                checkpoint's scale, else the authors'. A scale other than 1 needs a network that was also trained
                without its condition.
            eta: Noise of DDIM's steps in [0, 1]; 0 adds none. Schedulers without it ignore it.
            num_images_per_prompt: Number of images for each small image. The images of the first small image come
                first.
            generator: One generator for the batch, or a list with one for each image. With a list, image k depends on
                generator k alone.
            latents: Standard normal noise (b, c, h, w) in place of a draw. The scheduler scales it.
            tile_size: Side or (height, width) in pixels of the tiles in which the network and the first stage see the
                image of the result. Tiles are blended by the distance from their borders. They are for images that are
                larger than those of the training, or than the memory holds. None means one piece.
            tile_stride: Pixels from tile to tile, one number or (down, across). The default is half a tile.
            output_type: "pil"; "np" (b, H, W, 3) or "pt" (b, 3, H, W), both in [0, 1]; or "latent" for the latents as
                the network sees them, scaled and not decoded.
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
        images = image_batch(image)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        factor, multiple = self.vae_scale_factor, self.size_multiple // self.vae_scale_factor
        for name, side in (("image.height", images.shape[2]), ("image.width", images.shape[3])):
            check_side(name, side, multiple, multiple, because=f"network {multiple}; crop or pad the picture")
        return self.run(
            len(images) * num_images_per_prompt,
            (images.shape[2] * factor, images.shape[3] * factor),
            lambda device, tiles: self.encode_images(images, num_images_per_prompt, device=device),
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
        )

    def encode_images(
        self, images: Tensor, num_images_per_prompt: int = 1, *, device: torch.device | str | None = None
    ) -> LDMCondition:
        """Small images (n, 3, h, w) in [0, 1] to channels beside the latents, (n * num_images_per_prompt, 3, h, w)."""
        device = device if device is not None else self._execution_device
        maps = (2 * images - 1).to(device).repeat_interleave(num_images_per_prompt, dim=0)
        return LDMCondition(concat=maps, null_concat=self._null_maps(maps))
