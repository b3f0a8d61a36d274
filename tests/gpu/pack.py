"""`make gpu-kit`: what a machine with a GPU and torch, but without network, needs for `make gpu PY=python3`.

    make gpu-kit                                 # for Python 3.12 on x86-64 Linux
    make gpu-kit ARGS="--python_version 3.13"

Written are `gpu-kit/wheels/`, which `make gpu` looks into, and `gpu-kit.tar`: the sources as git tracks them, the
bundled checkpoints that the GPU tests read, and the wheels, under 60 MiB. There: `tar xf gpu-kit.tar; cd
diffusers_ext; make gpu PY=python3`. Wheels are those of the packages as installed here, with all that they need but
the large ones that a machine with torch has (`THERE`); of those that are there as well the machine's own are used.
"""

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "gpu-kit"
LIMIT = 60  # MiB
PACKAGES = ("diffusers", "transformers", "accelerate", "peft", "datasets", "pytest", "jinja2")
# Large, or of torch itself. hf-xet only moves files over the network.
THERE = {"hf-xet", "numpy", "pandas", "pillow", "pyarrow", "scipy", "torch"}
SOURCES = ("src/", "training/", "pipelines/", "benchmarks/", "tests/")
FILES = ("Makefile", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")
CHECKPOINTS = ("checkpoints/ldm-text-scenes-64",)  # beside those that the smoke presets name
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux2010_x86_64")


def closure(python_version: str) -> dict[str, str]:
    """The wheels to pack, name -> version as installed here: `PACKAGES` and what they need on that Python."""
    place = {"python_version": python_version, "python_full_version": f"{python_version}.0", "extra": "",
             "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}  # fmt: skip
    found: dict[str, str] = {}
    open_ = list(PACKAGES)
    while open_:
        name = canonicalize_name(open_.pop())
        if name in found or name in THERE:
            continue
        found[name] = importlib.metadata.version(name)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(place):
                open_.append(requirement.name)
    return found


def download(pins: dict[str, str], python_version: str, target: Path) -> None:
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation",
         "cp", "--python-version", python_version, *platforms, "--dest", str(target),
         *(f"{name}=={version}" for name, version in sorted(pins.items()))],
        check=True,
    )  # fmt: skip


def bundled() -> list[str]:
    """The checkpoints that the smoke presets and the GPU tests read."""
    presets = [path.read_text(encoding="utf-8") for path in (ROOT / "training" / "presets").glob("*-smoke.yaml")]
    named = {name for text in presets for name in re.findall(r"checkpoints/[\w.-]+", text)}
    return sorted({*named, *CHECKPOINTS})


def sources() -> list[str]:
    """Tracked files that travel: code, its data files, and the checkpoints; no recorded numbers, no fixtures."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    checkpoints = tuple(f"{name}/" for name in bundled())
    return [
        name
        for name in tracked
        if name in FILES
        or name.startswith(checkpoints)
        or (name.startswith(SOURCES) and (not name.startswith("tests/") or name.endswith(".py")))
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--python_version", default="3.12", help="of the machine with the GPU")
    args = parser.parse_args(arguments)
    folder, archive = ROOT / FOLDER, ROOT / f"{FOLDER}.tar"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    download(closure(args.python_version), args.python_version, folder / "wheels")
    wheels = sorted((folder / "wheels").glob("*.whl"))
    names = sources()
    with tarfile.open(archive, "w") as tar:
        for name in [*names, *(str(wheel.relative_to(ROOT)) for wheel in wheels)]:
            tar.add(ROOT / name, f"diffusers_ext/{name}")
    sizes = {
        "wheels": sum(wheel.stat().st_size for wheel in wheels),
        "checkpoints": sum((ROOT / name).stat().st_size for name in names if name.startswith("checkpoints/")),
        "whole": archive.stat().st_size,
    }
    print(", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items()), f"({len(wheels)} wheels)")
    if sizes["whole"] > LIMIT * 2**20:
        sys.exit(f"{archive.name} is larger than {LIMIT} MiB: take a wheel or a checkpoint out in tests/gpu/pack.py.")


if __name__ == "__main__":
    main()
