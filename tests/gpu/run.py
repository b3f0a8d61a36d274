"""`make gpu`: does everything run on this machine's GPU, and how fast? At most 8 minutes, without network.

    make gpu               # with .venv
    make gpu PY=python3    # without: what python3 lacks comes out of gpu-kit/wheels, see `make gpu-kit`

First the tests of this folder, three processes at a time, then every `benchmarks/speed_*.py` that knows a device, one
after another. A part that fails or that takes longer than its limit is told, and the rest goes on. What ran is shown
in one table and written to one JSON, with the tracebacks. Status 0: all is well, or there is no GPU. Needs torch; a
part whose other packages are absent is skipped, and they are named.
"""

import argparse
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "gpu-kit" / "wheels"
SECONDS = 470  # of all parts; 8 minutes with the start and the table
PACKAGES = {  # that torch does not bring, as they are imported
    "diffusers": "diffusers", "transformers": "transformers", "accelerate": "accelerate", "safetensors": "safetensors",
    "huggingface-hub": "huggingface_hub", "peft": "peft", "numpy": "numpy", "pillow": "PIL", "scipy": "scipy",
    "jinja2": "jinja2", "pytest": "pytest", "datasets": "datasets",
}  # fmt: skip
LIBRARY = tuple(name for name in PACKAGES if name not in ("pytest", "datasets"))

# A benchmark's words on a GPU where its own defaults take too long, or it has no `--device` and finds the GPU itself.
SHORT = {
    "speed_paella": ["--batch_sizes", "16", "--steps", "8", "--rounds", "2"],
    "speed_ldm": ["--dtype", "bfloat16", "--steps", "10", "--rounds", "2"],
    "speed_versatile": ["--width", "160", "--flows", "text-to-image", "--steps", "10", "--rounds", "2"],
    "speed_piti": ["--dtype", "bfloat16", "--steps", "20", "--rounds", "2"],
    "speed_cascaded": ["--batch_size", "1", "--steps", "3", "--rounds", "2"],
    "speed_paella_cache": ["--conditions", "text", "--rounds", "1", "--steps", "12", "--num_samples", "256"],
}
FINDS_IT = ("speed_paella_cache",)


@dataclass(frozen=True)
class Part:
    """One process of its own.

    Args:
        words: behind `python`; "{json}" is the file for its results.
        limit: seconds.
        needs: packages without which it is skipped.
        is_test: it is pytest, which writes a line a test; else it writes rows.
    """

    name: str
    words: Sequence[str]
    limit: float
    needs: Sequence[str] = LIBRARY
    is_test: bool = False


def tests(name: str, file: str, *words: str, limit: float, needs: Sequence[str] = ()) -> Part:
    options = ["-m", "pytest", f"tests/gpu/{file}.py", "-q", "-p", "no:cacheprovider", *words]
    return Part(name, options, limit, (*LIBRARY, "pytest", *needs), is_test=True)


def test_parts() -> list[Part]:
    return [
        tests("graphs", "test_pipelines", "-k", "one_graph", limit=240),
        tests("recipes", "test_recipes", limit=240, needs=["datasets"]),
        tests("pipelines", "test_pipelines", "-k", "not one_graph", limit=200),
    ]


def speed_parts(device: str) -> list[Part]:
    """Every benchmark of speed that knows a device, those with `SHORT` words first."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("speed_*.py")}
    names = [name for name, text in sorted(found.items()) if '"--device"' in text or name in FINDS_IT]
    order = list(SHORT)
    parts = []
    for name in sorted(names, key=lambda name: order.index(name) if name in SHORT else len(order)):
        place = [] if name in FINDS_IT else ["--device", device]
        words = [f"benchmarks/{name}.py", *place, *SHORT.get(name, []), "--json", "{json}"]
        parts.append(Part(name, words, 100, (*LIBRARY, "datasets") if name in FINDS_IT else LIBRARY))
    return parts


# --- what the interpreter lacks


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def fits(version: str, wanted: str) -> bool:
    """Whether a version is within bounds such as ">=0.42,<0.43"; other conditions are passed over."""
    low, high = re.findall(r">=\s*([\d.]+)", wanted), re.findall(r"<\s*([\d.]+)", wanted)
    return all(numbers(version) >= numbers(bound) for bound in low) and all(
        numbers(version) < numbers(bound) for bound in high
    )


def runs_here(wheel: Path) -> bool:
    """Whether a wheel's tag is that of this Python: pure, of this version, or of the stable interface."""
    python, abi = wheel.stem.split("-")[2:4]
    here = sys.version_info[1]
    for tag in python.split("."):
        if version := re.fullmatch(r"(py|cp)3(\d*)", tag):
            minor = int(version[2] or here)
            if minor == here or (minor < here and abi == "abi3"):
                return True
    return False


