"""Label maps, sketches or geometry to images with PITI: 64x64 pixels, then 256x256.

Wang et al., "Pretraining is All You Need for Image-to-Image Translation", arXiv 2205.12952; original:
PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/glide_util.py and image_sample.py (MIT). Differences: the encoder runs
once a call, not once a step; the paper's normalised guidance, which the released code lacks, comes with
`NormalizedCFGScheduler`; label ids are accepted beside their colours; any scheduler of diffusers that has such betas.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from torch import Tensor

from ...conditions.label_maps import label_batch
from ...conditions.masks import mask_values
from ...conditions.palettes import NAMED_PALETTES, check_palette
from ...conditions.piti import (
    CONDITION_CHANNELS,
    label_condition,
    normals_and_depth_condition,
    read_depth,
    read_normals,
    resize_nearest,
    sketch_condition,
)
from ...models.blocks.wrappers import unwrap
from ...models.encoder_piti import PITIEncoder
from ..adapters import low_rank_difference
from ..base import Config, ConfigOf
from ..callbacks import Callback
from ..checks import check_integer, check_parts
from ..glide.base import CHANNELS, Generators, GlideBasePipeline, Run
from ..listed_options import read_option, record_option
from ..saving import check_saveable

logger = logging.get_logger(__name__)


def truncate_to_8_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] on the grid of 8 bits, the next darker value each: so the authors save the small image."""
    return (127.5 * (images.clamp(-1, 1) + 1)).floor() / 127.5 - 1


