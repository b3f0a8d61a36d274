"""What networks return that give one tensor."""

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


def as_output(sample: Tensor, return_dict: bool | None) -> Tensor | SampleOutput | tuple[Tensor]:
    """`sample` as `return_dict` asks for it: None the tensor itself, True a `SampleOutput`, False a tuple."""
    if return_dict is None:
        return sample
    return SampleOutput(sample=sample) if return_dict else (sample,)
