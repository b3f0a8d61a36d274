"""What `accelerate launch`, `accelerate config` and the environment say about a run, and what it does about it."""

import os
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from .args import LAUNCHER, TrainArgs

# What shards weights: a checkpoint of the main process would hold a part of them.
NOT_BUILT = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def make_accelerator(train: TrainArgs) -> Accelerator:
    """The accelerator of a run: `fit` does the accumulation itself, so accelerate is told of none.

    Raises:
        ValueError: the launcher was configured for FSDP, DeepSpeed and the like, or fp16 is asked for on a CPU.
    """
    for variable, name in NOT_BUILT.items():
        if parse_flag_from_env(variable):
            refuse(name)
    accelerator = Accelerator(
        mixed_precision=train.mixed_precision, log_with=list(train.trackers) or None, project_dir=train.output_dir
    )
    if accelerator.distributed_type in (
        DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM
    ):  # fmt: skip
        refuse(accelerator.distributed_type.value)
    accelerator.gradient_accumulation_steps = 1  # the environment would divide every gradient once more
    if train.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            f"--mixed_precision=fp16 (from {train.origin.sources['mixed_precision']}) needs a GPU: on a CPU it would "
            "be float32 without a word. Pass bf16 or no."
        )
    return accelerator


def refuse(name: str) -> None:
    raise ValueError(
        f"The launcher was configured for {name}, which the recipes do not know yet: their checkpoints hold the "
        "weights of the main process. Use `accelerate launch --multi_gpu` (data parallel), or run `accelerate config` "
        "again."
    )


def describe(train: TrainArgs) -> str:
    """What a step is made of, and who said so."""
    batch, accumulation = train.train_batch_size, train.gradient_accumulation_steps
    processes, sources = PartialState().num_processes, train.origin.sources
    return (
        f"{processes} {'process' if processes == 1 else 'processes'} x {batch} samples x {accumulation} micro-steps = "
        f"{processes * batch * accumulation} samples a step (accumulation from "
        f"{sources['gradient_accumulation_steps']}), precision {train.mixed_precision} (from "
        f"{sources['mixed_precision']})"
    )


def launch_words(train: TrainArgs) -> list[str]:
    """The words before the script's name that launch such a run again, whatever a configuration file says."""
    processes, words = PartialState().num_processes, ["accelerate", "launch"]
    if train.origin.sources["gradient_accumulation_steps"] == "the launcher":
        words = [f"{LAUNCHER['gradient_accumulation_steps'][0]}={train.gradient_accumulation_steps}", *words]
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        words = ["ACCELERATE_USE_CPU=true", *words]
    if processes > 1:
        words.append("--multi_gpu")  # on CPUs as well: `--cpu` would start a single process
    words += ["--num_processes", str(processes)]
    if (machines := int(os.environ.get("GROUP_WORLD_SIZE", "1"))) > 1:
        words += ["--num_machines", str(machines)]
    return [*words, "--mixed_precision", train.mixed_precision]


def launcher_process() -> int | None:
    """The number of the process `accelerate launch` that started this one, where the system tells (Linux).

    None where something else did, such as a shell, whose end means nothing.
    """
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return None
    names = [Path(word).name for word in words]
    launches = ("accelerate", "launch") in zip(names, names[1:], strict=False)
    return parent if launches or {"accelerate-launch", "accelerate.commands.launch"} & set(names) else None