def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        metadata = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        lines = file.read(metadata).decode("utf-8").splitlines()
    found = [line.removeprefix("Requires-Dist:").strip() for line in lines if line.startswith("Requires-Dist:")]
    return [line.split(";")[0] for line in found if ";" not in line]


def present(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def unpack_missing(wheels: Iterable[Path], wanted: Iterable[str], target: Path) -> list[str]:
    """Unpacks the wheels of what this Python lacks or has in a version that does not fit; returns them by name.

    Args:
        wanted: requirements such as "diffusers>=0.42,<0.43"; those of a wheel that is taken count too.
    """
    kit = {plain(wheel.name.split("-")[0]): wheel for wheel in wheels if runs_here(wheel)}
    taken: dict[str, Path] = {}
    open_ = [*wanted, *kit]
    while open_:
        requirement = open_.pop(0)
        name = plain(re.match(r"[\w.-]+", requirement)[0])
        version = present(name)
        if name in kit and name not in taken and (version is None or not fits(version, requirement)):
            taken[name] = kit[name]
            open_ += requirements(kit[name])
    for wheel in taken.values():
        with zipfile.ZipFile(wheel) as file:
            file.extractall(target)
    return [f"{wheel.name.split('-')[0]} {wheel.name.split('-')[1]}" for _, wheel in sorted(taken.items())]


def link_package(site: Path) -> None:
    """Our package as the wheel has it: `training/` is `diffusers_ext.training`."""
    package = site / "diffusers_ext"
    package.mkdir()
    entries = {entry.name: entry for entry in (ROOT / "src" / "diffusers_ext").iterdir()}
    for name, entry in {**entries, "training": ROOT / "training"}.items():
        (package / name).symlink_to(entry)


PROBE = f"""
import importlib.util, json, platform, sys
told = {{"python": platform.python_version(), "absent": [name for name, module in {PACKAGES!r}.items()
         if importlib.util.find_spec(module) is None]}}
try:
    import torch
    told |= {{"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}}
    if torch.accelerator.is_available():
        told["device"] = torch.accelerator.current_accelerator().type
        told["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else told["device"]
except ImportError as error:
    told["torch_error"] = str(error)
print(json.dumps(told))
"""


def probe(environment: Mapping[str, str]) -> dict[str, Any]:
    answer = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment)
    if answer.returncode:
        raise SystemExit(f"This Python does not start:\n{answer.stderr}")
    return json.loads(answer.stdout.splitlines()[-1])


# --- running


