"""`diffusers-ext`: each command end to end, and its errors as one line with status 2."""

import json
import re
import sys
from importlib.metadata import entry_points

import pytest
import torch
from conversion.test_optimus import original as optimus_weights
from conversion.test_optimus import saved_tokenizer
from conversion.test_versatile import stable_diffusion
from huggingface_hub import constants
from open_clip.model import CLIP
from pipelines.tiny_paella import tiny_paella_components
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

import diffusers_ext
from diffusers_ext import cli
from diffusers_ext.conversion.catalogue import KINDS
from diffusers_ext.models.unet_versatile import CONTEXT_TYPES


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "paella"
    diffusers_ext.PaellaPipeline(**tiny_paella_components()).save_pretrained(folder)
    return folder


def test_the_console_script_is_installed(capsys):
    (script,) = entry_points(group="console_scripts", name="diffusers-ext")
    assert callable(script.load())
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and all(command in printed for command in ("convert", "export-hub", "scenes"))


def test_help_and_wrong_words_load_no_network(run_python):
    """As the console script starts: torch comes with the first command that needs it, and with it the registration."""
    printed = run_python(
        """
import contextlib, io, runpy, sys
import diffusers_ext_command
def run(*words):
    sys.argv = ["diffusers-ext", *words]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = diffusers_ext_command.main()
        except SystemExit as end:
            status = end.code
    return status, out.getvalue()
from importlib.metadata import version
assert run("--version") == (0, f"diffusers-ext {version('diffusers-ext')}\\n")
for words, expected in [
    (["--help"], 0), (["convert", "--help"], 0), (["convert", "ldm", "--help"], 0), (["export-hub", "--help"], 0),
    (["scenes", "--help"], 0), ([], 2), (["paint"], 2), (["convert", "ldm", "x"], 2), (["convert", "unknown"], 2),
    (["convert", "ldm", "x", "y", "--license", "mit", "--ignore", "z"], 2),
]:
    status, text = run(*words)
    assert status == expected and (status == 0 or text.count("\\n") == 1), (words, status, text)
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
assert run("export-hub", "nowhere")[0] == 2
import diffusers, diffusers_ext
assert diffusers.PaellaPipeline is diffusers_ext.PaellaPipeline
try:
    runpy.run_module("diffusers_ext.cli", run_name="__main__")  # python -m diffusers_ext.cli export-hub nowhere
except SystemExit as end:
    assert end.code == 2
    print("all")
""",
        cold=True,
    ).stdout
    assert printed.split()[-1] == "all"


def test_each_kind_lists_its_own_options_alone(capsys):
    for name, kind in KINDS.items():
        with pytest.raises(SystemExit):
            cli.main(["convert", name, "--help"])
        listed = set(re.findall(r"--(\w[\w-]*)", capsys.readouterr().out))
        switches = {"no-use_ema"} if "use_ema" in kind.options else set()
        assert listed == {"help", "license", "allow_pickle"} | kind.options.keys() | switches
    assert KINDS["versatile-start"].options["context_type"]["choices"] == tuple(CONTEXT_TYPES)


def test_the_kind_may_stand_behind_options(original, tmp_path):
    weights = str(original / "v1_unet_forward" / "weights.safetensors")
    words = ["--license", "mit", "--time_embed_dim", "16", "paella-unet", weights, str(tmp_path / "optimus")]
    assert cli.main(["convert", *words]) == 0
    assert diffusers_ext.PaellaUNet.from_pretrained(tmp_path / "optimus").config.time_embed_dim == 16


def test_scenes_writes_a_folder_with_captions(tmp_path):
    assert cli.main(["scenes", "--output_dir", str(tmp_path / "out"), "--num_samples", "2", "--resolution", "32"]) == 0
    lines = (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all((tmp_path / "out" / json.loads(line)["file_name"]).is_file() for line in lines)


def test_export_hub_checks_and_copies(saved, tmp_path, capsys):
    assert cli.main(["export-hub", str(saved)]) == 0
    assert "holds a PaellaPipeline" in capsys.readouterr().out
    copy = tmp_path / "copy"
    assert cli.main(["export-hub", str(saved), "--no-import", "--output_dir", str(copy)]) == 0
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
        (["--no-import"], "--no-import and --output_dir go together"),
        (["--self-contained"], "--no-import and --output_dir go together"),
        (["--output_dir", "x"], "--no-import and --output_dir go together"),
        (["--push"], "--push and --hub_model_id go together"),
        (["--hub_model_id", "user/x"], "--push and --hub_model_id go together"),
    ],
)
def test_export_hub_rejects(saved, words, message, capsys):
    assert cli.main(["export-hub", str(saved), *words]) == 2
    assert message in capsys.readouterr().err


