"""Options that are lists: recorded as dicts, which diffusers does not take for components; read whichever way."""

import json

import pytest
from pipelines.contract import CASES, ONE_EACH
from pipelines.tiny_ldm import CLASSES, LABELS, PALETTE, tiny_inputs, tiny_ldm

import diffusers_ext
from diffusers_ext.pipelines.listed_options import read_option, record_option


@pytest.mark.parametrize("value", [["a", "b"], ("a", "b"), {0: "a", 1: "b"}, {"1": "b", "0": "a"}])
def test_every_form_is_recorded_alike_and_read_back(value):
    assert record_option("names", value) == {"0": "a", "1": "b"}
    assert read_option(record_option("names", value)) == ["a", "b"]
    assert list(record_option("names", value)) == ["0", "1"]


def test_what_is_no_list_stays():
    assert [record_option("x", value) for value in (None, 3, "ab")] == [None, 3, "ab"]
    assert read_option(None) is None and read_option(["a"]) == ["a"] and read_option((1, 2)) == [1, 2]
    assert read_option(record_option("names", [str(i) for i in range(12)])) == [str(i) for i in range(12)]


def test_numbers_with_a_gap_are_refused():
    with pytest.raises(ValueError, match=r"`class_names` has the keys \[1, 2\]; expected are the numbers 0 to 1"):
        tiny_ldm("class", class_names={1: "circle", 2: "star"})


def test_no_pipeline_records_a_list(tmp_path):
    """What is a list in `model_index.json` is a component, whatever the pipeline."""
    for name in ONE_EACH:
        pipe = CASES[name].build()
        pipe.save_config(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        lists = {key for key, value in index.items() if isinstance(value, list)}
        assert lists <= pipe.components.keys() and all(len(index[key]) == 2 for key in lists), name


def test_lists_and_dicts_make_the_same_pipeline(tmp_path):
    lists = tiny_ldm("semantic", label_names=LABELS, label_palette=PALETTE)
    dicts = tiny_ldm(
        "semantic", label_names=dict(enumerate(LABELS)), label_palette={str(i): c for i, c in enumerate(PALETTE)}
    )
    assert lists.label_names == LABELS and lists.label_palette == PALETTE
    assert dicts.config["label_palette"] == lists.config["label_palette"]
    lists.save_pretrained(tmp_path)
    loaded = diffusers_ext.LDMSemanticPipeline.from_pretrained(tmp_path)
    assert loaded.label_palette == PALETTE and loaded.config["label_names"] == lists.config["label_names"]
    assert tiny_ldm("class").class_names == tiny_ldm("layout").class_names == CLASSES
    other = diffusers_ext.LDMClassConditionalPipeline.from_pretrained(
        saved_class(tmp_path), class_names=["a", "b", "c"]
    )
    assert other.class_names == ["a", "b", "c"]


def saved_class(folder):
    tiny_ldm("class").save_pretrained(folder / "class")
    return folder / "class"


def test_a_size_of_two_sides_is_kept():
    pipe = tiny_ldm("class", default_sample_size=(4, 6))
    assert pipe.config["default_sample_size"] == {"0": 4, "1": 6}
    inputs = {"class_labels": tiny_inputs("class")["class_labels"]}
    images = pipe(**inputs, num_inference_steps=1, output_type="np").images
    assert images.shape[1:3] == (16, 24)
