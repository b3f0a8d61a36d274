"""A recipe as a command: what its user can mend is a message at the end, not a traceback."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .lock import FolderInUse

ALWAYS = (OSError, FloatingPointError, FolderInUse)  # whoever raises them: a file, the Hub, the numbers of a run
OURS = (ValueError, TypeError, ImportError)  # messages where this library raises them, else perhaps a bug
PACKAGE = Path(__file__).resolve().parents[1]
# `accelerate launch` sets it for its processes
LAUNCHED = "ACCELERATE_MIXED_PRECISION"
WORKER = re.compile(
    r"\ACaught \w+ in DataLoader worker process \d+\.\nOriginal Traceback.*^[\w.]*Error: ", re.M | re.S
)  # torch's words before the message of an error in a loader process


def run_command(main: Callable[[], Any]) -> None:
    """Runs a recipe's `main` on the words of the command line.

    An error that its user can mend is one message on stderr, `train_ldm: ...`, and ends the process with status 2. Any
    other error keeps its traceback. Python callers use `main` itself, which raises.

    Raises:
        SystemExit: 2 after such a message; what `main` raises of it.
    """
    launched = LAUNCHED in os.environ
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    try:
        main()
    except (*ALWAYS, *OURS) as error:
        if not is_message(error):
            raise
        process = f" (process {rank})" if rank else ""
        print(f"{Path(sys.argv[0]).stem}{process}: {WORKER.sub('', str(error)).strip()}", file=sys.stderr)
        if launched and not rank:
            way_out = " `accelerate launch --quiet` leaves it out." if processes == 1 else ""
            print(f"(The launcher adds a traceback of its own, which says no more.{way_out})", file=sys.stderr)
        raise SystemExit(2) from None


def is_message(error: Exception) -> bool:
    """Whether the text of an error was written for the user of a recipe."""
    if isinstance(error, ALWAYS):
        return True
    # an error in a loader process is raised again by torch, with its traceback as text
    files = re.findall(r'^  File "(.+)", line \d+', str(error), re.M) if WORKER.match(str(error)) else []
    files = files or [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    raised_in = Path(files[-1]).resolve() if files else Path()
    script = Path(sys.argv[0])
    beside = [script.resolve().parent] if script.is_file() else []  # in a clone, `training/` lies outside the package
    return any(raised_in.is_relative_to(folder) for folder in (PACKAGE, *beside))
