"""Sharing: a model card that says how the numbers came about, an upload that cannot lose the result, and an export
that loads without `import diffusers_ext`."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import HfApi, ModelCard, ModelCardData

from ..data.broken_pictures import BROKEN_LIST
from .lock import LOCK
from .saved_folders import LIBRARY, SavedFolder, options_as_dicts, package, read_saved

logger = logging.get_logger(__name__)

# `pipelines/cards.py` says the same: neither of the two may import the other.
INSTALL = "pip install .  # in a checkout of diffusers_ext; with its wheel: pip install path/to/diffusers_ext-*.whl"
# What a training leaves beside its result and nobody wants to download.
NOT_FOR_THE_HUB = ["checkpoint-*", "checkpoint-*/**", "logs/**", "*.tmp", ".tmp-*", LOCK, BROKEN_LIST]


def write_model_card(
    folder: str | Path,
    *,
    title: str,
    description: str,
    license: str | None,
    usage: str | None = None,
    command: str | None = None,
    log: Sequence[Mapping[str, object]] = (),
    tags: Sequence[str] = (),
    base_model: str | None = None,
    pipeline_tag: str | None = None,
    datasets: Sequence[str] = (),
    picture: str | None = None,
) -> Path:
    """Writes `folder/README.md`: a Hub model card with metadata, description, usage, training command and log.

    Args:
        folder: an existing folder, usually what `save_pretrained` wrote.
        title: the heading.
        description: Markdown; what the model does, what it was trained on, what was measured.
        license: that of the *weights*, as an identifier that the Hub knows (`apache-2.0`, `mit`, `other`); None if it
            is not known.
        usage: Python code that loads and runs the model; `import diffusers_ext` must stand in it.
        command: the shell command that trained the model.
        log: rows of the training log (one mapping a row, printed as a table with the keys of the first row).
        tags: the task and more; `diffusers` and `diffusers_ext` are added.
        base_model: Hub id or name of the model that was fine-tuned.
        pipeline_tag: the Hub's name of the task (`text-to-image`).
        datasets: Hub ids of the training data.
        picture: a file in `folder` to show below the description.

    Returns:
        the path of the card.

    Raises:
        ValueError: the folder is missing, the licence is empty, the usage does not import the package, or a row of the
            log has other keys than the first.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be an existing folder, got {str(folder)!r}: save the model there first.")
    if license is not None and not license:
        raise ValueError("`license` is empty: name the licence of the weights, for example 'apache-2.0' or 'other'.")
    if usage is not None and LIBRARY not in usage:
        raise ValueError(f"`usage` must import {LIBRARY}, otherwise its reader cannot load the model; got {usage!r}.")
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        base_model=base_model,
        pipeline_tag=pipeline_tag,
        datasets=list(datasets) or None,
        tags=list(dict.fromkeys(["diffusers", LIBRARY, *tags])),
    )
    sections = [f"# {title}", description.strip()]
    if picture is not None:
        sections.append(f"![samples]({picture})")
    if usage is not None:
        sections += ["## Use", f"```shell\n{INSTALL}\n```\n\n```python\n{usage.strip()}\n```"]
    if command is not None:
        sections += ["## Training", f"```shell\n{command.strip()}\n```"]
    if log:
        sections.append(_table(log))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    card.save(folder / "README.md")
    return folder / "README.md"


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table; floats with four significant digits."""
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"each row of `log` must have the keys {columns}, got {list(row)}.")

    def line(cells) -> str:
        return "| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |"

    return "\n".join([line(columns), line("---" for _ in columns), *(line(row.values()) for row in rows)])


def push_folder(folder: str | Path, repo_id: str, token: str | None = None, *, private: bool = False) -> str | None:
    """Uploads `folder` (without training checkpoints and logs) to the Hub repository `repo_id`, made if missing.

    The card that is uploaded names the repository wherever its Python lines load this folder, and options that
    `model_index.json` holds as lists go up as dicts, since the Hub route takes every list for a component.
    The local result stays whatever happens: a failed upload is logged with its reason and the command that repeats it,
    and None is returned, so that a finished training still ends as a success. Returns the URL of the commit otherwise.

    Raises:
        ValueError: the folder is missing or empty.
    """
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ValueError(f"`folder` must be a folder with something in it, got {str(folder)!r}.")
    api, asked = HfApi(token=token), repo_id
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as staging:
            commit = api.upload_folder(
                folder_path=_stage(folder, Path(staging, "folder"), (asked, repo_id)),
                repo_id=repo_id,
                commit_message="Upload from diffusers_ext",
                ignore_patterns=NOT_FOR_THE_HUB,
            )
    except (
        Exception
    ) as error:  # network, login, quota, wrong name: hours of training lie in `folder`, so none may end it
        exclude = " ".join(f"--exclude '{pattern}'" for pattern in NOT_FOR_THE_HUB)
        logger.error(
            f"The upload to {repo_id!r} failed ({type(error).__name__}: {error}). Nothing is lost: the result is "
            f"complete in {str(folder)!r}. To repeat the upload:\n"
            f"  hf upload {repo_id} {folder} . {exclude}{' --private' if private else ''}"
        )
        return None
    logger.info(f"Uploaded {str(folder)!r}: {commit.commit_url}")
    return str(commit.commit_url)


def _stage(folder: Path, staging: Path, names: tuple[str, str]) -> Path:
    """The folder as it goes up: links to its files, and the card and index that a stranger can use."""
    asked, repo_id = names
    shutil.copytree(folder.resolve(), staging, copy_function=os.symlink, ignore=_not_for_others)
    card, index = staging / "README.md", staging / "model_index.json"
    if not card.is_file():
        with contextlib.suppress(ValueError):  # whatever else is in the folder goes up without a card
            write_card_of(read_saved(folder), staging, repo_id)
    else:
        text = name_repository(card.read_text(encoding="utf-8"), (str(folder), asked), repo_id)
        card.unlink()
        card.write_text(text, encoding="utf-8")
    if index.is_file():
        content = json.dumps(options_as_dicts(json.loads(index.read_text()), folder), indent=2) + "\n"
        index.unlink()
        index.write_text(content)
    return staging


def _not_for_others(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("checkpoint-") or name in ("logs", LOCK)]


def name_repository(card: str, names: Sequence[str], repo_id: str) -> str:
    """A card whose Python lines load from `repo_id` where they loaded from a folder of this machine.

    Args:
        card: Markdown.
        names: what the folder is called so far: paths, or another name of the repository.
        repo_id: `user/name`.
    """
    last = {Path(name).name for name in names}
    known = "|".join(re.escape(name) for name in {*names, *last})
    ending = "|".join(re.escape(f"/{name}") for name in last)
    quoted = re.compile(rf"([\"'])(?:{known}|[^\"'\n]*(?:{ending}))\1")
    blocks = re.compile(r"^```(?:python|py)\n.*?^```", re.M | re.S)
    return blocks.sub(lambda block: quoted.sub(lambda found: f"{found[1]}{repo_id}{found[1]}", block[0]), card)


_SHIM = '''"""Written by `diffusers-ext export-hub --no-import`: lets this folder load without an import line."""

try:
    from {library} import {name}
except ImportError as error:
    raise ImportError("This model needs the package {library}: {install}.") from error
'''
_NEEDED = "run `pip install .` in a checkout of it, or `pip install path/to/diffusers_ext-*.whl` with its wheel"


def export_self_contained(folder: str | Path, output_dir: str | Path, *, hub_model_id: str | None = None) -> Path:
    """Copies a saved pipeline or model to `output_dir` so that it loads where nobody has imported the package:
    `DiffusionPipeline.from_pretrained(output_dir, trust_remote_code=True)`, of a model of this library `AutoModel`.

    It saves the import line, not the installation. Writes `pipeline.py` and, for each component of this library,
    `<component>/diffusers_ext.py` (each imports one class from the installed package), and names the pipeline class in
    list form. The price: such a folder *always* needs `trust_remote_code=True`, AutoPipeline does not know it, and
    diffusers builds the class that the folder names, whichever class loads it. That is why this is an export of its
    own and `output_dir` must be a new folder; it appears when it is complete.

    Args:
        hub_model_id: where it will be uploaded, for its card.

    Raises:
        ValueError: see `read_saved`; or `output_dir` exists.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} exists: choose a new folder, the export changes its files."
        )
    saved = read_saved(folder)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as staging:
        copy = Path(staging, "copy")
        shutil.copytree(saved.folder, copy, ignore=_not_for_others)
        if saved.index is None:
            _add_model_shim(copy, saved)
        else:
            _add_pipeline_shims(copy, saved.class_name, saved.index)
        _write_export_card(copy, saved, hub_model_id or output_dir.name, output_dir.name)
        copy.rename(output_dir)
    return output_dir