def test_export_hub_rejects_a_folder_that_is_no_pipeline(tmp_path, capsys):
    assert cli.main(["export-hub", str(tmp_path)]) == 2
    assert "holds no model_index.json and no config.json" in capsys.readouterr().err


@pytest.fixture
def original(repo_root):
    return repo_root / "tests" / "parity" / "cases" / "paella"


@pytest.mark.parametrize(
    ("kind", "case", "name", "options"),
    [
        ("paella-unet", "paella/v1_unet_forward", "PaellaUNet", ["--time_embed_dim", "16"]),
        ("paella-vqgan", "paella/v1_vqgan_gumbel_f8", "GumbelVQModel", []),
        ("paella-vqgan-f4", "paella/v3_vqgan_f4", "PaellaVQModel", []),
        ("versatile-unet", "vd/unet_flows_b", "VersatileUNet", ["--num_heads", "4", "--attention_levels", "1", "0"]),
        ("optimus", "vd/optimus", "AutoencoderOptimus", ["--encoder_heads", "4", "--decoder_heads", "2"]),
    ],
)
def test_convert_writes_a_model_and_its_card(original, tmp_path, capsys, kind, case, name, options):
    out = tmp_path / "converted"
    weights = str(original.parent / case / "weights.safetensors")
    assert cli.main(["convert", kind, weights, str(out), "--license", "mit", *options]) == 0
    assert f"Wrote {out}: {name} with" in capsys.readouterr().out
    model = getattr(diffusers_ext, name).from_pretrained(out)
    assert model.num_parameters() > 1000
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "converted from `weights.safetensors`" in card
    assert cli.main(["convert", kind, weights, str(out), "--license", "mit", *options]) == 2
    assert "exists: name a new folder" in capsys.readouterr().err


def test_convert_makes_a_start_of_stable_diffusion(tmp_path):
    weights, out = str(tmp_path / "sd.safetensors"), tmp_path / "start"
    save_file(stable_diffusion().state_dict(), weights)
    words = ["--license", "other", "--num_heads", "4", "--context_type", "text"]
    assert cli.main(["convert", "versatile-start", weights, str(out), *words]) == 0
    assert diffusers_ext.VersatileUNet.from_pretrained(out).flows == ["text-to-image"]


