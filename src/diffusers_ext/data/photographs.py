"""A folder of real pictures without any download: tiles of the colour photographs inside scikit-image's package.

`python -m diffusers_ext.data.photographs --output_dir photographs` writes it: the example of a user's own folder.
Origin and licence of each photograph: the docstrings of `skimage.data` (public domain, CC0 or CC-BY).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# file inside skimage/data -> caption; only those that the wheel holds, nothing is fetched
PHOTOGRAPHS = {
    "astronaut.png": "a photograph of an astronaut",
    "chelsea.png": "a photograph of a cat",
    "coffee.png": "a photograph of a cup of coffee",
    "hubble_deep_field.jpg": "a photograph of distant galaxies",
    "ihc.png": "a photograph of stained tissue",
    "motorcycle_left.png": "a photograph of a motorcycle",
    "retina.jpg": "a photograph of a retina",
    "rocket.jpg": "a photograph of a rocket",
}


def find_photographs() -> dict[str, Path]:
    """Caption -> file, for the photographs that the installed scikit-image holds."""
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError('The photographs come with scikit-image: pip install scikit-image (extra "eval")') from error
    folder = Path(os.fspath(skimage.data.__file__)).parent
    return {caption: folder / name for name, caption in PHOTOGRAPHS.items() if (folder / name).is_file()}


def tile_photographs(
    output_dir: str | os.PathLike[str],
    tile: int = 128,
    *,
    stride: int = 32,
    short_side: int = 288,
    max_tiles: int | None = None,
    min_contrast: float = 6.0,
) -> Path:
    """Writes overlapping square tiles as PNG files with `metadata.jsonl` (file_name, text, label, class_name).

    Args:
        output_dir: Created if missing; must not hold a `metadata.jsonl` already.
        tile: Side of a tile, in pixels.
        stride: Distance between neighbouring tiles, in pixels.
        short_side: Photographs are first scaled so that their shorter side has this many pixels: all give about
            as many tiles, and a tile shows more than a texture.
        max_tiles: At most so many tiles a photograph, evenly chosen.
        min_contrast: Tiles with a smaller standard deviation (of 0 to 255) are left out, such as the black
            corners around the retina.

    Returns:
        The folder.
    """
    if not 8 <= tile <= short_side:
        raise ValueError(f"`tile` must lie between 8 and `short_side` = {short_side}, but is {tile}.")
    if stride < 1:
        raise ValueError(f"`stride` must be at least 1, but is {stride}.")
    if max_tiles is not None and max_tiles < 1:
        raise ValueError(f"`max_tiles` must be at least 1 or None, but is {max_tiles}.")
    output_dir = Path(output_dir)
    if (output_dir / "metadata.jsonl").exists():
        raise ValueError(f"`output_dir` {str(output_dir)!r} already holds a metadata.jsonl: name another.")
    photographs = find_photographs()
    if not photographs:
        raise ValueError(f"The installed scikit-image holds none of {', '.join(PHOTOGRAPHS)}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for label, (caption, path) in enumerate(sorted(photographs.items())):
        kept = [piece for piece in _tiles(path, tile, stride, short_side) if np.asarray(piece).std() >= min_contrast]
        if max_tiles is not None and len(kept) > max_tiles:
            kept = [kept[position * len(kept) // max_tiles] for position in range(max_tiles)]
        for number, piece in enumerate(kept):
            file_name = f"{path.stem}_{number:04d}.png"
            piece.save(output_dir / file_name)
            entry = {"file_name": file_name, "text": caption, "label": label, "class_name": path.stem}
            lines.append(json.dumps(entry))
    (output_dir / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return output_dir


def _tiles(path: Path, tile: int, stride: int, short_side: int) -> list[Image.Image]:
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = short_side / min(image.size)
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    corners = [(x, y) for y in range(0, height - tile + 1, stride) for x in range(0, width - tile + 1, stride)]
    return [image.crop((x, y, x + tile, y + tile)) for x, y in corners]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_ext.data.photographs",
        description="Cut scikit-image's bundled colour photographs into captioned tiles (a folder to train on).",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--tile", type=int, default=128, help="side of a tile in pixels")
    parser.add_argument("--stride", type=int, default=32, help="distance between tiles in pixels")
    parser.add_argument("--short_side", type=int, default=288, help="scale the photographs to this shorter side first")
    parser.add_argument("--max_tiles", type=int, default=None, help="at most so many tiles a photograph")
    options = parser.parse_args(arguments)
    folder = tile_photographs(
        options.output_dir,
        options.tile,
        stride=options.stride,
        short_side=options.short_side,
        max_tiles=options.max_tiles,
    )
    count = len((folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    print(f"{count} tiles with captions in {folder}")


if __name__ == "__main__":
    main()
