"""Against open_clip itself: small random models, both towers, un-normalised vectors."""

import json
import sys

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from diffusers_ext.conversion.keys import load_original
from diffusers_ext.conversion.open_clip import (
    build_open_clip_processors,
    convert_open_clip,
    load_open_clip,
    read_config,
    rename_weights,
)
from diffusers_ext.training_utils.clip import CLIP_COMPONENTS, load_clip

VISION = {"image_size": 12, "patch_size": 4, "width": 24, "layers": 2, "head_width": 8, "mlp_ratio": 4.3637}
TEXT = {"context_length": 11, "vocab_size": 40, "width": 20, "heads": 5, "layers": 3}


def random_clip(kind=CLIP, *, embed_dim=14, quick_gelu=False, vision=(), text=()):
    """An open_clip model whose every weight is drawn, norms and biases too: a lost one would show."""
    torch.manual_seed(0)
    model = kind(embed_dim, {**VISION, **dict(vision)}, {**TEXT, **dict(text)}, quick_gelu=quick_gelu).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def texts(vocab_size=40, length=11):
    """Rows of ids, each with its end of text (the highest id) at another place, padded with 0 as open_clip does."""
    ids = torch.zeros(4, length, dtype=torch.int64)
    for row, end in enumerate((1, 4, 7, length - 1)):
        ids[row, 0], ids[row, 1:end] = vocab_size - 2, torch.randint(1, vocab_size - 2, (end - 1,))
        ids[row, end] = vocab_size - 1
    return ids


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({}, {"vision_heads": 3, "text_heads": 5}),
        ({"quick_gelu": True}, {"vision_heads": 3, "text_heads": 5}),
        ({"vision": {"head_width": 12}, "text": {"heads": 2}}, {"vision_heads": 2, "text_heads": 2}),
        ({"vision": {"width": 128, "head_width": 64}, "text": {"width": 64, "heads": 1}}, {}),
        ({"vision": {"width": 1408, "head_width": 88, "layers": 1}, "text": {"width": 64, "heads": 1}}, {}),
        ({"kind": CustomTextCLIP, "embed_dim": 20}, {"vision_heads": 3, "text_heads": 5}),  # square projection
    ],
    ids=["gelu", "quick_gelu", "other heads", "heads of 64", "ViT-g's heads of 88", "text tower under `text.`"],
)
def test_vectors_equal_those_of_open_clip(options, heads, tmp_path):
    original = random_clip(**options)
    model = convert_open_clip(original.state_dict(), quick_gelu=options.get("quick_gelu", False), **heads)
    ids, pixels = texts(), torch.randn(3, 3, 12, 12)
    text, image = original.encode_text(ids), original.encode_image(pixels)
    torch.testing.assert_close(model.get_text_features(ids).pooler_output, text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, image, rtol=1e-5, atol=1e-5)
    assert text.std() > 0.1 and image.std() > 0.1
    assert model.logit_scale == original.logit_scale
    padded = torch.where(ids == 0, 39, ids)  # as the tokenizer of transformers pads
    torch.testing.assert_close(model.get_text_features(padded).pooler_output, text, rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path)  # what pipelines hold are the towers, each loaded from the folder of both
    towers = [kind.from_pretrained(tmp_path) for kind in (CLIPTextModelWithProjection, CLIPVisionModelWithProjection)]
    torch.testing.assert_close(towers[0](ids).text_embeds, text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(towers[1](pixels).image_embeds, image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ViT-g-14", "ViT-H-14", "ViT-bigG-14", "ViT-L-14-336", "ViT-B-32"])
def test_every_key_and_size_of_released_models(name):
    """At full size on the meta device: all keys find a place of their shape, and the heads are open_clip's."""
    options = open_clip.get_model_config(name)
    with torch.device("meta"):
        weights = rename_weights(CLIP(**options).state_dict())
        config = read_config(weights, vision_heads=None, text_heads=None, quick_gelu=False)
        wanted = CLIPModel(config).state_dict()
    assert {key: value.shape for key, value in weights.items()} == {key: v.shape for key, v in wanted.items()}
    vision, text = options["vision_cfg"], options["text_cfg"]
    assert config.vision_config.num_attention_heads == vision["width"] // vision.get("head_width", 64)
    assert config.text_config.num_attention_heads == text["heads"]
    assert config.vision_config.image_size == vision["image_size"] and config.projection_dim == options["embed_dim"]
    assert config.text_config.eos_token_id == 49407 and config.text_config.max_position_embeddings == 77


@pytest.mark.parametrize("wrap", ["flat", "state_dict", "ddp", "trained", "safetensors"])
def test_wrappings_of_a_file(tmp_path, wrap):
    weights = random_clip().state_dict()
    ddp = {f"module.{key}": value for key, value in weights.items()}
    content = {
        "flat": weights,
        "state_dict": {"state_dict": weights},
        "ddp": ddp,
        "trained": {"epoch": 3, "name": "run", "state_dict": ddp, "optimizer": {"state": {}, "param_groups": []}},
    }
    path = tmp_path / f"open_clip_pytorch_model.{'safetensors' if wrap == 'safetensors' else 'bin'}"
    save_file(weights, path) if wrap == "safetensors" else torch.save(content[wrap], path)
    model = convert_open_clip(load_original(path), vision_heads=3, text_heads=5)
    assert torch.equal(model.text_projection.weight, weights["text_projection"].T)


def test_dtype_and_folder_survive(tmp_path):
    weights = {key: value.half() for key, value in random_clip().state_dict().items()}
    convert_open_clip(weights, vision_heads=3, text_heads=5).save_pretrained(tmp_path)
    loaded = CLIPModel.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.float16 and torch.equal(loaded.visual_projection.weight, weights["visual.proj"].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("ln_final.bias"), r"CLIPModel\. missing: text_model\.final_layer_norm\.bias\."),
        (lambda w: w.pop("visual.transformer.resblocks.1.attn.in_proj_bias"), r"missing: vision_model.*k_proj"),
        (lambda w: w.update({"visual.ls_1.gamma": w["ln_final.bias"]}), r"does not know: visual\.ls_1\.gamma"),
        (lambda w: w.update({"logit_bias": torch.zeros(())}), r"does not know: logit_bias"),
        (lambda w: w.update({"text.ln_final.bias": w["ln_final.bias"]}), r"would overwrite others: text\.ln_final"),
        (lambda w: w.update({"visual.ln_pre.bias": torch.zeros(3)}), r"misshaped: vision_model\.pre_layrnorm\.bias"),
        (
            lambda w: w.update({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(59)}),
            r"misshaped: text_model\.encoder\.layers\.0\.self_attn\.v_proj\.bias \(19,\)",
        ),
        (lambda w: w["visual.proj"].fill_(float("nan")), r"not finite: visual_projection\.weight"),
        (lambda w: w.pop("visual.class_embedding"), r"not an open_clip ViT: .* vision_model\.embeddings\.class_emb"),
        (lambda w: w.update({"visual.positional_embedding": torch.zeros(9, 24)}), r"8 patches: .* square grid"),
    ],
)  # fmt: skip
def test_conversion_is_strict(change, message):
    weights = random_clip().state_dict()
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert_open_clip(weights, vision_heads=3, text_heads=5)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (
            {"text_heads": 5},
            r"`vision_heads` is None, but the attention is 24 wide, which is no multiple of 64",
        ),
        ({"text_heads": 5, "vision_heads": 5}, r"`vision_heads` is 5, .* 24"),
        ({"vision_heads": 3}, r"`text_heads` is None, .* 20"),
        ({"vision_heads": 3, "text_heads": 0}, r"`text_heads` is 0, .* 20"),
    ],
)
def test_heads_that_cannot_be_guessed_are_asked_for(heads, message):
    with pytest.raises(ValueError, match=message):
        convert_open_clip(random_clip().state_dict(), **heads)


