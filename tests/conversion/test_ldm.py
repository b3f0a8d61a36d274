"""Original U-Nets, conditioners and whole checkpoints of latent diffusion: every released layout, key by key."""

import pytest
import torch
from conversion.ldm_originals import (
    CONDITIONERS,
    UNETS,
    bert_shapes,
    checkpoint,
    random_weights,
    unet_shapes,
)
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from noise_levels import scaled_linear_betas

from diffusers_ext.conversion.keys import load_original
from diffusers_ext.conversion.ldm import convert_ldm_schedule, split_ldm_checkpoint
from diffusers_ext.conversion.ldm_encoders import (
    convert_ldm_bert,
    convert_ldm_class_embedder,
    convert_ldm_layout_encoder,
    convert_ldm_spatial_rescaler,
)
from diffusers_ext.conversion.ldm_unet import convert_ldm_unet
from diffusers_ext.models.encoders_ldm import LDMLayoutEncoder, LDMSpatialRescaler
from diffusers_ext.models.unet_ldm import LDMUNet

CROSS = {"ch": 32, "mult": (1, 2), "layers": 1, "attention": (2,), "context": 12}
PLAIN = {"ch": 32, "mult": (1, 2), "layers": 1, "attention": (2,)}


def numbers(values) -> list[int]:
    return sorted(torch.Size(getattr(value, "shape", value)).numel() for value in values)


