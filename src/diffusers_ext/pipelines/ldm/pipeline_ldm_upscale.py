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
from ..callbacks import Callback, callback_tensor_names
from ..checks import check_integer, check_side
from .base import Generators, LDMBasePipeline
from .checks import check_components
from .denoising import LDMCondition


class LDMUpscalePipeline(LDMBasePipeline):
    """Draws a picture that is larger by the autoencoder's factor; the small one lies behind the latents as it is.

    Example:

        pipe(Image.open("small.png"), num_inference_steps=100, eta=1.0)
        pipe(Image.open("photograph.png"), tile_size=512)                # of any size, in tiles

    Args:
        vqvae, unet, scheduler, latent_scale, default_guidance_scale: see `LDMBasePipeline`.
        null_condition: whether the network also learnt zeros in place of the small picture, which guidance needs.
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
    ) -> ImagePipelineOutput | tuple:
        """Samples pictures.

        Args:
            image: the small picture, or several of one size (see `conditions.images.image_batch`). Its sides are
                multiples of the network's factor.
            num_inference_steps: the authors use 100.
            num_images_per_prompt: results for each small picture; those of the first come first.
            tile_size: in pixels of the result, as elsewhere.

        The other arguments and the result are those of `LDMClassConditionalPipeline.__call__`.
        """
        callback_names = callback_tensor_names(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        scale = self._resolve_scale(guidance_scale)

        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        check_components(self, concat_channels=3)
        pictures = image_batch(image)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        factor, multiple = self.vae_scale_factor, self.size_multiple // self.vae_scale_factor
        for name, side in (("image.height", pictures.shape[2]), ("image.width", pictures.shape[3])):
            check_side(name, side, multiple, multiple, because=f"network {multiple}; crop or pad the picture")
        batch_size = len(pictures) * num_images_per_prompt
        size = (pictures.shape[2] * factor, pictures.shape[3] * factor)
        tiles = self.check_inputs(
            batch_size,
            *size,
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
        maps = (2 * pictures - 1).to(timesteps.device).repeat_interleave(num_images_per_prompt, dim=0)

        def encode() -> LDMCondition:
            return LDMCondition(concat=maps, null_concat=self._null_maps(maps))

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
        return self._end_run(sampled, output_type, return_dict, tiles=tiles)
