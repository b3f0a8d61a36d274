"""Model cards, uploads to a double of the Hub, and what is left when an upload fails."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from diffusers import AutoModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import ModelCard, constants
from pipelines.tiny_ldm import LABELS, PALETTE, tiny_ldm
from safetensors.torch import load_file, save_file

from diffusers_ext import LDMSpatialRescaler
from diffusers_ext.pipelines import cards
from diffusers_ext.pipelines.drawing import describe
from diffusers_ext.training_utils import hub
from diffusers_ext.training_utils.hub import export_self_contained, name_repository, push_folder, write_model_card


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A pipeline with components of this library and of others, and with options that are lists."""
    folder = tmp_path_factory.mktemp("export") / "semantic"
    tiny_ldm("semantic").save_pretrained(folder)
    return folder


def changed_copy(saved: Path, folder: Path, **entries) -> Path:
    shutil.copytree(saved, folder)
    index = json.loads((folder / "model_index.json").read_text()) | entries
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"_class_name": "DDPMPipeline"},
            "'DDPMPipeline': wanted is a pipeline of diffusers_ext, one of .*LDMClass",
        ),
        ({"_class_name": ["pipeline", "X"]}, "wanted is a pipeline of diffusers_ext"),
        ({"_class_name": ["other", "LDMSemanticPipeline"]}, "wanted is a pipeline of diffusers_ext"),
        ({"_class_name": "LDMSemanticPipeline\nimport os"}, "wanted is a pipeline of diffusers_ext"),
        ({"_class_name": "LDMUNet"}, "wanted is a pipeline of diffusers_ext"),
        ({"..": ["diffusers_ext", "PaellaUNet"]}, r"for the component '\.\.': these are no names"),
        ({"/tmp": ["diffusers_ext", "PaellaUNet"]}, "for the component '/tmp': these are no names"),
        ({"unet": ["diffusers_ext", "PaellaUNet\n    print(1)"]}, "for the component 'unet': these are no names"),
        ({"unet": ["diffusers_ext/../os", "PaellaUNet"]}, "for the component 'unet': these are no names"),
        (
            {"unet": ["diffusers_ext", "register"]},
            "'register' of diffusers_ext for 'unet': there is no such class",
        ),
        ({"unet": ["diffusers_ext", 3]}, "for the component 'unet': these are no names"),
        ({"prior": ["diffusers_ext", "PaellaUNet"]}, "the component 'prior', but there is no such folder beside it"),
    ],
)
def test_export_rejects_what_its_index_must_not_say(saved, tmp_path, entries, message):
    """Names become paths and code; nothing is written, beside the output folder or in it."""
    folder = changed_copy(saved, tmp_path / "in", **entries)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        export_self_contained(folder, tmp_path / "out" / "copy")
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_export_leaves_nothing_half_written(saved, tmp_path, monkeypatch):
    def full_disk(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(hub, "write_model_card", full_disk)  # the last thing that is written
    with pytest.raises(OSError, match="No space left"):
        export_self_contained(saved, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_rejects_a_folder_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="holds no model_index.json and no config.json"):
        export_self_contained(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"architectures": ["a b"]}')
    with pytest.raises(ValueError, match="names 'a b' as its class: wanted is a saved model"):
        export_self_contained(tmp_path, tmp_path / "out")


def test_export_rejects_an_existing_output(saved, tmp_path):
    with pytest.raises(ValueError, match="choose a new folder"):
        export_self_contained(saved, tmp_path)


def test_export_rejects_weights_with_matrices_beside_them(saved, tmp_path):
    folder = changed_copy(saved, tmp_path / "in")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {key.replace("conv_in.weight", "conv_in.base_layer.weight"): v for key, v in load_file(file).items()}
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"with LoRA matrices beside its weights \(conv_in.base_layer.weight"):
        export_self_contained(folder, tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_export_rejects_weights_that_are_not_finite(saved, tmp_path, bad):
    folder = changed_copy(saved, tmp_path / "in")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] = bad
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"`conv_in.bias` in '.*safetensors' is not finite .* Save the pipeline"):
        export_self_contained(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_rejects_a_file_that_was_cut_short(saved, tmp_path):
    folder = changed_copy(saved, tmp_path / "in")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model.safetensors' is damaged or incomplete \("):
        export_self_contained(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model.safetensors' is damaged or incomplete \("):
        describe(str(folder))


def test_export_of_an_export_and_of_a_folder_with_lists(saved, tmp_path):
    """Both give what an export of the folder itself gives."""
    first = export_self_contained(saved, tmp_path / "first", hub_model_id="user/x")
    second = export_self_contained(first, tmp_path / "second", hub_model_id="user/x")
    old = changed_copy(saved, tmp_path / "old", label_names=LABELS, label_palette=PALETTE)
    third = export_self_contained(old, tmp_path / "third", hub_model_id="user/x")
    indices = [json.loads((folder / "model_index.json").read_text()) for folder in (first, second, third)]
    assert indices[0] == indices[1] == indices[2] and indices[0]["label_names"]["1"] == LABELS[1]
    cards = [(folder / "README.md").read_text() for folder in (first, second)]
    assert all(card.count('DiffusionPipeline.from_pretrained("user/x"') == 1 + (card is cards[1]) for card in cards)
    assert all((folder / "spatial_rescaler" / "diffusers_ext.py").is_file() for folder in (first, second, third))


def test_a_model_of_ours_is_exported_for_auto_model(tmp_path):
    tiny_ldm("semantic").spatial_rescaler.save_pretrained(tmp_path / "model")
    exported = export_self_contained(tmp_path / "model", tmp_path / "exported")
    assert "AutoModel.from_pretrained" in (exported / "README.md").read_text()
    loaded = AutoModel.from_pretrained(str(exported), trust_remote_code=True)
    assert type(loaded) is LDMSpatialRescaler
    assert type(LDMSpatialRescaler.from_pretrained(exported)) is LDMSpatialRescaler


def test_old_lists_go_up_as_dicts(saved, online, tmp_path):
    old = changed_copy(saved, tmp_path / "old", label_names=LABELS)
    assert push_folder(old, "user/old", token="hf_double")
    index = json.loads(online.repos["user/old"]["model_index.json"])
    assert index["label_names"] == {str(place): name for place, name in enumerate(LABELS)}
    assert json.loads((old / "model_index.json").read_text())["label_names"] == LABELS  # the folder itself stays
    assert 'LDMSemanticPipeline.from_pretrained("user/old"' in online.repos["user/old"]["README.md"].decode()


def test_cards_name_the_repository_in_their_python_lines_alone():
    card = """# mine
```shell
python x.py runs/mine
```
```python
a("runs/mine"); b('/data/runs/mine', subfolder="mine"); c("runs/mine-2", "other/mine.png"); d("me")
```
"""
    named = name_repository(card, ("runs/mine", "me"), "user/mine")
    assert "python x.py runs/mine\n" in named
    assert 'a("user/mine"); b(\'user/mine\', subfolder="user/mine")' in named
    assert 'c("runs/mine-2", "other/mine.png"); d("user/mine")' in named


def test_both_places_say_the_same_install_line():
    assert hub.INSTALL == cards.INSTALL and not re.search(r"install diffusers", hub.INSTALL)
