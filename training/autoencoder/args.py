"""The options of train_autoencoder.py, and what can be said against them before anything is loaded."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusers_ext.training_utils.adversarial import refuse_micro_steps
from diffusers_ext.training_utils.args import TrainArgs, between, option, positive


@dataclass
class AutoencoderArgs:
    """The network and its loss."""

    # On a resume, see TrainArgs.
    APPLIED: ClassVar[tuple[str, ...]] = ("disc_learning_rate", "scale_samples")
    BOOKKEEPING: ClassVar[tuple[str, ...]] = ("validation_samples", "feature_model")

    model: Literal["vq", "paella_vq", "gumbel_vq", "kl"] = option(
        "vq", "Nearest code (stock network or Paella's), Gumbel-softmax codes, or a Gaussian posterior."
    )
    pretrained_model_name_or_path: str | None = option(
        None, "Autoencoder to fine-tune; the sizes below then come from it."
    )
    subfolder: str | None = option(None, "Where it lies there: `vae` in a pipeline.")
    block_out_channels: list[int] = option(
        [16, 32, 64, 96], "Width of each level; the factor is 2^(levels - 1), for paella_vq 2^levels."
    )
    bottleneck_blocks: int = option(12, "paella_vq: blocks of the decoder's deepest level.")
    layers_per_block: int = option(1, "ResNet blocks a level.")
    norm_num_groups: int = option(8, "Groups of the group norms.")
    mid_block_add_attention: bool = option(True, "Self-attention in the middle block.")
    attention_levels: list[int] = option([], "Levels (0: full size) with self-attention after each block.")
    latent_channels: int = option(16, "Channels between encoder and decoder.")
    vq_embed_dim: int | None = option(None, "Width of a code; latent_channels when unset.")
    num_vq_embeddings: int = option(512, "Codes in the codebook.")
    l1_weight: float = option(1.0, "Weight of the mean absolute error.")
    l2_weight: float = option(0.0, "Weight of the mean squared error.")
    perceptual_model: str = option("none", "`none`, `lpips`, or a folder with a CLIP model.")
    perceptual_weight: float = option(1.0, "Weight of the perceptual distance.")
    lpips_dropout: bool = option(False, "Dropout before LPIPS's heads in training, as (by accident) the originals.")
    reduction: Literal["sum", "mean"] | None = option(
        None, "Of these three over a picture's elements; when unset, kl: sum, else mean."
    )
    kl_weight: float = option(1e-6, "KL: weight of the divergence from N(0, 1), in nats.")
    logvar_init: float = option(0.0, "KL: log-variance of the output elements.")
    learn_logvar: bool = option(False, "KL: learn it (the original keeps it fixed).")
    commitment_beta: float = option(0.25, "VQ: weight of the commitment term.")
    codebook_weight: float = option(1.0, "VQ: weight of codebook and commitment together.")
    plain_fraction: float = option(0.12, "VQ: share of the steps before the codebook is started.")
    kmeans_samples: int = option(512, "VQ: pictures whose latents the k-means start uses; 0: a random start.")
    restart_steps: int = option(60, "VQ: give unused codes a new place every so many steps.")
    restart_fraction: float = option(0.7, "VQ: share of the steps after which restarts end.")
    gumbel_temperature: list[float] = option([1.0, 0.0625], "Gumbel: first and last temperature (cosine between).")
    gumbel_kl_weight: float = option(1e-4, "Gumbel: weight of the divergence from uniform codes.")
    disc_start: int | None = option(None, "First step with the PatchGAN; none when unset.")
    disc_weight: float = option(0.8, "Weight of the adversarial term (times the adaptive one).")
    disc_loss: Literal["hinge", "vanilla"] = option("hinge", "The discriminator's loss.")
    disc_channels: int = option(64, "Width of the discriminator's first layer.")
    disc_layers: int = option(3, "Strided layers of the discriminator.")
    disc_learning_rate: float | None = option(None, "learning_rate when unset.")
    disc_fresh_forward: bool = option(
        False, "Reconstruct anew for the discriminator, with the step's weights and new draws."
    )
    scale_samples: int = option(256, "Pictures that measure scaling_factor = 1 / std(latents) at the end; 0: keep it.")
    validation_samples: int = option(64, "Pictures of a validation.")
    feature_model: str | None = option(
        None, "Folder with a CLIP image tower: report the Frechet distance of its vectors."
    )

    def __post_init__(self):
        if len(self.gumbel_temperature) != 2 or min(self.gumbel_temperature) <= 0:
            raise ValueError(f"--gumbel_temperature needs two values > 0, got {self.gumbel_temperature}.")
        positive(
            self, "restart_steps", "disc_channels", "disc_layers", "validation_samples",
            "bottleneck_blocks", "layers_per_block", "norm_num_groups", "latent_channels", "vq_embed_dim",
            "num_vq_embeddings", "block_out_channels",
        )  # fmt: skip
        between(
            self, 0, None, "kmeans_samples", "scale_samples", "kl_weight", "gumbel_kl_weight", "l1_weight",
            "l2_weight", "perceptual_weight", "commitment_beta", "codebook_weight", "disc_start", "disc_weight",
            "disc_learning_rate",
        )  # fmt: skip
        between(self, 0, 1, "plain_fraction", "restart_fraction")
        levels = len(self.block_out_channels)
        if not set(self.attention_levels) <= set(range(levels)):
            raise ValueError(
                f"--attention_levels={self.attention_levels}: --block_out_channels gives the levels 0 to {levels - 1}."
            )
        halves = [self.block_out_channels[-1] // 2**level for level in reversed(range(levels))]
        if self.model == "paella_vq" and list(self.block_out_channels) != halves:
            raise ValueError(
                f"--block_out_channels={self.block_out_channels}: for --model=paella_vq each level is twice as wide "
                f"as the one before, here {halves}."
            )
        if self.model != "kl" and (self.learn_logvar or self.logvar_init):
            raise ValueError(f"--logvar_init and --learn_logvar belong to --model=kl, got --model={self.model}.")
        if self.lpips_dropout and self.perceptual_model != "lpips":
            raise ValueError(
                f"--lpips_dropout goes with --perceptual_model=lpips, got --perceptual_model={self.perceptual_model}."
            )
        if self.subfolder and not self.pretrained_model_name_or_path:
            raise ValueError(f"--subfolder={self.subfolder} goes with --pretrained_model_name_or_path.")

    @property
    def resolved_reduction(self) -> Literal["sum", "mean"]:
        return self.reduction or ("sum" if self.model == "kl" else "mean")


def check_accumulation(args: AutoencoderArgs, train: TrainArgs) -> None:
    """Refuses micro-steps with the PatchGAN; see `refuse_micro_steps`."""
    if args.disc_start is not None:
        refuse_micro_steps(
            train, "with --disc_start the adaptive weight is one of a whole batch", otherwise="--disc_start none"
        )