def _add_pipeline_shims(folder: Path, class_name: str, index: dict[str, Any]) -> None:
    (folder / "pipeline.py").write_text(_SHIM.format(library=LIBRARY, name=class_name, install=_NEEDED))
    for component, value in index.items():
        if isinstance(value, list) and value[0] == LIBRARY:
            shim = _SHIM.format(library=LIBRARY, name=value[1], install=_NEEDED)
            (folder / component / f"{LIBRARY}.py").write_text(shim)
    exported = index | {"_class_name": ["pipeline", class_name]}
    (folder / "model_index.json").write_text(json.dumps(exported, indent=2, sort_keys=True) + "\n")


def _add_model_shim(folder: Path, saved: SavedFolder) -> None:
    if saved.is_ours:  # a stock model needs none
        (folder / f"{LIBRARY}.py").write_text(_SHIM.format(library=LIBRARY, name=saved.class_name, install=_NEEDED))
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoModel": f"{LIBRARY}.{saved.class_name}"}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_export_card(folder: Path, saved: SavedFolder, name: str, title: str) -> None:
    """The folder's own card with lines for the export at its head, or a new one."""
    path = folder / "README.md"
    usage = saved.usage(name, without_import=True)
    if not path.is_file():
        write_card_of(saved, folder, name, title=title, without_import=True)
        return
    text = name_repository(path.read_text(encoding="utf-8"), (str(saved.folder), saved.folder.resolve().name), name)
    body = text.split("\n---\n", 1)[1] if text.startswith("---\n") else text
    header = text[: len(text) - len(body)]
    heading = f"## Without an import line\n\n```shell\n{INSTALL}\n```\n\n```python\n{usage.strip()}\n```\n"
    body = re.sub(r"(?ms)^## Without an import line\n.*?(?=^## |\Z)", "", body)  # of an earlier export
    match = re.search(r"^# .*\n", body, re.M)
    at = match.end() if match else 0
    path.write_text(f"{header}{body[:at]}\n{heading}{body[at:]}", encoding="utf-8")


def write_card_of(
    saved: SavedFolder, folder: Path, name: str, *, title: str | None = None, without_import: bool = False
) -> Path:
    """A card for a saved folder of which nothing else is known."""
    header: dict[str, Any] = {}
    if saved.index is not None:
        header = getattr(package(), saved.class_name).card_tags()
    return write_model_card(
        folder,
        title=title or name.split("/")[-1],
        description=f"A `{saved.class_name}`.",
        license=None,
        usage=saved.usage(name, without_import=without_import),
        **header,
    )
