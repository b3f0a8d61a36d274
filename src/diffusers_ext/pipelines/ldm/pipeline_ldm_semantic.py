"""Pictures of a semantic label map with latent diffusion, of any size.

Rombach et al., arXiv 2112.10752, section 4.3.2; original: CompVis/latent-diffusion@a506df5
:models/ldm/semantic_synthesis256/config.yaml (code and weights MIT). Differences: see `base.py`.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ...conditions.label_maps import label_batch, resize_labels
from ...models.encoders_ldm import LDMSpatialRescaler
from ...models.unet_ldm import LDMUNet
from ..callbacks import Callback, callback_tensor_names
from ..checks import check_integer, check_parts
from ..listed_options import read_option
from .base import Generators, LDMBasePipeline
from .checks import check_components, check_rescaler
from .denoising import LDMCondition


class LDMSemanticPipeline(LDMBasePipeline):
    """Draws pictures with given things at given pixels.

    Example:

        pipe(Image.open("labels.png"))                               # mode L or P: one label a pixel
        pipe(label_map, height=1024, width=2048, tile_size=256)      # larger than in the training, in tiles

    Args:
        vqvae, unet, scheduler, latent_scale, default_guidance_scale: see `LDMBasePipeline`.
        spatial_rescaler: label maps to channels at latent size; its `in_channels` is the number of labels.
        label_names: names of the labels 0, 1, ...; a list, or a dict by number, which is how the config holds them.
        label_palette: (r, g, b) of each label, 0 to 255: then maps may be drawn in these colours. Held alike.
        null_condition: whether the network also learnt maps of zeros behind the rescaler, which guidance needs.
    """

    _pipeline_tag = "image-to-image"
    _card_tags = ("semantic-image-synthesis",)
    _example = """from PIL import Image

image = pipe(Image.open("labels.png")).images[0]  # one label a pixel"""

    model_cpu_offload_seq = "spatial_rescaler->unet->vqvae"

    spatial_rescaler: LDMSpatialRescaler

    def __init__(
        self,
        vqvae: AutoencoderKL | VQModel,
        unet: UNet2DModel | LDMUNet,
        scheduler: Any,
        spatial_rescaler: LDMSpatialRescaler,
        label_names: list[str] | dict[str, str] | None = None,
        label_palette: list[list[int]] | dict[str, list[int]] | None = None,
        null_condition: bool = False,
        latent_scale: float | None = None,
        default_guidance_scale: float | None = None,
    ):
        super().__init__(
            {"vqvae": vqvae, "unet": unet, "scheduler": scheduler, "spatial_rescaler": spatial_rescaler},
            {
                "label_names": label_names,
                "label_palette": label_palette,
                "null_condition": null_condition,
                "latent_scale": latent_scale,
                "default_guidance_scale": default_guidance_scale,
            },
        )

    @property
    def label_names(self) -> list[str] | None:
        """Names of the labels 0, 1, ..."""
        return read_option(self.config["label_names"])

    @property
    def label_palette(self) -> list[list[int]] | None:
        """(r, g, b) of the labels 0, 1, ..."""
        return read_option(self.config["label_palette"])

    @torch.no_grad()
    def __call__(
        self,
        label_map: Any,
        height: int | None = None,
        width: int | None = None,
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
            label_map: one map or several of one size: PIL pictures of mode L or P that hold labels, or of mode RGB in
                the checkpoint's `label_palette`; integer arrays or tensors (H, W) or (n, H, W).
            height: of the result in pixels, by default the map's; so is `width`. The map is resized to it, nearest
                neighbour.

        The other arguments and the result are those of `LDMClassConditionalPipeline.__call__`.
        """
        callback_names = callback_tensor_names(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        scale = self._resolve_scale(guidance_scale)

        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        check_components(self, concat_channels=None if self.spatial_rescaler is None else self._channels())
        check_rescaler(self)
        labels = label_batch(label_map, self.num_labels, palette=self.label_palette)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        batch_size = len(labels) * num_images_per_prompt
        own = height is None and width is None
        size = (labels.shape[1] if height is None else height, labels.shape[2] if width is None else width)
        tiles = self.check_inputs(
            batch_size,
            *size,
            size_names=("label_map.height", "label_map.width") if own else ("height", "width"),
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
        labels = resize_labels(labels.to(timesteps.device), *size)

        def encode() -> LDMCondition:
            return self.encode_labels(labels, num_images_per_prompt)

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

    @property
    def num_labels(self) -> int:
        check_parts(self, "a label map", "spatial_rescaler")
        return self.spatial_rescaler.config["in_channels"]

    def encode_labels(self, labels: Tensor, num_images_per_prompt: int = 1) -> LDMCondition:
        """Label maps to channels beside the latents, (n * num_images_per_prompt, c', h, w).

        Args:
            labels: integers (n, H, W), on the rescaler's device.
        """
        check_parts(self, "a label map", "spatial_rescaler")
        maps = self.spatial_rescaler(labels).repeat_interleave(num_images_per_prompt, dim=0)
        return LDMCondition(concat=maps, null_concat=self._null_maps(maps))

    def _channels(self) -> int:
        channels = self.spatial_rescaler.config["out_channels"]
        return self.num_labels if channels is None else channels
