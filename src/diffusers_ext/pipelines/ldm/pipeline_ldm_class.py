"""Pictures of a class with latent diffusion.

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
from ..callbacks import Callback, callback_tensor_names
from ..checks import check_integer, check_parts
from ..listed_options import read_option
from .base import Generators, LDMBasePipeline
from .checks import check_components
from .denoising import LDMCondition


class LDMClassConditionalPipeline(LDMBasePipeline):
    """Draws pictures of given classes.

    Example:

        pipe(["red circle", 3], num_images_per_prompt=4, guidance_scale=3.0)

    Args:
        vqvae, unet, scheduler, latent_scale, default_sample_size, default_guidance_scale: see `LDMBasePipeline`.
        class_embedder: one token a class; guidance needs its `null_class`.
        class_names: names of the classes 0, 1, ... (without the null class), so that they may be asked for by name; a
            list, or a dict by number, which is how the config holds them.
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
        super().__init__(
            {"vqvae": vqvae, "unet": unet, "scheduler": scheduler, "class_embedder": class_embedder},
            {
                "class_names": class_names,
                "latent_scale": latent_scale,
                "default_sample_size": default_sample_size,
                "default_guidance_scale": default_guidance_scale,
            },
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
    ) -> ImagePipelineOutput | tuple:
        """Samples pictures.

        Args:
            class_labels: one class or several, by number or, if the checkpoint has `class_names`, by name.
            height: pixels, a multiple of the first stage's factor; `width` alike, and the two may differ. By default
                those of `latents`, else what the network was trained on. Larger ones work, in one piece or in tiles.
            num_inference_steps: sampling steps, at least 1; the authors use 20 to 250 with DDIM.
            guidance_scale: s in u + s * (c - u), finite and >= 0: 1 is the plain conditional prediction at half the
                cost, more follows the condition more closely, 0 ignores it. By default the checkpoint's, else the
                authors'; other values than 1 need a network that was also trained without its condition.
            eta: noise of DDIM's steps in [0, 1], 0 for none; schedulers without it ignore it.
            num_images_per_prompt: pictures for each class; those of the first come first.
            generator: one for the batch, or a list with one a picture: then picture k depends on generator k alone.
            latents: standard normal noise (b, c, h, w) in place of a draw; the scheduler scales it.
            tile_size: side or (height, width) in pixels of the tiles in which network and first stage see the picture,
                blended by their distance from the tiles' borders; a multiple as `height` is. For pictures larger than
                what the network was trained on or than the memory holds. None: in one piece.
            tile_stride: pixels from tile to tile, one or (down, across); by default half a tile.
            output_type: "pil"; "np" (b, H, W, 3) or "pt" (b, 3, H, W), both in [0, 1]; "latent": the latents, scaled
                as the network sees them, not decoded.
            return_dict: False for a plain tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`, called after each step; tensors
                that it returns replace those of the loop. `pipe._interrupt = True` skips the remaining steps, and
                `pipe._guidance_scale` may be set: 1 (or 0, as diffusers' callbacks do) turns guidance off.
            callback_on_step_end_tensor_inputs: which tensors it gets, by default `["latents"]`; `prompt_embeds` and
                `negative_prompt_embeds` are the condition, whatever it is made of (context or maps), and
                `pred_original_sample` holds the clean latents that the step's prediction amounts to.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple that holds them.

        Order of the draws of each generator: the initial noise, then for each step those of `scheduler.step`.
        """
        callback_names = callback_tensor_names(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        scale = self._resolve_scale(guidance_scale)

        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        check_components(self, context_width=None if self.class_embedder is None else self._width())
        labels = self.get_label_ids(class_labels)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        batch_size = len(labels) * num_images_per_prompt
        size = self._resolve_size(height, width, latents)
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
        def encode() -> LDMCondition:
            return self.encode_labels(labels, num_images_per_prompt, device=timesteps.device)

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
        """One token a picture, and the null class's if the run is guided."""
        check_parts(self, "a class", "class_embedder")
        device = device if device is not None else self._execution_device
        tokens = self.class_embedder(torch.tensor(labels, device=device))  # (n, 1, d)
        null = None
        if self.do_classifier_free_guidance:
            null = self.class_embedder(torch.tensor([self.class_embedder.config["null_class"]], device=device))
        return LDMCondition(tokens.repeat_interleave(num_images_per_prompt, dim=0), null)

    def _width(self) -> int:
        return self.class_embedder.config["embed_dim"]
