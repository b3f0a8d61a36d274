"""Checkpoints of Versatile Diffusion, in all layouts, and Stable Diffusion as a start."""

import json
from itertools import product

import pytest
import torch
from conversion.versatile_originals import LAYOUTS, TINY, original_weights, tiny_unet
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from pipelines.tiny_versatile import tiny_clip, tiny_vae
from safetensors.torch import save_file

from diffusers_ext.conversion.versatile import (
    convert_stable_diffusion_unet,
    convert_versatile_unet,
    load_versatile_repository,
    read_versatile_unet,
)
from diffusers_ext.conversion.versatile_checkpoint import convert_versatile_clip, split_versatile_checkpoint
from diffusers_ext.models.unet_versatile import VersatileUNet
from diffusers_ext.pipelines.versatile.pipeline_versatile import VersatilePipeline

SHAPES = {"image": (2, 4, 4, 8), "text": (2, 6)}
CONTEXTS = {name: torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(k)) for k, name in enumerate(SHAPES)}
DEEP = {"block_out_channels": (32, 32, 64), "layers_per_block": (1, 2, 1), "attention_levels": (False, True, True)}


@torch.no_grad()
def outputs(unet: VersatileUNet) -> dict[str, torch.Tensor]:
    found = {}
    for data, context in product(unet.data_layers, unet.context_layers):
        sample = torch.randn(SHAPES[data], generator=torch.Generator().manual_seed(7))
        found[f"{context}-to-{data}"] = unet(
            sample, 321, CONTEXTS[context], data_type=data, context_type=context
        ).sample
    return found


def same(first: VersatileUNet, second: VersatileUNet) -> bool:
    one, other = outputs(first), outputs(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [{}, DEEP], ids=["default", "deep"])
def test_every_layout_gives_back_the_network(layout, config):
    unet = tiny_unet(**config)
    weights = {key: value.half().float() for key, value in original_weights(unet, layout).items()}
    unet.load_state_dict({key: value.half().float() for key, value in unet.state_dict().items()})
    converted = convert_versatile_unet(
        {key: value.half() for key, value in weights.items()}, num_heads=4,
        attention_levels=config.get("attention_levels"),
    )  # fmt: skip
    assert converted.dtype == torch.float16 and not converted.training
    assert converted.flows == unet.flows
    for name in ("data_types", "context_types", "attention_levels"):
        assert converted.config[name] == unet.config[name]
    assert same(converted.float(), unet)


def test_what_the_shapes_do_not_tell():
    """The current layout does not say between which data blocks the context blocks stand."""
    widths = {"block_out_channels": (32, 32), "attention_levels": (False, True)}
    unet = tiny_unet(**widths)
    for layout in ("first release", "diffusers"):  # these do
        assert same(convert_versatile_unet(original_weights(unet, layout), num_heads=4), unet)
    weights = original_weights(unet, "current")
    assert convert_versatile_unet(weights, num_heads=4).config.attention_levels == (True, False)  # as released
    assert same(convert_versatile_unet(weights, num_heads=4, attention_levels=[False, True]), unet)
    by_numbers = convert_versatile_unet(weights, num_heads=4, attention_levels=[0, 1])  # as the command line has them
    assert [level is True for level in by_numbers.config.attention_levels] == [False, True]
    with pytest.raises(
        ValueError, match=r"`attention_levels` is \[True, True\]; the context blocks fit \[\(True, False"
    ):
        convert_versatile_unet(weights, attention_levels=[True, True])
    same_count = {"block_out_channels": (32, 32, 32), "attention_levels": (False, True, False)}
    with pytest.raises(ValueError, match=r"`attention_levels` is None; the context blocks fit .*: pass one of"):
        convert_versatile_unet(original_weights(tiny_unet(**same_count), "current"), num_heads=4)
    assert convert_versatile_unet(original_weights(unet, "diffusers"), num_heads=2).config.num_attention_heads == 2


def test_a_checkpoint_of_some_flows():
    """The authors' two-flow network: pictures from both contexts."""
    unet = tiny_unet(flows=["text-to-image", "image-to-image"])
    for layout in ("current", "first release"):
        converted = convert_versatile_unet(original_weights(unet, layout), num_heads=4)
        assert converted.flows == ["image-to-image", "text-to-image"] and same(converted, unet)
        assert converted.config.data_types["text"] == {"kind": "vector", "channels": 768, "positions": 4}
        converted.add_flows(["image-to-text"])  # the next stage
        assert converted.flows == converted.known_flows


