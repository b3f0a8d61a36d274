"""Whether a folder or a component is of the kind that a pipeline class takes; if not, whose it is."""

from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import transformers
from torch import nn

from ..models.blocks.wrappers import unwrap


def check_component(pipeline_class: Any, name: str, component: nn.Module, family: Iterable[type]) -> None:
    """A network is of a class that the pipeline's constructor names for it.

    Args:
        family: all pipeline classes of the house, for the message.

    Raises:
        ValueError: naming the classes that are taken, and the pipelines that take this one.
    """
    wanted = network_classes(pipeline_class, name)
    component = unwrap(component)
    if not wanted or isinstance(component, wanted):
        return
    found = type(component)
    takers = [taker.__name__ for taker in family if issubclass(found, network_classes(taker, name))]
    if inside := next((place for place, part in component.named_modules() if isinstance(part, wanted)), None):
        raise ValueError(
            f"`{name}` is a {found.__name__} around a network that {pipeline_class.__name__} takes. It sees through"
            " torch.compile, DistributedDataParallel and DataParallel, and through no other wrapper: assign the"
            f" network itself, the wrapper's `{inside}`."
        )
    where = f" A {found.__name__} belongs into {' or '.join(takers)}." if takers else ""
    raise ValueError(
        f"`{name}` is a {found.__name__}, {pipeline_class.__name__} needs {_listed(wanted)}: load the one that the"
        f" checkpoint was trained with.{where}"
    )


def check_folder(
    pipeline_class: Any, folder: str, index: Mapping[str, Any], passed: Mapping[str, Any], family: Iterable[type]
) -> None:
    """A saved pipeline is one that the class can load, judged by its `model_index.json`: nothing has been read yet.

    Args:
        folder: how the user named it.
        index: its `model_index.json`.
        passed: components that the user gives in place of those of the folder.
        family: all pipeline classes of the house.

    Raises:
        ValueError: naming the class that the folder was saved with.
    """
    saved_as = str(index.get("_class_name", "no pipeline"))
    saver = next((one for one in family if one.__name__ == saved_as), None)
    wrong = []
    if saver is not None and not _shares_folders(pipeline_class, saver):
        wrong.append(f"it was saved as a {saved_as}")
    expected, _ = pipeline_class._get_signature_keys(pipeline_class)
    for name in sorted(expected):
        wanted, recorded = network_classes(pipeline_class, name), index.get(name)
        if name in passed or not wanted:
            continue
        recorded = recorded if isinstance(recorded, (list, tuple)) and len(recorded) == 2 else (None, None)
        if recorded[1] is None:
            if name not in pipeline_class._optional_components:
                wrong.append(f"it has no `{name}`, {_listed(wanted)}")
        elif (found := _resolve(*recorded)) is not None and not issubclass(found, wanted):
            wrong.append(f"its `{name}` is a {recorded[1]}, wanted is {_listed(wanted)}")
    if wrong:
        known = saver is not None or hasattr(diffusers, saved_as)
        load_with = saved_as if known and saved_as != pipeline_class.__name__ else "DiffusionPipeline"
        raise ValueError(
            f"{folder!r} is no checkpoint of {pipeline_class.__name__}: {'; '.join(wrong)}. Load it with"
            f" `{load_with}.from_pretrained`, or pass what does not fit as an argument."
        )


def network_classes(pipeline_class: Any, name: str) -> tuple[type, ...]:
    """The classes of networks that the constructor names for a component, none for other arguments."""
    kinds = pipeline_class._get_signature_types().get(name, ())
    return tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, nn.Module))


def _shares_folders(pipeline_class: type, saver: type) -> bool:
    """Whether one of them loads what the other saved: the same class, a subclass, or two modes of one checkpoint."""
    if issubclass(pipeline_class, saver) or issubclass(saver, pipeline_class):
        return True
    return any(getattr(base, "_one_checkpoint", False) and issubclass(saver, base) for base in pipeline_class.__mro__)


def _resolve(library: str | None, class_name: str) -> type | None:
    """The class that a `model_index.json` names, if it is known without importing anything."""
    libraries = {"transformers": transformers}
    found = getattr(libraries.get(str(library), diffusers), class_name, None)
    return found if isinstance(found, type) else None


def _listed(kinds: tuple[type, ...]) -> str:
    return "a " + " or ".join(kind.__name__ for kind in kinds)
