"""What pipelines that share components with others have in common."""

from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

_KEEP_DTYPE = object()  # what `from_pipe` hands to `to` in place of diffusers' silent float32


class SharingPipeline(DiffusionPipeline):
    """A pipeline whose `from_pipe` leaves the shared components as they are."""

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
