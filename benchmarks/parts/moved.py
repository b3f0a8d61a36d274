"""What stands behind the old name of a benchmark, for one release: it says the new name and runs it."""

import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]


def run_as(name: str) -> None:
    """Runs `benchmarks/<name>.py` in this process, with the words of this command."""
    print(f"{Path(sys.argv[0]).name} is now benchmarks/{name}.py; the old name goes with 0.2.", file=sys.stderr)
    sys.argv[0] = str(FOLDER / f"{name}.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
