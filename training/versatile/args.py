"""The options of Versatile Diffusion's recipe, and the names of its flows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffusers_ext.pipelines.checks import check_guidance_scale, check_steps, check_timesteps
from diffusers_ext.pipelines.versatile.denoising import versatile_scheduler
from diffusers_ext.training_utils.args import below, between, check_rank, option, positive

FLOWS = ("image-to-image", "text-to-image", "image-to-text", "text-to-text")


def parts_of(flow: str) -> tuple[str, str]:
    """The context type and the data type of a flow's name: "text-to-image" makes images of texts."""
    context_type, _, data_type = flow.partition("-to-")
    return context_type, data_type


@dataclass
class VersatileArgs:
    """The network, its flows, and the frozen networks around it."""

    # On a resume, see TrainArgs.
    APPLIED: ClassVar[tuple[str, ...]] = ("lr_scales", "guidance_scale")
    BOOKKEEPING: ClassVar[tuple[str, ...]] = ("num_inference_steps", "validation_samples", "cache_dir")

    flows: list[str] = option(list(FLOWS), f"What is trained: some of {', '.join(FLOWS)}.")
    flow_weights: list[str] = option([], "Weights of flows in the loss: image-to-text=0.5 ...; 1 by default.")
    lr_scales: list[str] = option([], "Multiples of the learning rate: global=0.1 data.image=0.2 ...; 1 by default.")
    pretrained_model_name_or_path: str | None = option(
        None, "Result of an earlier stage: the network to go on with, and all parts."
    )
    pretrained_unet_name_or_path: str | None = option(
        None, "VersatileUNet to start from, such as a converted Stable Diffusion."
    )
    pretrained_vae_name_or_path: str | None = option(None, "AutoencoderKL of the images.")
    pretrained_optimus_name_or_path: str | None = option(
        None, "Text autoencoder with its tokenizers, a result of train_optimus.py."
    )
    pretrained_clip_name_or_path: str | None = option(
        None, "CLIP of both contexts: a folder, a name on the Hub, or open_clip:<model>/<tag or file>."
    )
    untrained_parts: list[str] = option(
        [], "To try the recipe out: vae, optimus or both, tiny and untrained where no option names one."
    )
    contexts_like: str | None = option(
        None, "New context layers start as a copy of those of this type: image or text."
    )
    block_out_channels: list[int] = option([320, 640, 1280, 1280], "Width of each level, finest first.")
    layers_per_block: int = option(2, "Residual blocks of each level on the way down.")
    attention_levels: list[int] = option(
        [], "Levels (0: finest) with contexts besides the middle; all but the last if unset."
    )
    num_attention_heads: int = option(8, "Heads of every attention.")
    norm_num_groups: int = option(32, "Groups of every normalisation.")
    text_positions: int = option(4, "Tokens that a text latent is treated as.")
    dropout: float = option(0.0, "In residual blocks and transformers.")
    cond_dropout_prob: float = option(0.1, "Samples of a flow trained without context.")
    clean_captions: bool = option(True, "Remove addresses, HTML, brackets and symbols from what the text flows see.")
    paraphrase_column: str | None = option(
        None, "Column with another caption: the context of text-to-text; else the same one."
    )
    rank: int | None = option(
        None, "Train LoRA matrices of this rank beside the contexts' attentions instead of all weights."
    )
    guidance_scale: float = option(7.5, "For the validation samples.")
    num_inference_steps: int = option(25, "For the validation samples.")
    cache_dir: str | None = option(
        None,
        "Folder for the pictures' latents and context tokens: computed once, then trained from. Excludes "
        "augmentation.",
    )
    validation_samples: int = option(64, "Held-out samples whose loss is reported.")

    def __post_init__(self):
        unknown = [flow for flow in self.flows if flow not in FLOWS]
        if unknown or not self.flows or len(set(self.flows)) != len(self.flows):
            raise ValueError(f"--flows is {self.flows}: name some of {', '.join(FLOWS)}, each once.")
        if strangers := [name for name in self.untrained_parts if name not in ("vae", "optimus")]:
            raise ValueError(f"--untrained_parts names {', '.join(strangers)}; it can be vae, optimus or both.")
        between(self, 0, 1, "cond_dropout_prob")
        weights = read_factors("flow_weights", self.flow_weights)
        if strangers := [flow for flow in weights if flow not in self.flows]:
            raise ValueError(f"--flow_weights names {', '.join(strangers)}, but --flows is {' '.join(self.flows)}.")
        read_factors("lr_scales", self.lr_scales)
        if self.cache_dir and self.flows == ["text-to-text"]:
            raise ValueError("--cache_dir is for pictures, which text-to-text does not read: leave it out.")
        last = len(self.block_out_channels) - 1
        if not set(self.attention_levels) <= set(range(last + 1)):
            raise ValueError(
                f"--attention_levels is {self.attention_levels}: --block_out_channels gives the levels 0 to {last}."
            )
        positive(
            self, "rank", "num_inference_steps", "validation_samples", "text_positions", "block_out_channels",
            "layers_per_block", "num_attention_heads", "norm_num_groups",
        )  # fmt: skip
        below(self, 0, 1, "dropout")
        check_guidance_scale(self.guidance_scale)
        scheduler = versatile_scheduler()
        check_steps(scheduler, self.num_inference_steps)
        scheduler.set_timesteps(self.num_inference_steps)
        check_timesteps(scheduler, self.num_inference_steps)
        check_rank(self, "pretrained_model_name_or_path", "pretrained_unet_name_or_path")
        if self.pretrained_model_name_or_path and self.pretrained_unet_name_or_path:
            raise ValueError(
                "--pretrained_model_name_or_path already holds the network to go on with: leave out "
                "--pretrained_unet_name_or_path."
            )


def read_factors(name: str, words: Sequence[str]) -> dict[str, float]:
    """`["a=0.5", "b=2"]` as a mapping.

    Raises:
        ValueError: a word has another form, a factor is negative, or a name occurs twice.
    """
    factors: dict[str, float] = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            factor = float(value)
        except ValueError:
            factor = -1.0
        if not key or factor < 0 or key in factors:
            raise ValueError(f"--{name} got {word!r}: write name=factor with a factor >= 0, each name once.")
        factors[key] = factor
    return factors
