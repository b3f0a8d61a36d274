"""Images of a class with latent diffusion.

Rombach et al., arXiv 2112.10752, section 4.3.1 and appendix E.2 (LDM-4 and LDM-8 on ImageNet); original:
CompVis/latent-diffusion@a506df5:configs/latent-diffusion/cin256-v2.yaml and its notebook (code and weights MIT).
Differences: see `base.py`; classes may be named.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ...conditions.named_boxes import find_class
from ...models.encoders_ldm import LDMClassEmbedder
from ..callbacks import Callback
from ..checks import check_integer, check_parts
from ..listed_options import read_option, record_option, record_sample_size
from .base import Generators, LDMBasePipeline
from .denoising import LDMCondition


class LDMClassConditionalPipeline(LDMBasePipeline):
    """Draws images of given classes.

    Example:

        pipe(["red circle", 3], num_images_per_prompt=4, guidance_scale=3.0)

    Args:
        vqvae: The first stage, an `AutoencoderKL` or a `VQModel`. Its config holds the scale of the latents.
        unet: Predicts the noise under cross-attention to the class.
        scheduler: Any scheduler of diffusers that denoises with betas.
        class_embedder: One token for each class. Guidance needs its `null_class`.
        class_names: Names of the classes 0, 1, ... without the null class, so that classes may be asked for by name. A
            list, or a dict by number, which is how the config holds them.
        latent_scale: By what latents are multiplied before diffusion, in place of `vqvae.config.scaling_factor`.
        default_sample_size: Side or (height, width) of the latents when a call names no size, in place of
            `unet.config.sample_size`.
        default_guidance_scale: Guidance scale when a call names none, in place of the one that the authors used.
    """

    _pipeline_tag = "unconditional-image-generation"  # the Hub has no task for classes
    _card_tags = ("class-conditional",)
    model_cpu_offload_seq = "class_embedder->unet->vqvae"
    _usual_guidance_scale = 3.0

    class_embedder: LDMClassEmbedder

    def __init__(
        self,
        vqvae: AutoencoderKL | VQModel,
        unet: UNet2DConditionModel,
        scheduler: Any,
        class_embedder: LDMClassEmbedder,
        class_names: list[str] | dict[str, str] | None = None,
        latent_scale: float | None = None,
        default_sample_size: int | tuple[int, int] | dict[str, int] | None = None,
        default_guidance_scale: float | None = None,
    ):
        super().__init__(vqvae, unet, scheduler, latent_scale)
        self.register_modules(class_embedder=class_embedder)
        self.register_to_config(
            class_names=record_option("class_names", class_names),
            default_sample_size=record_sample_size(default_sample_size, None, None),
            default_guidance_scale=default_guidance_scale,
        )

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes 0, 1, ..."""
        return read_option(self.config["class_names"])

    @property
    def has_null_condition(self) -> bool:
        return self.class_embedder is not None and self.class_embedder.config["null_class"] is not None

    @property
    def no_guidance_because(self) -> str:
        return (
            "the network was trained without a null class (class_embedder.config.null_class is None), so nothing can"
            " be guided away from: leave it at 1, or train with labels dropped at times"
        )

    @property
    def context_width(self) -> int:
        check_parts(self, "a class", "class_embedder")
        return self.class_embedder.config["embed_dim"]

    @classmethod
    def example_lines(cls, config: Mapping[str, Any], prompt: str | None = None) -> str:
        names = read_option(config.get("class_names"))
        return f"image = pipe({names[0] if names else 0!r}).images[0]"

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor,
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
        """Draws images of classes.

        Args:
            class_labels: One class or several, by number or, if the checkpoint has `class_names`, by name.
            height: Height of the image in pixels, a multiple of the first stage's factor. The default is that of
                `latents`, else the height that the network was trained on. Larger images work, in one piece or in
                tiles.
            width: Width of the image in pixels, a multiple of the first stage's factor. The default is that of
                `latents`, else the width that the network was trained on.
            num_inference_steps: Number of sampling steps, at least 1. The authors use 20 to 250 with DDIM.
            guidance_scale: s in u + s * (c - u), finite and at least 0. 1 is the plain conditional prediction at half
                the cost, a larger scale follows the condition more closely, and 0 ignores it. The default is the
                checkpoint's scale, else the authors'. A scale other than 1 needs a network that was also trained
                without its condition.
            eta: Noise of DDIM's steps in [0, 1]; 0 adds none. Schedulers without it ignore it.
            num_images_per_prompt: Number of images for each class. The images of the first class come first.
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
                `prompt_embeds` and `negative_prompt_embeds` are the context of the condition and of the null branch.
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
        labels = self.get_label_ids(class_labels)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        return self.run(
            len(labels) * num_images_per_prompt,
            self.resolve_size(height, width, latents),
            lambda device, tiles: self.encode_labels(labels, num_images_per_prompt, device=device),
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

    def get_label_ids(self, class_labels: Any) -> list[int]:
        """Class numbers of names, numbers, or a mixture of them.

        Raises:
            TypeError, ValueError: for anything else, none at all, or an unknown class.
        """
        labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        labels = list(labels) if isinstance(labels, (list, tuple)) else [labels]
        if not labels:
            raise ValueError("`class_labels` is empty; pass at least one class.")
        check_parts(self, "a class", "class_embedder")
        num_classes, names = self.class_embedder.config["num_class_embeds"], self.class_names
        return [find_class(label, num_classes, names, "class_labels") for label in labels]

    def encode_labels(
        self, labels: list[int], num_images_per_prompt: int = 1, *, device: torch.device | str | None = None
    ) -> LDMCondition:
        """One token for each image, and the null class's if the run is guided."""
        check_parts(self, "a class", "class_embedder")
        device = device if device is not None else self._execution_device
        tokens = self.class_embedder(torch.tensor(labels, device=device))  # (n, 1, d)
        null = None
        if self.do_classifier_free_guidance:
            null = self.class_embedder(torch.tensor([self.class_embedder.config["null_class"]], device=device))
        return LDMCondition(tokens.repeat_interleave(num_images_per_prompt, dim=0), null)
