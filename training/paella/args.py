"""The options of train_paella.py that are its own."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusers_ext.pipelines.checks import check_guidance_scale
from diffusers_ext.training_utils.args import between, check_rank, option, positive

CLIP_HELP = "CLIP, for text and image: a folder, a name on the Hub, or open_clip:<model>/<tag or file>."


@dataclass
class PaellaArgs:
    """The token predictor, what it is conditioned on, and the frozen networks around it."""

    # On a resume, see TrainArgs.
    APPLIED: ClassVar[tuple[str, ...]] = ("text_encoder_lr", "guidance_scale", "typical_mass")
    BOOKKEEPING: ClassVar[tuple[str, ...]] = ("num_inference_steps", "validation_prompts", "cache_dir")

    pretrained_model_name_or_path: str | None = option(
        None, "Paella pipeline to fine-tune; its networks replace those named below."
    )
    pretrained_vqvae_name_or_path: str | None = option(None, "Tokenizer (VQ autoencoder).")
    pretrained_clip_name_or_path: str | None = option(None, CLIP_HELP)
    condition: Literal["text", "image", "class", "semantic"] = option(
        "text", "CLIP text vector, CLIP image vector, one-hot class, or one-hot label map."
    )
    num_labels: int | None = option(
        None, "Classes, for --condition class and semantic; counted in the data when unset."
    )
    semantic_column: str = option("semantic", "Column with the label map (integer picture).")
    train_text_encoder: bool = option(False, "Train CLIP's text tower as well; the paper keeps it frozen.")
    text_encoder_lr: float | None = option(None, "The text tower's; learning_rate when unset.")
    cond_dropout_prob: float = option(0.1, "Samples trained with the zero vector.")
    block_out_channels: list[int] = option([320, 640, 1280], "Width of each level, finest first.")
    down_layers_per_block: list[int] = option([4, 8, 16], "Residual blocks of each level on the way down.")
    up_layers_per_block: list[int] = option([16, 8, 4], "Residual blocks of each level on the way up, deepest first.")
    time_embed_dim: int = option(64, "Width of the sinusoidal embedding of the noise level.")
    kernel_size: int = option(3, "Side of the depthwise kernels.")
    layer_scale_init: float = option(1e-6, "First value of the residual branches' scales.")
    label_smoothing: float = option(0.1, "Of the cross-entropy.")
    rank: int | None = option(None, "Train LoRA matrices of this rank instead of all weights.")
    cache_dir: str | None = option(
        None,
        "Folder for each picture's tokens and condition: computed once, then trained from. Excludes "
        "augmentation; refused with other data or encoders.",
    )
    guidance_scale: float = option(5.0, "For the validation pictures.")
    typical_mass: float = option(0.2, "Saved as the scheduler's default.")
    num_inference_steps: int = option(12, "For the validation pictures.")
    validation_prompts: list[str] | None = option(
        None, "Prompts of the validation pictures; captions of the data when unset."
    )

    def __post_init__(self):
        between(self, 0, 1, "cond_dropout_prob")
        positive(
            self, "rank", "num_inference_steps", "num_labels", "block_out_channels", "down_layers_per_block",
            "up_layers_per_block", "time_embed_dim", "kernel_size",
        )  # fmt: skip
        between(self, 0, None, "text_encoder_lr")
        check_guidance_scale(self.guidance_scale)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label_smoothing must lie in [0, 1), got {self.label_smoothing}.")
        if self.validation_prompts and self.condition != "text":
            raise ValueError(f"--validation_prompts go with --condition text, got --condition {self.condition}.")
        check_rank(self, "pretrained_model_name_or_path")
        if self.train_text_encoder and (self.condition != "text" or self.rank):
            raise ValueError("--train_text_encoder goes with --condition text and without --rank.")
