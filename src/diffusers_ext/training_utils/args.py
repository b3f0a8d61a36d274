"""Arguments that mean the same in every recipe, and the one way in which a recipe reads them.

A call is `accelerate launch training/train_<recipe>.py [preset] [--field value ...]`. The preset is a flat file or the
name of one that is installed with the recipes. It is spliced in front of the command line as `--key=value` words, so
that the command line wins. (`HfArgumentParser` cannot mix the two itself, and its `parse_yaml_file` leaves `1e-4` a
string.) The command line can also take back what the preset says: another source of pictures replaces the preset's,
and `--field none` unsets a field.
"""

import logging
import math
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from diffusers.optimization import SchedulerType
from transformers import HfArgumentParser

from ..data.broken_pictures import BROKEN_LIST
from ..places import did_you_mean, is_local, is_path
from .presets import find_preset, optional_fields, preset_words, take_unset, without_the_source

logger = logging.getLogger(__name__)

PRECISIONS = ("no", "fp16", "bf16")
UNBOUNDED = ("max_grad_norm", "max_train_minutes")  # infinity says that there is no limit
# diffusers' schedules, without the one whose rules no option could hold
LR_SCHEDULERS = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)
# option -> (variable that `accelerate launch` hands down, the values of it that say nothing)
LAUNCHER = {
    "mixed_precision": ("ACCELERATE_MIXED_PRECISION", ("", "no")),
    "gradient_accumulation_steps": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "1", "auto")),
}


def option(default: Any, text: str) -> Any:
    """A dataclass field with its line of `--help`."""
    metadata = {"help": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataArgs:
    """Where the training pictures come from; the layouts are described in training/README.md."""

    BOOKKEEPING: ClassVar[tuple[str, ...]] = ("dataloader_num_workers", "on_broken_picture")  # see TrainArgs

    dataset_name: str | None = option(None, "`scenes` (built in), or the name of a data set on the Hub.")
    dataset_config_name: str | None = option(None, "Configuration of the Hub data set; the grounds of `scenes`.")
    train_data_dir: str | None = option(
        None, "Folder of pictures: with metadata.jsonl, with text files, class folders, or plain."
    )
    image_column: str = option("image", "Column that holds the picture.")
    caption_column: str = option("text", "Column that holds the caption or captions.")
    label_column: str = option("label", "Column that holds the integer class label.")
    captions_from_names: bool = option(
        False, "Make captions of the names of files, or of class folders, where a folder has no captions."
    )
    max_train_samples: int | None = option(
        None, "Use only so many samples, drawn from all (`scenes`: how many to make; 100,000 when unset)."
    )
    resolution: int = option(64, "Side of the square training pictures in pixels.")
    center_crop: bool = option(False, "Crop the centre instead of a random place.")
    random_flip: bool = option(False, "Mirror half of the pictures left to right.")
    dataloader_num_workers: int = option(0, "Processes that load data; results do not depend on it.")
    on_broken_picture: Literal["stop", "skip"] = option(
        "stop",
        "A file that cannot be read ends the run, or another row stands in for its row always, and "
        f"<output_dir>/{BROKEN_LIST} names it; of more than a twentieth of the rows the run ends.",
    )
    broken_pictures: Path | None = field(default=None, init=False, repr=False, compare=False)  # that file, to skip

    def __post_init__(self):
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                f"Exactly one of --dataset_name (got {self.dataset_name!r}) and --train_data_dir (got "
                f"{self.train_data_dir!r}) is needed; `--dataset_name scenes` is built in. Either of them on the "
                "command line replaces the source of a preset."
            )
        positive(self, "resolution", "max_train_samples")
        between(self, 0, None, "dataloader_num_workers")

    def changed(self, **options: Any) -> "DataArgs":
        """The same source with other options."""
        new = replace(self, **options)
        new.broken_pictures = self.broken_pictures
        return new

    def without_augmentation(self) -> "DataArgs":
        """The options of a validation: the centre of the picture, not mirrored."""
        return self.changed(center_crop=True, random_flip=False)


@dataclass
class Origin:
    """What is known of a run besides its options.

    Args:
        sections: All dataclasses of the command line.
        sources: Where precision and accumulation come from.
        checkpoint: The one that is resumed, with its manifest.
        learnt: What was learnt from the data at the start, see `tokenizers.learn_once`.
        stopped_by: The signal that ended training before its last step.
    """

    sections: tuple[Any, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)
    checkpoint: tuple[Path, dict[str, Any]] | None = None
    learnt: dict[str, Any] = field(default_factory=dict)
    stopped_by: int | None = None


