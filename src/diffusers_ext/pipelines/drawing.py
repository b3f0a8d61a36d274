"""Draws with any pipeline of the house from plain words and files: what `diffusers-ext sample` and `info` do."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image, PngImagePlugin
from safetensors import safe_open

from .base import HousePipeline

# option of the command -> the argument of `__call__` that it fills: the first that the pipeline has
ARGUMENTS = {
    "prompt": ("prompt",),
    "negative_prompt": ("negative_prompt",),
    "image": ("image",),
    "mask": ("mask_image", "image_masks"),
    "map": ("label_map",),
    "boxes": ("boxes",),
    "class_label": ("class_labels",),
    "num": ("num_images_per_prompt", "batch_size"),
    "steps": ("num_inference_steps",),
    "guidance": ("guidance_scale",),
    "eta": ("eta",),
    "strength": ("strength",),
    "height": ("height",),
    "width": ("width",),
    "caption": ("data_type",),
}
SETTINGS = "diffusers_ext"  # key of the settings in a PNG's metadata


def pipeline_class(folder: str) -> type[HousePipeline]:
    """The class that a folder or a repository of the Hub was saved with, read from its index.

    Raises:
        ValueError: if it holds no pipeline, or one that is not of this library.
    """
    if Path(folder).is_dir() and not (Path(folder) / "model_index.json").is_file():
        what = "a model" if (Path(folder) / "config.json").is_file() else "no pipeline"
        raise ValueError(
            f"{folder!r} holds {what}: there is no model_index.json. Name the folder that a training ended in or that"
            " `save_pretrained` of a pipeline wrote; checkpoint-N folders are for --resume_from_checkpoint."
        )
    index: Any = DiffusionPipeline.load_config(folder)
    name = index["_class_name"]
    name = name[-1] if isinstance(name, (list, tuple)) else name  # of a folder of `export-hub --no-import`
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, HousePipeline)):
        raise ValueError(f"{folder!r} holds a {name}, which is no pipeline of this library: use diffusers itself.")
    return found


def options_of(pipeline: type[HousePipeline]) -> list[str]:
    """The options of the command that a pipeline class takes."""
    parameters = inspect.signature(pipeline.__call__).parameters
    return [option for option, names in ARGUMENTS.items() if any(name in parameters for name in names)]


def call_arguments(pipeline: type[HousePipeline], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the command as arguments of `__call__`; None means that an option was not given.

    Raises:
        ValueError: for an option that the pipeline does not take, or a condition that is missing.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    taken = options_of(pipeline)
    given = {option: value for option, value in options.items() if value is not None}
    unknown = [option for option in given if option not in taken]
    if unknown:
        raise ValueError(
            f"{pipeline.__name__} takes no --{unknown[0]}; it takes {', '.join(f'--{name}' for name in taken)}."
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
    needed = [
        option
        for option in taken
        if option not in given and parameters.get(ARGUMENTS[option][0], _OPTIONAL).default is inspect.Parameter.empty
    ]
    if needed:
        raise ValueError(f"{pipeline.__name__} needs {' and '.join(f'--{name}' for name in needed)}.")
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
        lora: folder, file or Hub name of an adapter.
        device: by default a GPU where there is one.

    Raises:
        ValueError: for options that do not fit the pipeline.
    """
    pipeline = pipeline_class(folder)
    arguments = call_arguments(pipeline, options)
    for name in ("image", "mask_image", "image_masks", "label_map"):
        if name in arguments:
            path = Path(arguments[name])
            if not path.is_file():
                raise ValueError(f"There is no picture {str(path)!r}.")
            arguments[name] = Image.open(path)
    if "class_labels" in arguments and str(arguments["class_labels"]).isdecimal():
        arguments["class_labels"] = int(arguments["class_labels"])
    pipe: Any = pipeline.from_pretrained(folder, dtype=dtype)
    if lora is not None:
        pipe.load_lora_weights(lora)
    pipe = pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    count = options.get("num") or 1
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    result = pipe(**arguments, generator=generators)
    texts: Any = getattr(result, "texts", None)
    drawn = list(texts) if options.get("caption") else list(result.images)
    settings = {"pipeline": pipeline.__name__, "checkpoint": Path(folder).name, "diffusers": diffusers.__version__}
    settings |= {name: value for name, value in options.items() if isinstance(value, (str, int, float))}
    if lora is not None:
        settings["lora"] = Path(lora).name
    return drawn, settings | {"guidance": pipe.guidance_scale, "seed": seed}


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
    """What a saved pipeline is: class, options, licence, and its components with parameters and sizes."""
    pipeline = pipeline_class(folder)
    path = Path(folder) if Path(folder).is_dir() else Path(DiffusionPipeline.download(folder))
    lines = [f"{pipeline.__name__}: takes {', '.join(f'--{option}' for option in options_of(pipeline))}"]
    if (path / "README.md").is_file():
        data: Any = ModelCard.load(path / "README.md").data
        facts = {"licence": data.license, "base model": data.base_model, "data": data.datasets}
        lines += [f"{name}: {value}" for name, value in facts.items() if value]
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    for name in sorted(part.name for part in path.iterdir() if part.is_dir() and part.name in index):
        weights = sorted((path / name).glob("*.safetensors"))
        count = sum(_count(file) for file in weights)
        size = sum(file.stat().st_size for file in weights)
        kind = index[name][-1] if isinstance(index[name], list) else "?"
        lines.append(f"  {name}: {kind}" + (f", {count:,} parameters, {size / 1e6:.1f} MB" if weights else ""))
    return "\n".join(lines)


def _count(file: Path) -> int:
    """Numbers in a safetensors file, read from its header."""
    with safe_open(file, framework="pt") as weights:
        return sum(torch.Size(weights.get_slice(key).get_shape()).numel() for key in weights.keys())
