"""`diffusers-ext`: each command end to end, and its errors as one line with status 2."""

import json
from importlib.metadata import entry_points

import pytest
from huggingface_hub import constants
from pipelines.tiny_paella import tiny_paella_components

import diffusers_ext
from diffusers_ext import cli


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "paella"
    diffusers_ext.PaellaPipeline(**tiny_paella_components()).save_pretrained(folder)
    return folder


def test_the_console_script_is_installed(capsys):
    (script,) = entry_points(group="console_scripts", name="diffusers-ext")
    assert script.load() is cli.main
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and all(command in printed for command in ("convert", "export-hub", "scenes"))


def test_scenes_writes_a_folder_with_captions(tmp_path):
    assert cli.main(["scenes", "--output_dir", str(tmp_path / "out"), "--num_samples", "2", "--resolution", "32"]) == 0
    lines = (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all((tmp_path / "out" / json.loads(line)["file_name"]).is_file() for line in lines)


def test_export_hub_checks_and_copies(saved, tmp_path, capsys):
    assert cli.main(["export-hub", str(saved)]) == 0
    assert "holds a PaellaPipeline" in capsys.readouterr().out
    copy = tmp_path / "copy"
    assert cli.main(["export-hub", str(saved), "--self-contained", "--output_dir", str(copy)]) == 0
    assert json.loads((copy / "model_index.json").read_text())["_class_name"] == ["pipeline", "PaellaPipeline"]


def test_export_hub_pushes_and_tells_success_from_failure(saved, hub, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    push = ["export-hub", str(saved), "--push", "--hub_model_id", "user/paella", "--private"]
    assert cli.main(push) == 1  # offline: the tests' default
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_double")
    assert cli.main(push) == 0
    assert f"Uploaded: {hub.url}/user/paella/commit/" in capsys.readouterr().out
    assert hub.private["user/paella"] and "unet/diffusion_pytorch_model.safetensors" in hub.repos["user/paella"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--self-contained"], "--self-contained and --output_dir go together"),
        (["--output_dir", "x"], "--self-contained and --output_dir go together"),
        (["--push"], "--push and --hub_model_id go together"),
        (["--hub_model_id", "user/x"], "--push and --hub_model_id go together"),
    ],
)
def test_export_hub_rejects(saved, words, message, capsys):
    assert cli.main(["export-hub", str(saved), *words]) == 2
    assert message in capsys.readouterr().err


def test_export_hub_rejects_a_folder_that_is_no_pipeline(tmp_path, capsys):
    assert cli.main(["export-hub", str(tmp_path)]) == 2
    assert "holds no model_index.json" in capsys.readouterr().err


@pytest.fixture
def original(repo_root):
    return repo_root / "tests" / "parity" / "cases" / "paella"


@pytest.mark.parametrize(
    ("kind", "case", "name", "options"),
    [
        ("paella-unet", "v1_unet_forward", "PaellaUNet", ["--time_embed_dim", "16"]),
        ("paella-vqgan", "v1_vqgan_gumbel_f8", "GumbelVQModel", []),
    ],
)
def test_convert_writes_a_model_and_its_card(original, tmp_path, capsys, kind, case, name, options):
    out = tmp_path / "converted"
    weights = str(original / case / "weights.safetensors")
    assert cli.main(["convert", kind, weights, str(out), "--license", "mit", *options]) == 0
    assert f"Wrote {out}: {name} with" in capsys.readouterr().out
    model = getattr(diffusers_ext, name).from_pretrained(out)
    assert model.num_parameters() > 1000
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "converted from `weights.safetensors`" in card
    assert cli.main(["convert", kind, weights, str(out), "--license", "mit", *options]) == 2
    assert "exists: name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["paella-vqgan", "weights.safetensors", "--time_embed_dim", "16"], "paella-vqgan takes no --time_embed_dim"),
        (["paella-unet", "nothing.pt"], "there is no such file"),
        (["paella-vqgan", "weights.safetensors"], "is not a Gumbel-VQGAN"),
    ],
)
def test_convert_rejects(original, tmp_path, capsys, words, message):
    kind, file, *options = words
    path, out = original / "v1_unet_forward" / file, tmp_path / "out"
    assert cli.main(["convert", kind, str(path), str(out), "--license", "mit", *options]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_convert_asks_for_the_licence_of_the_weights(original, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", "paella-unet", "x.pt", str(tmp_path / "out")])
    assert end.value.code == 2 and "--license" in capsys.readouterr().err
