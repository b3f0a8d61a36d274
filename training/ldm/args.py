"""The options of train_ldm.py, and what can be said against them before anything is loaded."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusers_ext.pipelines.checks import check_guidance_scale
from diffusers_ext.training_utils.args import (
    TrainArgs,
    below,
    between,
    check_rank,
    check_unet_widths,
    option,
    positive,
)
from diffusers_ext.training_utils.schedules import WarmupDecay
from diffusers_ext.training_utils.tokenizers import SMALLEST_VOCABULARY

TaskName = Literal["unconditional", "class", "text", "layout", "semantic", "super_resolution", "inpainting"]
CONTEXT_TASKS = ("class", "text", "layout")  # conditions for cross-attention; the others are concatenated


@dataclass
class LDMArgs:
    """What is generated from what, the denoising network, and the frozen first stage."""

    # On a resume, see TrainArgs.
    APPLIED: ClassVar[tuple[str, ...]] = ("lr_multipliers", "lr_decay_steps", "lr_decay", "guidance_scale")
    BOOKKEEPING: ClassVar[tuple[str, ...]] = (
        "num_validation_images", "validation_prompts", "num_inference_steps", "eta", "cache_dir",
    )  # fmt: skip

    task: TaskName = option("unconditional", "What the pictures are generated from.")
    pretrained_model_name_or_path: str | None = option(
        None, "Pipeline of the same task to fine-tune: its networks, noise levels and formats replace those below."
    )

    pretrained_vqvae_name_or_path: str | None = option(None, "First stage: a VQModel or an AutoencoderKL.")
    vqvae_subfolder: str | None = option(None, "Where it lies there: `vqvae` in a pipeline.")
    latent_scale: float | None = option(
        None, "Multiplies the latents; the first stage's scaling_factor when unset (1 for a VQModel without one)."
    )
    scale_by_std: bool = option(False, "latent_scale = 1 / std of the first training pictures' latents.")
    latent_channels: int | None = option(
        None, "Of the first stage. Read from it; when set, it must be so (and 3 for a network built without it)."
    )

    beta_start: float = option(0.0015, "First noise variance; between are squares of evenly spaced numbers.")
    beta_end: float = option(0.0195, "Last noise variance.")
    num_train_timesteps: int = option(1000, "Noise levels.")
    loss_type: Literal["l1", "l2"] = option("l2", "Error of the predicted noise.")
    vlb_weight: float = option(0.0, "Weight of the variational bound in the loss; 0 in the paper.")
    cond_dropout_prob: float | None = option(
        None,
        "Samples trained without their condition, for classifier-free guidance; unset: 0.1 for class, text and "
        "layout, 0 where the condition is concatenated.",
    )

    block_out_channels: list[int] = option([224, 448, 672, 896], "U-Net: width of each level, finest first.")
    layers_per_block: int = option(2, "U-Net: residual blocks of a level.")
    attention_levels: list[int] = option([], "U-Net: levels (0: finest) with attention besides the middle.")
    attention_head_dim: int | None = option(None, "U-Net: width of a head; 32 when num_attention_heads is unset too.")
    num_attention_heads: int | None = option(None, "U-Net: heads, on every level the same number.")
    transformer_layers_per_block: int = option(1, "U-Net: transformer blocks in each cross-attention.")
    cross_attention_dim: int = option(512, "Width of the condition's vectors, for class, text and layout.")
    resnet_updown: bool = option(False, "U-Net: residual blocks resample (only without cross-attention).")
    resnet_time_scale_shift: Literal["default", "scale_shift"] = option(
        "default", "U-Net: the time shifts, or it scales and shifts."
    )
    norm_num_groups: int = option(32, "U-Net: groups of the group norms.")
    dropout: float = option(0.0, "U-Net: dropout in the residual blocks.")

    num_labels: int | None = option(
        None, "Classes, categories of boxes, or labels of maps; read from the data where they tell."
    )
    token_init_std: float = option(
        1.0,
        "Text and layout: standard deviation of a new encoder's rows for tokens and for their places (text: 0.5 at "
        "the most for places). It is 0.02 in the paper, with which small models did not learn colours and places.",
    )
    pretrained_tokenizer_name_or_path: str | None = option(
        None, "Text: e.g. bert-base-uncased (the paper's); unset: a byte-pair tokenizer learnt from the captions."
    )
    vocab_size: int = option(1024, "Text: largest size of a learnt vocabulary.")
    text_max_length: int = option(77, "Text: tokens of a caption, which are padded and cut to it.")
    encoder_layers: int = option(16, "Text and layout: layers of the transformer (32 in the paper's text model).")
    encoder_attention_heads: int = option(8, "Text and layout: heads of the transformer.")
    encoder_head_dim: int = option(64, "Text and layout: width of a head, whatever cross_attention_dim is.")
    boxes_column: str = option("boxes", "Layout: column with a list of boxes.")
    box_names_column: str = option("box_names", "Layout: column with the name (or category number) of each box.")
    box_format: Literal["xyxy", "xywh", "xyxy_pixels", "xywh_pixels"] = option(
        "xyxy", "Layout: (left, top, right, bottom) or (left, top, width, height), relative or in pixels."
    )
    layout_flags: Literal["none", "group", "all"] = option(
        "none",
        "Layout: the column is_group_of, or also is_occluded, is_depiction and is_inside, with one value a box.",
    )
    max_objects: int = option(30, "Layout: boxes of a sequence; further ones are left out.")
    layout_vocab_size: int = option(8192, "Layout: tokens; its root is the grid of places.")
    semantic_column: str = option("semantic", "Semantic: column with the label map (a picture of integers).")
    rescaler_channels: int = option(3, "Semantic: channels that the label map becomes.")
    degradation: Literal["bicubic", "bsr", "bsr_light"] = option(
        "bicubic", "Super-resolution: what makes the small picture (bsr_light: the released model)."
    )
    low_column: str | None = option(
        None, "Super-resolution: column with small pictures of your own, instead of degraded large ones."
    )
    crop_scale: list[float] | None = option(
        None,
        "Range of the square that is cut, relative to the shorter side; starting at 0: at --resolution pixels. Unset: "
        "1 1, for super-resolution 0.5 1.",
    )

    lr_multipliers: list[float] | None = option(
        None, "First, largest and last multiple of learning_rate, instead of --lr_scheduler: a linear warm-up of "
        "--lr_warmup_steps, then a way down until --lr_decay_steps."
    )  # fmt: skip
    lr_decay_steps: int | None = option(None, "End of that way down; max_train_steps when unset.")
    lr_decay: Literal["cosine", "linear"] = option("cosine", "Its shape.")
    rank: int | None = option(None, "Train LoRA matrices of this rank in the U-Net instead of all weights.")
    cache_dir: str | None = option(
        None, "Folder for the pictures' latents: computed once, then trained from. Excludes augmentation."
    )

    num_validation_images: int = option(8, "Pictures of a validation.")
    validation_prompts: list[str] | None = option(None, "Text: prompts of the validation pictures; captions if unset.")
    guidance_scale: float | None = option(None, "For the validation pictures, and the pipeline's default.")
    num_inference_steps: int = option(50, "For the validation pictures.")
    eta: float = option(0.0, "For the validation pictures: 0 is DDIM, 1 draws new noise at every step.")

    def __post_init__(self):
        self._check_ranges()
        check_rank(self, "pretrained_model_name_or_path")
        if self.cond_dropout_prob and self.task == "unconditional":
            raise ValueError(
                f"--cond_dropout_prob={self.cond_dropout_prob}: --task unconditional has no condition to drop."
            )
        if self.validation_prompts and self.task != "text":
            raise ValueError(f"--validation_prompts go with --task text, got --task {self.task}.")
        if self.low_column and self.task != "super_resolution":
            raise ValueError(f"--low_column={self.low_column} goes with --task super_resolution, got {self.task}.")
        if self.low_column and self.crop_scale:
            raise ValueError("--low_column with --crop_scale: pairs are cut at --resolution pixels, never resized.")
        if self.resnet_updown and self.task in CONTEXT_TASKS:
            raise ValueError(f"--resnet_updown goes with tasks without cross-attention, got --task {self.task}.")
        if self.scale_by_std and self.latent_scale is not None:
            raise ValueError(f"--scale_by_std measures what --latent_scale={self.latent_scale} sets: leave one out.")
        if self.scale_by_std and self.pretrained_model_name_or_path:
            raise ValueError("--scale_by_std with --pretrained_model_name_or_path: its latents have a scale already.")
        if self.attention_head_dim is not None and self.num_attention_heads is not None:
            raise ValueError(
                f"--attention_head_dim={self.attention_head_dim} and --num_attention_heads={self.num_attention_heads} "
                "say the same thing: leave one out."
            )

    def _check_ranges(self) -> None:
        positive(
            self, "num_train_timesteps", "layers_per_block", "attention_head_dim", "num_attention_heads",
            "transformer_layers_per_block", "cross_attention_dim", "norm_num_groups", "num_labels", "encoder_layers",
            "encoder_attention_heads", "encoder_head_dim", "max_objects", "rescaler_channels", "latent_channels",
            "latent_scale", "token_init_std", "lr_decay_steps", "rank", "layout_vocab_size", "num_validation_images",
            "num_inference_steps",
        )  # fmt: skip
        between(self, 0, 1, "cond_dropout_prob", "eta")
        between(self, SMALLEST_VOCABULARY, None, "vocab_size")
        between(self, 3, None, "text_max_length")  # start, one token, end
        below(self, 0, 1, "dropout")
        between(self, 0, None, "vlb_weight")
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"--beta_start={self.beta_start} and --beta_end={self.beta_end}: 0 < start <= end < 1 is needed."
            )
        check_unet_widths(
            self, attention_head_dim=self.attention_head_dim, num_attention_heads=self.num_attention_heads
        )
        if self.crop_scale is not None and not (
            len(self.crop_scale) == 2 and 0 <= self.crop_scale[0] <= self.crop_scale[1] <= 1 and self.crop_scale[1]
        ):
            raise ValueError(f"--crop_scale needs two numbers, 0 <= first <= second <= 1, got {self.crop_scale}.")
        if self.lr_multipliers is not None and (len(self.lr_multipliers) != 3 or min(self.lr_multipliers) < 0):
            raise ValueError(f"--lr_multipliers needs three numbers >= 0, got {self.lr_multipliers}.")

    @property
    def dropout_of_condition(self) -> float:
        """How often the condition is dropped."""
        if self.cond_dropout_prob is not None:
            return self.cond_dropout_prob
        return 0.1 if self.task in CONTEXT_TASKS else 0.0

    @property
    def resolved_crop_scale(self) -> tuple[float, float]:
        low, high = self.crop_scale or ((0.5, 1.0) if self.task == "super_resolution" else (1.0, 1.0))
        return low, high


def lr_multiplier(args: LDMArgs, train: TrainArgs) -> WarmupDecay | None:
    """The paper's schedules, where they are asked for."""
    if args.lr_multipliers is None:
        return None
    first, peak, last = args.lr_multipliers
    length = args.lr_decay_steps or train.max_train_steps
    try:
        return WarmupDecay(train.lr_warmup_steps, first, peak, last, length, args.lr_decay)
    except ValueError as error:
        raise ValueError(f"--lr_multipliers with --lr_warmup_steps and --lr_decay_steps: {error}") from error
