"""What others put around a network, wrappers and hooks, and how the library gets along with both."""

import functools
from collections.abc import Callable
from typing import Any

from diffusers.utils.accelerate_utils import apply_forward_hook
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


def with_forward_hooks(function: Callable[..., Any]) -> Callable[..., Any]:
    """For what computes with a module, its first argument, outside of its `forward`: `encode`, `decode` and the like.

    Offloading hooks sit on `forward`. Model offloading's (accelerate's) fires here too, by diffusers' own decorator,
    and so does that of block-level group offloading, which holds what is in no block, and takes it away at the end: of
    two such functions within each other, the outer one reads no weights after the inner one.
    """
    function = apply_forward_hook(function)

    @functools.wraps(function)
    def run(module: Any, *args: Any, **kwargs: Any) -> Any:
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is None:
            return function(module, *args, **kwargs)
        hook.pre_forward(module)
        try:
            return function(module, *args, **kwargs)
        finally:
            hook.post_forward(module, None)

    return run