@pytest.mark.parametrize("name", UNETS)
def test_every_key_of_a_released_unet_finds_its_place(name):
    """Converted at 32 channels; at the released width the same keys have the released numbers of parameters."""
    released = UNETS[name]
    sizes = unet_shapes(**released["sizes"])
    assert round(sum(numbers(sizes.values())) / 1e6, 1) == released["millions"]
    narrow_sizes = {**released["sizes"], "ch": 32}
    weights = random_weights(unet_shapes(**narrow_sizes))
    assert weights.keys() == sizes.keys()
    heads = {"num_heads": 8} if "num_heads" in released["heads"] else {"num_head_channels": 32}
    narrow = convert_ldm_unet(weights, **heads)
    assert type(narrow) is released["class"]
    assert sum(p.numel() for p in narrow.parameters()) == sum(value.numel() for value in weights.values())
    total = sum(float(value.double().sum()) for value in weights.values())
    assert sum(float(p.detach().double().sum()) for p in narrow.parameters()) == pytest.approx(total, abs=1e-3)

    widths = tuple(released["sizes"]["ch"] * m for m in released["sizes"]["mult"])
    config = {**narrow.config, "block_out_channels": widths}
    if isinstance(narrow, UNet2DConditionModel):
        per_head = released["heads"].get("num_head_channels")
        config["attention_head_dim"] = tuple(w // per_head for w in widths) if per_head else tuple(
            released["heads"]["num_heads"] for _ in widths
        )  # fmt: skip
        config["cross_attention_dim"] = released["sizes"]["context"]
    with torch.device("meta"):
        full = type(narrow).from_config(config)
    assert full.state_dict().keys() == narrow.state_dict().keys()
    qkv = [shape for key, shape in sizes.items() if ".qkv." in key]
    split = [(shape[0] // 3, *shape[1:]) for shape in qkv for _ in range(3)]
    others = [shape for key, shape in sizes.items() if ".qkv." not in key]
    assert numbers(full.state_dict().values()) == numbers(others + split)


@torch.no_grad()
@pytest.mark.parametrize(
    ("sizes", "heads"),
    [
        ({**PLAIN, "mult": (1,), "attention": (1,)}, {"num_heads": 2}),
        ({**PLAIN, "mult": (1, 1, 2), "layers": 2, "attention": (1, 4), "film": True}, {"num_head_channels": 8}),
        ({**PLAIN, "attention": (), "updown": True, "in_channels": 7}, {"num_heads": 8}),
        ({**PLAIN, "mult": (1, 2, 2), "attention": (1, 2), "updown": True, "labels": 5}, {"num_heads": 4}),
        ({**CROSS, "depth": 3, "layers": 2}, {"num_head_channels": 16}),
        ({**CROSS, "mult": (1, 1, 2), "attention": (1, 4), "film": True}, {"num_heads": 8}),
    ],
)
def test_unet_sizes_are_read_off_the_shapes(sizes, heads, tmp_path):
    weights = random_weights(unet_shapes(**sizes))
    unet = convert_ldm_unet({"state_dict": weights}, **heads, sample_size=8, dropout=0.1)
    assert tuple(unet.config.block_out_channels) == tuple(sizes["ch"] * m for m in sizes["mult"])
    assert unet.config.layers_per_block == sizes["layers"]
    assert (unet.config.sample_size, unet.config.dropout) == (8, 0.1)
    assert unet.config.in_channels == sizes.get("in_channels", 3)
    assert (unet.config.resnet_time_scale_shift == "scale_shift") == sizes.get("film", False)
    with_attention = ["Attn" in kind for kind in unet.config.down_block_types]
    assert with_attention == [2**level in sizes["attention"] for level in range(len(sizes["mult"]))]
    attention = [module for module in unet.modules() if isinstance(module, Attention)]
    for module in attention:
        wanted = heads.get("num_heads") or module.inner_dim // heads["num_head_channels"]
        assert module.heads == wanted
    assert not unet.training

    call = {"sample": torch.randn(2, unet.config.in_channels, 8, 8), "timestep": 11}
    if "context" in sizes:
        call["encoder_hidden_states"] = torch.randn(2, 3, sizes["context"])
    if "labels" in sizes:
        call["class_labels"] = torch.tensor([0, 4])
    output = unet(**call).sample
    assert output.isfinite().all() and output.shape == (2, 3, 8, 8)
    unet.save_pretrained(tmp_path)
    torch.testing.assert_close(type(unet).from_pretrained(tmp_path)(**call).sample, output, atol=1e-4, rtol=1e-4)


def test_queries_keys_and_values_lie_head_by_head():
    weights = random_weights(unet_shapes(**PLAIN))
    unet = convert_ldm_unet(weights, num_heads=4)
    original = weights["middle_block.1.qkv.weight"]  # 4 heads x (q, k, v) x 16 dimensions
    attention = unet.mid_block.attentions[0]
    for head in range(4):
        for index, layer in enumerate((attention.to_q, attention.to_k, attention.to_v)):
            rows = original[head * 48 + index * 16 : head * 48 + (index + 1) * 16, :, 0]
            assert torch.equal(layer.weight[head * 16 : (head + 1) * 16], rows)
    assert torch.equal(attention.to_v.bias[16:32], weights["middle_block.1.qkv.bias"][48 + 32 : 48 + 48])


def test_stock_class_wherever_it_is_enough():
    plain = random_weights(unet_shapes(**PLAIN))
    assert type(convert_ldm_unet(plain, num_heads=4)) is UNet2DModel  # one width has attention
    assert type(convert_ldm_unet(plain, num_head_channels=8)) is UNet2DModel
    both = random_weights(unet_shapes(**{**PLAIN, "attention": (1, 2)}))
    assert type(convert_ldm_unet(both, num_head_channels=8)) is UNet2DModel
    assert type(convert_ldm_unet(both, num_heads=8)) is LDMUNet
    half = convert_ldm_unet({key: value.half() for key, value in plain.items()}, num_heads=4)
    assert half.dtype == torch.float16


@pytest.mark.parametrize(
    ("sizes", "heads", "change", "message"),
    [
        (PLAIN, {}, None, r"`num_heads` is None and `num_head_channels` None: pass the one"),
        (PLAIN, {"num_heads": 4, "num_head_channels": 8}, None, r"`num_heads` is 4 and `num_head_channels` 8"),
        (PLAIN, {"num_heads": 5}, None, r"`num_heads` is 5, but the attention is 32 wide"),
        (PLAIN, {"num_head_channels": 0}, None, r"`num_head_channels` is 0, but the attention is 32 wide"),
        (PLAIN, {"num_heads": 4}, lambda w: w.pop("middle_block.1.norm.weight"), r"not a latent-diffusion U-Net: it"),
        (PLAIN, {"num_heads": 4}, lambda w: w.pop("output_blocks.1.2.conv.bias"), r"missing: up_blocks\.0\.upsampl"),
        (PLAIN, {"num_heads": 4}, lambda w: w.pop("input_blocks.3.1.qkv.bias"), r"missing: down_blocks\.1\.attenti"),
        (PLAIN, {"num_heads": 4}, lambda w: w.update(id_predictor=w["out.2.bias"]), r"not know: id_predictor"),
        (PLAIN, {"num_heads": 4}, lambda w: w["out.2.bias"].fill_(float("nan")), r"not finite: conv_out\.bias"),
        (
            PLAIN, {"num_heads": 4}, lambda w: w.update({"out.2.bias": torch.zeros(4)}),
            r"misshaped: conv_out\.bias \(4,\) instead of \(3,\)",
        ),
        (
            {**PLAIN, "start": 64}, {"num_heads": 4}, None,
            r"starts with 64 channels and its first level has 32.*`channel_mult`",
        ),
        ({**CROSS, "updown": True}, {"num_heads": 4}, None, r"both cross-attention and residual resampling"),
    ],
)  # fmt: skip
def test_unet_is_converted_strictly(sizes, heads, change, message):
    weights = random_weights(unet_shapes(**sizes))
    if change is not None:
        change(weights)
    with pytest.raises(ValueError, match=message):
        convert_ldm_unet(weights, **heads)


# Text and layout encoders


def test_every_key_of_the_released_text_encoder_finds_its_place():
    sizes = bert_shapes(layers=32, width=1280, vocab=30522, length=77)
    weights = random_weights(bert_shapes(layers=32, width=8, vocab=30, length=7))
    assert weights.keys() == sizes.keys()
    narrow = convert_ldm_bert(weights)
    with torch.device("meta"):
        full = LDMBertModel(LDMBertConfig())
    assert full.state_dict().keys() == narrow.state_dict().keys()
    assert numbers(full.state_dict().values()) == numbers(sizes.values())
    assert sum(numbers(sizes.values())) + 872.3e6 == pytest.approx(1.45e9, rel=5e-3)  # "1.45 billion"
    assert narrow.config.dropout == 0.0 and narrow.config.head_dim == 64 and narrow.config.encoder_attention_heads == 8


def test_every_key_of_the_released_layout_encoder_finds_its_place():
    sizes = bert_shapes(layers=16, width=512, vocab=8192, length=92)
    weights = random_weights(bert_shapes(layers=16, width=8, vocab=30, length=7))
    assert weights.keys() == sizes.keys()
    narrow = convert_ldm_layout_encoder(weights)
    with torch.device("meta"):
        full = LDMLayoutEncoder()
    assert full.state_dict().keys() == narrow.state_dict().keys()
    kept = [shape for key, shape in sizes.items() if ".to_logits." not in key]
    assert numbers(full.state_dict().values()) == numbers(kept)


@torch.no_grad()
def test_text_and_layout_encoder_are_the_same_network(tmp_path):
    weights = random_weights(bert_shapes(layers=3, width=24, vocab=40, length=9, inner=64))
    text, layout = convert_ldm_bert(weights, num_heads=4), convert_ldm_layout_encoder(weights, num_heads=4)
    tokens = torch.randint(0, 40, (2, 9))
    expected = text(tokens, return_dict=True).last_hidden_state
    torch.testing.assert_close(layout(tokens), expected, atol=1e-5, rtol=1e-5)
    text.save_pretrained(tmp_path / "text")
    layout.save_pretrained(tmp_path / "layout")
    loaded = LDMBertModel.from_pretrained(tmp_path / "text")
    torch.testing.assert_close(loaded(tokens, return_dict=True).last_hidden_state, expected)
    torch.testing.assert_close(LDMLayoutEncoder.from_pretrained(tmp_path / "layout")(tokens), layout(tokens))


@pytest.mark.parametrize("convert", [convert_ldm_bert, convert_ldm_layout_encoder])
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda w: w.pop("transformer.norm.bias"), {}, r"missing: (model\.layer_norm|norm)\.bias"),
        (
            lambda w: w.update({"transformer.attn_layers.layers.2.1.to_q.bias": torch.zeros(8)}), {},
            r"unknown: .*q(_proj)?\.bias",
        ),
        (lambda w: w.pop("transformer.token_emb.weight"), {}, r"not a BERTEmbedder: it lacks transformer\.token_emb"),
        (lambda w: None, {"num_heads": 7}, r"`num_heads` is 7, but the attention is 64 wide"),
        (lambda w: w["transformer.norm.bias"].fill_(float("inf")), {}, r"not finite"),
    ],
)  # fmt: skip
def test_encoders_are_converted_strictly(convert, change, options, message):
    weights = random_weights(bert_shapes(layers=2, width=8, vocab=30, length=7, inner=64))
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert(weights, **options)


