"""Pictures from nothing."""

from collections.abc import Sequence
from typing import Any

from diffusers_ext.data.labels import Classes
from diffusers_ext.pipelines.ldm.pipeline_ldm_unconditional import LDMUnconditionalPipeline
from diffusers_ext.training.ldm.tasks.base import Task


class Unconditional(Task):
    pipeline = LDMUnconditionalPipeline
    stock = "LDMPipeline"

    def new_config(self, names: Classes | None) -> dict[str, Any]:
        return {}

    def call(self, pipe: Any, batch: dict[str, Any], examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"batch_size": len(examples), **self.square()}
