"""Pictures of a layout, that is of named boxes, with latent diffusion.

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
from ..callbacks import Callback, callback_tensor_names
from ..checks import check_integer, check_parts
from ..listed_options import read_option
from .base import Generators, LDMBasePipeline
from .checks import check_components
from .denoising import LDMCondition
from .tiling import Tiles


class LDMLayoutPipeline(LDMBasePipeline):
    """Draws pictures with given things in given boxes.

    Boxes are (x0, y0, x1, y1), left upper and right lower corner as fractions of the picture's sides.

    Example:

        boxes, names = [(0.1, 0.2, 0.5, 0.9), (0.6, 0.1, 0.9, 0.4)], ["person", "kite"]
        image = pipe(boxes, names).images[0]
        pipe.draw_boxes(image, boxes, names)

    Args:
        vqvae, unet, scheduler, latent_scale, default_sample_size, default_guidance_scale: see `LDMBasePipeline`.
        layout_encoder: layout tokens to context; the last token of its vocabulary means "none".
        class_names: names of the categories 0, 1, ..., so that they may be asked for by name; a list, or a
            dict by number, which is how the config holds them.
        num_classes: number of categories; by default that of `class_names`.
        max_objects, encode_crop, use_group_flag, use_other_flags: the tokens' format, see
            `conditions.layout.LayoutTokenizer`.
        null_condition: whether the network also learnt sequences of nothing but "none", which guidance needs.
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
        super().__init__(
            {"vqvae": vqvae, "unet": unet, "scheduler": scheduler, "layout_encoder": layout_encoder},
            {
                "class_names": class_names,
                "num_classes": num_classes,
                "max_objects": max_objects,
                "encode_crop": encode_crop,
                "use_group_flag": use_group_flag,
                "use_other_flags": use_other_flags,
                "null_condition": null_condition,
                "latent_scale": latent_scale,
                "default_sample_size": default_sample_size,
                "default_guidance_scale": default_guidance_scale,
            },
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
            num_classes=len(names) if num_classes is None else num_classes,
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
    ) -> ImagePipelineOutput | tuple:
        """Samples pictures.

        Args:
            boxes: (x0, y0, x1, y1) of each thing as fractions in [0, 1]; or a list of such lists, one a picture.
            names: category of each box, by name or number; nested like `boxes`.
            tile_size: as elsewhere. Each tile is told the whole layout's boxes that it shows, and its own place.

        The other arguments and the result are those of `LDMClassConditionalPipeline.__call__`.
        """
        callback_names = callback_tensor_names(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        scale = self._resolve_scale(guidance_scale)

        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        check_components(self, context_width=None if self.layout_encoder is None else self._width())
        layouts = self.read_layouts(boxes, names)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        batch_size = len(layouts) * num_images_per_prompt
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
            return self.encode_layouts(layouts, num_images_per_prompt, tiles=tiles, device=timesteps.device)

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

    def read_layouts(self, boxes: Any, names: Any) -> list[list[LayoutObject]]:
        """Boxes and names as `__call__` takes them to one list of objects a picture; see `conditions.named_boxes`."""
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
        """Context vectors of layouts, of each tile if there are any, and of "no layout" if the run is guided.

        A tile is to a layout what a crop was in the training: objects outside are left out, and its place is told.
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
        return LDMCondition(None, null, tile_contexts=[encode(box) for box in tiles.latents.boxes()])

    @staticmethod
    def draw_boxes(images: Any, boxes: Any, names: Any) -> list[Image.Image]:
        """PIL pictures with their layouts drawn over them.

        Args:
            images: one or several, as `__call__` returns them.
            boxes, names: as `__call__` took them; pictures of one layout follow each other.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        several = isinstance(names[0], (list, tuple))
        layouts = list(zip(boxes, names, strict=True)) if several else [(boxes, names)]
        if len(images) % len(layouts):
            raise ValueError(f"`images` holds {len(images)} pictures for {len(layouts)} layouts: as many for each.")
        repeats = len(images) // len(layouts)
        return [draw_layout(image, *layouts[number // repeats]) for number, image in enumerate(images)]

    def _width(self) -> int:
        return self.layout_encoder.config["hidden_size"]
