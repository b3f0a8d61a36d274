"""Model cards, uploads to a double of the Hub, and what is left when an upload fails."""

import json
import logging
from pathlib import Path

import pytest
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import ModelCard, constants

from diffusers_ext.training_utils.hub import export_self_contained, push_folder, write_model_card


@pytest.fixture
def result(tmp_path) -> Path:
    """A finished training: weights, card, and what should stay at home."""
    folder = tmp_path / "runs" / "mine"
    for name in ("config.json", "README.md", "unet/w.safetensors", "checkpoint-20/optimizer.bin", "logs/events"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def online(hub, monkeypatch):
    """Points huggingface_hub, which reads its environment at import, to the double."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return hub


@pytest.fixture
def log(caplog):
    """diffusers' loggers do not propagate; let the test see them."""
    diffusers_logging.enable_propagation()
    caplog.set_level(logging.INFO)
    yield caplog
    diffusers_logging.disable_propagation()


def card_of(folder: Path, **changes) -> ModelCard:
    arguments = dict(
        title="Paella on scenes",
        description="Draws shapes.",
        license="apache-2.0",
        usage="import diffusers_ext\nprint(1)",
        command="accelerate launch training/train_paella.py training/presets/paella-smoke.yaml",
        log=[{"step": 100, "loss": 0.123456}, {"step": 200, "loss": 1e-05}],
        tags=["text-to-image"],
        base_model="user/base",
    )
    return ModelCard.load(write_model_card(folder, **(arguments | changes)))


def test_model_card_says_how_to_use_and_how_it_came_about(tmp_path):
    card = card_of(tmp_path)
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers"
    assert card.data.tags == ["diffusers", "diffusers_ext", "text-to-image"] and card.data.base_model == "user/base"
    assert "# Paella on scenes\n\nDraws shapes." in card.text
    assert "```python\nimport diffusers_ext\nprint(1)\n```" in card.text
    assert "accelerate launch training/train_paella.py" in card.text
    assert "| step | loss |\n| --- | --- |\n| 100 | 0.1235 |\n| 200 | 1e-05 |" in card.text
    assert "[More Information Needed]" not in card.content and "TODO" not in card.content


def test_model_card_without_the_optional_parts(tmp_path):
    card = card_of(tmp_path, usage=None, command=None, log=[], base_model=None, tags=["diffusers"])
    assert card.text.strip() == "# Paella on scenes\n\nDraws shapes." and card.data.tags == [
        "diffusers",
        "diffusers_ext",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"license": ""}, "`license` is empty"),
        ({"usage": "print(1)"}, "`usage` must import diffusers_ext"),
        ({"log": [{"a": 1}, {"b": 2}]}, r"must have the keys \['a'\]"),
    ],
)
def test_model_card_rejects(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        card_of(tmp_path, **changes)


def test_model_card_rejects_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="must be an existing folder"):
        card_of(tmp_path / "nothing here")


def test_push_uploads_the_result_and_leaves_checkpoints_and_logs(online, result):
    url = push_folder(result, "user/mine", token="hf_double", private=True)
    assert url == f"{online.url}/user/mine/commit/{online.sha('user/mine')}"
    assert online.repos["user/mine"].keys() == {"config.json", "README.md", "unet/w.safetensors"}
    assert online.repos["user/mine"]["unet/w.safetensors"] == b"unet/w.safetensors" and online.private["user/mine"]
    (result / "config.json").write_text("newer")
    assert push_folder(result, "user/mine", token="hf_double") != url  # the repository may exist already
    assert online.repos["user/mine"]["config.json"] == b"newer"


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_failed_upload_loses_nothing_and_says_how_to_repeat_it(online, result, log, status, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its retries
    before = {path: path.read_bytes() for path in result.rglob("*") if path.is_file()}
    online.fail_with = status
    assert push_folder(result, "user/mine", token="hf_double", private=True) is None
    assert {path: path.read_bytes() for path in result.rglob("*") if path.is_file()} == before
    assert f"hf upload user/mine {result} . --exclude 'checkpoint-*'" in log.text and "--private" in log.text
    assert "Nothing is lost" in log.text
    online.fail_with = None
    assert push_folder(result, "user/mine", token="hf_double")


def test_an_upload_without_network_or_with_a_bad_name_is_no_exception(result, log):
    assert push_folder(result, "user/mine", token="hf_double") is None  # the tests run with HF_HUB_OFFLINE=1
    assert "OfflineModeIsEnabled" in log.text
    assert push_folder(result, "not/a/repo/name", token="hf_double") is None
    assert "HFValidationError" in log.text


def test_push_rejects_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="folder with something in it"):
        push_folder(tmp_path, "user/mine")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "holds no model_index.json"),
        ({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}, "wanted is a pipeline saved with"),
        ({"_class_name": ["pipeline", "X"], "unet": ["diffusers_ext", "Y"]}, "wanted is a pipeline saved with"),
    ],
)
def test_export_rejects_what_is_no_pipeline_of_ours(tmp_path, index, message):
    if index is not None:
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        export_self_contained(tmp_path, tmp_path / "out")


def test_export_rejects_an_existing_output(tmp_path):
    index = {"_class_name": "PaellaPipeline", "unet": ["diffusers_ext", "PaellaUNet"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="choose a new folder"):
        export_self_contained(tmp_path, tmp_path)
