"""How much do the flows of Versatile Diffusion share? One network of four flows against four networks of one flow.

    python benchmarks/claims_versatile_parameters.py                                      # the paper's sizes
    python benchmarks/claims_versatile_parameters.py --config checkpoints/some-pipeline   # those of a checkpoint

Parameters are counted on the meta device: nothing is allocated or downloaded (arXiv 2211.08332, section 3.1: flows
share the global layers, the layers of their data type and those of their context type).
"""

import argparse
from typing import Any

import torch

from diffusers_ext.models.unet_versatile import VersatileUNet


def count_parameters(config: dict[str, Any], flows: list[str] | None) -> dict[str, int]:
    """Parameters of each layer group, such as "data.image", of a network of these flows (None: all)."""
    with torch.device("meta"):
        unet = VersatileUNet.from_config({**config, "flows": flows})
    return {name: sum(p.numel() for p in group.parameters()) for name, group in unet.layer_groups().items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="pipeline folder with a `unet`; the paper's sizes when unset")
    args = parser.parse_args(arguments)
    config = dict(VersatileUNet.load_config(args.config, subfolder="unet")) if args.config else {}
    with torch.device("meta"):
        flows = VersatileUNet.from_config({**config, "flows": None}).known_flows
    together = count_parameters(config, None)
    alone = {flow: sum(count_parameters(config, [flow]).values()) for flow in flows}
    print("| network | parameters |\n|---|---|")
    for flow, number in alone.items():
        print(f"| {flow} alone | {number:,} |")
    total, shared = sum(alone.values()), sum(together.values())
    print(f"| these {len(flows)} networks | {total:,} |")
    for name, number in together.items():
        print(f"| of one network: {name} | {number:,} |")
    print(f"| one network of {len(flows)} flows | {shared:,} |")
    print(f"| one network / {len(flows)} networks | {shared / total:.3f} |")


if __name__ == "__main__":
    main()
