"""What a recipe learns, as one module: `fit` and the adversarial loop call it, and know nothing else of the recipe.

Below it what objectives draw for each sample: whether it keeps its condition, its noise level, latents of its
posterior.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor, nn

from ..losses.kl import sample_posterior


class Objective(nn.Module):
    """A batch in, its losses out.

    What is trained is registered (`self.unet = unet`), so that a checkpoint holds it. What the objective keeps between
    steps (counts of codes, a history of losses, a measured scale) are its buffers, for the same reason. Frozen
    networks are not registered: they lie in a dataclass, a list or a dictionary.

    The loops call the module that accelerate has prepared, `prepared(batch, generators, step)`: under data parallelism
    the gradients of anything that is called otherwise stay on their process.
    """

    def losses(self, batch: Any, generators: list[Generator], step: int) -> dict[str, Tensor]:
        """The losses of a micro-batch.

        Args:
            batch: As the recipe's `transform` and `collate` make it, on the device.
            generators: One a sample, on the CPU: every draw comes from them.
            step: Number of the optimizer step, from 0 on.

        Returns:
            "loss", the mean over the samples, which is minimised. The other single numbers are logged; tensors with
            dimensions are for `observe` (and for the discriminator of the adversarial loop).
        """
        raise NotImplementedError

    def forward(self, batch: Any, generators: list[Generator], step: int) -> dict[str, Tensor]:
        return self.losses(batch, generators, step)

    def before_step(self, batch: Any, own: int, step: int, accelerator: Accelerator) -> None:
        """Changes by hand before the losses of a step: a codebook that is started, say.

        Args:
            batch: The step's first micro-batch, not yet on the device.
            own: Only the first `own` samples are this process's: a cut last batch has fewer on some processes.
            step: Number of the optimizer step.
            accelerator: What one process changes, all must.
        """

    def observe(self, found: Mapping[str, Tensor], weight: float, accelerator: Accelerator) -> None:
        """Takes note of a micro-batch in the buffers, which must stay equal on all processes.

        Args:
            found: What `losses` returned.
            weight: The micro-batch's share of the step's samples; 0 on a process that had none of its own.
            accelerator: Gathers what the other processes found.
        """

    def logged(self) -> dict[str, float]:
        """What was observed since, as numbers for the log."""
        return {}


def keep_condition(generators: Sequence[Generator], dropout_prob: float) -> Tensor:
    """Which samples (b,) keep their condition: each with probability 1 - `dropout_prob`, one draw a sample."""
    return torch.stack([torch.rand((), generator=g) for g in generators]) >= dropout_prob


def check_predicts_noise(scheduler: Any) -> None:
    """A stage to go on from has a network that predicts the noise, as its scheduler says.

    Raises:
        ValueError: It predicts something else.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise ValueError(
            f"The pipeline's network predicts {kind!r}; this recipe trains networks that predict the noise "
            "('epsilon')."
        )


def draw_integers(generators: Sequence[Generator], first: int, end: int) -> Tensor:
    """An integer a sample (b,), from `first` to `end` - 1, such as the number of its noise level."""
    return torch.stack([torch.randint(first, end, (), generator=g) for g in generators])


def draw_posterior(moments: Tensor, generators: Sequence[Generator]) -> Tensor:
    """Latents of a Gaussian posterior, float32 (b, d, h, w), (d, h, w) draws a sample.

    Args:
        moments: (b, 2 d, h, w), as an `AutoencoderKL` gives them: mean, then log-variance.
        generators: One a sample.
    """
    count, channels, *sides = moments.shape
    noise = randn_tensor((count, channels // 2, *sides), generator=list(generators), device=moments.device)
    return sample_posterior(moments, noise)
