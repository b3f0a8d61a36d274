"""Public data sets and own pictures as image folders with conditions: label maps, sketches, normals and depth.

`diffusers-ext prepare KIND INPUT_DIR OUTPUT_DIR` writes the picture, its conditions in subfolders of their names, and
`metadata.jsonl`. The folder appears when it is complete. Splits become `train` and `validation`.

Layouts of the originals: COCO-Stuff `images/train2017/*.jpg` with `annotations/train2017/*.png` (numbers 0 to 181, 255
where unlabelled, which becomes 182); ADE20K's scene parsing `images/training/*.jpg` with `annotations/training/*.png`
(0 where unlabelled, else 1 to 150); DIODE `train/**/*.png` with `*_depth.npy`, `*_depth_mask.npy` and
`*_normal.npy` beside it.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..places import no_such
from .image_folder import IMAGE_SUFFIXES, decode_image

logger = logging.getLogger(__name__)

EDGE_THRESHOLD = 0.6  # of HED's edge maps, as in PITI
_COCO_UNLABELLED = 182  # the number that 255 becomes: one more label, black in the palette coco182
_LABEL_SPLITS = {
    "coco-stuff": {"train2017": "train", "val2017": "validation"},
    "ade20k": {"training": "train", "validation": "validation"},
}
_DIODE_SPLITS = {"train": "train", "val": "validation"}
KINDS = ("sketch", *_LABEL_SPLITS, "diode")


def prepare(
    kind: str, input_dir: str | os.PathLike, output_dir: str | os.PathLike, *, edges: str | os.PathLike | None = None
) -> int:
    """Writes a folder that the trainings read; returns the number of pictures.

    Args:
        kind: one of `KINDS`.
        input_dir: the original data set, or for sketches a folder of pictures.
        output_dir: a new folder.
        edges: sketches only: a folder of edge maps with the names of the pictures, for instance HED's. White are
            lines. Without it, the edges are detected.

    Raises:
        ValueError: for another kind, a folder that exists, a layout without pictures, conditions that are missing or
            of another size, and values that are out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` is {kind!r}: it must be one of {', '.join(KINDS)}.")
    if edges is not None and kind != "sketch":
        raise ValueError(f"`edges` is given, but {kind} has conditions of its own: leave it out.")
    source, target = Path(input_dir), Path(output_dir)
    if target.exists():
        raise ValueError(f"`output_dir` {str(target)!r} exists: name a new folder.")
    if not source.is_dir():
        raise ValueError(f"`input_dir`: {no_such('folder', source)}")
    splits: dict[str, Iterator[Row]]
    if kind == "sketch":
        splits = {"": _sketches(source, None if edges is None else Path(edges))}
    elif kind == "diode":
        splits = {
            name: _geometry(source / folder) for folder, name in _DIODE_SPLITS.items() if (source / folder).is_dir()
        }
    else:
        splits = {
            name: _label_maps(kind, source, folder)
            for folder, name in _LABEL_SPLITS[kind].items()
            if (source / "images" / folder).is_dir()
        }
    if not splits:
        wanted = _DIODE_SPLITS if kind == "diode" else [f"images/{name}" for name in _LABEL_SPLITS[kind]]
        raise ValueError(f"`input_dir` {str(source)!r} is not {kind}: it has no folder {' or '.join(wanted)}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as unfinished:
        folder = Path(unfinished, target.name)
        count = sum(_write(folder / name, rows, source) for name, rows in splits.items())
        folder.rename(target)
    return count


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


# a row: the picture, the name of its copy, and for each condition the writer of its file and the file's suffix
Row = tuple[Path, str, dict[str, tuple[str, Callable[[Path], object]]]]


def _write(folder: Path, rows: Iterator[Row], source: Path) -> int:
    lines, pictures = [], {}
    for picture, stem, conditions in rows:
        if (other := pictures.setdefault(stem, picture)) != picture:
            raise ValueError(
                f"{str(other)!r} and {str(picture)!r} would both be called {stem!r} in the new folder, and their"
                " conditions too: rename one of them."
            )
        entry = {"file_name": stem + picture.suffix}
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, folder / entry["file_name"])
        for name, (suffix, save) in conditions.items():
            (folder / name).mkdir(exist_ok=True)
            entry[f"{name}_file_name"] = f"{name}/{stem}{suffix}"
            save(folder / name / f"{stem}{suffix}")
        lines.append(json.dumps(entry))
    if not lines:
        raise ValueError(f"`input_dir` {str(source)!r} has no pictures for {folder.name!r}.")
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def _label_maps(kind: str, source: Path, split: str) -> Iterator[Row]:
    for picture in _pictures(source / "images" / split):
        path = source / "annotations" / split / f"{picture.stem}.png"
        if not path.is_file():
            raise ValueError(f"{str(picture)!r} has no label map {str(path)!r}: complete the data set.")
        with Image.open(path) as image:
            labels = np.array(image)
        _check_size(labels.shape[:2], picture, path)
        last = 181 if kind == "coco-stuff" else 150
        if kind == "coco-stuff":
            labels = np.where(labels == 255, _COCO_UNLABELLED, labels)
            last = _COCO_UNLABELLED
        if labels.ndim != 2 or labels.max() > last:
            found = sorted(set(np.unique(labels).tolist()) - set(range(last + 1)))
            raise ValueError(
                f"{str(path)!r} is no label map of {kind}: it has shape {labels.shape} and labels {found}."
            )
        yield picture, picture.stem, {"semantic": (".png", Image.fromarray(labels.astype(np.uint8)).save)}


def _sketches(source: Path, edges: Path | None) -> Iterator[Row]:
    empty = []
    for picture in _pictures(source):
        stem = "_".join(picture.relative_to(source).with_suffix("").parts)
        if edges is None:
            lines = detect_edges(np.asarray(decode_image(str(picture)).convert("L"), dtype=np.float64) / 255)
        else:
            path = next((edges / f"{picture.stem}{suffix}" for suffix in IMAGE_SUFFIXES
                         if (edges / f"{picture.stem}{suffix}").is_file()), None)  # fmt: skip
            if path is None:
                raise ValueError(f"`edges` {str(edges)!r} has no edge map of the name {picture.stem!r}.")
            grey = np.asarray(decode_image(str(path)).convert("L"))
            _check_size(grey.shape, picture, path)
            lines = grey > 255 * EDGE_THRESHOLD
        if not lines.any():
            empty.append(picture.name)
        sketch = Image.fromarray(np.where(lines, 255, 0).astype(np.uint8))
        yield picture, stem, {"sketch": (".png", sketch.save)}
    if empty:
        logger.warning(
            "%d sketches have no lines, which equals no condition: %s. Redraw or remove them.",
            len(empty),
            ", ".join(empty[:10]),
        )


def _geometry(source: Path) -> Iterator[Row]:
    for picture in _pictures(source):
        files = {name: picture.with_name(f"{picture.stem}_{name}.npy") for name in ("depth", "depth_mask", "normal")}
        for path in files.values():
            if not path.is_file():
                raise ValueError(
                    f"{str(picture)!r} has no {str(path)!r}: unpack depth and normals of DIODE into one tree."
                )
        depth, mask, normals = map(_read_array, files.values())
        for values, path in zip((depth, mask, normals), files.values(), strict=True):
            _check_size(values.shape[:2], picture, path)
        depth = np.where((mask > 0) & np.isfinite(depth), depth, 0)  # 0 is unknown
        normals = np.where(np.isfinite(normals).all(axis=-1, keepdims=True), normals, 0)
        if normals.shape[2:] != (3,) or np.abs(normals).max() > 1.001 or depth.min() < 0:
            raise ValueError(
                f"{str(files['normal'])!r} must hold unit normals (h, w, 3), and the depth metres from 0 on."
            )
        # scenes and scans repeat no names, but keep them apart all the same
        stem = "_".join(picture.relative_to(source).with_suffix("").parts)
        yield (
            picture,
            stem,
            {
                "normals": (".npy", lambda path, values=normals: np.save(path, values)),
                "depth": (".npy", lambda path, values=depth: np.save(path, values)),
            },
        )


def _read_array(path: Path) -> np.ndarray:
    """The numbers of a .npy file, float32 (h, w) or (h, w, c)."""
    try:
        values = np.load(path, allow_pickle=False).astype(np.float32)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is no .npy file of numbers: {error}") from error
    values = values[:, :, 0] if values.shape[2:] == (1,) else values
    wanted = 3 if path.stem.endswith("_normal") else 2
    if values.ndim != wanted:
        raise ValueError(f"{str(path)!r} has the shape {values.shape}: expected (h, w{', 3' if wanted == 3 else ''}).")
    return values


def _check_size(shape: tuple[int, ...], picture: Path, path: Path) -> None:
    with Image.open(picture) as image:
        width, height = image.size
    if shape != (height, width):
        raise ValueError(f"{str(path)!r} has {shape[1]}x{shape[0]} pixels, but {str(picture)!r} {width}x{height}.")


def detect_edges(grey: np.ndarray) -> np.ndarray:
    """Lines where brightness changes most, bool (h, w): Canny of scikit-image where installed, else thinned Sobel.

    Neither is HED, which PITI's sketches come from: pass its edge maps for sketches like those.

    Args:
        grey: brightness from 0 to 1, (h, w).
    """
    try:
        from skimage.feature import canny
    except ImportError:
        return thin_sobel(grey)
    return canny(grey, sigma=1.5)


def thin_sobel(grey: np.ndarray, threshold: float = 0.25) -> np.ndarray:
    """Sobel's gradient where it is largest across the line and at least `threshold` of the image's largest."""
    padded = np.pad(grey, 1, mode="edge")
    smooth_rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    smooth_columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    across, down = smooth_rows[:, 2:] - smooth_rows[:, :-2], smooth_columns[2:] - smooth_columns[:-2]
    strength = np.hypot(across, down)
    if strength.max() < 0.05:  # a plain area
        return np.zeros(grey.shape, dtype=bool)
    sector = np.round(np.arctan2(down, across) / (np.pi / 4)).astype(int) % 4  # direction of the gradient
    around, (height, width) = np.pad(strength, 1), grey.shape
    lines = np.zeros(grey.shape, dtype=bool)
    for number, (row, column) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = around[1 + row : 1 + row + height, 1 + column : 1 + column + width]
        behind = around[1 - row : 1 - row + height, 1 - column : 1 - column + width]
        lines |= (sector == number) & (strength >= ahead) & (strength > behind)
    return lines & (strength >= threshold * strength.max())