class PITIPipeline(GlideBasePipeline):
    """Draws images that follow a label map, a sketch, or normals and depth, whichever the checkpoint was trained on.

    Example:

        pipe(label_map=Image.open("labels.png"), generator=torch.Generator().manual_seed(0)).images[0]

    Args:
        encoder: Conditions to what the base U-Net attends to.
        unet: Predicts the noise of the small image.
        scheduler: Any scheduler of diffusers that denoises with betas, or `NormalizedCFGScheduler` around one.
        upscale_encoder: As `encoder`, for the upsampler. The upsampler may be None, with all of its parts.
        upscale_unet: Predicts the noise of the large image.
        upscale_scheduler: Any scheduler of diffusers that denoises with betas.
        condition_type: "label_map", "sketch" or "geometry" (normals and depth).
        label_palette: Label maps only: (r, g, b) of each label, 0 to 255, which is what the encoder sees. A list, or
            a dict by number; the default is PITI's coding of the 182 classes of COCO-Stuff, and black for label 182,
            which is nothing.
        label_names: Label maps only: names of the labels 0, 1, ...
        default_guidance_scale: Guidance scale when a call names none, in place of the authors' 1.3.
    """

    _pipeline_tag = "image-to-image"
    _card_tags = ("semantic-image-synthesis",)
    _example = """from PIL import Image

image = pipe(label_map=Image.open("labels.png")).images[0]  # one label a pixel"""

    model_cpu_offload_seq = "encoder->unet->upscale_encoder->upscale_unet"
    _optional_components = ["upscale_encoder", "upscale_unet", "upscale_scheduler"]
    _usual_guidance_scale = 1.3
    to_8_bits = staticmethod(truncate_to_8_bits)

    encoder: PITIEncoder
    upscale_encoder: PITIEncoder | None

    def __init__(
        self,
        encoder: PITIEncoder,
        unet: UNet2DConditionModel,
        scheduler: Any,
        upscale_encoder: PITIEncoder | None = None,
        upscale_unet: UNet2DConditionModel | None = None,
        upscale_scheduler: Any = None,
        condition_type: str = "label_map",
        label_palette: list[list[int]] | dict[str, list[int]] | None = None,
        label_names: list[str] | dict[str, str] | None = None,
        default_guidance_scale: float | None = None,
    ):
        super().__init__(unet, scheduler, upscale_unet, upscale_scheduler)
        self.register_modules(encoder=encoder, upscale_encoder=upscale_encoder)
        if condition_type not in CONDITION_CHANNELS:
            raise ValueError(
                f"`condition_type` is {condition_type!r}: it must be one of {', '.join(CONDITION_CHANNELS)}."
            )
        if label_palette is not None:
            listed = read_option(record_option("label_palette", label_palette))
            label_palette = check_palette(listed, "`label_palette`").tolist()
        self.register_to_config(
            condition_type=condition_type,
            label_palette=record_option("label_palette", label_palette),
            label_names=record_option("label_names", label_names),
            default_guidance_scale=default_guidance_scale,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in the other pipelines; a folder that `save_adapter` wrote is refused with what loads it.

        Raises:
            ValueError: For a folder without a U-Net, or one of another pipeline.
        """
        if "unet" not in kwargs and Path(pretrained_model_name_or_path).is_dir():
            cls.check_part(pretrained_model_name_or_path, "unet")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def check_part(cls, folder: str | Path, name: str) -> None:
        """Refuses a folder that `save_adapter` wrote; `DiffusionPipeline.from_pretrained` asks before it reads a part.

        Args:
            folder: Of the pipeline, on this machine.
            name: Of the part.

        Raises:
            ValueError: For a U-Net that is not there. It names what loads the folder.
        """
        # of a repository on the Hub, where the matrices are not loaded with a pipeline
        cached = next((part for part in Path(folder).parts if part.startswith("models--")), None)
        has_matrices = cached is not None or Path(folder, LORA_WEIGHT_NAME_SAFE).is_file()
        if name != "unet" or Path(folder, name).is_dir() or not has_matrices:
            return
        place = str(folder) if cached is None else cached.removeprefix("models--").replace("--", "/", 1)
        raise ValueError(
            f"{place!r} holds what a condition adds to a prior, and no U-Net: load it with"
            f" `PITIPipeline.from_prior(prior, {place!r})`, or with --lora beside the prior's folder."
            " `save_pretrained` then makes a whole pipeline of it."
        )

    @classmethod
    def from_prior(
        cls,
        prior: str | Path,
        adapter: str | Path,
        *,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> "PITIPipeline":
        """Loads a condition onto a prior: its encoder, and LoRA matrices that are added to the prior's U-Net.

        So several conditions share the weights of one prior.

            pipe = PITIPipeline.from_prior("checkpoints/piti-scenes", "checkpoints/piti-scenes", subfolder="sketch")

        Args:
            prior: Folder or name on the Hub of the pipeline whose `unet` the matrices change.
            adapter: Folder or name on the Hub of what `save_adapter` or a training with `--rank` wrote.
            subfolder: Where in `adapter` it lies.
            dtype: As in `from_pretrained`; float32 if unset.

        The other arguments are those of `from_pretrained` that say how to look a name up on the Hub (`cache_dir`,
        `local_files_only`, `revision` ...). They hold for both.

        Raises:
            ValueError: For matrices of another network than the prior's.
        """
        folder = Path(adapter)
        if not folder.is_dir():
            wanted = None if subfolder is None else f"{subfolder}/*"
            folder = Path(snapshot_download(str(adapter), allow_patterns=wanted, **kwargs))
        folder = folder / (subfolder or "")
        unet = UNet2DConditionModel.from_pretrained(prior, subfolder="unet", dtype=torch.float32, **kwargs)
        pipe = cls.from_pretrained(folder, unet=unet)
        pipe.load_lora_weights(folder)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        return pipe if dtype in (None, torch.float32) else pipe.to(dtype)

    def save_adapter(self, save_directory: str | Path, prior: str | Path, rank: int = 16) -> None:
        """Saves what the pipeline adds to a prior, for `from_prior`.

        That is all components but the U-Net, and the U-Net's change since the prior as LoRA matrices. They are
        the nearest of their rank to the change of the linear and convolutional layers. Biases and norms stay the
        prior's: compare the images before you share it.

        Args:
            save_directory: Folder, made if missing.
            prior: Folder or name on the Hub of the pipeline whose `unet` the training started from.
            rank: Rank of the matrices, at least 1. The larger, the nearer.

        Raises:
            ValueError: For a prior of other layers, and a rank below 1.
        """
        check_integer("rank", rank, 1)
        check_saveable(self.components)
        base = UNet2DConditionModel.from_pretrained(prior, subfolder="unet")
        matrices = low_rank_difference(self._network, base, rank)
        self.save_config(save_directory)
        for name, component in self.components.items():
            if component is not None and name != "unet":
                unwrap(component).save_pretrained(Path(save_directory, name))
        dtype = self._network.dtype
        self.save_lora_weights(save_directory, {name: value.to(dtype) for name, value in matrices.items()})

    @property
    def label_palette(self) -> np.ndarray:
        """(r, g, b) of the labels 0, 1, ..., uint8 (labels, 3)."""
        palette = read_option(self.config["label_palette"])
        return NAMED_PALETTES["coco182"] if palette is None else np.array(palette, dtype=np.uint8)

    @torch.no_grad()
    def __call__(
        self,
        label_map: Any = None,
        sketch: Any = None,
        normals: Any = None,
        depth: Any = None,
        num_inference_steps: int | str | None = None,
        upscale_num_inference_steps: int | str | None = None,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        upscale_latents: Tensor | None = None,
        upscale_temperature: float = 0.997,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws images that follow conditions, which are resized to what the encoder takes, nearest neighbour.

        Args:
            label_map: One map or several of one size: PIL images of mode L or P that hold labels, or of mode RGB in
                the checkpoint's `label_palette`; integer arrays or tensors (H, W) or (n, H, W).
            sketch: White lines on black: PIL images, arrays or tensors. Only pure white is a line.
            normals: Unit normals: PIL images in the usual colours, or float tensors (3, H, W) or (n, 3, H, W) in
                [-1, 1], or arrays (H, W, 3) of them; or a list of those.
            depth: Depth in metres: float arrays or tensors (H, W) or (n, H, W), 0 where it is unknown, or a list of
                those.
            num_inference_steps: Number of steps of the small image, at least 1. `RespacedScheduler` also takes a
                respacing such as "250". The default is the checkpoint's, else 100.
            upscale_num_inference_steps: The same for the large image; the default is the checkpoint's, else 27.
            guidance_scale: s in u + s * (c - u) for the small image, finite and at least 0; the paper's w is s - 1.
                1 is the plain conditional prediction at half the cost. The default is the checkpoint's, else 1.3.
                With `NormalizedCFGScheduler` it is normalised. The upsampler is not guided.
            eta: Noise of DDIM's steps in [0, 1]; 0 adds none. Schedulers without it ignore it.
            num_images_per_prompt: Number of images for each condition. The images of the first one come first.
            generator: One generator for the batch, or a list with one for each image. With a list, image k depends on
                generator k alone.
            latents: Standard normal noise (b, 3, h, w) of the small image in place of a draw.
            upscale_latents: Standard normal noise (b, 3, H, W) of the large image in place of a draw.
            upscale_temperature: What the large image's noise is multiplied by.
            output_type: "pil"; "np" (b, H, W, 3) or "pt" (b, 3, H, W), both in [0, 1]; or "latent" for what the last
                stage denoised, not clamped.
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`, called after each step of both
                stages; `pipe.stage` tells which. Tensors that it returns replace those of the loop.
                `pipe._interrupt = True` ends the run with what the stage has.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets, by default `["latents"]`.
                `prompt_embeds` and `negative_prompt_embeds` are the tokens (b, l + 1, d) of the condition and of the
                null condition, the vector of the whole last. `pred_original_sample` is the clean image that the step's
                prediction amounts to, for reading only.

        Returns:
            `ImagePipelineOutput` with the `images`, or a tuple that holds them.

        Raises:
            TypeError, ValueError: For arguments of another kind or range, before any network runs.

        Order of the draws of each generator: noise of the small image, of its steps, of the large image, of its steps.
        """
        # 1. Everything that can be refused is refused here
        self.check_components()
        conditions = self.read_conditions(label_map=label_map, sketch=sketch, normals=normals, depth=depth)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        run = Run(
            guidance_scale=self.resolve_scale(guidance_scale),
            eta=eta,
            generator=generator,
            latents=latents,
            upscale_latents=upscale_latents,
            upscale_temperature=upscale_temperature,
            callback=callback_on_step_end,
            callback_tensors=callback_on_step_end_tensor_inputs,
            num_inference_steps=num_inference_steps,
            upscale_num_inference_steps=upscale_num_inference_steps,
        )
        batch_size = len(conditions) * num_images_per_prompt
        self.check_run(run, batch_size, output_type)

        # 2. One stage after the other
        drawn: Tensor | None = None
        for name, *_ in self.stage_parts():
            encoder = self.encoder if name == "base" else self.upscale_encoder
            embeds = self.encode_conditions(conditions, encoder).repeat_interleave(num_images_per_prompt, dim=0)
            stage = self.prepare_stage(name, run, embeds, partial(self.null_embeds, batch_size, encoder), drawn)
            drawn = self.run_stage(stage, run)
            if self.interrupt:
                break
        assert drawn is not None
        return self.finish_images(drawn, output_type, return_dict)

    @classmethod
    def idle_arguments(cls, index: Config, config_of: ConfigOf) -> set[str]:
        taken = _arguments_of(index.get("condition_type", "label_map"))
        return {"label_map", "sketch", "normals", "depth"} - {*taken}

    def read_conditions(
        self, *, label_map: Any = None, sketch: Any = None, normals: Any = None, depth: Any = None
    ) -> Tensor:
        """What a user has of a condition, as the encoder takes it: (n, channels, side, side) in [-1, 1].

        The arguments are those of a call.

        Raises:
            TypeError, ValueError: For conditions of another type than the checkpoint's, and malformed ones.
        """
        kind = self.config["condition_type"]
        given = {"label_map": label_map, "sketch": sketch, "normals": normals, "depth": depth}
        wanted = _arguments_of(kind)
        received = [name for name, value in given.items() if value is not None]
        if set(received) != set(wanted):
            raise ValueError(
                f"This checkpoint draws from {' and '.join(f'`{name}`' for name in wanted)}; received"
                f" {', '.join(received) or 'nothing'}."
            )
        side = self.encoder.config["sample_size"]
        if kind == "label_map":
            palette = self.label_palette
            labels = label_batch(label_map, len(palette), palette=palette.tolist())
            return label_condition(labels, palette, side)
        if kind == "sketch":
            lines = mask_values(sketch, "sketch") >= 1  # grey pixels are no lines
            if not bool(resize_nearest(lines[:, None].float(), side).flatten(1).any(dim=1).all()):
                logger.warning(
                    "`sketch` has no lines (pure white pixels): that is the null condition, so the image is drawn"
                    " freely. Lines are white on black."
                )
            return sketch_condition(lines, side)
        return normals_and_depth_condition(read_normals(normals), read_depth(depth), side)

    def encode_conditions(self, conditions: Tensor, encoder: PITIEncoder | None = None) -> Tensor:
        """Tokens and the vector behind them, (n, l + 1, d).

        Args:
            conditions: as `read_conditions` gives them.
            encoder: one of the pipeline's two, by default the base stage's.
        """
        check_parts(self, "a condition", "encoder")
        encoder = self.encoder if encoder is None else encoder
        conditions = conditions.to(device=self._execution_device, dtype=encoder.dtype)
        tokens, vector = encoder(conditions, return_dict=False)
        return torch.cat([tokens, vector[:, None]], dim=1)

    def null_embeds(self, batch_size: int, encoder: PITIEncoder | None = None) -> Tensor:
        """What stands for "no condition", an image of ones, encoded: (batch_size, l + 1, d)."""
        encoder = self.encoder if encoder is None else encoder
        side = encoder.config["sample_size"]
        null = torch.ones(1, encoder.config["in_channels"], side, side)
        return self.encode_conditions(null, encoder).repeat(batch_size, 1, 1)  # a callback may write in each

    def check_components(self) -> None:
        """All components fit: the U-Nets take what the encoders give, and those what the checkpoint draws from."""
        check_parts(self, "a condition", "encoder", "unet", "scheduler")
        self.check_stages()
        if self.upscales:
            check_parts(self, "the upsampler", "upscale_encoder")
        kind = self.config["condition_type"]
        encoders = {"base": self.encoder, "upscale": self.upscale_encoder}
        for name, unet, _ in self.stage_parts():
            prefix, encoder = ("" if name == "base" else "upscale_"), encoders[name]
            if encoder.config["in_channels"] != CONDITION_CHANNELS[kind]:
                raise ValueError(
                    f"`{prefix}encoder` takes {encoder.config['in_channels']} channels, but a condition of type"
                    f" {kind!r} has {CONDITION_CHANNELS[kind]}: load the encoder of this condition."
                )
            if encoder.config["sample_size"] != self.encoder.config["sample_size"]:
                raise ValueError(
                    f"`upscale_encoder` takes conditions of {encoder.config['sample_size']} pixels, `encoder` of"
                    f" {self.encoder.config['sample_size']}: load the pair that was trained together."
                )
            width, wanted = encoder.config["hidden_size"], unet.config["cross_attention_dim"]
            if width != wanted:
                raise ValueError(
                    f"`{prefix}unet` attends to tokens of width {wanted}, `{prefix}encoder` gives {width}: load the"
                    " pair that was trained together."
                )
            channels = CHANNELS if name == "base" else 2 * CHANNELS
            if unet.config["in_channels"] != channels:
                raise ValueError(
                    f"`{prefix}unet` takes {unet.config['in_channels']} channels, a stage {name} has {channels}."
                )


def _arguments_of(condition_type: str) -> tuple[str, ...]:
    return ("normals", "depth") if condition_type == "geometry" else (condition_type,)
