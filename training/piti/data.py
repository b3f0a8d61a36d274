"""The data of train_piti.py: a picture, and what a stage is told of it."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerBase

from diffusers_ext.conditions.label_maps import label_batch
from diffusers_ext.conditions.masks import mask_values
from diffusers_ext.conditions.piti import (
    label_condition,
    normals_and_depth_condition,
    read_normals,
    resize_nearest,
    sketch_condition,
)
from diffusers_ext.data.annotations import ROW, NamedRows, check_filled
from diffusers_ext.data.crops import Crop, choose_text, draw_crop
from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.data.scenes import metres_of_nearness
from diffusers_ext.degradations.bsr import degrade_piti
from diffusers_ext.degradations.resizing import resize, round_to_8_bits
from diffusers_ext.pipelines.tokenization import tokenize_texts
from diffusers_ext.training.piti.args import PITIArgs
from diffusers_ext.training_utils.args import DataArgs

logger = logging.getLogger(__name__)

_NAMED = 5  # sketches without lines that warnings name

# a column's name here -> other names that it may have, the first of them in the built-in `scenes`
OTHER_NAMES = {"normals": ("normals", "normal"), "depth": ("metres", "depth")}
L0_PROB = {"bsr_light": 0.0, "bsr_light_l0": 0.2}


def load_rows(args: PITIArgs, data: DataArgs) -> tuple[NamedRows, NamedRows, dict[str, str]]:
    """Training and validation set, and what the columns of the condition are called there.

    Rows also tell what an error calls them. `scenes` are drawn as large as their maps have to be.

    Raises:
        ValueError: A column is missing.
    """
    source = data.changed(resolution=max(data.resolution, args.map_side))
    names = {column: column for column in args.columns(data.caption_column)}
    if data.dataset_name == "scenes":
        names = {name: OTHER_NAMES.get(column, (column,))[0] for name, column in names.items()}
        sets = load_pictures(source, columns=tuple(names.values()))
    else:
        fixed = tuple(column for column in names if column not in OTHER_NAMES)
        sets = load_pictures(source, columns=fixed)
        found = sets[0].column_names
        for name in [column for column in names if column in OTHER_NAMES]:
            known = [column for column in (name, *OTHER_NAMES[name]) if column in found]
            if not known:
                raise ValueError(
                    f"There is no column {name!r} in {data.train_data_dir or data.dataset_name!r}; its columns are "
                    f"{', '.join(found)}. `diffusers-ext prepare diode` writes such data."
                )
            names[name] = known[0]
            for one in sets:
                check_filled(one, known[0], data.image_column)
    columns = list(dict.fromkeys([data.image_column, *names.values()]))
    train_set, validation_set = (NamedRows(one, data.image_column).select_columns(columns) for one in sets)
    return train_set, validation_set, names


# Without networks, so that loader processes can be started with it on every platform.
@dataclass(frozen=True)
class Reader:
    """Makes a training sample of a row: the picture, cut and mirrored, and what a subclass adds.

    Args:
        args: How pictures are made smaller.
        data: How they are cut.
    """

    args: PITIArgs
    data: DataArgs

    def __call__(self, row: dict[str, Any], generator: Generator) -> dict[str, Tensor | str]:
        """The `image` (3, h, w) in [-1, 1] and what `read` returns.

        Draws, in this order: four numbers of the crop, then those of `read`.

        Raises:
            ValueError: the row does not fit; the message names its picture.
        """
        data, picture = self.data, row[self.data.image_column]
        try:
            crop = draw_crop(
                picture.size,
                data.resolution,
                generator,
                center_crop=data.center_crop,
                random_flip=data.random_flip,
            )
            return {"image": crop.image(picture, data.resolution, self.args.downsampling)} | self.read(
                row, crop, generator
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{row[ROW]}: {error}") from error

    def read(self, row: dict[str, Any], crop: Crop, generator: Generator) -> dict[str, Tensor | str]:
        """What the stage is told of a row, cut like its picture."""
        raise NotImplementedError

    def without_augmentation(self) -> "Reader":
        """The one of the validation: the centre, not mirrored."""
        return replace(self, data=self.data.without_augmentation())


@dataclass(frozen=True)
class TextReader(Reader):
    """The tokens of one of a picture's captions.

    Args:
        tokenizer: Of the pipeline.
        window: Tokens of a text, padding included.
        lower_case: Whether texts are written in lower case first.
    """

    tokenizer: PreTrainedTokenizerBase
    window: int
    lower_case: bool

    def read(self, row: dict[str, Any], crop: Crop, generator: Generator) -> dict[str, Tensor | str]:
        """The `text` and its `tokens` (window,). Draws which of the captions."""
        text = choose_text(row[self.data.caption_column], generator)
        return {"text": text, "tokens": self.tokens(text)}

    def tokens(self, text: str) -> Tensor:
        """A text as the pipeline tokenizes it (window,)."""
        text = text.lower() if self.lower_case else text
        return tokenize_texts(self.tokenizer, [text], self.window)[0][0]


@dataclass(frozen=True)
class ConditionReader(Reader):
    """What PITI draws from.

    Args:
        columns: What the columns of the condition are called in the data, see `load_rows`.
        side: Of the maps, the encoder's `sample_size`.
        palette: Label maps: (r, g, b) of each label, uint8 (labels, 3).
    """

    columns: dict[str, str]
    side: int
    palette: np.ndarray | None = None

    def read(self, row: dict[str, Any], crop: Crop, generator: Generator) -> dict[str, Tensor | str]:
        """The `condition` (c, side, side) in [-1, 1], and what the pipeline makes it of, at the same size: `label_map`
        (side, side), `sketch` (side, side), or `normals` (3, side, side) and `depth` (side, side).

        No draws.
        """
        values = {name: row[column] for name, column in self.columns.items()}
        if "normals" in values:
            normals, depth = read_geometry(values["normals"], values["depth"])
            normals = crop.values(normals, "map of normals")
            if crop.flip:
                normals[..., 0] *= -1  # what looked to the right looks to the left
            facing = torch.from_numpy(normals).permute(2, 0, 1)
            metres = torch.from_numpy(crop.values(depth, "map of depth"))
            # coloured at their own size, as the pipeline does: the colours depend on all depths
            condition = normals_and_depth_condition(facing[None], metres[None], self.side)[0]
            return {"condition": condition, "normals": self._resized(facing), "depth": self._resized(metres[None])[0]}
        if "sketch" in values:
            lines = mask_values(values["sketch"], "sketch")[0] >= 1  # grey pixels are no lines
            if not bool(lines.any()):
                warn_of_no_lines(str(row[ROW]))
            lines = self._resized(torch.from_numpy(crop.values(lines.numpy(), "sketch"))[None].float())[0] > 0
            return {"condition": sketch_condition(lines[None], self.side)[0], "sketch": lines}
        assert self.palette is not None
        palette = self.palette
        try:
            labels = label_batch(values["semantic"], len(palette), palette=palette.tolist(), name="label map")
        except ValueError as error:
            raise ValueError(f"{error} --palette says which labels there are, and their colours.") from error
        cut = torch.from_numpy(crop.values(labels[0].numpy(), "label map"))
        labels = self._resized(cut[None].float())[0].long()
        return {"condition": label_condition(labels[None], palette, self.side)[0], "label_map": labels}

    def _resized(self, values: Tensor) -> Tensor:
        """(c, h, w) at the size of the maps."""
        return resize_nearest(values[None], self.side)[0]


@dataclass(frozen=True)
class UpscaleReader:
    """The samples of another reader, and the small image that belongs to each large one.

    Args:
        reader: Cuts the picture, and reads what the stage is told of it.
        scale: How many times larger the large image is.
        args: How the small image is made.
    """

    reader: Reader
    scale: int
    args: PITIArgs

    def __call__(self, row: dict[str, Any], generator: Generator) -> dict[str, Any]:
        """What the reader gives, and `low` (3, h, w) in [-1, 1], on the grid of 8 bits. Draws the degradation last."""
        sample, degradation = self.reader(row, generator), self.args.degradation
        image = sample["image"]
        if degradation == "none":
            method = "area" if self.args.downsampling == "area" else "antialiased"
            low = resize(image, image.shape[1] // self.scale, image.shape[2] // self.scale, method)
            return sample | {"low": round_to_8_bits(low)}
        low = degrade_piti(image, self.scale, generator, l0_prob=L0_PROB[degradation])
        return sample | {"low": low}

    def without_augmentation(self) -> "UpscaleReader":
        """The one of the validation: the centre, not mirrored; the small image is degraded as in training."""
        return replace(self, reader=self.reader.without_augmentation())


def read_geometry(normals: Any, depth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals (h, w, 3) and metres (h, w), float32, as data hold them.

    Args:
        normals: An array of such shape, or a picture of the usual colours.
        depth: An array of metres, or an 8-bit grey picture of nearness as `scenes` writes it.

    Raises:
        ValueError: something else.
    """
    if isinstance(normals, Image.Image):
        normals = read_normals(normals)[0].permute(1, 2, 0).numpy()
    normals = np.asarray(normals, dtype=np.float32)
    if normals.ndim != 3 or normals.shape[2] != 3:
        raise ValueError(f"The map of normals has the shape {normals.shape}: expected (height, width, 3).")
    if isinstance(depth, Image.Image):
        if depth.mode != "L":
            raise ValueError(
                f"The map of depth is a picture of mode {depth.mode}, which does not say what its values mean: save "
                "metres as a float array, a .npy file. (8-bit grey is nearness, white near, as `scenes` has it.)"
            )
        depth = metres_of_nearness(np.asarray(depth))
    depth = np.asarray(depth, dtype=np.float32)
    depth = depth[..., 0] if depth.ndim == 3 and depth.shape[2] == 1 else depth
    if depth.ndim != 2:
        raise ValueError(f"The map of depth has the shape {depth.shape}: expected (height, width), metres.")
    return normals, depth


_WITHOUT_LINES: set[str] = set()  # pictures that this process has warned of


def warn_of_no_lines(name: str) -> None:
    """Names the first pictures whose sketches have no lines, each once."""
    if name in _WITHOUT_LINES or len(_WITHOUT_LINES) > _NAMED:
        return
    _WITHOUT_LINES.add(name)
    if len(_WITHOUT_LINES) > _NAMED:
        logger.warning("More sketches have no lines; they are not named.")
        return
    logger.warning(
        "%s has a sketch without lines (pure white pixels), which is the null condition: it teaches to draw freely. "
        "Lines are white on black.",
        name,
    )
