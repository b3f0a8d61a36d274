"""benchmarks/speed_versatile.py at its smallest sizes: the same results on both sides, and what is measured."""

import mmap
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_ext.models.unet_versatile import VersatileUNet

SMALL = ["--smoke", "--threads", "1"]


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        script = SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "speed_versatile.py")))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))
    with pytest.MonkeyPatch.context() as patch:
        # put back at the end: other tests may want diffusers as it is
        patch.setattr(script.DualTransformer2DModel, "forward", script.DualTransformer2DModel.forward)
        script.repair_dual_contexts()
        yield script


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("repository"))
    args = script.parse_args(SMALL)
    tokenizer = script.write_repository(f"{folder}/published", args.width, args.resolution, 1, script.PROMPT)
    script.convert_repository(f"{folder}/published", args.width, tokenizer).save_pretrained(f"{folder}/ours")
    return folder


@pytest.mark.parametrize("flow", ["text-to-image", "image-to-image", "dual"])
def test_both_sides_make_the_same(script, folder, flow):
    """In one step of the network, in a picture, and through the pipeline that holds all flows."""
    args = script.parse_args(SMALL)
    pipes = {side: script.load(side, flow, folder, args) for side in ("diffusers", "whole", "ours")}
    theirs, ours = script.network_pair(flow, pipes["diffusers"], pipes["ours"], args)
    with torch.no_grad():
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-5)
    given = script.encode_as_diffusers(pipes["diffusers"], script.picture(args)) if flow == "dual" else {}
    first, second, third = (
        script.sample(side, flow, pipe, args, 2, **(given if side == "ours" else {})) for side, pipe in pipes.items()
    )
    assert first.shape == (1, 64, 64, 3) and first.std() > 0.01
    assert np.abs(first - second).max() < 1e-4 and np.abs(first - third).max() < 1e-4


def test_every_row_of_a_flow(script, folder):
    rows = list(script.flow_rows("text-to-image", folder, script.parse_args(SMALL)))
    assert [row["case"].removeprefix("text-to-image: ") for row in rows] == [
        "loading", "network, one guided step", "sampling, 2 steps"
    ]  # fmt: skip
    assert all(row["ratio"] > 0 for row in rows)
    assert all(float(row["difference"]) < 1e-4 for row in rows[1:])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory on a CPU is read from /proc")
def test_memory_counts_weights_and_pictures(script, folder, repo_root):
    before = script.process_bytes("VmRSS")
    with mmap.mmap(-1, 2**26) as block:  # new pages: an allocator may have 64 MiB at hand that it counts already
        block.write(b"\1" * len(block))
        assert script.process_bytes("VmRSS") - before > 0.9 * len(block)
    words = [
        *SMALL,
        "--measure_memory",
        "ours",
        "text-to-image",
        folder,
    ]  # in a process of its own, as the script does
    command = [sys.executable, str(repo_root / "benchmarks" / "speed_versatile.py"), *words]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    flow = VersatileUNet.from_pretrained(Path(folder) / "ours" / "unet", flows=["text-to-image"])
    assert peak > sum(parameter.nbytes for parameter in flow.parameters())


def test_sizes_follow_the_device_unless_given(script):
    args = script.parse_args([])
    assert (args.width, args.resolution, args.dtype) == (80, 256, "float32")
    args = script.parse_args(["--device", "cuda", "--steps", "7"])
    assert (args.width, args.resolution, args.steps, args.dtype) == (320, 512, 7, "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--width 40", "--width must be a positive multiple of 16, received 40"),
        ("--resolution 100", "--resolution must be a positive multiple of 64, received 100"),
        ("--rounds 0", "--rounds must be a positive multiple of 1, received 0"),
        ("--flows text-to-text", "invalid choice: 'text-to-text'"),
    ],
)
def test_bad_arguments(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(arguments.split())
    assert message in capsys.readouterr().err