def test_convert_optimus_writes_the_tokenizers_that_are_named(tmp_path, capsys):
    """As `train_versatile.py --pretrained_optimus_name_or_path` reads them."""
    torch.save(optimus_weights(encoder=(3, 8, 1, 8, 12), decoder=(6, 12, 1, 14)), tmp_path / "optimus.pth")
    bert = saved_tokenizer(tmp_path / "bert", ["[PAD]", "a", "[UNK]"], pad_token="[PAD]")
    gpt2 = saved_tokenizer(tmp_path / "gpt2", ["a", "ring", "?"])
    out, words = tmp_path / "out", ["--license", "mit", "--encoder_heads", "2", "--decoder_heads", "3"]
    command = ["convert", "optimus", str(tmp_path / "optimus.pth")]
    for named, message in [
        (["--encoder_tokenizer", bert], "--encoder_tokenizer and --decoder_tokenizer go together: name both or none"),
        (["--decoder_tokenizer", gpt2], "--encoder_tokenizer and --decoder_tokenizer go together: name both or none"),
        (["--encoder_tokenizer", gpt2, "--decoder_tokenizer", gpt2], "`encoder_pad_token_id` of the model is 0"),
        (["--encoder_tokenizer", bert, "--decoder_tokenizer", "/nowhere"], "`decoder_name_or_path` is '/nowhere'"),
    ]:
        assert cli.main([*command, str(out), *words, *named]) == 2
        assert message in capsys.readouterr().err and not out.exists()
    assert cli.main([*command, str(out), *words, "--encoder_tokenizer", bert, "--decoder_tokenizer", gpt2]) == 0
    assert "No tokenizers" not in capsys.readouterr().out
    assert diffusers_ext.AutoencoderOptimus.from_pretrained(out).config.pad_token_id == 3
    encoder, decoder = (
        AutoTokenizer.from_pretrained(out, subfolder=f"{part}_tokenizer") for part in ("encoder", "decoder")
    )
    assert len(encoder) == 3 and encoder.pad_token_id == 0
    assert decoder.convert_tokens_to_ids(["<PAD>", "<BOS>", "<EOS>"]) == [3, 4, 5]
    assert cli.main([*command, str(tmp_path / "alone"), *words]) == 0
    printed = capsys.readouterr().out
    assert "No tokenizers are written: trainings ask for both, --encoder_tokenizer and --decoder_tokenizer" in printed
    assert not [path for path in (tmp_path / "alone").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimus", "weights.safetensors", "--attention_levels", "1"], "optimus takes no --attention_levels"),
        (["paella-unet", "weights.safetensors", "--encoder_tokenizer", "x"], "takes no --encoder_tokenizer"),
        (["versatile-unet", "weights.safetensors", "--context_type", "text"], "takes no --context_type"),
        (
            ["paella-vqgan", "weights.safetensors", "--time_embed_dim", "16"],
            "paella-vqgan takes no --time_embed_dim. Its --help lists",
        ),
        (["paella-unet", "nothing.pt"], "there is no such file"),
        (["paella-vqgan", "weights.safetensors"], "is not a Gumbel-VQGAN"),
        (["paella-vqgan-f4", "weights.safetensors"], "is not Paella's f4 tokenizer: it lacks in_block.1.weight"),
        (["paella-unet", "weights.safetensors", "--ignore", "x"], "paella-unet takes no --ignore"),
        (["paella-unet", "weights.safetensors", "--quick_gelu", "--text_heads", "2"], "no --quick_gelu --text_heads"),
        (["open-clip", "weights.safetensors", "--time_embed_dim", "16"], "open-clip takes no --time_embed_dim"),
        (["open-clip", "weights.safetensors"], "does not know: "),
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


def test_convert_leaves_out_what_is_asked_for(original, tmp_path, capsys):
    weights = load_file(original / "v1_vqgan_gumbel_f8" / "weights.safetensors")
    torch.save({"state_dict": {**weights, "colorize": torch.zeros(1)}}, tmp_path / "more.ckpt")
    words = ["convert", "paella-vqgan", str(tmp_path / "more.ckpt"), str(tmp_path / "out"), "--license", "mit"]
    assert cli.main(words) == 2 and "does not know: colorize" in capsys.readouterr().err
    assert cli.main([*words, "--ignore", "loss.*", "colorize"]) == 0


def test_convert_open_clip_writes_all_that_a_clip_folder_needs(tmp_path, capsys, monkeypatch):
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8}
    clip = CLIP(6, vision, {"width": 12, "heads": 3, "layers": 1}, quick_gelu=True)
    torch.save(clip.state_dict(), tmp_path / "clip.bin")
    out = tmp_path / "out"
    words = ["convert", "open-clip", str(tmp_path / "clip.bin"), str(out), "--license", "mit", "--vision_heads", "2"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "open_clip.tokenizer", None)  # as if it were not installed
        assert cli.main([*words, "--text_heads", "3"]) == 2
    assert 'pip install open_clip_torch (extra "train")' in capsys.readouterr().err and not out.exists()
    assert cli.main(words) == 2
    assert "`text_heads` is None" in capsys.readouterr().err and not out.exists()
    assert cli.main([*words, "--text_heads", "3", "--quick_gelu"]) == 0
    model = CLIPModel.from_pretrained(out)
    assert (model.config.vision_config.num_attention_heads, model.config.text_config.num_attention_heads) == (2, 3)
    assert model.config.vision_config.hidden_act == "quick_gelu" == model.config.text_config.hidden_act
    ids = AutoTokenizer.from_pretrained(out)(["a fox"], return_tensors="pt").input_ids
    assert model.get_text_features(ids).pooler_output.shape == (1, 6)
    assert CLIPImageProcessor.from_pretrained(out).crop_size["height"] == 8
    assert "transformers.CLIPModel.from_pretrained" in (out / "README.md").read_text()
