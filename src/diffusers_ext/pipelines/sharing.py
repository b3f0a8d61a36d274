"""What pipelines that share components with others have in common."""

from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from ..models.blocks.wrappers import unwrap

_KEEP_DTYPE = object()  # what `from_pipe` hands to `to` in place of diffusers' silent float32


class SharingPipeline(DiffusionPipeline):
    """A pipeline whose `from_pipe` leaves the shared components as they are.

    A component may be compiled (`pipe.unet = torch.compile(pipe.unet)`). Of one in `DistributedDataParallel` or
    `DataParallel`, which hide its config and methods, the pipeline keeps the network: sampling has nothing to
    synchronise. Other wrappers are refused.
    """

    def register_modules(self, **kwargs: Any) -> None:
        super().register_modules(**{name: _visible_component(name, part) for name, part in kwargs.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _visible_component(name, value))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """diffusers' `from_pipe`, except that shared components keep their dtypes unless `dtype` is given."""
        names_dtype = kwargs.get("dtype") is not None or kwargs.get("torch_dtype") is not None
        if not names_dtype and kwargs.get("custom_pipeline") is None:
            kwargs["dtype"] = _KEEP_DTYPE
        return super().from_pipe(pipeline, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> "SharingPipeline":
        """As in diffusers: moves and casts all components."""
        if kwargs.get("dtype") is _KEEP_DTYPE:
            return self
        return super().to(*args, **kwargs)


def _visible_component(name: str, component: Any) -> Any:
    """The component in a form whose config and methods can be reached.

    Raises:
        TypeError: for an unknown wrapper, which would hide what the pipeline has to know.
    """
    if not isinstance(component, nn.Module):
        return component
    bare = unwrap(component)
    if not hasattr(bare, "config"):
        raise TypeError(
            f"`{name}` is a {type(bare).__name__}, which has no `config`: the pipeline sees through torch.compile,"
            " DistributedDataParallel and DataParallel, and through no other wrapper. Assign the network that it"
            " holds, or change that in place, as `unet.compile()` does."
        )
    return component if hasattr(component, "config") else bare
