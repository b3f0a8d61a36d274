"""Images of a layout, that is of named boxes, with latent diffusion.

Rombach et al., arXiv 2112.10752, section 4.3.1; original: CompVis/latent-diffusion@a506df5 (code and weights MIT),
which published the network, but neither its data set class nor any way to give it boxes. Differences: see
`base.py` and `conditions/layout.py`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from ...conditions.layout import LayoutObject, LayoutTokenizer
from ...conditions.named_boxes import draw_layout, read_layouts
from ...models.encoders_ldm import LDMLayoutEncoder
from ..callbacks import Callback
from ..checks import check_integer, check_parts
from ..listed_options import read_option, record_option, record_sample_size
from .base import Generators, LDMBasePipeline
from .denoising import LDMCondition
from .tiling import Tiles


class LDMLayoutPipeline(LDMBasePipeline):
    """Draws images with given things in given boxes.

    Boxes are (x0, y0, x1, y1), the upper left and the lower right corner as fractions of the image's sides.

    Example:

        boxes, names = [(0.1, 0.2, 0.5, 0.9), (0.6, 0.1, 0.9, 0.4)], ["person", "kite"]
        image = pipe(boxes, names).images[0]
        pipe.draw_boxes(image, boxes, names)

    Args:
        vqvae: The first stage, an `AutoencoderKL` or a `VQModel`. Its config holds the scale of the latents.
        unet: Predicts the noise under cross-attention to the layout.
        scheduler: Any scheduler of diffusers that denoises with betas.
        layout_encoder: Layout tokens to context. The last token of its vocabulary means "none".
        class_names: Names of the categories 0, 1, ..., so that categories may be asked for by name. A list, or a dict
            by number, which is how the config holds them.
        num_classes: Number of categories. The default is the number of `class_names`.
        max_objects: Number of boxes in a layout at most, see `conditions.layout.LayoutTokenizer`.
        encode_crop: Whether the layout's tokens tell which part of the image is shown.
        use_group_flag: Whether an object's tokens tell that it is a group.
        use_other_flags: Whether an object's tokens tell that it is occluded, truncated and so on.
        null_condition: Whether the network also learnt sequences of nothing but "none", which guidance needs.
        latent_scale: By what latents are multiplied before diffusion, in place of `vqvae.config.scaling_factor`.
        default_sample_size: Side or (height, width) of the latents when a call names no size, in place of
            `unet.config.sample_size`.
        default_guidance_scale: Guidance scale when a call names none, in place of the one that the authors used.
    """

    _pipeline_tag = "text-to-image"
    _card_tags = ("layout-to-image",)
    model_cpu_offload_seq = "layout_encoder->unet->vqvae"

    layout_encoder: LDMLayoutEncoder

    def __init__(
        self,
        vqvae: AutoencoderKL | VQModel,
        unet: UNet2DConditionModel,
        scheduler: Any,
        layout_encoder: LDMLayoutEncoder,
        class_names: list[str] | dict[str, str] | None = None,
        num_classes: int | None = None,
        max_objects: int = 30,
        encode_crop: bool = True,
        use_group_flag: bool = True,
        use_other_flags: bool = False,
        null_condition: bool = False,
        latent_scale: float | None = None,
        default_sample_size: int | tuple[int, int] | dict[str, int] | None = None,
        default_guidance_scale: float | None = None,
    ):
        super().__init__(vqvae, unet, scheduler, latent_scale)
        self.register_modules(layout_encoder=layout_encoder)
        self.register_to_config(
            class_names=record_option("class_names", class_names),
            num_classes=num_classes,
            max_objects=max_objects,
            encode_crop=encode_crop,
            use_group_flag=use_group_flag,
            use_other_flags=use_other_flags,
            null_condition=null_condition,
            default_sample_size=record_sample_size(default_sample_size, None, None),
            default_guidance_scale=default_guidance_scale,
        )

    @property
    def class_names(self) -> list[str] | None:
        """Names of the categories 0, 1, ..."""
        return read_option(self.config["class_names"])

    @property
    def layout_tokenizer(self) -> LayoutTokenizer:
        """Boxes to tokens, in the format that the network was trained with.

        Raises:
            ValueError: if nothing says how many categories there are, or they do not fit the encoder.
        """
        names, num_classes = self.class_names, self.config["num_classes"]
        if num_classes is None and names is None:
            raise ValueError("The pipeline knows neither `class_names` nor `num_classes`: build it with one of them.")
        check_parts(self, "a layout", "layout_encoder")
        tokenizer = LayoutTokenizer(
            num_classes=len(names or ()) if num_classes is None else num_classes,
            max_objects=self.config["max_objects"],
            vocab_size=self.layout_encoder.config["vocab_size"],
            encode_crop=self.config["encode_crop"],
            use_group_flag=self.config["use_group_flag"],
            use_other_flags=self.config["use_other_flags"],
        )
        longest = self.layout_encoder.config["max_length"]
        if tokenizer.length > longest:
            raise ValueError(
                f"A layout of `max_objects`={tokenizer.max_objects} is {tokenizer.length} tokens long, layout_encoder"
                f" takes {longest}: build the pipeline with the number of objects that it was trained with."
            )
        return tokenizer

    @property
    def context_width(self) -> int:
        check_parts(self, "a layout", "layout_encoder")
        return self.layout_encoder.config["hidden_size"]

    @classmethod
    def example_lines(cls, config: Mapping[str, Any], prompt: str | None = None) -> str:
        names = read_option(config.get("class_names"))
        return f"image = pipe([(0.1, 0.2, 0.5, 0.9)], [{names[0] if names else 0!r}]).images[0]"

    @torch.no_grad()
    def __call__(
        self,
        boxes: Any,
        names: Any,
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
        """Draws images of layouts.

        Args:
            boxes: (x0, y0, x1, y1) of each thing as fractions in [0, 1], or a list of such lists with one for each
                image.
            names: Category of each box, by name or number, nested like `boxes`.
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
            num_images_per_prompt: Number of images for each layout. The images of the first layout come first.
            generator: One generator for the batch, or a list with one for each image. With a list, image k depends on
                generator k alone.
            latents: Standard normal noise (b, c, h, w) in place of a draw. The scheduler scales it.
            tile_size: Side or (height, width) in pixels of the tiles in which the network and the first stage see the
                image. Each tile is told its place and the boxes that it shows. Tiles are blended by the distance from
                their borders. They are for images that are larger than those of the training, or than the memory
                holds. None means one piece.
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
        layouts = self.read_layouts(boxes, names)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        return self.run(
            len(layouts) * num_images_per_prompt,
            self.resolve_size(height, width, latents),
            lambda device, tiles: self.encode_layouts(layouts, num_images_per_prompt, tiles=tiles, device=device),
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

    def read_layouts(self, boxes: Any, names: Any) -> list[list[LayoutObject]]:
        """Boxes and names, as `__call__` takes them, to one list of objects for each image.

        See `conditions.named_boxes`.
        """
        tokenizer = self.layout_tokenizer
        return read_layouts(
            boxes,
            names,
            num_classes=tokenizer.num_classes,
            class_names=self.class_names,
            max_objects=tokenizer.max_objects,
        )

    def encode_layouts(
        self,
        layouts: list[list[LayoutObject]],
        num_images_per_prompt: int = 1,
        *,
        tiles: Tiles | None = None,
        device: torch.device | str | None = None,
    ) -> LDMCondition:
        """Context vectors of layouts, and those of "no layout" if the run is guided.

        With tiles there is a context for each tile. A tile is described as a crop was in the training: its place is
        told, and objects outside of it are left out.
        """
        tokenizer, device = self.layout_tokenizer, device if device is not None else self._execution_device

        def encode(crop: tuple[float, float, float, float] | None = None) -> Tensor:
            tokens = torch.stack([tokenizer.encode(layout, crop=crop) for layout in layouts])
            context = self.layout_encoder(tokens.to(device))  # (n, l, d)
            return context.repeat_interleave(num_images_per_prompt, dim=0)

        null = None
        if self.do_classifier_free_guidance:
            nothing = torch.full((1, tokenizer.length), tokenizer.none_token, device=device)
            null = self.layout_encoder(nothing)
        if tiles is None:
            return LDMCondition(encode(), null)
        return LDMCondition([encode(box) for box in tiles.latents.boxes()], null)

    @staticmethod
    def draw_boxes(images: Any, boxes: Any, names: Any) -> list[Image.Image]:
        """PIL images with their layouts drawn over them.

        Args:
            images: one or several, as `__call__` returns them.
            boxes, names: as `__call__` took them; images of one layout follow each other.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        several = isinstance(names[0], (list, tuple))
        layouts = list(zip(boxes, names, strict=True)) if several else [(boxes, names)]
        if len(images) % len(layouts):
            raise ValueError(f"`images` holds {len(images)} pictures for {len(layouts)} layouts: as many for each.")
        repeats = len(images) // len(layouts)
        return [draw_layout(image, *layouts[number // repeats]) for number, image in enumerate(images)]