def with_vocabulary(vocab_size=49408, length=77):
    weights = random_clip(text={"vocab_size": vocab_size, "context_length": length, "width": 8, "heads": 2})
    return weights, convert_open_clip(weights.state_dict(), vision_heads=3, text_heads=2)


@torch.no_grad()
def test_tokenizer_and_pictures_are_those_of_open_clip(tmp_path):
    original, model = with_vocabulary()
    tokenizer, image_processor = build_open_clip_processors(model)
    sentences = [
        "a fox posing for a photo, stock photo. highly detailed, 4k!",
        "",
        "Größe und  Weite\n der Küste — 1234 Möwen's blick",
        "日本の城 🦊 <3 it's they're we'll",
        "word " * 100,
    ]
    expected = open_clip.get_tokenizer("ViT-g-14")(sentences)
    inputs = tokenizer(sentences, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    used = inputs.attention_mask.bool()
    assert torch.equal(inputs.input_ids[used], expected[used]) and (expected[~used] == 0).all()
    assert tokenizer.model_max_length == 77 and tokenizer.eos_token_id == model.config.text_config.eos_token_id
    vectors = model.get_text_features(inputs.input_ids).pooler_output
    torch.testing.assert_close(vectors, original.encode_text(expected), rtol=1e-5, atol=1e-5)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert torch.equal(again(sentences[0], return_tensors="pt").input_ids[0], inputs.input_ids[0][used[0]])

    picture = Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    prepare = open_clip.image_transform(12, is_train=False)
    pixels = image_processor(picture, return_tensors="pt").pixel_values[0]
    assert pixels.shape == (3, 12, 12) and (pixels - prepare(picture)).abs().max() < 0.05  # a grey value is 0.015


def test_another_vocabulary_has_another_tokenizer():
    _, model = with_vocabulary(vocab_size=40)
    with pytest.raises(ValueError, match="knows 40 tokens and open_clip's vocabulary has 49408"):
        build_open_clip_processors(model)


def test_the_vocabulary_needs_open_clip(monkeypatch):
    _, model = with_vocabulary()
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)  # as if it were not installed
    with pytest.raises(ImportError, match="pip install open_clip_torch .extra .train.."):
        build_open_clip_processors(model)


