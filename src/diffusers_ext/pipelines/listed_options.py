"""Options of a pipeline that are lists: how `model_index.json` holds them.

diffusers takes every list there for `[library, class]` of a component, on the Hub even before it looks at the pipeline
class. So a list is recorded as a dict from its places, as in `DiTPipeline`: `{"0": "circle", "1": "square"}`. Folders
from before that hold lists, which load from disk; both are read.
"""

from collections.abc import Mapping
from typing import Any

from ..models.blocks.wrappers import unwrap
from .checks import sample_sides


def record_option(name: str, value: Any) -> Any:
    """An option as it is recorded: lists, tuples and dicts by number become dicts by the number's text.

    Raises:
        ValueError: for a dict whose keys are not 0, 1, ... up to its length.
    """
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return value
    by_place = {str(place): item for place, item in value.items()}
    wanted = [str(place) for place in range(len(value))]
    if sorted(by_place) != sorted(wanted):
        raise ValueError(
            f"`{name}` has the keys {list(value)}; expected are the numbers 0 to {len(value) - 1}, or a list."
        )
    return {place: by_place[place] for place in wanted}


def read_option(value: Any) -> Any:
    """A recorded option as a list, whichever way it was recorded; anything else as it is."""
    if isinstance(value, Mapping):
        return [value[str(place)] for place in range(len(value))]
    return list(value) if isinstance(value, tuple) else value


def record_sample_size(value: Any, unet: Any, otherwise: int | None) -> Any:
    """The size of a pipeline's samples as it is recorded: the given one, else the network's own, else another.

    The network's is `sample_size` of its config, so that a pipeline made of another's components samples its size.
    """
    if value is None:
        value = None if unet is None else unwrap(unet).config.get("sample_size")
        value = otherwise if value is None else value
    if value is None:
        return None
    sides = sample_sides("default_sample_size", value)
    return sides[0] if sides[0] == sides[1] else record_option("default_sample_size", sides)