def test_whole_checkpoints_are_taken_apart():
    unet = tiny_unet()
    parts = {"vae": {"encoder.conv_in.weight": torch.ones(2)}, "optimus": {"encoder.linear.weight": torch.ones(3)},
             "clip": {"text_projection.weight": torch.ones(4), "logit_scale": torch.ones(())}}  # fmt: skip
    prefixes = {
        "current": ("vae.image.", "vae.text.", "ctx.image.model."),
        "first release": ("autokl.", "optimus.", "clip.model."),
    }
    for layout, names in prefixes.items():
        own = original_weights(unet, layout)
        whole = dict(own) | {
            "betas": torch.ones(5),
            "sqrt_recip_alphas_cumprod": torch.ones(5),
            "logvar": torch.ones(5),
        }
        for prefix, weights in zip(names, parts.values(), strict=True):
            whole |= {prefix + key: value for key, value in weights.items()}
        found = split_versatile_checkpoint({"state_dict": whole})
        assert found.unet.keys() == own.keys()
        assert (found.vae, found.optimus, found.clip) == tuple(parts.values())
        assert same(convert_versatile_unet(found.unet, num_heads=4), unet)
        with pytest.raises(ValueError, match=r"does not know: .* is taken apart by `split_versatile_checkpoint`"):
            convert_versatile_unet(whole, num_heads=4)
    twice = own | {f"ctx.{name}.model.logit_scale": torch.ones(()) for name in ("image", "text")}
    assert list(split_versatile_checkpoint(twice).clip) == ["logit_scale"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strictness(layout):
    weights = original_weights(tiny_unet(), layout)
    keys = sorted(weights)
    middle = next(key for key in keys if "conv2.weight" in key or "out_layers.3.weight" in key)
    time = next(key for key in keys if "time_embed" in key and key.endswith("weight"))
    stranger = keys[0].rsplit(".", 1)[0] + ".stranger"
    context = next(key for key in keys if key.endswith("attn2.to_v.weight"))
    for change, message in [
        ({stranger: torch.ones(1)}, r"stranger"),
        ({middle: None}, r"missing: .*conv2\.weight|lacks .*(conv2|out_layers\.3)\.weight"),
        ({context: None}, r"missing: .*attn2\.to_v\.weight"),
        (
            {context: weights[context][:-1]},
            r"misshaped: .*attn2\.to_v\.weight \(31, 12\) instead of \(32, 12\)|misshaped",
        ),
        ({context: weights[context] * float("nan")}, r"not finite: .*attn2\.to_v\.weight"),
        ({time: None}, r"missing: .*time_embedding\.linear_1\.weight|differ: the flows must share"),
    ]:
        changed = {key: value for key, value in (weights | change).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            convert_versatile_unet(changed, num_heads=4)


def test_other_checkpoints_are_refused():
    current = original_weights(tiny_unet(), "current")
    without_a_block = {key: value for key, value in current.items() if ".data_blocks.4." not in key}
    text_only = {key: value for key, value in current.items() if "context_blocks" not in key}
    for weights, message in [
        ({"conv_in.weight": torch.ones(1)}, r"layout of nothing known: .* It starts with \['conv_in\.weight'\]"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, r"layout of nothing known.*convert_stable"),
        (text_only, r"data groups \['image', 'text'\] and the context groups \[\]"),
        (current | original_weights(tiny_unet(), "first release"), r"layout of current and first release"),
        (without_a_block, r"levels hold \[1, 0\] residual blocks: each needs one at least"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            convert_versatile_unet(weights)
    for weights, message in [
        ({"conv_in.weight": torch.ones(1)}, r"holds keys of no known part: conv_in\.weight"),
        ({"vae.image.x": torch.ones(1)}, r"nothing lies under 'diffuser\.' \(current layout\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            split_versatile_checkpoint(weights)
    copies = original_weights(tiny_unet(), "diffusers")
    copies["text_unet.time_embedding.linear_1.bias"] = torch.zeros(128)
    with pytest.raises(ValueError, match=r"image_unet\.time_embedding\. and text_unet\.time_embedding\. differ"):
        convert_versatile_unet(copies)


def stable_diffusion(context: int = 12, **options) -> UNet2DConditionModel:
    torch.manual_seed(3)
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=context,
        **options,
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("context_type", ["image", "text"])
def test_stable_diffusion_as_a_start(context_type):
    """The stock network computes the same, so the first stage goes on exactly where Stable Diffusion stopped."""
    stock = stable_diffusion()
    unet = convert_stable_diffusion_unet(stock.state_dict(), context_type=context_type, num_heads=4)
    assert unet.flows == [f"{context_type}-to-image"] and len(unet.known_flows) == 4
    sample = torch.randn(2, 4, 8, 8)
    expected = stock(sample, torch.tensor([3, 900]), CONTEXTS["text"]).sample
    actual = unet(sample, torch.tensor([3, 900]), CONTEXTS["text"], context_type=context_type).sample
    torch.testing.assert_close(actual, expected)
    assert sum(p.numel() for p in unet.parameters()) == sum(p.numel() for p in stock.parameters())


def test_stable_diffusion_in_its_own_layout():
    stock = stable_diffusion()
    unet = convert_stable_diffusion_unet(stock.state_dict(), num_heads=4)
    first_release = original_weights(unet, "first release")
    original = {key.replace("unet_image.", ""): value for key, value in first_release.items()}
    assert "model.diffusion_model.input_blocks.1.1.proj_in.weight" in original
    whole = original | {
        "first_stage_model.x": torch.ones(1),
        "cond_stage_model.y": torch.ones(1),
        "betas": torch.ones(1),
    }
    assert same(convert_stable_diffusion_unet({"state_dict": whole}, num_heads=4), unet)
    bare = {key.removeprefix("model.diffusion_model."): value for key, value in original.items()}
    assert same(convert_stable_diffusion_unet(bare, num_heads=4), unet)
    with pytest.raises(ValueError, match=r"`context_type` is 'sound': expected one of image, text"):
        convert_stable_diffusion_unet(bare, context_type="sound")
    with pytest.raises(ValueError, match=r"keys that this converter does not know: stranger\.weight"):
        convert_stable_diffusion_unet(bare | {"stranger.weight": torch.ones(1)})


def test_stable_diffusion_2_is_refused():
    """By its linear layers: reshaped into convolutions they would go through, and the heads be wrong."""
    message = (
        r"holds {} of shape \(32, 32\), a linear layer as in Stable Diffusion 2\.x and XL: expected Stable Diffusion "
        r"1\.x, where it is a convolution of shape .* Pass a checkpoint of 1\.x, such as sd-v1-4\.ckpt"
    )
    second = stable_diffusion(use_linear_projection=True).state_dict()
    with pytest.raises(ValueError, match=message.format(r"down_blocks\.0\.attentions\.0\.proj_in\.weight")):
        convert_stable_diffusion_unet(second, num_heads=4)
    first = convert_stable_diffusion_unet(stable_diffusion().state_dict(), num_heads=4)
    original = {
        key.replace("unet_image.", ""): value[:, :, 0, 0] if ".1.proj_" in key and value.ndim == 4 else value
        for key, value in original_weights(first, "first release").items()
    }
    for prefix in ("model.diffusion_model.", ""):  # a whole checkpoint, its U-Net
        weights = {key.replace("model.diffusion_model.", prefix): value for key, value in original.items()}
        name = f"{prefix}input_blocks.1.1.proj_in.weight".replace(".", r"\.")
        with pytest.raises(ValueError, match=message.format(name)):
            convert_stable_diffusion_unet(weights | {"alphas_cumprod": torch.ones(1)} if prefix else weights)


def write_repository(folder) -> tuple[VersatileUNet, UNet2DConditionModel]:
    """A stand-in for the published repository: two U-Nets and stock components, with an index that names folders."""
    unet = tiny_unet()
    weights = original_weights(unet, "diffusers")
    for name in ("image_unet", "text_unet"):
        (folder / name).mkdir(parents=True)
        own = {key.removeprefix(f"{name}."): value.clone() for key, value in weights.items() if key.startswith(name)}
        save_file(own, folder / name / "diffusion_pytorch_model.safetensors")
        kind = "UNet2DConditionModel" if name == "image_unet" else "UNetFlatConditionModel"
        (folder / name / "config.json").write_text(json.dumps({"_class_name": kind, "attention_head_dim": 4}))
    tokenizer, text_encoder, image_encoder, feature_extractor = tiny_clip()
    tiny_vae().save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    image_encoder.save_pretrained(folder / "image_encoder")
    feature_extractor.save_pretrained(folder / "image_feature_extractor")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    index = {
        "_class_name": "VersatileDiffusionPipeline",
        "text_unet": ["versatile_diffusion", "UNetFlatConditionModel"],
        "image_unet": ["diffusers", "UNet2DConditionModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return unet, tokenizer


@torch.no_grad()
def test_the_repository_in_diffusers_format(tmp_path):
    unet, tokenizer = write_repository(tmp_path / "published")
    pipe = load_versatile_repository(tmp_path / "published", tokenizer=tokenizer)
    assert isinstance(pipe, VersatilePipeline) and same(pipe.unet, unet)
    assert isinstance(pipe.vae, AutoencoderKL) and pipe.optimus is None
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "latent"}
    expected = pipe("a red circle", generator=torch.Generator().manual_seed(0), **options).images
    pipe.save_pretrained(tmp_path / "ours")
    again = VersatilePipeline.from_pretrained(tmp_path / "ours", flows=["text-to-image"])
    again.set_progress_bar_config(disable=True)
    assert again.unet.flows == ["text-to-image"] and again.image_encoder is None
    actual = again("a red circle", generator=torch.Generator().manual_seed(0), **options).images
    torch.testing.assert_close(actual, expected)
    for options in ({}, {"flows": ["text-to-image"]}):
        with pytest.raises(ValueError, match=r"former Versatile Diffusion, .*load_versatile_repository`"):
            VersatilePipeline.from_pretrained(tmp_path / "published", **options)
    half = load_versatile_repository(tmp_path / "published", tokenizer=tokenizer, dtype=torch.bfloat16)
    assert half.unet.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16


def test_a_folder_that_is_no_repository(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder here\. Download it first: hf download"):
        load_versatile_repository("shi-labs/versatile-diffusion")
    with pytest.raises(FileNotFoundError, match=r"it has no image_unet and no text_unet, so it is no repository"):
        load_versatile_repository(tmp_path)
    write_repository(tmp_path / "published")
    with pytest.raises(FileNotFoundError, match=r"holds none of diffusion_pytorch_model\.fp16\.safetensors"):
        load_versatile_repository(tmp_path / "published", variant="fp16")
    (tmp_path / "published" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no scheduler/scheduler_config\.json; pass `scheduler`"):
        load_versatile_repository(tmp_path / "published")
    given = {"scheduler": DDIMScheduler(), "tokenizer": None}
    assert load_versatile_repository(tmp_path / "published", **given).tokenizer is None


@torch.no_grad()
def test_clip_of_the_first_release():
    _, text_encoder, image_encoder, _ = tiny_clip()
    weights = {**text_encoder.state_dict(), **image_encoder.state_dict(), "logit_scale": torch.ones(())}
    weights["text_model.embeddings.position_ids"] = torch.arange(4)[None]
    eos = text_encoder.config.eos_token_id
    text, image = convert_versatile_clip(weights, text_heads=2, vision_heads=2, eos_token_id=eos)
    ids = torch.tensor([[3, 9, 10, eos, 0], [3, 8, eos, 0, 0]])
    pixels = torch.randn(2, 3, image.config.image_size, image.config.image_size)
    exact = convert_versatile_clip(weights, text_heads=2, vision_heads=2, eos_token_id=eos, hidden_act="gelu")
    # the original's activation is the fast form of the exact one
    for activation, towers in (("quick_gelu", (text, image)), ("gelu", exact)):
        text_encoder.config.hidden_act = image_encoder.config.hidden_act = activation
        for actual, stock, argument in zip(towers, (text_encoder, image_encoder), (ids, pixels), strict=True):
            expected = type(stock)(stock.config)
            expected.load_state_dict(actual.state_dict())
            torch.testing.assert_close(actual(argument)[0], expected.eval()(argument)[0])
    assert not torch.equal(text(ids)[0], exact[0](ids)[0])
    with pytest.raises(ValueError, match=r"`hidden_act` is 'relu': expected one of quick_gelu, gelu, as CLIP's"):
        convert_versatile_clip(weights, text_heads=2, vision_heads=2, hidden_act="relu")
    for change, message in [
        ({"stranger": torch.ones(1)}, r"does not know: stranger"),
        ({"text_projection.weight": None}, r"is not CLIP's text tower: it lacks text_projection\.weight"),
        ({"visual_projection.weight": None}, r"is not CLIP's picture tower: it lacks visual_projection\.weight"),
        ({"vision_model.post_layernorm.bias": None}, r"missing: vision_model\.post_layernorm\.bias"),
    ]:
        changed = {key: value for key, value in (weights | change).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            convert_versatile_clip(changed, text_heads=2, vision_heads=2)
    with pytest.raises(ValueError, match=r"`text_heads` is 3, but the attention is 16 wide"):
        convert_versatile_clip(weights, text_heads=3, vision_heads=2)


def test_reading_needs_no_memory():
    with torch.device("meta"):
        unet = VersatileUNet(**TINY)
    config, weights = read_versatile_unet(original_weights(unet, "current"))
    assert all(value.is_meta for value in weights.values()) and weights.keys() == unet.state_dict().keys()
    assert config["block_out_channels"] == (32, 64)
