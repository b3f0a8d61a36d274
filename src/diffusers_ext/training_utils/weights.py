"""Loading for a recipe: whole and finite, or refused by name.

The libraries fill a missing tensor in with new values and say so in a report, and take infinities as they are: a run
would train on what nobody trained, to its end.
"""

import importlib
import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .checkpoints import first_not_finite

logger = logging.getLogger(__name__)

NETWORKS = (ModelMixin, transformers.PreTrainedModel)


def load_whole(kind: Any, place: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained(place, **options)` of a network whose file holds all of its tensors, each of them finite.

    Anything else than a network (a tokenizer, an image processor) is loaded as it is.

    Args:
        kind: A class of diffusers, transformers or this package.
        place: A folder, or a name on the Hub.
        options: Such as `subfolder`.

    Raises:
        ValueError: names the file and the tensors.
    """
    if not _is_network(kind):
        return kind.from_pretrained(place, **options)
    with _quiet():
        network, info = kind.from_pretrained(place, output_loading_info=True, **options)
    subfolder = options.get("subfolder")
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{_file_of(place, subfolder, missing[0])} lacks `{'`, `'.join(missing[:3])}`{more}, which a "
            f"{kind.__name__} needs: they would be new and untrained. Download or convert it again."
        )
    refuse_not_finite(network, place, subfolder)
    return network


def refuse_not_finite(network: nn.Module, place: str | Path, subfolder: str | None = None) -> None:
    """Raises ValueError, with file and tensor, where a weight is infinite or no number."""
    name = first_not_finite(network.state_dict())
    if name is not None:
        raise ValueError(
            f"`{name}` in {_file_of(place, subfolder, name)} is not finite: whatever is trained on it would not be "
            "either. Download or convert it again, or take an older checkpoint."
        )


def load_whole_pipeline(kind: Any, place: str | Path) -> Any:
    """`kind.from_pretrained(place)`, each of its networks as `load_whole` loads it."""
    index = kind.load_config(place)
    taken = set().union(*kind._get_signature_keys(kind))
    networks = {}
    for name, value in index.items():
        found = _class_of(value) if name in taken else None
        if found is not None:
            networks[name] = load_whole(found, place, subfolder=name)
    return kind.from_pretrained(place, **networks)


def warn_of_size(pipe: Any, place: str | Path, resolution: int) -> None:
    """Says so where a pretrained pipeline draws pictures of another size, by default, than it is now trained on.

    Pipelines whose pictures take the size of another picture, or of a label map, have none by default.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "height" not in parameters or "label_map" in parameters:
        return
    height, width = pipe.resolve_size(None, None)
    if (height, width) != (resolution, resolution):
        logger.warning(
            "--resolution is %d, but %s was trained on %d x %d, which its result goes on to draw by default: pass "
            "--resolution %d, or height=%d and width=%d whenever you draw.",
            resolution, place, width, height, height, resolution, resolution,
        )  # fmt: skip


def _class_of(entry: Any) -> type | None:
    """The class of a network in `model_index.json`; None for other components, which need no check."""
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
        return None
    library, name = entry
    # some libraries are modules of diffusers' pipelines, such as latent_diffusion
    module = getattr(diffusers.pipelines, library, None) or importlib.import_module(library)
    found = getattr(module, name, None)
    return found if _is_network(found) else None


def _is_network(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, NETWORKS)


def _file_of(place: str | Path, subfolder: str | None, tensor: str) -> str:
    """The file that holds (or should hold) a tensor, as far as the folder says."""
    folder = Path(place, subfolder or "")
    for index in sorted(folder.glob("*.index.json")):
        shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        return str(folder / shards[tensor]) if tensor in shards else str(index)
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    files = [path for path in files if "lora" not in path.name] or files
    return str(files[0]) if files else f"{place}{f' ({subfolder})' if subfolder else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Mutes the libraries' reports: what they fill in is an error here, and what they leave out is another tower's."""
    verbosities = [library.logging.get_verbosity() for library in (transformers, diffusers.utils)]
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosities[0])
        diffusers.utils.logging.set_verbosity(verbosities[1])
        if bars:
            transformers.logging.enable_progress_bar()