@dataclass
class TrainArgs:
    """Length, step and bookkeeping of a run."""

    # What a resumed run may change: these options apply from there on (and are listed), those tell nothing of the run.
    APPLIED: ClassVar[tuple[str, ...]] = (
        "max_train_steps", "learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2",
        "adam_weight_decay", "weight_decay_matrices_only", "adam_epsilon", "max_grad_norm", "mixed_precision",
        "gradient_checkpointing", "use_ema", "ema_decay",
    )  # fmt: skip
    BOOKKEEPING: ClassVar[tuple[str, ...]] = (
        "output_dir", "max_train_minutes", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
        "resume_with_changes", "validation_steps", "logging_steps", "report_to", "push_to_hub", "hub_model_id",
        "hub_private_repo", "license", "total_batch_size",  # which the micro-steps follow from
    )  # fmt: skip

    output_dir: str = option("runs/unnamed", "The final result lies here, checkpoints below it.")
    seed: int = option(0, "All draws are a function of it (and of epoch and sample).")
    train_batch_size: int = option(16, "Samples per process and micro-step.")
    gradient_accumulation_steps: int = option(1, "Micro-steps per optimizer step.")
    total_batch_size: int | None = option(
        None,
        "Samples of an optimizer step, all processes together: the micro-steps follow from it, from "
        "train_batch_size and from the number of processes.",
    )
    max_train_steps: int = option(1000, "Optimizer steps in all.")
    max_train_minutes: float | None = option(
        None, "Stop after so many minutes with a checkpoint; `--resume_from_checkpoint latest` goes on."
    )
    learning_rate: float = option(3e-4, "Peak learning rate.")
    lr_scheduler: str = option("constant_with_warmup", "A schedule name of diffusers.")
    lr_warmup_steps: int = option(0, "Optimizer steps of linear warm-up.")
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    weight_decay_matrices_only: bool = option(
        False, "No weight decay of norms, biases and single numbers such as CLIP's scale of the logits."
    )
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "Autocast of the forward pass.")
    gradient_checkpointing: bool = option(False, "Trade compute for memory.")
    use_ema: bool = option(False, "Keep, validate and export an exponential moving average.")
    ema_decay: float = option(0.9999, "Its largest decay; it starts near 0 and rises.")
    checkpointing_steps: int = option(500, "Save a training checkpoint every so many steps.")
    checkpoints_total_limit: int | None = option(2, "Keep so many of the newest checkpoints.")
    resume_from_checkpoint: str | None = option(
        None, "`latest` (the newest complete one, if any), the name of one in output_dir, or a path."
    )
    resume_with_changes: bool = option(
        False, "Go on from a checkpoint of other options, although they change the run."
    )
    validation_steps: int | None = option(None, "Validate every so many steps (and at the end).")
    logging_steps: int = option(50, "Write a line to <output_dir>/log.jsonl every so many steps.")
    report_to: str | None = option(
        None,
        "Trackers of accelerate: tensorboard, wandb, ...; several with commas between, `all` that are "
        "installed, or `none`.",
    )
    push_to_hub: bool = option(False, "Upload the final result to the Hub.")
    hub_model_id: str | None = option(None, "user/name on the Hub; the folder's name when unset.")
    hub_private_repo: bool = option(False, "Create the Hub repository as private.")
    license: str | None = option(None, "Licence of the weights, for the model card.")
    origin: Origin = field(default_factory=Origin, init=False, repr=False, compare=False)

    def __post_init__(self):
        positive(
            self, "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "max_train_minutes",
            "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "logging_steps", "max_grad_norm",
            "total_batch_size", "adam_epsilon",
        )  # fmt: skip
        between(self, 0, None, "learning_rate", "lr_warmup_steps", "adam_weight_decay")
        between(self, 0, 1, "ema_decay")
        between(self, 0, 2**32 - 1, "seed")
        below(self, 0, 1, "adam_beta1", "adam_beta2")
        if self.lr_scheduler not in LR_SCHEDULERS:
            raise ValueError(f"--lr_scheduler={self.lr_scheduler} must be one of {', '.join(LR_SCHEDULERS)}.")
        if self.lr_warmup_steps > self.max_train_steps:
            raise ValueError(
                f"--lr_warmup_steps={self.lr_warmup_steps} is longer than the run, --max_train_steps="
                f"{self.max_train_steps}, which would never reach its learning rate: pass --lr_warmup_steps 0, or "
                "train longer."
            )
        self.trackers  # noqa: B018  # so that a missing one is an error before anything is loaded

    @property
    def trackers(self) -> list[str]:
        """The trackers of `--report_to`.

        Raises:
            ValueError: one is unknown.
            ImportError: one is not installed; accelerate would leave it out without a word.
        """
        names = [name.strip() for name in (self.report_to or "none").split(",") if name.strip()]
        if [name.lower() for name in names] == ["none"]:
            return []
        installed = [str(name) for name in get_available_trackers()]
        if names == ["all"]:
            return installed
        for name in names:
            if name not in LOGGER_TYPE_TO_CLASS:
                known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
                raise ValueError(
                    f"--report_to={self.report_to}: {name!r} is unknown; known are {known}, all and none."
                )
            if name not in installed:
                raise ImportError(
                    f"--report_to={self.report_to} needs the package {name}: run `pip install {name}`, or pass "
                    "--report_to none."
                )
        return names

    def resolve_batch(self, num_processes: int) -> None:
        """Sets `gradient_accumulation_steps` so that a step has `total_batch_size` samples, if that is set.

        Raises:
            ValueError: the total is no multiple of what the processes take at a time, or other micro-steps were asked
                for; names what fits.
        """
        total, batch = self.total_batch_size, self.train_batch_size
        if total is None:
            return
        if total % num_processes:
            fitting = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0 and n <= 4 * num_processes)
            below = total // num_processes * num_processes
            nearest = " or ".join(str(size) for size in (below, below + num_processes) if size)
            raise ValueError(
                f"--total_batch_size={total} cannot be divided among {num_processes} processes: start {fitting} of "
                f"them, or pass --total_batch_size {nearest}."
            )
        share = total // num_processes
        if share % batch:
            fitting = ", ".join(str(size) for size in range(1, share + 1) if share % size == 0)
            raise ValueError(
                f"--total_batch_size={total} on {num_processes} process{'es' * (num_processes > 1)} is no multiple of "
                f"--train_batch_size={batch}: batches a process that fit are {fitting}."
            )
        if self.gradient_accumulation_steps not in (1, share // batch):
            raise ValueError(
                f"--gradient_accumulation_steps={self.gradient_accumulation_steps}, but --total_batch_size={total} "
                f"makes it {share // batch}: leave one of them out (`--total_batch_size none`)."
            )
        self.gradient_accumulation_steps = share // batch
        self.origin.sources["gradient_accumulation_steps"] = "--total_batch_size"


def parse_args(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple:
    """Reads `[preset] [--field value ...]` into one instance of each dataclass.

    The command line wins over the preset. `--train_data_dir` or `--dataset_name` there replaces the preset's source of
    pictures, and with it what the preset says of these pictures alone: columns, number of samples and classes, cache.
    `--field none` (in a preset: `field: null`) unsets a field that may be unset.

    Args:
        dataclass_types: The dataclasses, all of whose fields become options.
        argv: The words after the script's name; `sys.argv[1:]` when `None`.

    Raises:
        ValueError: the preset does not exist or is not a flat mapping, an option is unknown, or the dataclasses
            refuse a value.
        SystemExit: a value of the wrong type (argparse prints the options).
    """
    words, optional = list(sys.argv[1:] if argv is None else argv), optional_fields(dataclass_types)
    given, of_the_preset = options_given(words), frozenset()
    if words and not words[0].startswith("-"):
        preset, words = preset_words(find_preset(words[0]), optional), words[1:]
        of_the_preset = options_given(preset)
        words = without_the_source(preset, words) + words
    words, unset = take_unset(words, optional)
    parser = HfArgumentParser(list(dataclass_types), allow_abbrev=False)  # type: ignore[arg-type]
    own_options_first(parser, dataclass_types)
    parser.set_defaults(**dict.fromkeys(unset))  # None, also where the default is something else
    parsed = parser.parse_args_into_dataclasses(args=words, look_for_args_file=False, return_remaining_strings=True)
    *sections, unknown = parsed
    if unknown:
        raise ValueError(unknown_words(unknown, [name for section in sections for name in vars(section)]))
    parsed = tuple(sections)
    for section in parsed:
        check_numbers(section)
    for train in (section for section in parsed if isinstance(section, TrainArgs)):
        train.origin.sections = parsed
        for data in (section for section in parsed if isinstance(section, DataArgs)):
            if data.on_broken_picture == "skip":
                data.broken_pictures = Path(train.output_dir, BROKEN_LIST)
            if data.on_broken_picture == "skip" and (cache := all_options(train).get("cache_dir")):
                raise ValueError(
                    f"--on_broken_picture=skip with --cache_dir={cache}: a cache is of the pictures alone, and what "
                    "goes with them would be that of other rows. Leave one of them out; a cache is written before the "
                    "training and names the picture that has to be removed."
                )
        apply_launcher(train, given, of_the_preset)
    return parsed


def apply_launcher(train: TrainArgs, given: Collection[str] = (), preset: Collection[str] = ()) -> None:
    """Settles precision and accumulation: the command line, then what the launcher was told, then the preset.

    Args:
        train: Gets the values, and in `origin.sources` where each is from.
        given: Options that stand on the command line.
        preset: Options that a preset sets.

    Raises:
        ValueError: the launcher names a precision or an accumulation that there is not.
    """
    for name, (variable, silent) in LAUNCHER.items():
        told = os.environ.get(variable, "").lower()
        train.origin.sources[name] = (
            "the command line" if name in given else "the preset" if name in preset else "the default"
        )
        if name in given or told in silent:
            continue
        if name == "mixed_precision" and told not in PRECISIONS:
            raise ValueError(
                f"The launcher asks for --mixed_precision {told}; the recipes know {', '.join(PRECISIONS)}: pass one "
                "of them to `accelerate launch` or to the recipe."
            )
        if name == "gradient_accumulation_steps" and not (told.isdecimal() and int(told) > 0):
            raise ValueError(f"{variable}={told!r} is no number of micro-steps > 0: unset it.")
        setattr(train, name, told if name == "mixed_precision" else int(told))
        train.origin.sources[name] = "the launcher"


def unknown_words(words: Sequence[str], known: Sequence[str]) -> str:
    """A message about words that are no options, or belong to one that is none, with the options that are near."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    if not options:
        return f"{' '.join(words)} belongs to no option. A preset comes first: [preset] [--field value ...]."
    near = get_close_matches(options[0][2:].replace("-", "_"), known, n=3)
    hint = f" Did you mean {' or '.join('--' + name for name in near)}?" if near else ""
    return f"There is no option {' and no option '.join(options)}.{hint} --help lists all."


def options_given(words: Sequence[str]) -> frozenset[str]:
    """The names of the options on a command line."""
    return frozenset(word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))


def all_options(train: TrainArgs) -> dict[str, Any]:
    """Every option of the command line with its present value, those of the recipe included."""
    sections = train.origin.sections or (train,)
    return {name: getattr(section, name) for section in sections for name in vars(section) if is_option(section, name)}


def check_places(train: TrainArgs) -> None:
    """Refuses options that name a folder which is not there (the libraries would look for it on the Hub), and an
    `--output_dir` that cannot be one.

    Raises:
        ValueError: names the option, the folder, those with names near to it, and the way out.
    """
    output_dir = Path(train.output_dir).absolute()
    there = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "may not be written" if there.is_dir() else "is no folder"
        raise ValueError(f"--output_dir={train.output_dir}: {there} {why}. Name another folder.")
    for name, value in all_options(train).items():
        if name.endswith(("_name_or_path", "_model")) or name in ("train_data_dir", "stages_before", "stages_after"):
            for place in value if isinstance(value, list) else [value]:
                if isinstance(place, str) and not Path(place).exists():
                    check_missing(name, place)


def check_missing(name: str, place: str) -> None:
    """Refuses a path that does not exist; of what may be a name on the Hub it says which folders are near."""
    if not (is_path(place) or name == "train_data_dir"):
        if is_local(place) and (hint := did_you_mean(place)):
            logger.warning("--%s is %s: there is no such folder, so it is looked up on the Hub.%s", name, place, hint)
        return
    if Path(place).parts[:1] == ("checkpoints",) and not Path("checkpoints").is_dir():
        where = (
            "; the bundled checkpoints lie in a clone of the repository, not in the package: run from the clone's top "
            f"folder, or name another --{name}."
        )
    elif Path(place).parts[:1] == ("checkpoints",):
        where = f"; it is not among the bundled ones: train or convert it first, or name another --{name}."
    else:
        where = "."
    raise ValueError(f"--{name} is {place}, a folder that is not here{where}{did_you_mean(place)}")


def is_option(section: Any, name: str) -> bool:
    field = type(section).__dataclass_fields__.get(name)
    return field is not None and field.init


def check_numbers(section: Any) -> None:
    """Refuses options of a dataclass that are no number, and infinite ones where infinity is not "no limit".

    Raises:
        ValueError: names the option.
    """
    for name, value in vars(section).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                if math.isnan(number) or name not in UNBOUNDED:
                    raise ValueError(f"--{name} must be a finite number, got {value}.")


def positive(args: Any, *names: str) -> None:
    """Refuses options of a dataclass that are set and not above 0; of lists every entry counts."""
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not number > 0:  # also no number
                raise ValueError(f"--{name} must be > 0, got {value}.")


def between(args: Any, lowest: float, highest: float | None, *names: str) -> None:
    """Refuses options of a dataclass that are set and outside of [lowest, highest]; `None`: no upper end."""
    for name in names:
        value = getattr(args, name)
        if value is None or (lowest <= value and (highest is None or value <= highest)):
            continue
        # whole numbers in full: {:g} would round the largest seed
        ends = [str(end) if isinstance(end, int) else f"{end:g}" for end in (lowest, highest or 0)]
        allowed = f"be >= {ends[0]}" if highest is None else f"lie in [{ends[0]}, {ends[1]}]"
        raise ValueError(f"--{name} must {allowed}, got {value}.")


def own_options_first(parser: HfArgumentParser, dataclass_types: Sequence[type]) -> None:
    """Help shows a recipe's own options before those that it shares with others, from which its dataclass derives."""
    classes = [base for kind in dataclass_types for base in kind.__mro__]
    names = dict.fromkeys(name for base in classes for name in base.__dict__.get("__annotations__", ()))
    places = {name: place for place, name in enumerate(names)}
    for actions in (parser._optionals._group_actions, parser._actions):
        actions.sort(key=lambda action: places.get(action.dest, -1))  # --help has none


def below(args: Any, lowest: float, end: float, *names: str) -> None:
    """Refuses options of a dataclass that are set and outside of [lowest, end)."""
    for name in names:
        if (value := getattr(args, name)) is not None and not lowest <= value < end:
            raise ValueError(f"--{name} must lie in [{lowest:g}, {end:g}), got {value}.")


def check_rank(args: Any, *starts: str) -> None:
    """Refuses LoRA matrices beside a network that nobody has trained.

    Args:
        starts: Options that name a network to start from.

    Raises:
        ValueError: `--rank` is set, and none of them.
    """
    if args.rank and not any(getattr(args, name) for name in starts):
        raise ValueError(
            f"--rank={args.rank} trains matrices beside an existing network: name it with "
            f"{' or '.join('--' + name for name in starts)}, or leave out --rank."
        )


def check_unet_widths(args: Any, **heads: int | None) -> None:
    """Refuses a U-Net with attention on a level that it lacks, or with widths that groups or heads do not divide.

    Args:
        args: Has `block_out_channels`, `attention_levels` and `norm_num_groups`.
        heads: Number or width of the attention's heads, under the option's name; `None` where it is unset.
    """
    widths, levels = args.block_out_channels, len(args.block_out_channels)
    if not widths or min(widths) < 1:
        raise ValueError(f"--block_out_channels={widths}: give each level a width above 0.")
    if not set(args.attention_levels) <= set(range(levels)):
        raise ValueError(
            f"--attention_levels={args.attention_levels}: --block_out_channels gives the levels 0 to {levels - 1}."
        )
    attended = [widths[level] for level in args.attention_levels] + widths[-1:]  # and the middle
    divisors = [("norm_num_groups", args.norm_num_groups, widths)]
    for name, value, divided in divisors + [(name, value, attended) for name, value in heads.items()]:
        if value and any(width % value for width in divided):
            raise ValueError(f"--{name}={value} must divide the widths {divided} of --block_out_channels.")
