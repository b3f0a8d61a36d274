"""The recipe of Versatile Diffusion: its stages one after the other, resuming, what it refuses."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import train_versatile
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_flows import sentence_tokenizers, tiny_encoders, tiny_unet
from transformers import CLIPConfig, CLIPModel

from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.models.unet_versatile import VersatileUNet
from diffusers_ext.pipelines.versatile.pipeline_versatile import VersatilePipeline
from diffusers_ext.training.versatile.args import FLOWS
from diffusers_ext.training.versatile.data import FlowRows
from diffusers_ext.training.versatile.networks import load_parts, load_unet, untrained_parts
from diffusers_ext.training_utils.kernels import plain_attention
from diffusers_ext.training_utils.lora import LORA_FILE

PRESETS = Path(__file__).parents[2] / "training" / "presets"
SMOKE = str(PRESETS / "versatile-smoke.yaml")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """Frozen networks, untrained, in the layouts of the recipes that make them."""
    torch.manual_seed(0)
    folder, parts = tmp_path_factory.mktemp("stages"), tiny_encoders()
    parts.vae.save_pretrained(folder / "vae")
    parts.optimus.save_pretrained(folder / "optimus")
    for name, tokenizer in zip(("encoder", "decoder"), sentence_tokenizers(), strict=True):
        tokenizer.save_pretrained(folder / "optimus" / f"{name}_tokenizer")
    towers = {"text_config": parts.text_encoder.config, "vision_config": parts.image_encoder.config}
    clip = CLIPModel(CLIPConfig(**{name: config.to_dict() for name, config in towers.items()}, projection_dim=8))
    for part in (clip, parts.tokenizer, parts.feature_extractor):
        part.save_pretrained(folder / "clip")
    return folder


def words(stages: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        SMOKE, "--output_dir", str(output_dir), "--resolution", "16", "--max_train_samples", "8",
        "--logging_steps", "1", "--validation_samples", "4", "--max_train_steps", "2",
        *(f"--pretrained_{name}_name_or_path={stages / name}" for name in ("vae", "optimus", "clip")), *more,
    ]  # fmt: skip


def run(stages: Path, output_dir: Path, *more: str) -> Path:
    train_versatile.main(words(stages, output_dir, *more))
    AcceleratorState._reset_state(reset_partial_state=True)
    return output_dir


def next_stage(last: Path, output_dir: Path, *more: str) -> Path:
    """Goes on from an earlier stage, which brings all parts along."""
    parts = ("--pretrained_vae_name_or_path", "none", "--pretrained_clip_name_or_path", "none")
    more = ("--pretrained_model_name_or_path", str(last), "--max_train_steps", "2", *more)
    data = ["--resolution", "16", "--max_train_samples", "8", "--validation_samples", "4", "--logging_steps", "1"]
    train_versatile.main([SMOKE, *parts, "--output_dir", str(output_dir), *data, *more])
    AcceleratorState._reset_state(reset_partial_state=True)
    return output_dir


@pytest.fixture(scope="module")
def single(stages, tmp_path_factory) -> Path:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    folder = tmp_path_factory.mktemp("single") / "run"
    return run(stages, folder, "--flows", "image-to-image", "--lr_scales", "data.image=0.1", "--use_ema", "false")


def logged(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_a_single_flow_holds_its_layers_only(single):
    pipe = VersatilePipeline.from_pretrained(single)
    assert pipe.unet.flows == ["image-to-image"]
    assert set(pipe.unet.layer_groups()) == {"global", "data.image", "context.image"}
    assert pipe.optimus.config.latent_dim == 6 and pipe.config.default_sample_size == 16
    assert logged(single, "loss") == logged(single, "loss_image_to_image")
    assert len(logged(single, "validation_loss_image_to_image")) == 1
    assert (single / "validation-2-image-to-image.png").is_file()
    assert "the flows image-to-image" in (single / "README.md").read_text()


def test_the_stages_go_on_from_each_other(single, tmp_path):
    """Single, dual, four flows; a rate of 0 keeps what came before, so that it can be recognised."""
    kept = ["--lr_scales", "global=0", "data.image=0", "context.image=0"]
    dual = next_stage(
        single, tmp_path / "dual", "--flows", "image-to-image", "text-to-image", *kept, "--contexts_like", "image"
    )
    before, after = load_file(single / WEIGHTS), load_file(dual / WEIGHTS)
    assert all(torch.equal(before[key], after[key]) for key in before)
    unet = VersatileUNet.from_pretrained(dual, subfolder="unet")
    assert unet.flows == ["image-to-image", "text-to-image"]
    moved = [
        not torch.equal(own, other)
        for own, other in zip(
            unet.context_layers["text"].parameters(), unet.context_layers["image"].parameters(), strict=True
        )
    ]
    assert any(moved)  # it began as a copy, and was trained
    four = next_stage(dual, tmp_path / "four", "--lr_scales", "data.text=2.0", "--use_ema")
    assert set(VersatileUNet.from_pretrained(four, subfolder="unet").flows) == set(FLOWS)
    losses = [logged(four, f"loss_{flow.replace('-', '_')}") for flow in FLOWS]
    torch.testing.assert_close(torch.tensor(losses).sum(0), torch.tensor(logged(four, "loss")), rtol=1e-4, atol=1e-4)
    sentences = (four / "validation-2-image-to-text.jsonl").read_text().splitlines()
    assert len(sentences) == 4 and json.loads(sentences[0]).keys() == {"caption", "generated"}


def test_flows_that_are_not_trained_keep_their_layers(single, tmp_path):
    both = next_stage(single, tmp_path / "both", "--flows", "image-to-image", "text-to-image")
    only = next_stage(both, tmp_path / "only", "--flows", "text-to-image", "--learning_rate", "1e-2")
    before, after = load_file(both / WEIGHTS), load_file(only / WEIGHTS)
    changed = {".".join(key.split(".")[:2]) for key in before if not torch.equal(before[key], after[key])}
    assert "context_layers.text" in changed and "context_layers.image" not in changed


def test_lora_trains_the_attention_of_its_contexts(stages, tmp_path):
    base = tmp_path / "unet"
    tiny_unet(flows=["image-to-image", "text-to-image"]).save_pretrained(base)
    more = (
        "--pretrained_unet_name_or_path", str(base), "--flows", "text-to-image", "--rank", "2",
        "--learning_rate", "0.1", "--checkpointing_steps", "1",
    )  # fmt: skip
    tuned = run(stages, tmp_path / "tuned", *more)
    before, after = load_file(base / Path(WEIGHTS).name), load_file(tuned / WEIGHTS)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    attention = {key for key in before if re.fullmatch(r"context_layers\.text\..*\.to_(q|k|v|out\.0)\.weight", key)}
    assert before.keys() == after.keys() and changed and changed <= attention  # merged, everything else as it was
    matrices = load_file(tuned / LORA_FILE)
    assert {re.sub(r"\.lora_[AB]", "", key) for key in matrices} == attention

    unet, merged = (VersatileUNet.from_pretrained(folder).eval() for folder in (base, tuned / "unet"))
    batch = (torch.randn(2, 2, 8, 8), torch.tensor([500, 1]), torch.randn(2, 5, 8))
    with torch.no_grad():
        plain, wanted = unet(*batch).sample, merged(*batch).sample
        unet.load_lora_adapter(tuned, prefix=None, weight_name=LORA_FILE)
        found = unet(*batch).sample
        unet.unload_lora()
        assert torch.equal(unet(*batch).sample, plain)
    torch.testing.assert_close(found, wanted)
    assert (found - plain).abs().max() > 0.01

    (tuned / "checkpoint-2" / "manifest.json").unlink()  # as if the run had been killed after step 1
    run(stages, tuned, *more, "--resume_from_checkpoint", "latest")
    again = load_file(tuned / LORA_FILE)
    assert all(torch.equal(value, again[key]) for key, value in matrices.items())


def test_lora_needs_the_layers_of_its_flows(single, tmp_path):
    message = "--flows is text-to-image, but the network has no layers for text-to-image, and --rank 2 trains none: "
    with pytest.raises(ValueError, match=message + "its flows are image-to-image. Train the others without --rank"):
        next_stage(single, tmp_path / "run", "--flows", "text-to-image", "--rank", "2")


@pytest.mark.parametrize(("resolution", "nearest"), [(19, "18 or 20"), (1, "2")])
def test_pictures_that_the_network_cannot_halve_are_refused_before_the_cache(stages, tmp_path, resolution, nearest):
    cache = ("--cache_dir", str(tmp_path / "cache"), "--center_crop", "--resolution", str(resolution))
    message = rf"--resolution is {resolution}; .* a multiple of 2 \(1 of .* times 2 of the U-Net\): pass {nearest}\."
    with pytest.raises(ValueError, match=message):
        run(stages, tmp_path / "run", *cache)
    assert not (tmp_path / "cache").exists()


def test_pictures_that_are_only_read_have_any_size(stages, tmp_path):
    run(stages, tmp_path, "--flows", "image-to-text", "--resolution", "19", "--lr_scales", "global=0.1")


def test_resuming_is_exact(stages, tmp_path):
    more = ("--checkpointing_steps", "1", "--flows", "text-to-text", "text-to-image")
    straight = run(stages, tmp_path / "straight", *more)
    run(stages, tmp_path / "resumed", *more)
    (tmp_path / "resumed" / "checkpoint-2" / "manifest.json").unlink()  # as if the run had been killed after step 1
    run(stages, tmp_path / "resumed", *more, "--resume_from_checkpoint", "latest")
    one, other = load_file(straight / WEIGHTS), load_file(tmp_path / "resumed" / WEIGHTS)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_cached_pictures_train_like_fresh_ones(stages, tmp_path):
    more, cache = ("--center_crop", "--learning_rate", "1e-2"), ("--cache_dir", str(tmp_path / "cache"))
    plain = run(stages, tmp_path / "plain", *more)
    for name in ("written", "read"):
        cached = run(stages, tmp_path / name, *more, *cache)
        for loss in ("loss", "validation_loss"):
            torch.testing.assert_close(logged(cached, loss), logged(plain, loss), rtol=1e-5, atol=1e-5)
    next_stage(plain, tmp_path / "later", "--center_crop", *cache)  # its parts are the same, from other folders
    with pytest.raises(
        ValueError, match=r"was made of something else: .*holds \(.*image_tokens.* there, \['moments'\] here"
    ):
        run(stages, tmp_path / "other", *more, *cache, "--flows", "text-to-image")


def test_plain_attention_is_the_same_attention():
    unet = tiny_unet()
    batch = (torch.randn(2, 2, 8, 8), torch.tensor([1, 2]), torch.randn(2, 5, 8))
    before = unet(*batch, data_type="image", context_type="text").sample
    plain_attention(unet)
    after = unet(*batch, data_type="image", context_type="text").sample
    assert not torch.equal(after, before)  # another kernel
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_it_starts_from_a_network_of_its_own_folder(stages, tmp_path):
    unet = tiny_unet(flows=["image-to-image"])
    unet.save_pretrained(tmp_path / "unet")
    start = ["--pretrained_unet_name_or_path", str(tmp_path / "unet"), "--learning_rate", "0"]
    trained = run(stages, tmp_path / "run", *start, "--flows", "image-to-image", "--lr_scales", "global=1")
    after = load_file(trained / WEIGHTS)
    assert all(torch.equal(value, after[key]) for key, value in unet.state_dict().items())
    args, _, _ = train_versatile.parse_args(words(stages, tmp_path, *start))
    parts = load_parts(args)
    parts["optimus"].register_to_config(latent_dim=5)
    with pytest.raises(ValueError, match="The network was made for .*'text_channels': 6.* but .*'text_channels': 5"):
        load_unet(args, parts)


def test_samples_carry_what_each_flow_reads(stages, tmp_path):
    args, data, _ = train_versatile.parse_args(words(stages, tmp_path))
    encoders = tiny_encoders()
    reader = FlowRows.of(encoders, args, data)
    row = {"image": load_pictures(data)[0][0]["image"], "text": "a [big] cat", "full_text": "a-cat"}
    work = pickle.loads(pickle.dumps(reader.read))  # what starting a loader process asks for where there is no fork
    sample = work(row, torch.Generator())
    assert sample["image"].shape == sample["clip_pixels"].shape == (3, 16, 16)
    texts = {name: value for name, value in sample.items() if isinstance(value, str)}
    assert texts == {"prompt": "a [big] cat", "sentence": "a cat", "source": "a cat"}
    batch = pickle.loads(pickle.dumps(reader.collate))([sample, {**sample, "sentence": "a red ring"}])
    ids = encoders.tokenizer("a cat", padding="max_length", max_length=6).input_ids
    assert batch["source_ids"].tolist() == [ids, ids] and batch["prompt"] == ["a [big] cat"] * 2
    red_ring = encoders.encoder_tokenizer("a red ring").input_ids
    assert batch["sentence_ids"][1, : len(red_ring)].tolist() == red_ring
    args.clean_captions, args.paraphrase_column = False, None
    assert reader.read(row, torch.Generator())["source"] == "a [big] cat"
    args.clean_captions = True
    row["text"] = "[nothing]"
    assert reader.read(row, torch.Generator())["sentence"] == "[nothing]"
    args.flows = ["text-to-text"]  # no more than the flows read
    alone = reader.collate([reader.read(row, torch.Generator())])
    assert alone.keys() == {"prompt", "source_ids", "sentence_ids"}


def test_the_smoke_preset_needs_nothing_trained_before(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(PRESETS.parents[1])  # it names the bundled checkpoints from here
    train_versatile.main([SMOKE, "--output_dir", str(tmp_path)])
    assert "optimus: built anew and never trained" in caplog.text
    assert "Its optimus was never trained" in (tmp_path / "README.md").read_text()
    AcceleratorState._reset_state(reset_partial_state=True)
    pipe = VersatilePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert set(pipe.unet.flows) == set(FLOWS)
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (32, 32)
    assert isinstance(pipe("a red circle", data_type="text", num_inference_steps=1).texts[0], str)
    # resumed after step 3, the untrained network is the same one again, or the last steps would come out otherwise
    names = (WEIGHTS, "optimus/diffusion_pytorch_model.safetensors")
    straight = [load_file(tmp_path / name) for name in names]
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    train_versatile.main([SMOKE, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"])
    for name, one in zip(names, straight, strict=True):
        other = load_file(tmp_path / name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_trained_parts_take_the_place_of_untrained_ones(stages, tmp_path):
    args, _, _ = train_versatile.parse_args(words(stages, tmp_path))
    args.untrained_parts = ["vae", "optimus"]
    assert untrained_parts(args) == []
    assert load_parts(args)["vae"].config.latent_channels == 2  # those of the stage, not the new one
    args.pretrained_vae_name_or_path = None
    parts = load_parts(args)
    assert parts["vae"].config.latent_channels == 4 and parts["optimus"].config.latent_dim == 6


def test_missing_parts_are_named(stages, tmp_path):
    for option, way_out in (("vae", "train_autoencoder.py --model kl"), ("optimus", "train_optimus.py")):
        args, _, _ = train_versatile.parse_args(words(stages, tmp_path))
        setattr(args, f"pretrained_{option}_name_or_path", None)
        args.untrained_parts = []
        with pytest.raises(ValueError, match=f"--pretrained_{option}_name_or_path is needed: .*{way_out}, or go on"):
            load_parts(args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flows", "text-to-sound"], "--flows is .'text-to-sound'.: name some of image-to-image"),
        (["--flows", "text-to-text", "text-to-text"], "each once"),
        (["--untrained_parts", "clip", "vae"], "--untrained_parts names clip; it can be vae, optimus or both"),
        (
            ["--block_out_channels", "8", "16", "--attention_levels", "1", "2"],
            r"--attention_levels is \[1, 2\]: --block_out_channels gives the levels 0 to 1",
        ),
        (["--cond_dropout_prob", "2"], r"--cond_dropout_prob must lie in \[0, 1\], got 2"),
        (["--flow_weights", "text-to-text"], "--flow_weights got 'text-to-text': write name=factor"),
        (["--flow_weights", "text-to-text=-1"], "a factor >= 0"),
        (["--lr_scales", "global=1", "global=2"], "--lr_scales got 'global=2': .*each name once"),
        (
            ["--flows", "text-to-text", "--flow_weights", "text-to-image=2"],
            "--flow_weights names text-to-image, but --flows is text-to-text",
        ),
        (["--num_inference_steps", "0"], "--num_inference_steps must be > 0, got 0"),
        (["--validation_samples", "0"], "--validation_samples must be > 0, got 0"),
        (["--cache_dir", "x"], "excludes augmentation: pass --center_crop"),
        (["--cache_dir", "x", "--center_crop", "--random_flip"], "leave out --random_flip"),
        (["--cache_dir", "x", "--flows", "text-to-text"], "which text-to-text does not read"),
        (["--text_positions", "0"], "--text_positions must be > 0, got 0"),
        (["--rank", "0"], "--rank must be > 0, got 0"),
        (["--rank", "2"], "--rank=2 trains .* name it with --pretrained_model_name_or_path or --pretrained_unet_name"),
        (
            ["--pretrained_model_name_or_path", "a", "--pretrained_unet_name_or_path", "b"],
            "already holds the network to go on with",
        ),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(options, message):
    with pytest.raises(ValueError, match=message):
        train_versatile.parse_args(["--dataset_name", "scenes", *options])
