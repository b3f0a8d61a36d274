"""Where a stage of a cascade comes from while its weights are not in memory: a folder, or a name on the Hub."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub.errors import HFValidationError

from ...models.unet_cascaded import CascadedUNet
from ...places import did_you_mean
from ..base import LOOKUP_ARGUMENTS
from ..saving import check_whole_files
from .stage import CascadedStage


@dataclass(frozen=True)
class StageSource:
    """A saved pipeline.

    Args:
        name: Folder, or name on the Hub.
        dtype: Of the weights.
        options: Further ones of `from_pretrained`.
    """

    name: str
    dtype: Any = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        return Path(self.name).is_dir()

    def load(self) -> Any:
        """The pipeline, weights and all."""
        try:
            return DiffusionPipeline.from_pretrained(self.name, dtype=self.dtype, **self.options)
        except (OSError, ValueError):
            _ = self.pipeline_class  # says so if there is no pipeline at all
            raise

    @property
    def pipeline_class(self) -> Any:
        """The class that it was saved with.

        Raises:
            ValueError: If there is no pipeline, or one of which nobody knows the class.
        """
        lookup: Any = {name: value for name, value in self.options.items() if name in LOOKUP_ARGUMENTS}
        try:
            index: Any = DiffusionPipeline.load_config(self.name, **lookup)
        except (OSError, HFValidationError) as error:
            raise ValueError(
                f"{self.name!r} holds no pipeline: a stage of a cascade is a folder with a model_index.json, or the"
                f" name of such a repository on the Hub. ({' '.join(str(error).split())})"
                f"{'' if self.is_folder else did_you_mean(self.name)}"
            ) from error
        recorded = index["_class_name"]
        found = getattr(diffusers, recorded[-1] if isinstance(recorded, list) else recorded, None)
        if found is None:
            raise ValueError(f"{self.name!r} holds a {recorded}, which neither diffusers nor this package knows.")
        return found

    def check_files(self, kind: Any) -> None:
        """The weights of a folder are whole, which nobody would notice before the stages that run before this one.

        Raises:
            ValueError: If a file was cut short.
        """
        for component in kind._get_signature_types() if self.is_folder else ():
            check_whole_files(Path(self.name, component))

    def blueprint(self) -> Any:
        """A stage of a cascade without its weights, for checks. None for any other pipeline.

        Raises:
            ValueError: If there is no pipeline, or a file of weights in its folder was cut short.
        """
        kind = self.pipeline_class
        self.check_files(kind)
        if not issubclass(kind, CascadedStage):
            return None
        lookup: Any = {name: value for name, value in self.options.items() if name in LOOKUP_ARGUMENTS}
        config: Any = CascadedUNet.load_config(self.name, subfolder="unet", **lookup)
        with init_empty_weights():
            unet = CascadedUNet.from_config(config)
        return kind.from_pretrained(self.name, unet=unet, **self.options)
