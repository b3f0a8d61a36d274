"""The options of train_clip.py that are its own."""

from dataclasses import dataclass

from diffusers_ext.training_utils.args import between, option, positive
from diffusers_ext.training_utils.tokenizers import SMALLEST_VOCABULARY

ONE_PICTURE = (
    "a contrast needs two different captions in the micro-batch of a process, else its loss is 0 from the start."
)


@dataclass
class ClipArgs:
    """The two towers."""

    pretrained_model_name_or_path: str | None = option(
        None, "CLIP to go on with, and its tokenizer: the sizes below are theirs then."
    )
    vocab_size: int = option(1024, "Largest size of the byte-level BPE vocabulary.")
    max_length: int = option(32, "Window of the text tower in tokens, start and end included.")
    text_width: int = option(128, "Width of the text tower.")
    text_layers: int = option(3, "Layers of the text tower.")
    vision_width: int = option(128, "Width of the image tower.")
    vision_layers: int = option(4, "Layers of the image tower.")
    patch_size: int = option(8, "Side of an image patch in pixels.")
    num_attention_heads: int = option(4, "Heads of both towers.")
    projection_dim: int = option(128, "Width of the shared embedding.")
    negative_caption_column: str | None = option(
        None, "Column with wrong captions of a picture, used as extra negatives."
    )
    num_negative_captions: int = option(
        1, "Draws from that column for each picture; more than 1 is for columns of lists."
    )
    paraphrase_column: str | None = option(
        None, "Column with another true caption: adds the contrast among captions to the loss."
    )
    patch_weight: float = option(
        0.0,
        "Weight of a second contrast, of the mean of the patch tokens in place of the class token. CLIP "
        "itself trains no patch token of its last layer, but Versatile Diffusion reads them all.",
    )
    caption_weight: float = option(
        0.0,
        "Weight of a captioning loss: a one-layer decoder, dropped afterwards, writes the caption (the "
        "paraphrase, if there is one) from the mean of all tokens, which has to say what belongs together then.",
    )

    def __post_init__(self):
        between(self, 1, None, "num_negative_captions")
        positive(
            self, "text_width", "text_layers", "vision_width", "vision_layers", "patch_size", "num_attention_heads",
            "projection_dim",
        )  # fmt: skip
        between(self, 0, None, "patch_weight", "caption_weight")
        if self.num_negative_captions > 1 and not self.negative_caption_column:
            raise ValueError(
                f"--num_negative_captions={self.num_negative_captions} needs --negative_caption_column, which it "
                "draws from."
            )
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"--vocab_size must be >= {SMALLEST_VOCABULARY} (256 bytes, start, end, padding), got "
                f"{self.vocab_size}."
            )
        if self.max_length < 3:
            raise ValueError(f"--max_length must be >= 3 (start, one token, end), got {self.max_length}.")
        for name in ("text_width", "vision_width"):
            if getattr(self, name) % self.num_attention_heads:
                raise ValueError(
                    f"--{name}={getattr(self, name)} is no multiple of --num_attention_heads="
                    f"{self.num_attention_heads}."
                )

    @property
    def has_other_losses(self) -> bool:
        """Whether a single picture with its caption has something to learn from."""
        return bool(self.negative_caption_column) or self.caption_weight > 0