TINY = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2},
}


@pytest.fixture
def tiny_open_clip(tmp_path):
    """A model that open_clip knows by name, and a file of its weights."""
    name = "tiny-of-the-tests"
    (tmp_path / f"{name}.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.manual_seed(0)
    original = open_clip.create_model(name)
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    return f"open_clip:{name}/{tmp_path / 'weights.pt'}", original.eval()


@torch.no_grad()
def test_a_clip_is_loaded_by_open_clip_and_saved_as_that_of_transformers(tiny_open_clip, tmp_path):
    place, original = tiny_open_clip
    parts = load_clip(place, load_open_clip)
    assert parts.keys() == CLIP_COMPONENTS.keys()
    for name, part in parts.items():
        part.save_pretrained(tmp_path / "saved" / name)
    again = {name: kind.from_pretrained(tmp_path / "saved" / name) for name, kind in CLIP_COMPONENTS.items()}
    texts = ["a large red circle", "blue star"]
    wanted = original.encode_text(open_clip.get_tokenizer("ViT-B-32", context_length=12)(texts))
    ids = again["tokenizer"](texts, padding="max_length", max_length=12, return_tensors="pt").input_ids
    torch.testing.assert_close(again["text_encoder"](ids).text_embeds, wanted, rtol=1e-5, atol=1e-5)
    picture = Image.fromarray(torch.randint(256, (20, 30, 3), dtype=torch.uint8).numpy())
    pixels = again["feature_extractor"](picture, return_tensors="pt").pixel_values
    wanted = original.encode_image(pixels)
    torch.testing.assert_close(again["image_encoder"](pixels).image_embeds, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.1 and pixels.shape == (1, 3, 16, 16)


def test_what_open_clip_does_not_know_is_refused(tiny_open_clip):
    for name, message in (
        ("ViT-B-32", r'"open_clip:ViT-B-32" must be open_clip:<model>/<tag or file>'),
        ("no-such-model/openai", "the models are .*ViT-B-32"),
        ("ViT-B-32/no_such_tag", "'no_such_tag' is no file and no tag of ViT-B-32; its tags are .*laion2b_s34b_b79k"),
        ("ViT-B-32/openai", "trained with the quick GELU.*name the model ViT-B-32-quickgelu"),
    ):
        with pytest.raises(ValueError, match=message):
            load_open_clip(name)


def test_pictures_are_normalised_as_open_clip_notes():
    weights = random_clip(text={"vocab_size": 49408}).state_dict()
    model = convert_open_clip(weights, vision_heads=3, text_heads=5)
    _, processor = build_open_clip_processors(model, {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)})
    assert list(processor.image_mean) == [0.5, 0.4, 0.3] and list(processor.image_std) == [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="by bicubic and squash, but this converter knows bicubic and shortest"):
        build_open_clip_processors(model, {"interpolation": "bicubic", "resize_mode": "squash"})
