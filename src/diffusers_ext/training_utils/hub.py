"""Sharing: a model card that says how the numbers came about, an upload that cannot lose the result, and an export
that loads without `import diffusers_ext`."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers.utils import logging
from huggingface_hub import HfApi, ModelCard, ModelCardData

logger = logging.get_logger(__name__)

LIBRARY = "diffusers_ext"
INSTALL = "pip install diffusers-ext"
# What a training leaves beside its result and nobody wants to download.
NOT_FOR_THE_HUB = ["checkpoint-*", "checkpoint-*/**", "logs/**", "*.tmp"]


def write_model_card(
    folder: str | Path,
    *,
    title: str,
    description: str,
    license: str,
    usage: str | None = None,
    command: str | None = None,
    log: Sequence[Mapping[str, object]] = (),
    tags: Sequence[str] = (),
    base_model: str | None = None,
) -> Path:
    """Writes `folder/README.md`: a Hub model card with metadata, description, usage, training command and log.

    Args:
        folder: an existing folder, usually what `save_pretrained` wrote.
        title: the heading.
        description: Markdown; what the model does, what it was trained on, what was measured.
        license: that of the *weights*, as an identifier that the Hub knows (`apache-2.0`, `mit`, `other`).
        usage: Python code that loads and runs the model; `import diffusers_ext` must stand in it.
        command: the shell command that trained the model.
        log: rows of the training log (one mapping a row, printed as a table with the keys of the first row).
        tags: the task and more; `diffusers` and `diffusers_ext` are added.
        base_model: Hub id or name of the model that was fine-tuned.

    Returns:
        the path of the card.

    Raises:
        ValueError: the folder is missing, the licence is empty, the usage does not import the package, or a row of the
            log has other keys than the first.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be an existing folder, got {str(folder)!r}: save the model there first.")
    if not license:
        raise ValueError("`license` is empty: name the licence of the weights, for example 'apache-2.0' or 'other'.")
    if usage is not None and LIBRARY not in usage:
        raise ValueError(f"`usage` must import {LIBRARY}, otherwise its reader cannot load the model; got {usage!r}.")
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        base_model=base_model,
        tags=list(dict.fromkeys(["diffusers", LIBRARY, *tags])),
    )
    sections = [f"# {title}", description.strip()]
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

    The local result stays whatever happens: a failed upload is logged with its reason and the command that repeats it,
    and None is returned, so that a finished training still ends as a success. Returns the URL of the commit otherwise.

    Raises:
        ValueError: the folder is missing or empty.
    """
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ValueError(f"`folder` must be a folder with something in it, got {str(folder)!r}.")
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            folder_path=folder,
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


_SHIM = '''"""Written by `diffusers-ext export-hub --self-contained`: lets this folder load without an import line."""

try:
    from {library} import {name}
except ImportError as error:
    raise ImportError("This model needs the package {library}: run `{install}`.") from error
'''


def export_self_contained(folder: str | Path, output_dir: str | Path) -> Path:
    """Copies a saved pipeline to `output_dir` so that it loads in a process that has not imported diffusers_ext:
    `DiffusionPipeline.from_pretrained(output_dir, trust_remote_code=True)`.

    Writes `pipeline.py` and, for each component of this library, `<component>/diffusers_ext.py` (each imports one
    class from the installed package), and names the pipeline class in list form. The price: such a folder *always*
    needs `trust_remote_code=True`, which is why this is an export of its own and `output_dir` must be a new folder.

    Raises:
        ValueError: `folder` is no saved pipeline of this library, or `output_dir` exists.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    index = read_index(folder)
    if output_dir.exists():
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} exists: choose a new folder, the export changes its files."
        )
    pipeline = index["_class_name"]
    shutil.copytree(folder, output_dir, ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
    (output_dir / "pipeline.py").write_text(_SHIM.format(library=LIBRARY, name=pipeline, install=INSTALL))
    for component, value in index.items():
        if isinstance(value, list) and value[0] == LIBRARY:
            shim = _SHIM.format(library=LIBRARY, name=value[1], install=INSTALL)
            (output_dir / component / f"{LIBRARY}.py").write_text(shim)
    index["_class_name"] = ["pipeline", pipeline]
    (output_dir / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return output_dir


def read_index(folder: Path) -> dict:
    """`model_index.json` of a pipeline saved by this library; ValueError otherwise."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no model_index.json: give the folder of a saved pipeline.")
    index = json.loads(path.read_text())
    libraries = {value[0] for value in index.values() if isinstance(value, list) and value[0]}
    if not isinstance(index.get("_class_name"), str) or LIBRARY not in libraries:
        raise ValueError(
            f"{str(path)!r} names {index.get('_class_name')!r} with components from {sorted(libraries)}: wanted is a "
            f"pipeline saved with {LIBRARY} imported. Load it with its class and call `save_pretrained` again."
        )
    return index
