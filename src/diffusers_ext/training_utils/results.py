"""What every recipe does with its final folder: a model card with the command and the log, and the optional upload."""

import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .args import TrainArgs
from .hub import push_folder, write_model_card

logger = logging.getLogger(__name__)


def publish_result(train: TrainArgs, *, recipe: str, argv: Sequence[str] | None, summary: str, usage: str) -> None:
    """Writes `output_dir/README.md` and uploads the folder if `--push_to_hub` is set.

    Args:
        train: Names the folder, its licence and the Hub repository.
        recipe: `train_<recipe>.py` made the folder.
        argv: The words of its command line (`None`: those of this process).
        summary: One sentence: what the folder holds.
        usage: Python lines that load it.
    """
    folder = Path(train.output_dir)
    words = list(sys.argv[1:] if argv is None else argv)
    log = folder / "log.jsonl"  # may be gone where a finished run is only exported again
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    training = [line for line in lines if "loss" in line]
    write_model_card(
        folder,
        title=folder.name,
        description=f"{summary} Trained by `training/train_{recipe}.py` for {train.max_train_steps} steps.",
        license=train.license or "other",
        usage=usage,
        command=shlex.join(["accelerate", "launch", f"training/train_{recipe}.py", *words]),
        log=[{key: line.get(key, "") for key in training[-1]} for line in _thinned(training, 12)],
    )
    logger.info("The result lies in %s.", folder)
    if train.push_to_hub:
        push_folder(folder, train.hub_model_id or folder.name, private=train.hub_private_repo)


def _thinned(lines: list[dict], count: int) -> list[dict]:
    """At most `count` lines, evenly spaced, the last one included."""
    stride = max(1, -(-len(lines) // count))
    return lines[::-1][::stride][::-1]