# Small conditioners


def test_class_embedder():
    weights = random_weights(CONDITIONERS["class"])
    embedder = convert_ldm_class_embedder(weights, null_class=1000)
    assert dict(embedder.config).items() >= {"num_class_embeds": 1001, "embed_dim": 512, "null_class": 1000}.items()
    assert torch.equal(embedder(torch.tensor([7, 1000]))[:, 0], weights["embedding.weight"][[7, 1000]])


def test_spatial_rescaler():
    weights = random_weights(CONDITIONERS["semantic"])
    rescaler = convert_ldm_spatial_rescaler(weights)
    with torch.device("meta"):
        released = LDMSpatialRescaler().state_dict()
    assert {key: value.shape for key, value in rescaler.state_dict().items()} == {
        key: value.shape for key, value in released.items()
    }
    options = {"num_stages": 3, "multiplier": 0.25, "method": "nearest"}
    other = convert_ldm_spatial_rescaler({**weights, "channel_mapper.bias": torch.ones(3)}, **options)
    assert dict(other.config).items() >= {**options, "bias": True, "in_channels": 182}.items()


@pytest.mark.parametrize(
    ("convert", "weights", "message"),
    [
        (convert_ldm_class_embedder, {"table": torch.zeros(2, 2)}, r"not a class embedder: it lacks embedding\.weigh"),
        (
            convert_ldm_class_embedder, {"embedding.weight": torch.zeros(2, 2), "embedding.bias": torch.zeros(2)},
            r"unknown: embedding\.bias",
        ),
        (convert_ldm_spatial_rescaler, {"map": torch.zeros(2, 2)}, r"not a spatial rescaler: it lacks channel_mapper"),
        (convert_ldm_spatial_rescaler, {}, r"`state_dict` holds nothing"),
    ],
)  # fmt: skip
def test_small_conditioners_are_converted_strictly(convert, weights, message):
    with pytest.raises(ValueError, match=message):
        convert(weights)


