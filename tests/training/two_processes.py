"""Runs recipes one after the other in the processes of one launch; `test_every_recipe.py` starts it.

    accelerate launch --multi_gpu --num_processes 2 two_processes.py jobs.json

Each job is [name, recipe, words of its command line], or [name of a check below, null, []]; what each process has to
say of it goes to `<name>.<rank>.json` beside the list of jobs.
"""

import importlib
import json
import sys
import time
import traceback
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from test_cache import Numbers, assert_numbers, open_numbers

from diffusers_ext.models.token_codec import codebook_weight
from diffusers_ext.models.vq_paella import PaellaVQModel
from diffusers_ext.training.autoencoder.networks import new_autoencoder
from diffusers_ext.training.autoencoder.objective import Quantized


def codes(jobs: Path) -> dict[str, list[float]]:
    """The codes that each process starts with when each sees other pictures (as rounding on a GPU would make them)."""
    args, _, _ = importlib.import_module("train_autoencoder").parse_args(
        ["--dataset_name", "scenes", "--model", "paella_vq", "--block_out_channels", "8", "16", "--num_vq_embeddings"]
        + ["8", "--plain_fraction", "0", "--latent_channels", "2"]
    )
    torch.manual_seed(0)
    autoencoder, accelerator = new_autoencoder(PaellaVQModel, args, 32), Accelerator()
    generator = torch.Generator().manual_seed(accelerator.process_index)
    images = torch.rand(4, 3, 32, 32, generator=generator)
    objective = Quantized(autoencoder, args, 10, pictures=lambda count: iter([(images, [])]))
    objective.before_step(images, 4, 0, accelerator)
    return {"codes": codebook_weight(objective.autoencoder).flatten().tolist()}


def numbers(jobs: Path) -> dict[str, list[int]]:
    """The samples that each process reads for a cache that they fill together; each finds all of them in it."""
    read = Numbers()
    assert_numbers(open_numbers(jobs.with_name("cache"), read))
    return {"seen": read.seen}


CHECKS = {check.__name__: check for check in (codes, numbers)}


def main() -> None:
    jobs = Path(sys.argv[1])
    destroy = PartialState.destroy_process_group
    PartialState.destroy_process_group = lambda self, group=None: None  # the recipes share the launch's group
    for name, recipe, words in json.loads(jobs.read_text()):
        started = time.monotonic()
        try:
            found = {} if recipe else CHECKS[name](jobs)
            if recipe:
                importlib.import_module(f"train_{recipe}").main(words)
        except Exception:  # the other process must not wait for this one's next job
            traceback.print_exc()
            print(f"failed: {name}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        state = PartialState()
        found |= {"processes": state.num_processes, "seconds": time.monotonic() - started}
        Path(jobs.parent, f"{name}.{state.process_index}.json").write_text(json.dumps(found))
        AcceleratorState._reset_state()
    destroy(PartialState())


if __name__ == "__main__":
    main()
