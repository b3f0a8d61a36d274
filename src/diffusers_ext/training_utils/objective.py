"""What a recipe learns, as one module: `fit` and the adversarial loop call it, and know nothing else of the recipe."""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import Generator, Tensor, nn


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
            dimensions are for `record` (and for the discriminator of the adversarial loop).
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

    def record(self, found: Mapping[str, Tensor], weight: float, accelerator: Accelerator) -> None:
        """Takes note of a micro-batch in the buffers, which must stay equal on all processes.

        Args:
            found: What `losses` returned.
            weight: The micro-batch's share of the step's samples; 0 on a process that had none of its own.
            accelerator: Gathers what the other processes found.
        """

    def logged(self) -> dict[str, float]:
        """What the records amount to, for the log."""
        return {}
