"""Draws with any pipeline of the house from plain words and files: what `diffusers-ext sample` and `info` do."""

import importlib.metadata
import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import ModelCard, list_repo_files
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from safetensors import safe_open

from ..conditions.geometry import read_geometry_file
from ..places import did_you_mean, is_local, no_such, split_place
from .base import HousePipeline
from .saving import check_whole_files

# option of the command -> the argument of `__call__` that it fills: the first that the pipeline has
ARGUMENTS = {
    "prompt": ("prompt",),
    "negative_prompt": ("negative_prompt",),
    "image": ("image",),
    "mask": ("mask_image", "image_masks"),
    "map": ("label_map",),
    "sketch": ("sketch",),
    "normals": ("normals",),
    "depth": ("depth",),
    "boxes": ("boxes",),
    "class_label": ("class_labels",),
    "num": ("num_images_per_prompt", "batch_size"),
    "steps": ("num_inference_steps",),
    "guidance": ("guidance_scale",),
    "eta": ("eta",),
    "strength": ("strength",),
    "noise_level": ("noise_level",),
    "height": ("height",),
    "width": ("width",),
    "caption": ("data_type",),
}
SETTINGS = "diffusers_ext"  # key of the settings in a PNG's metadata
CONDITIONS = ("prompt", "image", "mask", "map", "sketch", "normals", "depth", "boxes", "class_label")
MAKES = (
    "A training makes such a folder (`accelerate launch training/train_<recipe>.py <preset>`), and so do"
    " `save_pretrained` of a pipeline and `diffusers-ext convert`."
)
FILES = ("image", "mask", "map", "sketch", "normals", "depth")  # options that name a file


def pipeline_class(folder: str) -> type[HousePipeline]:
    """The class that a folder or a repository of the Hub was saved with, read from its index.

    Raises:
        ValueError: if it holds no pipeline, or one that is not of this library.
    """
    _check_folder(folder)
    try:
        index: Any = _index_of(folder)
    except OSError as error:
        raise ValueError(
            f"{folder!r} is no folder here, and no pipeline of that name was found on the Hub ({error})"
            f"{did_you_mean(folder)} {MAKES}"
        ) from error
    name = index["_class_name"]
    name = name[-1] if isinstance(name, (list, tuple)) else name  # of a folder of `export-hub --no-import`
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, HousePipeline)):
        raise ValueError(f"{folder!r} holds a {name}, which is no pipeline of this library: use diffusers itself.")
    return found


def _index_of(folder: str) -> Any:
    """model_index.json of a folder, of a repository on the Hub, or of a folder in one."""
    place, subfolder = split_place(folder)
    return DiffusionPipeline.load_config(place, subfolder=subfolder)


def _check_folder(folder: str) -> None:
    """Refuses what is meant as a folder and holds no pipeline, with what makes one."""
    path = Path(folder)
    if not path.exists() and is_local(folder) and split_place(folder)[1] is None:
        beside = sorted(one.parent.name for one in path.parent.glob("*/model_index.json"))
        holds = f" Pipelines in {str(path.parent)!r}: {', '.join(beside)}." if beside else ""
        raise ValueError(f"{no_such('folder', folder)}{holds} {MAKES}")
    if not path.is_dir() or (path / "model_index.json").is_file():
        return
    checkpoints = sorted(path.glob("checkpoint-*/"))
    if checkpoints:
        raise ValueError(
            f"{folder!r} holds checkpoints of a training that has not ended, and no pipeline yet. Repeat its command"
            f" with --resume_from_checkpoint latest --output_dir {folder}."
        )
    what = "a model" if (path / "config.json").is_file() else "no pipeline"
    raise ValueError(
        f"{folder!r} holds {what}: there is no model_index.json. Name the folder of a whole pipeline; checkpoint-N"
        f" folders are for --resume_from_checkpoint. {MAKES}"
    )


