"""Presets: flat YAML files as words of a command line, and what the command line takes back of them."""

import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import get_args, get_type_hints

import yaml

from ..places import did_you_mean

logger = logging.getLogger(__name__)

SOURCES = ("dataset_name", "train_data_dir")
# what a preset says of its own pictures besides their columns; it is not true of others
OF_THE_SOURCE = (
    "dataset_config_name", "captions_from_names", "max_train_samples", "num_labels", "num_negative_captions",
    "cache_dir",
)  # fmt: skip


def find_preset(word: str) -> Path:
    """The file of a preset: a path, or the name of one that is installed with the recipes (`paella-smoke`).

    A file that exists goes before the name.

    Raises:
        ValueError: there is neither; names the presets whose names are nearest.
    """
    path = Path(word)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return path
    installed = installed_presets()
    if word.removesuffix(".yaml") in installed:
        return installed[word.removesuffix(".yaml")]
    near = get_close_matches(path.stem, installed, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else did_you_mean(word)
    raise ValueError(
        f"The preset {word!r} is not a .yaml file that exists, nor the name of an installed one.{hint}"
        " Presets lie in training/presets/ and are called by path or by name, such as paella-smoke."
    )


def installed_presets() -> dict[str, Path]:
    """The presets that lie beside the recipes, by name."""
    folder = Path(str(files("diffusers_ext.training").joinpath("presets")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def preset_words(path: Path, optional: set[str]) -> list[str]:
    """A flat YAML preset as command-line words (`--key=value`; a list becomes `--key value value ...`).

    An empty value (`null`) unsets one of the `optional` fields, and says nothing about others.
    """
    try:
        preset = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The preset {str(path)!r} is not YAML: {error}") from error
    if not isinstance(preset, dict):
        raise ValueError(f"{path}: a preset holds one `option: value` a line, not a {type(preset).__name__}.")
    words = []
    for key, value in preset.items():
        if isinstance(value, dict):
            raise ValueError(f"{path}: `{key}` is a mapping; a preset is flat, one option a line.")
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words.append(f"--{key}={value}")
        elif key in optional:
            words.append(f"--{key}=none")
    return words


def optional_fields(dataclass_types: Sequence[type]) -> set[str]:
    """The fields `X | None`."""
    hints = [(f.name, get_type_hints(kind)[f.name]) for kind in dataclass_types for f in fields(kind) if f.init]
    return {name for name, hint in hints if type(None) in get_args(hint)}


def take_unset(words: Sequence[str], optional: set[str]) -> tuple[list[str], list[str]]:
    """The words without options whose last value is `none`, and the names of these."""
    groups = _options(words)
    unset = [name for name, option in dict(groups).items() if name in optional and _is_unset(option)]
    kept = [
        word for name, option in groups if name not in unset and not (name in optional and _is_unset(option))
        for word in option
    ]  # fmt: skip
    return kept, unset


def without_the_source(preset: Sequence[str], words: Sequence[str]) -> list[str]:
    """The preset's words without its source, and what goes with it, where the command line names another source."""
    told, ours = dict(_options(words)), dict(_options(preset))
    new = [name for name in SOURCES if name in told and not _is_unset(told[name])]
    if not new or all(name in ours and _values(told[name]) == _values(ours[name]) for name in new):
        return list(preset)
    dropped = [name for name in ours if name in (*SOURCES, *OF_THE_SOURCE) or name.endswith("_column")]
    silent = [name for name in dropped if name not in told and name not in SOURCES]
    if silent and os.environ.get("RANK", "0") == "0":  # one line, not one a process
        logger.warning(
            "--%s replaces the preset's data, so what the preset says of them does not count: %s. Name on the command "
            "line what holds for your data as well.",
            new[0], ", ".join(f"--{name} {' '.join(_values(ours[name]))}" for name in silent),
        )  # fmt: skip
    return [word for name, option in _options(preset) if name not in dropped for word in option]


def _options(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The words in groups, (name of the field, the option's words); ("", words) for words before any option."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") or not groups:
            name = word[2:].split("=", 1)[0].replace("-", "_") if word.startswith("--") else ""
            groups.append((name, [word]))
        else:
            groups[-1][1].append(word)
    return groups


def _values(option: Sequence[str]) -> list[str]:
    """What an option's words set: those after the first, or what follows the = in it."""
    return option[0].split("=", 1)[1:] + list(option[1:])


def _is_unset(option: Sequence[str]) -> bool:
    return [value.lower() for value in _values(option)] == ["none"]
