"""What recipes share that train a U-Net of ADM's kind to find the noise in images: cascades, GLIDE and PITI."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..losses.diffusion import VariationalLoss, noise_error, v_weights
from .args import below, between, check_unet_widths, option, positive


@dataclass
class NoisePredictionArgs:
    """Noise levels, loss and sizes of the U-Net."""

    beta_schedule: Literal["cosine", "linear"] = option("cosine", "Noise levels.")
    num_train_timesteps: int = option(1000, "Number of noise levels; the linear schedule is scaled to it.")
    loss_type: Literal["mse", "hybrid"] = option(
        "hybrid", "Error of the noise, or that with the variational bound of a learned variance."
    )
    max_loss_weight: float = option(
        1.0, "Error of the noise: a sample counts 1 / abar times, as if the error were that of v, but at most so "
        "often. 1 is the authors' plain mean; 25 makes small networks heed what they are told many steps earlier."
    )  # fmt: skip

    block_out_channels: list[int] = option([192, 384, 576, 768], "U-Net: width of each level, finest first.")
    layers_per_block: int = option(3, "U-Net: residual blocks of a level.")
    attention_levels: list[int] = option([], "U-Net: levels (0: finest) with attention besides the middle.")
    norm_num_groups: int = option(32, "U-Net: groups of the group norms.")
    dropout: float = option(0.0, "U-Net: dropout in the residual blocks.")

    def check_noise_prediction(self, **heads: int | None) -> None:
        """Refuses values out of range.

        Args:
            heads: As for `check_unet_widths`.

        Raises:
            ValueError: Names the option.
        """
        positive(self, "num_train_timesteps", "layers_per_block", "norm_num_groups")
        below(self, 0, 1, "dropout")
        between(self, 1, 1e6, "max_loss_weight")
        check_levels("num_train_timesteps", self.num_train_timesteps, self.beta_schedule)
        check_unet_widths(self, **heads)


def check_levels(name: str, count: int, schedule: str) -> None:
    """Refuses a number of noise levels that a schedule cannot have.

    Raises:
        ValueError: Names the option.
    """
    if count < 2:
        raise ValueError(f"--{name} must be >= 2, got {count}.")
    if schedule == "linear" and count <= 20:
        raise ValueError(f"--{name}={count}: the linear schedule, whose betas end at 20 / T, needs 21.")


def check_halving(resolution: int, multiple: int) -> None:
    """Refuses a size that the U-Net cannot halve as often as it has to.

    Args:
        multiple: The factor from its finest to its coarsest level.
    """
    if resolution % multiple:
        nearest = max(multiple, round(resolution / multiple) * multiple)
        raise ValueError(
            f"--resolution={resolution} is no multiple of {multiple}, as the U-Net halves it "
            f"{multiple.bit_length() - 1} times; the nearest is {nearest}."
        )


class NoiseLoss(nn.Module):
    """The loss of each sample; nothing of it is in a checkpoint.

    Args:
        scheduler: With the noise levels.
        args: The options.
    """

    weights: Tensor

    def __init__(self, scheduler: Any, args: NoisePredictionArgs):
        super().__init__()
        self.hybrid = VariationalLoss(scheduler.betas, "rescaled_mse") if args.loss_type == "hybrid" else None
        self.register_buffer("weights", v_weights(scheduler.alphas_cumprod, args.max_loss_weight), persistent=False)

    def forward(
        self, output: Tensor, noise: Tensor, clean: Tensor, noisy: Tensor, timesteps: Tensor
    ) -> dict[str, Tensor]:
        """The loss and what it is the sum of, one value a sample (b,).

        Args:
            output: Of the network, (b, c or 2 c, h, w).
            noise, clean, noisy: (b, c, h, w), `clean` in [-1, 1].
            timesteps: Integers (b,).

        Returns:
            "mse" (of the noise), with a learned variance "vb" (the share of the bound), and "loss", the weighted
            error and the bound.
        """
        if self.hybrid is None:
            terms = {"mse": noise_error(output, noise)}
        else:
            terms = self.hybrid(output, noise, clean, noisy, timesteps)
        return terms | {"loss": self.weights[timesteps] * terms["mse"] + terms.get("vb", 0)}