def modes_of(pipeline: type[HousePipeline]) -> list[type[HousePipeline]]:
    """The pipeline classes that load what `pipeline` saved, itself first: the editing modes of its family."""
    base = next((base for base in pipeline.__mro__ if base.__dict__.get("_one_checkpoint")), pipeline)
    found: Any = [getattr(diffusers, name, None) for name in sys.modules[__name__.partition(".")[0]].__all__]
    others = [one for one in found if isinstance(one, type) and issubclass(one, base) and one is not pipeline]
    return [pipeline, *others]


def choose_mode(pipeline: type[HousePipeline], options: Mapping[str, Any]) -> type[HousePipeline]:
    """The class that draws with these options: the saved one, or a mode of its family that fits where it does not.

    A checkpoint of `PaellaPipeline`, say, is drawn with `PaellaInpaintPipeline` where an image and a mask are given.
    Of the modes that fit, it is the one with the fewest conditions that were not given.
    """
    given = {option for option, value in options.items() if value is not None}
    fitting = [mode for mode in modes_of(pipeline) if given <= set(options_of(mode)) and not _missing(mode, given)]
    if not fitting or pipeline in fitting:
        return pipeline
    return min(fitting, key=lambda mode: len(set(options_of(mode)) & set(CONDITIONS) - given))


def _missing(pipeline: type[HousePipeline], given: Set[str], idle: Set[str] = frozenset()) -> str:
    """What a call lacks, as words for a message; empty where nothing is missing."""
    parameters = inspect.signature(pipeline.__call__).parameters
    taken = options_of(pipeline, idle)
    needed = [
        option
        for option in taken
        if option not in given and parameters.get(ARGUMENTS[option][0], _OPTIONAL).default is inspect.Parameter.empty
    ]
    if needed:
        return " and ".join(_option(option) for option in needed)
    conditions = [option for option in taken if option in CONDITIONS and option != "mask"]
    if (
        "batch_size" in parameters or not pipeline._needs_condition or given & set(conditions)
    ):  # the first draws without a condition
        return ""
    return " or ".join(_option(option) for option in conditions)


def _option(name: str) -> str:
    return "a prompt" if name == "prompt" else f"--{name}"


def options_of(pipeline: type[HousePipeline], idle: Set[str] = frozenset()) -> list[str]:
    """The options of the command that a pipeline class takes.

    Args:
        idle: Arguments that do not count, as the checkpoint's networks cannot use them (`idle_arguments`).
    """
    parameters = inspect.signature(pipeline.__call__).parameters.keys() - idle
    return [option for option, names in ARGUMENTS.items() if parameters & set(names)]


def idle_arguments(pipeline: type[HousePipeline], folder: str) -> set[str]:
    """Arguments that the networks of a checkpoint, in a folder or on the Hub, can do nothing with."""

    place, subfolder = split_place(folder)

    def config_of(component: str) -> Any:
        return UNet2DModel.load_config(place, subfolder=f"{subfolder}/{component}" if subfolder else component)

    return pipeline.idle_arguments(_index_of(folder), config_of)


