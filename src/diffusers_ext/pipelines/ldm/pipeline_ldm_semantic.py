"""Images of a semantic label map with latent diffusion, of any size.

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
from ..callbacks import Callback
from ..checks import check_integer, check_parts
from ..listed_options import read_option, record_option
from .base import Generators, LDMBasePipeline
from .denoising import LDMCondition


class LDMSemanticPipeline(LDMBasePipeline):
    """Draws images with given things at given pixels.

    Example:

        pipe(Image.open("labels.png"))                               # mode L or P: one label a pixel
        pipe(label_map, height=1024, width=2048, tile_size=256)      # larger than in the training, in tiles

    Args:
        vqvae: The first stage, an `AutoencoderKL` or a `VQModel`. Its config holds the scale of the latents.
        unet: Predicts the noise from the latents and, behind them, what the rescaler makes of the label map.
        scheduler: Any scheduler of diffusers that denoises with betas.
        spatial_rescaler: Label maps to channels of the latents' size. Its `in_channels` is the number of labels.
        label_names: Names of the labels 0, 1, ... A list, or a dict by number, which is how the config holds them.
        label_palette: (r, g, b) of each label, 0 to 255, so that maps may be drawn in these colours. A list, or a dict
            by number.
        null_condition: Whether the network also learnt maps of zeros behind the rescaler, which guidance needs.
        latent_scale: By what latents are multiplied before diffusion, in place of `vqvae.config.scaling_factor`.
        default_guidance_scale: Guidance scale when a call names none, in place of the one that the authors used.
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
        super().__init__(vqvae, unet, scheduler, latent_scale)
        self.register_modules(spatial_rescaler=spatial_rescaler)
        self.register_to_config(
            label_names=record_option("label_names", label_names),
            label_palette=record_option("label_palette", label_palette),
            null_condition=null_condition,
            default_guidance_scale=default_guidance_scale,
        )

    @property
    def label_names(self) -> list[str] | None:
        """Names of the labels 0, 1, ..."""
        return read_option(self.config["label_names"])

    @property
    def label_palette(self) -> list[list[int]] | None:
        """(r, g, b) of the labels 0, 1, ..."""
        return read_option(self.config["label_palette"])

    @property
    def num_labels(self) -> int:
        check_parts(self, "a label map", "spatial_rescaler")
        return self.spatial_rescaler.config["in_channels"]

    @property
    def concat_channels(self) -> int:
        check_parts(self, "a label map", "spatial_rescaler")
        channels = self.spatial_rescaler.config["out_channels"]
        return self.num_labels if channels is None else channels

    def check_components(self) -> None:
        """All components fit. In particular, the rescaler shrinks maps by the first stage's factor."""
        super().check_components()
        config = self.spatial_rescaler.config
        factor = config["multiplier"] ** -config["num_stages"]
        if factor != self.vae_scale_factor:
            raise ValueError(
                f"`spatial_rescaler` shrinks maps by {factor:g}, `vqvae` pictures by {self.vae_scale_factor}: they"
                " must meet at one size. Load the pair that the U-Net was trained with."
            )

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
        guidance_rescale: float = 0.0,
    ) -> ImagePipelineOutput | tuple:
        """Draws images of label maps.

        Args:
            label_map: One map or several of one size: PIL images of mode L or P that hold labels, or of mode RGB in
                the checkpoint's `label_palette`; integer arrays or tensors (H, W) or (n, H, W).
            height: Height of the image in pixels, a multiple of the first stage's factor times the network's. The
                default is the map's height. The map is resized, nearest neighbour.
            width: Width of the image in pixels, a multiple of the first stage's factor times the network's. The
                default is the map's width.
            num_inference_steps: Number of sampling steps, at least 1. The authors use 20 to 250 with DDIM.
            guidance_scale: s in u + s * (c - u), finite and at least 0. 1 is the plain conditional prediction at half
                the cost, a larger scale follows the condition more closely, and 0 ignores it. The default is the
                checkpoint's scale, else the authors'. A scale other than 1 needs a network that was also trained
                without its condition.
            eta: Noise of DDIM's steps in [0, 1]; 0 adds none. Schedulers without it ignore it.
            num_images_per_prompt: Number of images for each label map. The images of the first label map come first.
            generator: One generator for the batch, or a list with one for each image. With a list, image k depends on
                generator k alone.
            latents: Standard normal noise (b, c, h, w) in place of a draw. The scheduler scales it.
            tile_size: Side or (height, width) in pixels of the tiles in which the network and the first stage see the
                image. Tiles are blended by the distance from their borders. They are for images that are larger than
                those of the training, or than the memory holds. None means one piece.
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
        labels = label_batch(label_map, self.num_labels, palette=self.label_palette)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        own = height is None and width is None
        size = (labels.shape[1] if height is None else height, labels.shape[2] if width is None else width)
        return self.run(
            len(labels) * num_images_per_prompt,
            size,
            lambda device, tiles: self.encode_labels(resize_labels(labels.to(device), *size), num_images_per_prompt),
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
            size_names=("label_map.height", "label_map.width") if own else ("height", "width"),
        )

    def encode_labels(self, labels: Tensor, num_images_per_prompt: int = 1) -> LDMCondition:
        """Label maps to channels beside the latents, (n * num_images_per_prompt, c', h, w).

        Args:
            labels: integers (n, H, W), on the rescaler's device.
        """
        check_parts(self, "a label map", "spatial_rescaler")
        maps = self.spatial_rescaler(labels).repeat_interleave(num_images_per_prompt, dim=0)
        return LDMCondition(concat=maps, null_concat=self._null_maps(maps))
