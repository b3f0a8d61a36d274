"""Arguments that mean the same in every recipe, and the one way in which a recipe reads them.

A call is `accelerate launch training/train_<recipe>.py [preset.yaml] [--field value ...]`: the flat preset is spliced
in front of the command line as `--key=value` words, so that the command line wins. (`HfArgumentParser` cannot mix the
two itself, and its `parse_yaml_file` leaves `1e-4` a string.)
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser


@dataclass
class DataArgs:
    """Where the training pictures come from; the layouts are described in training/README.md."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "`scenes` (built in), or the name of a data set on the Hub."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub data set; the grounds of `scenes`."}
    )
    train_data_dir: str | None = field(
        default=None, metadata={"help": "Folder of pictures: with metadata.jsonl, class folders, or plain."}
    )
    image_column: str = field(default="image", metadata={"help": "Column that holds the picture."})
    caption_column: str = field(default="text", metadata={"help": "Column that holds the caption or captions."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the integer class label."})
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Use only so many samples (for `scenes`: how many to draw; 100,000 when unset)."},
    )
    resolution: int = field(default=64, metadata={"help": "Side of the square training pictures in pixels."})
    center_crop: bool = field(default=False, metadata={"help": "Crop the centre instead of a random place."})
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the pictures left to right."})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that load data; results do not depend on it."}
    )

    def __post_init__(self):
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                f"Exactly one of --dataset_name (got {self.dataset_name!r}) and --train_data_dir (got "
                f"{self.train_data_dir!r}) is needed; `--dataset_name scenes` is built in."
            )
        _positive(self, "resolution", "max_train_samples")


@dataclass
class TrainArgs:
    """Length, step and bookkeeping of a run."""

    output_dir: str = field(
        default="runs/unnamed", metadata={"help": "The final result lies here, checkpoints below it."}
    )
    seed: int = field(default=0, metadata={"help": "All draws are a function of it (and of epoch and sample)."})
    train_batch_size: int = field(default=16, metadata={"help": "Samples per process and micro-step."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-steps per optimizer step."})
    max_train_steps: int = field(default=1000, metadata={"help": "Optimizer steps in all."})
    max_train_minutes: float | None = field(
        default=None,
        metadata={"help": "Stop after so many minutes with a checkpoint; `--resume_from_checkpoint latest` goes on."},
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler: str = field(default="constant_with_warmup", metadata={"help": "A schedule name of diffusers."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps of linear warm-up."})
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    mixed_precision: Literal["no", "fp16", "bf16"] = field(
        default="no", metadata={"help": "Autocast of the forward pass."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade compute for memory."})
    use_ema: bool = field(default=False, metadata={"help": "Keep, validate and export an exponential moving average."})
    ema_decay: float = field(default=0.9999, metadata={"help": "Its largest decay; it starts near 0 and rises."})
    checkpointing_steps: int = field(default=500, metadata={"help": "Save a training checkpoint every so many steps."})
    checkpoints_total_limit: int | None = field(
        default=2, metadata={"help": "Keep so many of the newest checkpoints."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "`latest` (the newest complete one, if any) or the path of a checkpoint."}
    )
    validation_steps: int | None = field(
        default=None, metadata={"help": "Validate every so many steps (and at the end)."}
    )
    logging_steps: int = field(
        default=50, metadata={"help": "Write a line to <output_dir>/log.jsonl every so many steps."}
    )
    report_to: str | None = field(default=None, metadata={"help": "Tracker of accelerate: tensorboard, wandb, ..."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the final result to the Hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "user/name on the Hub; the folder's name when unset."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Create the Hub repository as private."})
    license: str | None = field(default=None, metadata={"help": "Licence of the weights, for the model card."})

    def __post_init__(self):
        _positive(
            self, "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "max_train_minutes",
            "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "logging_steps", "max_grad_norm",
        )  # fmt: skip
        if self.learning_rate < 0:
            raise ValueError(f"--learning_rate must be >= 0, got {self.learning_rate}.")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"--ema_decay must lie in [0, 1], got {self.ema_decay}.")


def parse_args(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple:
    """Reads `[preset.yaml] [--field value ...]` into one instance of each dataclass.

    Args:
        dataclass_types: The dataclasses, all of whose fields become options.
        argv: The words after the script's name; `sys.argv[1:]` when `None`.

    Raises:
        ValueError: the preset does not exist or is not a flat mapping, an option is unknown, or the dataclasses
            refuse a value.
        SystemExit: a value of the wrong type (argparse prints the options).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words = preset_words(Path(words[0])) + words[1:]
    parser = HfArgumentParser(list(dataclass_types), allow_abbrev=False)  # type: ignore[arg-type]
    return parser.parse_args_into_dataclasses(args=words, look_for_args_file=False)


def preset_words(path: Path) -> list[str]:
    """A flat YAML preset as command-line words (`--key=value`; a list becomes `--key value value ...`)."""
    if not path.is_file() or path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"The preset {str(path)!r} is not a .yaml file; presets lie in training/presets/.")
    try:
        preset = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The preset {str(path)!r} is not YAML: {error}") from error
    if not isinstance(preset, dict):
        raise ValueError(f"{path}: a preset holds one `option: value` a line, not a {type(preset).__name__}.")
    words = []
    for key, value in preset.items():
        if isinstance(value, dict):
            raise ValueError(f"{path}: `{key}` is a mapping; a preset is flat, one option a line.")
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words.append(f"--{key}={value}")
    return words


def _positive(args, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} must be > 0, got {value}.")