# Whole checkpoints


def test_checkpoint_is_taken_apart(tmp_path):
    unet = random_weights(unet_shapes(**CROSS))
    file = checkpoint(unet, cond=random_weights(CONDITIONERS["class"]), scale_factor=0.7)
    torch.save(file, tmp_path / "model.ckpt")
    parts = split_ldm_checkpoint(load_original(tmp_path / "model.ckpt"), use_ema=False)
    assert parts.unet.keys() == unet.keys() and all(torch.equal(parts.unet[key], unet[key]) for key in unet)
    assert parts.cond_stage.keys() == {"embedding.weight"}
    assert "encoder.conv_in.weight" in parts.first_stage
    assert parts.scale_factor == pytest.approx(0.7)
    scheduler = convert_ldm_schedule(parts.betas)
    assert scheduler.config.beta_schedule == "scaled_linear" and not scheduler.config.clip_sample
    assert (scheduler.config.beta_start, scheduler.config.beta_end) == pytest.approx((0.0015, 0.0195))
    convert_ldm_unet(parts.unet, num_heads=4)

    bare = {key: value for key, value in file["state_dict"].items() if key.startswith("model.")}
    parts = split_ldm_checkpoint(bare)
    assert (parts.first_stage, parts.cond_stage, parts.betas, parts.scale_factor) == ({}, {}, None, None)


