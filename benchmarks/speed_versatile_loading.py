"""What does a flow of Versatile Diffusion cost to load? Bytes read of the network's file, and memory.

    python benchmarks/speed_versatile_loading.py                                    # a quarter of the paper's widths
    python benchmarks/speed_versatile_loading.py --checkpoint checkpoints/some-pipeline

`VersatileUNet.from_pretrained(..., flows=[...])` maps the file and reads the layer groups that the flows need. "Read"
is what of the mapped file lies in this process's memory afterwards, as Linux counts it (/proc/self/smaps), after every
weight was looked at once; around what is read the kernel maps up to 2 MiB more. "Weights" are the parameters, and
"memory" is how much the process grew (VmRSS). Without a checkpoint a network with random weights is written to a
temporary folder.
"""

import argparse
import gc
import re
import sys
import tempfile
from pathlib import Path

import torch

from diffusers_ext.models.unet_versatile import VersatileUNet


def resident_bytes(path: Path) -> int:
    """How much of a file that this process has mapped lies in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def process_bytes() -> int:
    """Memory of this process."""
    (line,) = re.findall(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), flags=re.M)
    return 1024 * int(line)


@torch.no_grad()
def measure(folder: Path, flows: list[str] | None) -> tuple[int, int, int]:
    """(bytes read, bytes of the weights, growth of the process) of a network of these flows; None: all."""
    gc.collect()
    before = process_bytes()
    unet = VersatileUNet.from_pretrained(folder, flows=flows)
    for parameter in unet.parameters():
        parameter.sum()
    read = sum(resident_bytes(path) for path in folder.glob("*.safetensors"))
    return read, sum(p.nbytes for p in unet.parameters()), process_bytes() - before


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", help="pipeline folder; a new network when unset")
    parser.add_argument("--width", type=int, default=80, help="first width of a new network, a multiple of 16")
    args = parser.parse_args(arguments)
    if args.width < 16 or args.width % 16:
        parser.error(f"--width must be a multiple of 16, received {args.width}")
    if not Path("/proc/self/smaps").exists():
        sys.exit("Only Linux tells what of a file was read (/proc/self/smaps).")
    if args.checkpoint is not None:
        folder = Path(args.checkpoint).resolve() / "unet"
        if not list(folder.glob("*.safetensors")):
            parser.error(f"{args.checkpoint!r} is no pipeline folder: it holds no unet/*.safetensors")
        print_table(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        widths = (args.width, 2 * args.width, 4 * args.width, 4 * args.width)
        unet = VersatileUNet(block_out_channels=widths, norm_num_groups=16)
        unet.save_pretrained(temporary)
        del unet
        print_table(Path(temporary).resolve())


def print_table(folder: Path) -> None:
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    names = VersatileUNet.load_config(folder).get("flows") or all_flows(folder)
    print(f"The network's file holds {stored:,} bytes.\n")
    print("| flows | read, bytes | share of the file | weights, bytes | memory, bytes |\n|---|---|---|---|---|")
    for flows in (*([name] for name in names), list(names)):
        read, weights, memory = measure(folder, flows)
        label = flows[0] if len(flows) == 1 else "all"
        print(f"| {label} | {read:,} | {read / stored:.2f} | {weights:,} | {memory:,} |")


def all_flows(folder: Path) -> list[str]:
    """The flows of a network that was saved with all of them."""
    with torch.device("meta"):
        return VersatileUNet.from_config(VersatileUNet.load_config(folder)).known_flows


if __name__ == "__main__":
    main()
