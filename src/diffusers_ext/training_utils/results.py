"""What every recipe does at its end: the result, a model card with command and log, and the optional upload."""

import json
import logging
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from .args import TrainArgs, all_options
from .hub import push_folder, write_model_card
from .launch import describe, launch_words
from .lock import release
from .lora import merge_lora, save_lora
from .result_folder import write_result

logger = logging.getLogger(__name__)


def finish(
    accelerator: Accelerator,
    train: TrainArgs,
    finished: bool,
    save: Callable[[Path], Any],
    *,
    recipe: str,
    argv: Sequence[str] | None,
    summary: str,
    usage: Callable[[str], str],
    header: Mapping[str, Any] | None = None,
    lora: nn.Module | None = None,
    lora_part: str | None = None,
) -> None:
    """Ends a run: its result is published if training got there, the folder is unlocked, and a run that a signal has
    stopped ends with the status by which a shell knows it. See `publish_result` for the other arguments.

    Args:
        finished: What `fit` returned.
        lora: The network whose low-rank matrices (`lora.add_lora`) were trained: they are saved beside the result, and
            added to its weights in it.
        lora_part: Its name in the pipeline, where that is not `unet`.

    Raises:
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM. The time limit is no error: status 0.
    """

    def save_all(folder: Path) -> None:
        if lora is not None:
            save_lora(lora, folder, lora_part)
            merge_lora(lora)
        save(folder)

    if finished and accelerator.is_main_process:
        publish_result(train, save_all, recipe=recipe, argv=argv, summary=summary, usage=usage, header=header)
    release(Path(train.output_dir))
    accelerator.end_training()
    if train.origin.stopped_by is not None:
        raise SystemExit(128 + train.origin.stopped_by)


def publish_result(
    train: TrainArgs,
    save: Callable[[Path], None],
    *,
    recipe: str,
    argv: Sequence[str] | None,
    summary: str,
    usage: Callable[[str], str],
    header: Mapping[str, Any] | None = None,
) -> None:
    """Puts the result and its model card into `output_dir`, both or none, and uploads it if `--push_to_hub` is set.

    Args:
        train: Names the folder, its licence and the Hub repository.
        save: `(folder) -> None` writes the result: `save_pretrained` of the pipeline or model, and what belongs to it.
        recipe: `train_<recipe>.py` made it.
        argv: The words of its command line (`None`: those of this process).
        summary: One sentence: what the folder holds.
        usage: `(name) -> lines` of Python that load it from `name` and show what it does: the repository where it will
            be uploaded, or the folder's own name.
        header: Task and tags, as `card_tags` of a pipeline gives them.

    Raises:
        FloatingPointError: a weight is not finite; an older result stays.
    """
    folder = Path(train.output_dir)
    words = list(sys.argv[1:] if argv is None else argv)
    log = folder / "log.jsonl"  # may be gone where a finished run is only exported again
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    training = [line for line in lines if "loss" in line]

    def write(staging: Path) -> None:
        save(staging)
        write_model_card(
            staging,
            title=folder.resolve().name,
            description=f"{summary} Trained by `training/train_{recipe}.py` for {train.max_train_steps} steps: "
            f"{describe(train)}. `options.json` holds every option.",
            license=train.license or "other",
            usage=usage(train.hub_model_id or folder.resolve().name),
            command=shlex.join([*launch_words(train), f"training/train_{recipe}.py", *map(_without_place, words)]),
            log=[{key: line.get(key, "") for key in training[-1]} for line in _thinned(training, 12)],
            base_model=_base_model(train),
            datasets=_datasets(train),
            picture=_last_sheet(folder),
            **(header or {}),
        )

    write_result(folder, write)
    logger.info("The result lies in %s.", folder)
    if train.push_to_hub:
        push_folder(folder, train.hub_model_id or folder.resolve().name, private=train.hub_private_repo)


def _base_model(train: TrainArgs) -> str | None:
    """The Hub name of the model that was fine-tuned; a folder on this machine is no name that others could follow."""
    name = all_options(train).get("pretrained_model_name_or_path")
    return None if name is None or Path(name).exists() else name


def _datasets(train: TrainArgs) -> list[str]:
    """The Hub name of the training data, if it has one."""
    name = all_options(train).get("dataset_name")
    return [name] if isinstance(name, str) and name.count("/") == 1 and not Path(name).exists() else []


def _last_sheet(folder: Path) -> str | None:
    """The last validation sheet in the folder."""
    sheets = {int(match[1]): path.name for path in folder.glob("validation-*.png")
              if (match := re.match(r"validation-(\d+)", path.name))}  # fmt: skip
    return sheets[max(sheets)] if sheets else None


def _without_place(word: str) -> str:
    """A word of the command line without the place of its file on this machine."""
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{Path(value).name}" if Path(value).expanduser().is_absolute() else word


def _thinned(lines: list[dict], count: int) -> list[dict]:
    """At most `count` lines, evenly spaced, the last one included."""
    stride = max(1, -(-len(lines) // count))
    return lines[::-1][::stride][::-1]
