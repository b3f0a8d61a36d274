"""benchmarks/quality_demo.py with the bundled checkpoints: each of them has a row, and what is wrong is shown."""

import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.data.scenes import full_caption, parse_caption, render, sample_scene


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "quality_demo.py")))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


def test_every_bundled_pipeline_has_a_row(script, repo_root):
    bundled = {path.parent.name for path in (repo_root / "checkpoints").glob("*/model_index.json")}
    assert {row.checkpoint for row in script.ROWS} == bundled


def test_the_page_and_its_counts(script, tmp_path, capsys):
    script.main(["--num_samples", "2", "--out", str(tmp_path / "demo.png")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0][2:] for line in lines] == [row.title for row in script.ROWS]
    for line in lines:
        drawn, everything, named = (int(cell) for cell in line.split(" | ")[2:5])
        assert 0 <= everything <= named <= drawn == 2
    # one object is what every bundled checkpoint draws: the first case of each row but Paella's variations
    assert all(int(line.split(" | ")[4]) >= 1 for line in lines)
    page = Image.open(tmp_path / "demo.png")
    assert page.width == 12 + 2 * 140 and page.height > len(script.ROWS) * 160


def test_cells_are_judged_and_marked(script):
    draw_page = script.draw_page
    colors = {name: draw_page.__globals__[name] for name in ("RIGHT", "NAMED", "WRONG")}
    scenes = [sample_scene(0, i, split="test", num_objects=2, grounds=("plain",)) for i in range(2)]
    pictures = [Image.fromarray(render(scene, 64)) for scene in scenes]
    texts = [full_caption(scene) for scene in scenes]
    right = script.judge_pictures(pictures, texts, [parse_caption(text) for text in texts])
    wrong = script.judge_pictures(pictures, texts, [parse_caption(text) for text in texts[::-1]])
    assert [(cell.shape_and_color, cell.everything) for cell in right] == [(True, True)] * 2
    assert not any(cell.shape_and_color for cell in wrong)
    for cells, color in ((right, "RIGHT"), (wrong, "WRONG")):
        page = np.asarray(draw_page("title", [("row", cells)], "footer"))[: -44 - 12]  # without the legend
        count = {name: int((page == np.array(value)).all(axis=2).sum()) for name, value in colors.items()}
        assert count.pop(color) > 10 and not any(count.values()), count


def test_a_count_below_one_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--num_samples", "0"])
    assert "--num_samples must be at least 1, received 0" in capsys.readouterr().err
