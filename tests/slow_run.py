"""A run of small steps that waits in each; `training/test_run.py` starts it, sends it a signal and resumes it.

python slow_run.py <output_dir> <seconds a step> [--resume_from_checkpoint latest]
"""

import sys
import time
from functools import partial

import torch
from torch import nn

from diffusers_ext.training_utils.args import TrainArgs, parse_args
from diffusers_ext.training_utils.loop import fit
from diffusers_ext.training_utils.objective import Objective
from diffusers_ext.training_utils.results import finish
from diffusers_ext.training_utils.run import start


class Fitting(Objective):
    """A line through noisy points."""

    def __init__(self, seconds: float):
        super().__init__()
        self.network, self.seconds = nn.Linear(3, 1), seconds

    def losses(self, batch, generators, step):
        time.sleep(self.seconds)
        noise = torch.stack([torch.randn(1, generator=g) for g in generators])
        return {"loss": (self.network(batch) - noise).square().mean()}


def read(row: int, generator: torch.Generator) -> torch.Tensor:
    return torch.full((3,), float(row))


def save(folder, objective) -> None:
    torch.save(objective.state_dict(), folder / "weights.pt")


def main(output_dir: str, seconds: float, *words: str, workers: int = 0) -> Fitting:
    options = [
        "--output_dir",
        output_dir,
        "--max_train_steps",
        "40",
        "--train_batch_size",
        "2",
        "--logging_steps",
        "1",
    ]
    (args,) = parse_args((TrainArgs,), [*options, "--checkpointing_steps", "1000", *words])
    accelerator = start(args)
    objective = Fitting(seconds)
    finished = fit(accelerator, objective, list(range(8)), args, transform=read, num_workers=workers)
    finish(
        accelerator, args, finished, partial(save, objective=objective), recipe="line", argv=words, summary="A line.",
        usage=lambda name: f"import diffusers_ext  # {name}",
    )  # fmt: skip
    return objective


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:], workers=1)