def call_arguments(
    pipeline: type[HousePipeline], options: Mapping[str, Any], idle: Set[str] = frozenset()
) -> dict[str, Any]:
    """Options of the command as arguments of `__call__`; None means that an option was not given.

    Args:
        idle: Arguments that the checkpoint cannot use (`idle_arguments`).

    Raises:
        ValueError: for an option that the pipeline does not take, or a condition that is missing.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    taken = options_of(pipeline, idle)
    given = {option: value for option, value in options.items() if value is not None}
    unknown = [option for option in given if option not in taken]
    if unknown:
        raise ValueError(
            f"{pipeline.__name__} takes no {_option(unknown[0])}; it takes {', '.join(map(_option, taken))}."
        )
    arguments = {}
    for option, value in given.items():
        name = next(name for name in ARGUMENTS[option] if name in parameters)
        if option == "boxes":
            arguments["names"], arguments["boxes"] = read_boxes(value)
        elif option == "caption":
            arguments["data_type"] = "text"
        else:
            arguments[name] = value
    if missing := _missing(pipeline, set(given), idle):
        raise ValueError(f"{pipeline.__name__} needs {missing}.")
    return arguments


_OPTIONAL = inspect.Parameter("optional", inspect.Parameter.KEYWORD_ONLY, default=None)


def read_boxes(texts: Sequence[str]) -> tuple[list[str], list[list[float]]]:
    """Names and corners of boxes, each written "name x0 y0 x1 y1" with corners as fractions of the sides."""
    names, boxes = [], []
    for text in texts:
        name, *corners = text.rsplit(maxsplit=4)
        try:
            numbers = [float(corner) for corner in corners]
        except ValueError:
            numbers = []
        if len(numbers) != 4:
            raise ValueError(f'--boxes takes "name x0 y0 x1 y1" with corners from 0 to 1, received {text!r}.')
        names.append(name)
        boxes.append(numbers)
    return names, boxes


def draw(
    folder: str,
    options: Mapping[str, Any],
    *,
    seed: int = 0,
    lora: str | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Any], dict[str, Any]]:
    """Loads a pipeline and draws: images (PIL) or texts, and the settings that they were drawn with.

    Args:
        folder: of a saved pipeline, or its name on the Hub.
        options: by the names of `ARGUMENTS`; files are named by their paths.
        seed: of the first result; result k is drawn from seed + k.
        lora: folder, file or Hub name of an adapter, the latter also with a folder behind it (`user/repo/folder`).
        device: by default a GPU where there is one.

    Raises:
        ValueError: for options that do not fit the pipeline.
    """
    saved = pipeline_class(folder)
    if lora is None and (part := _condition_beside(saved, folder, options)):
        raise ValueError(f"{folder!r} holds a {saved.__name__}, which takes other options: pass --lora {part} too.")
    condition = None if lora is None else condition_class(saved, lora)
    pipeline = choose_mode(saved, options) if condition is None else condition
    arguments = call_arguments(pipeline, options, idle_arguments(pipeline, folder if condition is None else str(lora)))
    for option in FILES:
        for name in (name for name in ARGUMENTS[option] if name in arguments):
            arguments[name] = read_file(option, Path(arguments[name]))
    if "class_labels" in arguments and str(arguments["class_labels"]).isdecimal():
        arguments["class_labels"] = int(arguments["class_labels"])
    place, subfolder = (None, None) if lora is None else split_place(lora)
    on_the_hub = condition is not None or (
        subfolder is not None and f"{subfolder}/{LORA_WEIGHT_NAME_SAFE}" in _files_on_the_hub(str(place))
    )
    if lora is not None and is_local(lora) and not Path(lora).exists() and not on_the_hub:
        raise ValueError(
            f"{no_such('adapter', lora)} A training with --rank writes {LORA_WEIGHT_NAME_SAFE} into its folder."
        )
    if lora is not None and Path(folder).is_dir() and Path(lora).resolve() == Path(folder).resolve():
        raise ValueError(
            f"--lora {lora!r} is the pipeline itself: a training with --rank saves its matrices within the weights,"
            " too, so they would apply twice. Leave --lora out, or sample the pipeline that the training started from."
        )
    adapter = Path(folder) / "image_adapter"  # what a Paella that draws from texts needs to draw from images
    if lora is None and pipeline.__name__ == "PaellaImageVariationPipeline" and adapter.is_dir():
        raise ValueError(
            f"The weights of {folder!r} draw from texts, so variations of an image would be noise: pass"
            f" --lora {adapter}, or a prompt beside --image to edit it."
        )
    pipe: Any
    if condition is not None:
        pipe = condition.from_prior(folder, place, subfolder=subfolder, dtype=dtype)
    else:
        pipe = pipeline.from_pretrained(folder, dtype=dtype)
        if lora is not None:
            pipe.load_lora_weights(place, subfolder=subfolder)
    pipe = pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    count = options.get("num") or 1
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    try:
        result = pipe(**arguments, generator=generators)
    except (ValueError, TypeError) as error:
        raise ValueError(in_words_of_the_command(str(error))) from error
    texts: Any = getattr(result, "texts", None)
    drawn = list(texts) if options.get("caption") else list(result.images)
    return drawn, _settings(pipe, folder, options, arguments) | {
        **({} if lora is None else {"lora": Path(lora).name}),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
    }


def condition_class(saved: type[HousePipeline], lora: str | Path) -> Any:
    """The class that draws with a folder which holds an encoder beside its LoRA matrices (`PITIPipeline.from_prior`).

    None where `lora` holds matrices alone, or where `saved`, the class that they are for, has such an encoder.
    """
    if Path(lora).exists() or (is_local(str(lora)) and split_place(lora)[1] is None):
        if not Path(lora, "model_index.json").is_file():
            return None
        named = pipeline_class(str(lora))
    else:
        try:
            named = pipeline_class(str(lora))
        except ValueError:  # matrices alone, those of another library, or nothing: `load_lora_weights` says which
            return None
    return named if hasattr(named, "from_prior") and not issubclass(saved, named) else None


def _condition_beside(saved: type[HousePipeline], folder: str, options: Mapping[str, Any]) -> str | None:
    """The folder of an adapter within `folder` that takes the options, if the pipeline itself does not; of a
    repository on the Hub `user/repo/folder`.
    """
    given = {option for option, value in options.items() if value is not None}
    if given <= set(options_of(saved)):
        return None
    if Path(folder).is_dir():
        parts = [str(index.parent) for index in sorted(Path(folder).glob("*/model_index.json"))]
    else:
        files = _files_on_the_hub(folder)
        parts = [f"{folder}/{name.split('/')[0]}" for name in files if re.fullmatch("[^/]+/model_index.json", name)]
    for part in parts:
        condition = condition_class(saved, part)
        if condition is not None and given <= set(options_of(condition, idle_arguments(condition, part))):
            return part
    return None


def _files_on_the_hub(repository: str) -> list[str]:
    """Paths of a repository's files, none where it does not exist or is out of reach."""
    try:
        return sorted(list_repo_files(repository))
    except (OSError, ValueError):
        return []


