"""What small networks return: one tensor, or tokens and a vector."""

from dataclasses import dataclass

from diffusers.utils.outputs import BaseOutput
from torch import Tensor


@dataclass
class SampleOutput(BaseOutput):
    """The one result of a small network.

    Args:
        sample: see the `forward` that returned it.
    """

    sample: Tensor


@dataclass
class ConditionOutput(BaseOutput):
    """What an encoder makes of a condition.

    Args:
        last_hidden_state: tokens (batch, length, width), for the attention of a U-Net.
        pooler_output: one vector each (batch, width), for its time embedding.
    """

    # accelerate's hooks build it from one dict, so no field may be required
    last_hidden_state: Tensor = None  # type: ignore[assignment]
    pooler_output: Tensor = None  # type: ignore[assignment]


def as_output(sample: Tensor, return_dict: bool | None) -> Tensor | SampleOutput | tuple[Tensor]:
    """`sample` as `return_dict` asks for it: None the tensor itself, True a `SampleOutput`, False a tuple."""
    if return_dict is None:
        return sample
    return SampleOutput(sample=sample) if return_dict else (sample,)
