"""How far a reader walks: the house's functions and files that one prompt and one training batch pass.

    python benchmarks/reading_hops.py prompt      # from `__call__` to the image, two steps, each family
    python benchmarks/reading_hops.py batch       # from the files on the disk to the optimizer step, two recipes
    python benchmarks/reading_hops.py lines       # lines of code a folder
    ... --root OLD                                # the same of another checkout

Counted are distinct functions and files of this repository; what diffusers, transformers and torch do is not. A
network is one hop, whatever it is made of: a function of `models/` counts where something else than `models/` calls
it. Of a prompt, the files of such functions are in the number of files, and once more in a column of their own.
`frames` are the house's functions on the stack from `__call__` to the one that calls the U-Net, both included. Lines
of code are those that hold something else than blanks, comments and docstrings.

A batch's way begins where the loader reads its rows and ends where the optimizer takes the step; the functions on the
stack at both ends count. A component of a pipeline (network, scheduler) is one hop, whatever it is made of, and so is
its file: a reader of the training need not open it further. A hook of a base class that nobody fills (a docstring, no
line of code) is none, nor is what the import system calls.
"""

import argparse
import ast
import contextlib
import io
import os
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

HERE = Path(__file__).resolve().parents[1]
ROOT = Path(sys.argv[sys.argv.index("--root") + 1]).resolve() if "--root" in sys.argv[:-1] else HERE
HOUSE = (str(ROOT / "src" / "diffusers_ext"), str(ROOT / "training"))
MODELS = str(ROOT / "src" / "diffusers_ext" / "models")
COMPONENTS = (MODELS, str(ROOT / "src" / "diffusers_ext" / "schedulers"))
# how a pipeline enters a U-Net: torch's call, Paella's first half
ENTRIES = ("_wrapped_call_impl", "forward_features")
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "training")]

PROMPTS = {
    "Paella": "checkpoints/paella-scenes-64",
    "Latent Diffusion, text": "checkpoints/ldm-text-scenes-64",
    "Versatile Diffusion": "checkpoints/versatile-scenes-64",
}
BATCHES = {
    "train_paella": "paella-smoke.yaml",
    "train_ldm": "ldm-smoke.yaml",
}


class Walk:
    """The functions of the house that are called while it is active, in the order of their first call."""

    def __init__(self) -> None:
        self.functions: dict[CodeType, None] = {}

    def note(self, frame: FrameType) -> None:
        inside = is_house(frame.f_code) and all(MODELS in one.f_code.co_filename for one in stack(frame)[:2])
        if is_house(frame.f_code) and not inside:  # a network is one hop
            self.functions.setdefault(frame.f_code)

    @property
    def files(self) -> set[str]:
        return {code.co_filename for code in self.functions}

    @property
    def network_files(self) -> set[str]:
        return {name for name in self.files if name.startswith(MODELS)}

    def lines(self) -> Iterator[str]:
        for code in self.functions:
            yield f"    {os.path.relpath(code.co_filename, ROOT)}:{code.co_firstlineno} {code.co_qualname}"


def is_house(code: CodeType) -> bool:
    # a comprehension or a lambda is a part of the function that holds it
    if not code.co_filename.startswith(HOUSE) or code.co_name.startswith("<") or code.co_name == "find_spec":
        return False
    is_empty = not code.co_names and len(code.co_consts) == 2 and isinstance(code.co_consts[0], str)
    return not (is_empty and code.co_consts[1] is None and code.co_stacksize == 1)  # docstring, return None


def stack(frame: FrameType | None) -> list[FrameType]:
    """The house's frames, innermost first."""
    frames = []
    while frame is not None:
        if is_house(frame.f_code):
            frames.append(frame)
        frame = frame.f_back
    return frames