def _settings(pipe: Any, folder: str, options: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a result was drawn with: the options as they were written, files by their names alone, and the defaults."""
    written = {name: value for name, value in options.items() if value is not None}
    written |= {name: Path(written[name]).name for name in FILES if name in written}
    steps = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    defaults = {"steps": arguments.get("num_inference_steps", steps), "guidance": pipe.guidance_scale}
    if hasattr(pipe, "stage_parts"):  # of several stages: what their schedulers ran, which a call need not name
        for name, _, scheduler in pipe.stage_parts():
            defaults["steps" if name == "base" else f"{name}_steps"] = len(scheduler.timesteps)
    versions = {name: importlib.metadata.version(name) for name in ("diffusers-ext", "diffusers")}
    return {"pipeline": type(pipe).__name__, "checkpoint": Path(folder).name, **versions, **written, **defaults}


def read_file(option: str, path: Path) -> Any:
    """The image in a file; of normals and depth also the array in a .npy file, as `diffusers-ext prepare` writes it.

    Raises:
        ValueError: There is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(no_such("file" if path.suffix == ".npy" else "image", path))
    if option in ("normals", "depth"):
        return read_geometry_file(path, f"--{option}")
    try:
        return Image.open(path)
    except UnidentifiedImageError as error:
        raise ValueError(f"--{option}: {str(path)!r} is no image that Pillow reads.") from error


def in_words_of_the_command(message: str) -> str:
    """A message of a pipeline with the options of the command in place of the arguments that they fill."""
    for option, names in ARGUMENTS.items():
        for name in names:
            message = message.replace(f"`{name}`", _option(option))
    return message


def result_paths(out: Path, count: int, seed: int) -> list[Path]:
    """Where the images go: `out` is a file for one image, else a folder, in which the seeds are the names."""
    if out.suffix.lower() != ".png":
        return [out / f"{seed + index:05d}.png" for index in range(count)]
    if count > 1:
        raise ValueError(f"--out {str(out)!r} is one file, but {count} images are asked for: name a folder.")
    return [out]


def save_images(images: Sequence[Image.Image], settings: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Writes each image as a PNG with its settings, the seed among them, as JSON in the metadata."""
    for index, (image, path) in enumerate(zip(images, paths, strict=True)):
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = PngImagePlugin.PngInfo()
        metadata.add_text(SETTINGS, json.dumps({**settings, "seed": settings["seed"] + index}))
        image.save(path, pnginfo=metadata)


def describe(folder: str) -> str:
    """What a saved pipeline or model is: what it draws and takes, licence, and its parts with parameters and sizes."""
    path = Path(folder)
    if path.is_dir() and (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = config.get("_class_name") or " ".join(config.get("architectures") or ["model"])
        return "\n".join([_part("model", kind, path), *_card_facts(path)])
    pipeline = pipeline_class(folder)
    on_the_hub = not path.is_dir()
    path = Path(DiffusionPipeline.download(folder)) if on_the_hub else path
    lines = []
    for mode in modes_of(pipeline):
        taken = options_of(mode, idle_arguments(mode, str(path)))
        lines.append(f"{_task(mode)}: {mode.__name__} takes {', '.join(map(_option, taken))}")
    lines += _card_facts(path)
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    if index.get("default_guidance_scale") is not None:
        lines.append(f"guidance scale: {index['default_guidance_scale']:g}")
    folders = sorted(part for part in path.iterdir() if part.is_dir())
    parts = [part for part in folders if part.name in index]
    for part in parts:
        kind = index[part.name][-1] if isinstance(index[part.name], list) else "?"
        lines.append("  " + _part(part.name, kind, part))
    lines.append(_part("all", f"{len(parts)} components", path, among=parts))
    for part in folders:
        if part not in parts and (part / LORA_WEIGHT_NAME_SAFE).is_file():
            lines.append(_part("adapter", f"--lora {part}", part))
    for name in _files_on_the_hub(folder) if on_the_hub else ():
        if re.fullmatch(rf"[^/]+/{re.escape(LORA_WEIGHT_NAME_SAFE)}", name):
            lines.append(f"adapter: --lora {folder}/{name.split('/')[0]}")
    return "\n".join(lines)


def _task(pipeline: type[HousePipeline]) -> str:
    """What a class does, in the Hub's words."""
    return ", ".join(filter(None, [pipeline._pipeline_tag, *pipeline._card_tags]))


def _card_facts(path: Path) -> list[str]:
    if not (path / "README.md").is_file():
        return ["licence: not known (there is no card)"]
    data: Any = ModelCard.load(path / "README.md").data
    facts = {"licence": data.license or "not known (the card names none)"}
    facts |= {"base model": data.base_model, "data": data.datasets}
    return [f"{name}: {value}" for name, value in facts.items() if value]


def _part(name: str, kind: str, path: Path, among: Sequence[Path] = ()) -> str:
    """A line about the weights in a folder and, of a cascade's stage, in those below it."""
    weights = [file for folder in among or [path] for file in sorted(folder.rglob("*.safetensors"))]
    if not weights:
        return f"{name}: {kind}"
    if not among:  # else each was checked for its own line
        check_whole_files(path)
    count, size = sum(map(_count, weights)), sum(file.stat().st_size for file in weights)
    return f"{name}: {kind}, {count:,} parameters, {size / 1e6:.1f} MB"


def _count(file: Path) -> int:
    """Numbers in a safetensors file, read from its header."""
    with safe_open(file, framework="pt") as weights:
        return sum(torch.Size(weights.get_slice(key).get_shape()).numel() for key in weights.keys())
