"""Folders that were saved with this library: what they hold, and whether they may be shared.

Their index comes from whoever wrote the folder: its words become paths and Python code only after they were checked.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..places import no_such
from .checkpoints import first_not_finite

LIBRARY = "diffusers_ext"
COMPONENT_LIBRARIES = ("diffusers", "transformers", LIBRARY)


@dataclass(frozen=True)
class SavedFolder:
    """What a saved folder holds.

    Args:
        folder: where it lies.
        class_name: of the pipeline or model.
        index: `model_index.json` of a pipeline, with options as dicts; None for a model.
    """

    folder: Path
    class_name: str
    index: dict[str, Any] | None

    @property
    def is_ours(self) -> bool:
        return self.class_name in public_names()

    @property
    def loader(self) -> str:
        """What loads it, for messages and cards."""
        library = LIBRARY if self.is_ours else "transformers" if self._is_transformers else "diffusers"
        return f"{library}.{self.class_name}"

    @property
    def _is_transformers(self) -> bool:
        return self.index is None and "_class_name" not in json.loads((self.folder / "config.json").read_text())

    def usage(self, name: str, *, without_import: bool = False) -> str:
        """Python lines that load it from `name`; those of a pipeline draw too."""
        if self.index is not None:
            pipeline = getattr(package(), self.class_name)
            return pipeline.usage(name, self.index, without_import=without_import)
        if without_import and self.is_ours:
            load = f'model = AutoModel.from_pretrained("{name}", trust_remote_code=True)'
            return f"from diffusers import AutoModel\n\n# the package {LIBRARY} must be installed\n{load}\n"
        load = f'model = {self.loader}.from_pretrained("{name}")'
        return f"import {self.loader.split('.')[0]}\n\n{load}  # made with {LIBRARY}\n"


def read_saved(folder: str | Path) -> SavedFolder:
    """Checks a saved pipeline of this library, or a saved model that its recipes make.

    Raises:
        ValueError: it is neither; or its index names what is no name, lies outside of the folder, or is missing; or
            its weights hold LoRA matrices, which do not load, are not finite, or lie in a damaged file.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(no_such("folder", folder))
    if (folder / "model_index.json").is_file():
        saved = _read_pipeline(folder)
    elif (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{str(folder / 'config.json')!r} names {name!r} as its class: wanted is a saved model.")
        saved = SavedFolder(folder, name, None)
    else:
        raise ValueError(
            f"{str(folder)!r} holds no model_index.json and no config.json: give the folder of a saved pipeline or "
            "model."
        )
    _check_weights(folder)
    return saved


def _read_pipeline(folder: Path) -> SavedFolder:
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    recorded = index.get("_class_name") if isinstance(index, dict) else None
    name = recorded[1] if isinstance(recorded, list) and len(recorded) == 2 and recorded[0] == "pipeline" else recorded
    public = public_names()
    if not isinstance(name, str) or name not in public or not hasattr(public[name], "usage"):
        known = sorted(key for key, value in public.items() if hasattr(value, "usage"))
        raise ValueError(
            f"{str(path)!r} names {recorded!r}: wanted is a pipeline of {LIBRARY}, one of {', '.join(known)}. Load "
            "it with the class that reads it, and call `save_pretrained`."
        )
    index = options_as_dicts(index, folder)
    for component, value in index.items():
        if component.startswith("_") or not isinstance(value, list):
            continue
        index[component] = _checked_component(folder, component, value, path)
    return SavedFolder(folder, name, index)


def _checked_component(folder: Path, component: str, value: list, path: Path) -> list:
    """`[library, class]` of a component: its words become paths and Python code, so they must be plain names."""
    if value == [None, None]:
        return value
    library, name = value if len(value) == 2 else ("", "")
    words = [component, name, *(library.split(".") if isinstance(library, str) else [None])]
    if not all(isinstance(word, str) and word.isidentifier() for word in words):
        raise ValueError(f"{str(path)!r} records {value!r} for the component {component!r}: these are no names.")
    if not (folder / component).is_dir():
        raise ValueError(f"{str(path)!r} records the component {component!r}, but there is no such folder beside it.")
    if library.split(".")[0] != LIBRARY:
        return value
    if name not in public_names():
        raise ValueError(f"{str(path)!r} records {name!r} of {LIBRARY} for {component!r}: there is no such class.")
    return [LIBRARY, name]  # also where it was saved with its whole module path


def options_as_dicts(index: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Lists that are no components as dicts by number, as this library has recorded them since 0.1.0."""
    pipeline = public_names().get(index.get("_class_name", "")) if isinstance(index.get("_class_name"), str) else None
    if isinstance(index.get("_class_name"), list) and len(index["_class_name"]) == 2:
        pipeline = public_names().get(index["_class_name"][1])
    signature: Any = getattr(pipeline, "_get_signature_keys", None)
    options = () if signature is None else signature(pipeline)[1]

    def is_option(name: str, value: Any) -> bool:
        if not isinstance(value, list) or name not in options:
            return False
        is_component = (folder / name).is_dir() or (len(value) == 2 and value[0] in (None, *COMPONENT_LIBRARIES))
        return not is_component

    as_dict = {name: dict(enumerate(value)) for name, value in index.items() if is_option(name, value)}
    return index | {name: {str(place): item for place, item in value.items()} for name, value in as_dict.items()}


def _check_weights(folder: Path) -> None:
    """Refuses files that are cut short, weights that are not finite, and those with LoRA matrices beside them."""
    for path in sorted(folder.rglob("*.safetensors")):
        if any(parent.startswith("checkpoint-") for parent in path.relative_to(folder).parts):
            continue  # of a training: it stays here
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                broken = next((n for n in names if first_not_finite(file.get_tensor(n), n) is not None), None)
        except SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} is damaged or incomplete ({error}): copy it again, or save the pipeline again."
            ) from error
        wrapped = [name for name in names if ".base_layer." in name]
        if wrapped:  # they load as random ones
            raise ValueError(
                f"{str(path)!r} was saved with LoRA matrices beside its weights ({wrapped[0]} ...) and does not "
                "load: save the pipeline again after `pipe.fuse_lora()` and `pipe.unload_lora_weights()`."
            )
        if broken is not None:
            raise ValueError(
                f"`{broken}` in {str(path)!r} is not finite (NaN or infinite): nobody could use it. Save the pipeline"
                " again from weights before that."
            )


def package() -> Any:
    """The package itself, which recipes and commands have imported and this module may not."""
    return sys.modules[LIBRARY]


def public_names() -> dict[str, Any]:
    """The public classes and functions by name."""
    return {name: getattr(package(), name) for name in package().__all__}