@contextlib.contextmanager
def profiled(on_call: Callable[[FrameType], None]) -> Iterator[None]:
    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            on_call(frame)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def walk_prompt(folder: str) -> tuple[Walk, int]:
    """The walk of one prompt, and the number of frames from `__call__` to the caller of the U-Net."""
    import torch
    from diffusers import DiffusionPipeline

    import diffusers_ext  # noqa: F401  # its pipelines become known to diffusers

    pipe = DiffusionPipeline.from_pretrained(HERE / folder)
    pipe.set_progress_bar_config(disable=True)
    walk, frames = Walk(), 0

    def on_call(frame: FrameType) -> None:
        nonlocal frames
        walk.note(frame)
        if frame.f_locals.get("self") is pipe.unet and frame.f_code.co_name in ENTRIES:
            frames = max(frames, sum(MODELS not in one.f_code.co_filename for one in stack(frame)))

    with profiled(on_call):
        pipe(
            "a large green ring", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)
        )
    return walk, frames


def walk_batch(recipe: str, preset: str) -> Walk:
    """The walk of the third batch of a run."""
    import importlib

    from torch.optim import adam, adamw
    from torch.utils.data._utils import fetch

    from diffusers_ext.data.scenes import write_scenes

    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    os.chdir(ROOT)
    walk, steps, on_its_way = Walk(), 0, False

    def on_call(frame: FrameType) -> None:
        nonlocal steps, on_its_way
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        is_read, is_used = name == "fetch" and file == fetch.__file__, name == "step" and file in optimizers
        if steps == 2 and (is_read or is_used):
            on_its_way = is_read
            for one in reversed(stack(frame)):
                walk.note(one)
        elif on_its_way and not all(one.f_code.co_filename.startswith(COMPONENTS) for one in stack(frame)[:2]):
            walk.note(frame)
        steps += is_used

    optimizers = (adam.__file__, adamw.__file__)
    with tempfile.TemporaryDirectory() as folder, profiled(on_call):
        write_scenes(Path(folder) / "pictures", 32, resolution=64)
        options = (ROOT / "training" / "presets" / preset).read_text(encoding="utf-8").splitlines(keepends=True)
        own = Path(folder) / preset  # older recipes cannot replace a preset's data set
        own.write_text("".join(line for line in options if not line.startswith("dataset_name")), encoding="utf-8")
        words = [str(own), "--train_data_dir", f"{folder}/pictures", "--output_dir", f"{folder}/run"]
        words += ["--max_train_steps", "4", "--checkpointing_steps", "100", "--logging_steps", "100"]
        importlib.import_module(recipe).main(words)
    return walk


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def print_lines(root: Path) -> None:
    """A row a folder of the package, and one for the recipes."""
    totals: dict[str, int] = {}
    longest_file, longest_function = (0, ""), (0, "")
    for folder in (root / "src" / "diffusers_ext", root / "training"):
        for path in sorted(folder.rglob("*.py")):
            lines = code_lines(path.read_text(encoding="utf-8"))
            place = path.relative_to(root)
            inside = place.parts[2:-1] if place.parts[0] == "src" else place.parts[:1]
            totals[inside[0] if inside else "(top)"] = totals.get(inside[0] if inside else "(top)", 0) + len(lines)
            longest_file = max(longest_file, (len(lines), str(place)))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    size = len(lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
                    longest_function = max(longest_function, (size, f"{place}:{node.lineno} {node.name}"))
    print("| folder | lines of code |\n|---|---|")
    for name, count in sorted(totals.items()):
        print(f"| {name} | {count} |")
    recipes = totals.get("training", 0)
    print(f"| the package | {sum(totals.values()) - recipes} |")
    print(f"| training and training_utils | {recipes + totals['training_utils']} |")
    for what, (count, where) in (("file", longest_file), ("function", longest_function)):
        print(f"longest {what}: {where}, {count} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prompt", "batch", "lines"])
    parser.add_argument("--list", action="store_true", help="name the functions, in the order of their first call")
    parser.add_argument("--root", type=Path, default=HERE, help="another checkout, in place of this one")
    args = parser.parse_args()
    if args.what == "lines":
        return print_lines(ROOT)
    print("| what | functions | files | of these, networks | frames |\n|---|---|---|---|---|")
    for name, source in (PROMPTS if args.what == "prompt" else BATCHES).items():
        if args.what == "prompt":
            walk, frames = walk_prompt(source)
        else:
            walk, frames = walk_batch(name, source), "-"
        print(f"| {name} | {len(walk.functions)} | {len(walk.files)} | {len(walk.network_files)} | {frames} |")
        if args.list:
            print("\n".join(walk.lines()))


if __name__ == "__main__":
    main()