def test_averaged_weights_are_found_by_their_names_without_dots():
    unet = random_weights(unet_shapes(**PLAIN))
    file = checkpoint(unet, averaged={key: value + 1 for key, value in unet.items()})
    assert "model_ema.diffusion_modelinput_blocks00weight" in file["state_dict"]
    for use_ema, shift in ((None, 1), (True, 1), (False, 0)):
        parts = split_ldm_checkpoint(file, use_ema=use_ema)
        assert parts.unet.keys() == unet.keys()
        assert all(torch.equal(parts.unet[key], unet[key] + shift) for key in unet)
    del file["state_dict"]["model_ema.decay"], file["state_dict"]["model_ema.num_updates"]
    assert torch.equal(split_ldm_checkpoint(file).unet["out.2.bias"], unet["out.2.bias"] + 1)


def test_averages_of_a_first_stage_alone_and_inside_a_checkpoint():
    own = {"encoder.conv_in.weight": torch.zeros(2), "quant_conv.bias": torch.ones(2)}
    file = {
        **own,
        **{f"model_ema.{key.replace('.', '')}": value + 5 for key, value in own.items()},
        "loss.discriminator.main.0.bias": torch.full((2,), 3.0),
        "model_ema.lossdiscriminatormain0bias": torch.full((2,), 4.0),
        "loss.logvar": torch.zeros(()),
        "model_ema.decay": torch.tensor(0.9999),
    }
    parts = split_ldm_checkpoint(file)
    assert torch.equal(parts.first_stage["quant_conv.bias"], torch.full((2,), 6.0)) and not parts.unet
    assert parts.first_stage.keys() == own.keys() | {"loss.discriminator.main.0.bias", "loss.logvar"}
    assert torch.equal(split_ldm_checkpoint(file, use_ema=False).first_stage["quant_conv.bias"], torch.ones(2))
    whole = {"model.diffusion_model.out.2.bias": torch.zeros(1)}
    whole |= {f"first_stage_model.{key}": value for key, value in file.items()}
    assert torch.equal(split_ldm_checkpoint(whole).first_stage["quant_conv.bias"], torch.full((2,), 6.0))


@pytest.mark.parametrize(
    ("change", "use_ema", "message"),
    [
        (lambda w: w.update(extra=torch.zeros(1)), None, r"keys of no known part: extra"),
        (lambda w: w.pop("model_ema.diffusion_modelout2bias"), None, r"Without an average: diffusion_model\.out\.2"),
        (lambda w: w.update({"model_ema.modelx": torch.zeros(1)}), None, r"averages of nothing: modelx\. Pass"),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("model_ema.")], True, r"`use_ema` is True, but the ch"),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("model.")], None, r"no latent-diffusion checkpoint"),
    ],
)  # fmt: skip
def test_checkpoint_is_taken_apart_strictly(change, use_ema, message):
    unet = random_weights(unet_shapes(**PLAIN))
    weights = checkpoint(unet, averaged=unet)["state_dict"]
    change(weights)
    with pytest.raises(ValueError, match=message):
        split_ldm_checkpoint(weights, use_ema=use_ema)


def test_other_schedules_are_refused():
    with pytest.raises(ValueError, match=r"`betas` go from 0.0015 to 0.0195, but not as squares.*trained_betas"):
        convert_ldm_schedule(torch.linspace(0.0015, 0.0195, 1000))
    assert convert_ldm_schedule(scaled_linear_betas(1e-3, 1e-2, 50)).config.num_train_timesteps == 50
