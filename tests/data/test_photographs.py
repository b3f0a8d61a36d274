"""The README's real pictures: tiles of scikit-image's bundled photographs as a user's folder."""

import json

import numpy as np
import pytest

from diffusers_ext.data.image_folder import load_image_dataset
from diffusers_ext.data.photographs import PHOTOGRAPHS, find_photographs, main, tile_photographs

pytest.importorskip("skimage", reason="scikit-image comes with the extra `eval`")


def test_all_photographs_are_inside_the_installed_package():
    found = find_photographs()
    assert sorted(found) == sorted(PHOTOGRAPHS.values()) and len(set(found)) == 8
    assert all("skimage" in path.parts for path in found.values())


def test_tiles_are_a_captioned_folder(tmp_path):
    folder = tile_photographs(tmp_path / "tiles", 48, stride=48, short_side=96, max_tiles=4)
    dataset = load_image_dataset(folder, columns=("text", "label"))
    assert len(dataset) == 4 * 8 and set(dataset["text"]) == set(PHOTOGRAPHS.values())
    assert len({(row["text"], row["label"]) for row in dataset}) == 8
    for row in dataset:
        assert row["image"].size == (48, 48) and row["image"].mode == "RGB"
        assert np.asarray(row["image"]).std() >= 6
    pictures = [np.asarray(row["image"]) for row in dataset if "cat" in row["text"]]
    assert all((pictures[0] != other).any() for other in pictures[1:])


def test_uniform_tiles_are_left_out(tmp_path):
    strict = tile_photographs(tmp_path / "strict", 32, stride=32, short_side=96, min_contrast=30.0)
    loose = tile_photographs(tmp_path / "loose", 32, stride=32, short_side=96, min_contrast=0.0)
    counts = [len((folder / "metadata.jsonl").read_text().splitlines()) for folder in (strict, loose)]
    assert counts[0] < counts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 4}, "`tile` must lie between 8 and `short_side` = 288, but is 4"),
        ({"tile": 64, "short_side": 32}, "`tile` must lie between 8 and `short_side` = 32, but is 64"),
        ({"stride": 0}, "`stride` must be at least 1, but is 0"),
        ({"max_tiles": 0}, "`max_tiles` must be at least 1 or None, but is 0"),
    ],
)
def test_bad_options(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        tile_photographs(tmp_path, **arguments)


def test_command_refuses_a_used_folder(tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path), "--tile", "32", "--stride", "64", "--short_side", "64"]
    main([*arguments, "--max_tiles", "1"])
    assert "8 tiles with captions" in capsys.readouterr().out
    first = json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[0])
    assert (tmp_path / first["file_name"]).is_file() and first["text"] in PHOTOGRAPHS.values()
    with pytest.raises(ValueError, match="already holds a metadata.jsonl"):
        main(arguments)