def run_part(part: Part, environment: Mapping[str, str], folder: Path, until: float, absent: Sequence[str]) -> dict:
    """Runs a part and returns what came of it: `outcome` (passed, failed, stopped, skipped), `rows`, `message`."""
    result: dict[str, Any] = {"part": part.name, "seconds": 0.0, "rows": [], "message": ""}
    if missing := [name for name in part.needs if name in absent]:
        return result | {"outcome": "skipped", "message": f"absent: {', '.join(missing)}"}
    started, limit = time.monotonic(), min(part.limit, until - time.monotonic())
    if limit < 5:
        return result | {"outcome": "skipped", "message": "no time is left"}
    json_file, log_file = folder / f"{part.name}.json", folder / f"{part.name}.log"
    words = [sys.executable, *(str(json_file) if word == "{json}" else word for word in part.words)]
    environment = {**environment, "GPU_TESTS_RESULTS": str(json_file)}
    with open(log_file, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(limit)
            outcome = "failed" if process.returncode else "passed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
            outcome = "stopped"
    log = log_file.read_text(encoding="utf-8", errors="replace")
    rows = read_rows(part, json_file, log)
    message = "" if outcome == "passed" else f"stopped after {limit:.0f} s" if outcome == "stopped" else last_line(log)
    print(f"{part.name}: {outcome} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    seconds = round(time.monotonic() - started, 1)
    return result | {"outcome": outcome, "seconds": seconds, "rows": rows, "message": message, "log": log[-20_000:]}


def last_line(log: str) -> str:
    """pytest's last error, else the last line, which names the exception of a program that broke."""
    lines = re.findall(r"^E  +(\S.*)$", log, flags=re.M) or [line for line in log.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "it said nothing"


def read_rows(part: Part, file: Path, log: str) -> list[dict]:
    """The lines of the tests, or the rows of a benchmark; of one that was stopped the ratios that it had told."""
    if part.is_test:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    if not file.is_file():
        told = re.findall(r"^ {2}(\S.*): ([\d.]+)$", log, flags=re.M)
        return [{"case": case, "ratio": float(ratio)} for case, ratio in told]
    found = json.loads(file.read_text(encoding="utf-8"))
    tables = found.values() if isinstance(found, dict) else [found]
    return [row for table in tables for row in (table if isinstance(table, list) else [table])]


def run_all(parts: Sequence[Sequence[Part]], environment: Mapping[str, str], absent: Sequence[str]) -> list[dict]:
    """Runs groups one after another, the parts of a group at the same time."""
    until, results = time.monotonic() + SECONDS, []
    with tempfile.TemporaryDirectory() as folder:
        for group in parts:
            with ThreadPoolExecutor(max_workers=max(1, len(group))) as pool:
                waiting = [pool.submit(run_part, part, environment, Path(folder), until, absent) for part in group]
                results += [one.result() for one in waiting]
    return results


# --- telling


def table(results: Sequence[dict]) -> str:
    """A row a check of the tests, with the cases that failed, and a row a measurement of the benchmarks."""
    lines = ["| part | what | result |", "|---|---|---|"]
    for result in results:
        rows = result["rows"]
        if result["outcome"] != "passed" or not rows:
            lines.append(f"| {result['part']} | the whole part | **{result['outcome']}** {result['message']} |")
        for check in dict.fromkeys(row["check"] for row in rows if "check" in row):
            found = [row for row in rows if row.get("check") == check]
            counts = {how: sum(row["outcome"] == how for row in found) for how in ("passed", "failed", "skipped")}
            said = ", ".join(f"{count} {how}" for how, count in counts.items() if count)
            for row in found:
                if row["outcome"] == "failed":
                    said += f"; {row['case'] or check}: {one_line(row['message'])}"
            lines.append(f"| {result['part']} | {check} | {said} |")
        for row in rows:
            if "check" not in row:
                case = str(next(iter(row.values())))
                figures = ", ".join(f"{key} {shown(row[key])}" for key in list(row)[1:] if row[key] is not None)
                lines.append(f"| {result['part']} | {case} | {figures} |")
    return "\n".join(lines)


def one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:160]


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")


def failures(results: Sequence[dict]) -> int:
    return sum(
        max(sum(row.get("outcome") == "failed" for row in one["rows"]), one["outcome"] in ("failed", "stopped"))
        for one in results
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", help="default: the GPU that torch finds; cpu: what runs without one")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--json", default="runs/gpu.json", help="file for everything that was found")
    args = parser.parse_args(arguments)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site-packages")  # so named, or dill takes what lies there for the user's own modules
        site.mkdir()
        unpacked = unpack_missing(sorted(WHEELS.glob("*.whl")), wanted, site)
        link_package(site)
        paths = [str(site), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        machine = probe(environment)
        if "torch" not in machine:
            print(f"{sys.executable} has no torch that can be imported ({machine['torch_error']}): make gpu PY=...")
            return 1
        if machine["gpu"] is None and args.device is None:
            print(f"torch {machine['torch']} (CUDA {machine['cuda']}) sees no GPU here: nothing was run.")
            return 0
        device = args.device or machine["device"]
        if args.device:
            environment["GPU_TESTS_DEVICE"] = args.device
        groups = [test_parts(), *([part] for part in speed_parts(device))]
        if args.only:
            names = [part.name for group in groups for part in group]
            if unknown := sorted(set(args.only) - set(names)):
                parser.error(f"--only: there is no {', '.join(unknown)}; the parts are {', '.join(names)}")
            groups = [[part for part in group if part.name in args.only] for group in groups]
        started = time.monotonic()
        results = run_all(groups, environment, machine["absent"])
    found = failures(results)
    print(
        f"{machine['gpu'] or 'no GPU'}, device {device}, torch {machine['torch']}, CUDA {machine['cuda']}, Python"
        f" {machine['python']}; unpacked: {', '.join(unpacked) or 'nothing'}; absent:"
        f" {', '.join(machine['absent']) or 'nothing'}\n"
    )
    print(table(results))
    print(f"\n{found} failed, {time.monotonic() - started:.0f} s. Everything, with tracebacks: {args.json}")
    file = Path(args.json)
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"machine": machine, "device": device, "unpacked": unpacked, "parts": results}
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
