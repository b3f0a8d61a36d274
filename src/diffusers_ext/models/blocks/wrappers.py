"""What torch wraps around a network: seen through by everything that asks for a component's class or config."""

from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch.nn import DataParallel
from torch.nn.parallel import DistributedDataParallel


def unwrap(module: Any) -> Any:
    """The network inside of `torch.compile`, `DistributedDataParallel` and `DataParallel`, in any order.

    Anything else comes back as it is.
    """
    while True:
        inner = unwrap_module(module)  # torch.compile
        if isinstance(inner, (DistributedDataParallel, DataParallel)):
            inner = inner.module
        if inner is module:
            return module
        module = inner
