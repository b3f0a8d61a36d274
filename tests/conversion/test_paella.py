import pytest
import torch

from diffusers_ext.conversion.keys import load_original
from diffusers_ext.conversion.paella import convert_paella_unet, convert_paella_vqgan_gumbel
from diffusers_ext.models.token_codec import decode_indices, encode_indices
from diffusers_ext.models.unet_paella import PaellaUNet
from diffusers_ext.models.vq_gumbel import GumbelVQModel


def unet_shapes(levels=2, widths=(8, 16), down=(1, 2), up=(2, 1), codes=12, cond=20, kernel=3):
    """Shapes under the original's keys (reference: key table of the released file)."""
    weights = {"embedding.weight": (codes, widths[0]), "clf.weight": (codes, widths[0], 1, 1), "clf.bias": (codes,)}

    def block(prefix, c, skip=0):
        weights.update({
            f"{prefix}.gamma": (c,),
            f"{prefix}.depthwise.1.weight": (c, 1, kernel, kernel), f"{prefix}.depthwise.1.bias": (c,),
            f"{prefix}.ln.gamma": (1, 1, 1), f"{prefix}.ln.beta": (1, 1, 1),
            f"{prefix}.ln.ln.weight": (c,), f"{prefix}.ln.ln.bias": (c,),
            f"{prefix}.channelwise.0.weight": (4 * c, c + skip), f"{prefix}.channelwise.0.bias": (4 * c,),
            f"{prefix}.channelwise.2.weight": (c, 4 * c), f"{prefix}.channelwise.2.bias": (c,),
            f"{prefix}.cond_mapper.weight": (c, cond), f"{prefix}.cond_mapper.bias": (c,),
        })  # fmt: skip

    for level in range(levels):
        if level:
            weights[f"down_blocks.{level}.0.weight"] = (widths[level], widths[level - 1], 4, 4)
            weights[f"down_blocks.{level}.0.bias"] = (widths[level],)
        for layer in range(down[level]):
            block(f"down_blocks.{level}.{layer + (level > 0)}", widths[level])
        c = widths[levels - 1 - level]
        for layer in range(up[level]):
            block(f"up_blocks.{level}.{layer}", c, c if level and layer == 0 else 0)
        if level < levels - 1:
            weights[f"up_blocks.{level}.{up[level]}.weight"] = (c, widths[levels - 2 - level], 4, 4)
            weights[f"up_blocks.{level}.{up[level]}.bias"] = (widths[levels - 2 - level],)
    return weights


def original_unet(**sizes):
    """Random weights under the original's keys."""
    return random_weights(unet_shapes(**sizes))


def random_weights(shapes):
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"levels": 1, "widths": (8,), "down": (2,), "up": (3,)},
        {"levels": 4, "widths": (4, 4, 8, 8), "down": (1, 1, 2, 11), "up": (12, 2, 1, 1), "kernel": 5},
    ],
)
def test_unet_config_is_read_off_the_shapes(sizes):
    weights = original_unet(**sizes)
    unet = convert_paella_unet(weights, time_embed_dim=8)
    reference = {"levels": 2, "widths": (8, 16), "down": (1, 2), "up": (2, 1), "kernel": 3, **sizes}
    assert tuple(unet.config.block_out_channels) == reference["widths"]
    assert tuple(unet.config.down_layers_per_block) == reference["down"]
    assert tuple(unet.config.up_layers_per_block) == reference["up"]
    assert (unet.config.kernel_size, unet.config.condition_dim, unet.config.num_vq_embeddings) == (
        reference["kernel"],
        12,
        12,
    )
    assert sum(p.numel() for p in unet.parameters()) == sum(value.numel() for value in weights.values())
    side = unet.min_size
    logits = unet(torch.zeros(1, side, side, dtype=torch.int64), 0.5, torch.zeros(1, 12)).sample
    assert logits.isfinite().all()


def test_unet_wrapped_and_saved(tmp_path):
    weights = original_unet()
    unet = convert_paella_unet(weights, time_embed_dim=8)
    wrapped = {"state_dict": {f"module.{key}": value for key, value in weights.items()}, "step": 600_000}
    convert_paella_unet(wrapped, time_embed_dim=8).save_pretrained(tmp_path)
    loaded = PaellaUNet.from_pretrained(tmp_path)
    for (name, expected), actual in zip(unet.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), name
    half = convert_paella_unet({key: value.half() for key, value in weights.items()}, time_embed_dim=8)
    assert half.dtype == torch.float16


RELEASED_UNET = {"levels": 3, "down": (4, 8, 16), "up": (16, 8, 4)}


def test_every_key_of_the_released_depth_finds_its_place():
    with torch.device("meta"):
        released = PaellaUNet()
    narrow = original_unet(**RELEASED_UNET, widths=(2, 4, 8), codes=3, cond=5)
    converted = convert_paella_unet(narrow, time_embed_dim=4).state_dict()
    assert converted.keys() == released.state_dict().keys()
    sizes = unet_shapes(**RELEASED_UNET, widths=(320, 640, 1280), codes=8192, cond=1024 + 64)
    assert narrow.keys() == sizes.keys()
    numbers = sorted(torch.Size(shape).numel() for shape in sizes.values())
    assert numbers == sorted(value.numel() for value in released.state_dict().values())
    assert sum(numbers) == 577_995_184  # as counted on the original


def content_of_files(weights: dict) -> dict[str, dict]:
    """What the authors' files and those of users of their code hold, by the name of a file."""
    ddp = {f"module.{key}": value for key, value in weights.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 3e-4, "betas": (0.9, 0.999)}]}
    return {
        "f8_600000.pt": weights,  # paella.py saves `model.module.state_dict()`
        "f8_img_40000.pt": weights,
        "of_the_ddp_module.pt": ddp,
        "wrapped.pt": {"state_dict": weights},
        "wrapped_with_more.ckpt": {"state_dict": ddp, "optimizer_states": [optimizer], "step": 600_000, "lr": 3e-4},
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_unet_files_are_read_without_running_pickles(tmp_path, legacy):
    weights = original_unet(**RELEASED_UNET, widths=(2, 4, 8), codes=3, cond=5)
    expected = convert_paella_unet(weights, time_embed_dim=4).state_dict()
    for name, content in content_of_files(weights).items():
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        converted = convert_paella_unet(load_original(tmp_path / name), time_embed_dim=4).state_dict()
        assert all(torch.equal(converted[key], value) for key, value in expected.items()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("up_blocks.1.0.ln.gamma"), r"PaellaUNet\. missing: up_levels\.1\.blocks\.0\.norm\.gain"),
        (lambda w: w.update({"down_blocks.0.0.attention.weight": w["clf.bias"]}), r"not know: down_blocks\.0\.0\.att"),
        (lambda w: w.update({"clf.bias": torch.zeros(13)}), r"misshaped: proj_out\.bias \(13,\) instead of \(12,\)"),
        (lambda w: w["clf.bias"].fill_(float("inf")), r"not finite: proj_out\.bias"),
        (lambda w: w.pop("embedding.weight"), r"not a Paella v1 DenoiseUNet: it lacks embedding\.weight"),
    ],
)  # fmt: skip
def test_unet_is_converted_strictly(change, message):
    weights = original_unet()
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert_paella_unet(weights, time_embed_dim=8)


def test_time_embed_dim_must_leave_a_condition():
    with pytest.raises(ValueError, match=r"`time_embed_dim` is 64.*together have 20 channels.*`c_r`"):
        convert_paella_unet(original_unet())


def vqgan_shapes(ch=32, ch_mult=(1, 1, 2), attn_levels=(2,), num_res_blocks=1, z=8, codes=6):
    """Shapes under the keys of taming-transformers' Encoder and Decoder."""
    shapes = {}

    def conv(name, cin, cout, k):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (cout, cin, k, k), (cout,)

    def norm(name, c):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (c,)

    def resnet(name, cin, cout):
        norm(f"{name}.norm1", cin), conv(f"{name}.conv1", cin, cout, 3)
        norm(f"{name}.norm2", cout), conv(f"{name}.conv2", cout, cout, 3)
        if cin != cout:
            conv(f"{name}.nin_shortcut", cin, cout, 1)

    def attention(name, c):
        norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", c, c, 1)

    widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
    conv("encoder.conv_in", 3, ch, 3), conv("decoder.conv_in", z, widths[-1], 3)
    channels = ch
    for level, width in enumerate(widths):
        for layer in range(num_res_blocks):
            resnet(f"encoder.down.{level}.block.{layer}", channels, width)
            channels = width
            if level in attn_levels:
                attention(f"encoder.down.{level}.attn.{layer}", width)
        if level < last:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    for level in reversed(range(last + 1)):
        for layer in range(num_res_blocks + 1):
            resnet(f"decoder.up.{level}.block.{layer}", channels, widths[level])
            channels = widths[level]
            if level in attn_levels:
                attention(f"decoder.up.{level}.attn.{layer}", channels)
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", channels, channels, 3)
    for side, width in (("encoder", widths[-1]), ("decoder", widths[0])):
        resnet(f"{side}.mid.block_1", widths[-1], widths[-1]), resnet(f"{side}.mid.block_2", widths[-1], widths[-1])
        attention(f"{side}.mid.attn_1", widths[-1])
        norm(f"{side}.norm_out", width), conv(f"{side}.conv_out", width, z if side == "encoder" else 3, 3)
    conv("quant_conv", z, z, 1), conv("post_quant_conv", z, z, 1), conv("quantize.proj", z, codes, 1)
    shapes["quantize.embed.weight"] = (codes, z)
    return shapes


def original_vqgan(**sizes):
    """Random weights under the original's keys."""
    return random_weights(vqgan_shapes(**sizes))


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"ch_mult": (1,), "attn_levels": ()},
        {"ch_mult": (1, 2), "attn_levels": (0, 1), "num_res_blocks": 2},
        {"ch_mult": (1, 1, 2, 2), "attn_levels": (1, 3), "num_res_blocks": 2, "codes": 11},
    ],
)
def test_vqgan_config_is_read_off_the_shapes(sizes, tmp_path):
    weights = original_vqgan(**sizes)
    vqvae = convert_paella_vqgan_gumbel({"state_dict": weights})
    reference = {"ch_mult": (1, 1, 2), "attn_levels": (2,), "num_res_blocks": 1, "codes": 6, **sizes}
    assert tuple(vqvae.config.block_out_channels) == tuple(32 * m for m in reference["ch_mult"])
    assert vqvae.config.layers_per_block == reference["num_res_blocks"]
    attention = [kind.startswith("Attn") for kind in vqvae.config.down_block_types]
    assert attention == [level in reference["attn_levels"] for level in range(len(attention))]
    assert [kind.startswith("Attn") for kind in vqvae.config.up_block_types] == attention[::-1]
    assert sum(p.numel() for p in vqvae.parameters()) == sum(value.numel() for value in weights.values())
    image = torch.randn(1, 3, 8, 16)
    indices = encode_indices(vqvae, image)
    assert decode_indices(vqvae, indices).shape == image.shape
    vqvae.save_pretrained(tmp_path)
    assert torch.equal(encode_indices(GumbelVQModel.from_pretrained(tmp_path), image), indices)


def test_vqgan_leaves_out_the_losses_and_nothing_else():
    weights = original_vqgan(ch_mult=(1,), attn_levels=())
    leftovers = {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.perceptual_loss.net.weight": torch.zeros(1)}
    assert convert_paella_vqgan_gumbel({**weights, **leftovers}).config.num_vq_embeddings == 6
    with pytest.raises(ValueError, match=r"does not know: colorize\."):
        convert_paella_vqgan_gumbel({**weights, **leftovers, "colorize": torch.zeros(1)})
    convert_paella_vqgan_gumbel({**weights, "colorize": torch.zeros(1)}, ignore=("colorize",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.up.1.upsample.conv.bias"), r"missing: decoder\.up_blocks\.1\.upsamplers\.0"),
        (lambda w: w.pop("quantize.proj.weight"), r"not a Gumbel-VQGAN: it lacks quantize\.proj\.weight"),
        (lambda w: w.update({"encoder.conv_in.weight": torch.zeros(16, 3, 3, 3)}), r"starts with 16 .*`ch_mult`"),
    ],
)  # fmt: skip
def test_vqgan_is_converted_strictly(change, message):
    weights = original_vqgan()
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert_paella_vqgan_gumbel(weights)


RELEASED_VQGAN = {"ch_mult": (1, 1, 2, 4), "attn_levels": (3,), "num_res_blocks": 2}


def test_every_key_of_the_released_tokenizer_finds_its_place():
    narrow = convert_paella_vqgan_gumbel(original_vqgan(**RELEASED_VQGAN))
    released_config = {
        **{key: narrow.config[key] for key in ("down_block_types", "up_block_types", "layers_per_block")},
        **{"block_out_channels": (128, 128, 256, 512), "latent_channels": 256, "num_vq_embeddings": 8192},
    }
    assert released_config["down_block_types"] == ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",)
    assert released_config["up_block_types"] == ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3
    with torch.device("meta"):
        released = GumbelVQModel(**released_config).state_dict()
    assert narrow.state_dict().keys() == released.keys()
    sizes = vqgan_shapes(**RELEASED_VQGAN, ch=128, z=256, codes=8192).values()
    assert sorted(torch.Size(shape).numel() for shape in sizes) == sorted(v.numel() for v in released.values())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_tokenizer_files_are_read_without_running_pickles(tmp_path, legacy):
    weights = original_vqgan(**RELEASED_VQGAN)
    expected = convert_paella_vqgan_gumbel(weights).state_dict()
    leftovers = {
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1),
    }
    files = {
        "vqgan.gumbelf8-sber.model.ckpt": {"state_dict": {**weights, **leftovers}},
        "lightning.ckpt": {"state_dict": {**weights, **leftovers}, "epoch": 1, "global_step": 7, "callbacks": {}},
        "flat.pt": weights,
        "shell.pt": {f"model.{key}": value for key, value in weights.items()},  # of ruDALL-E's VQGanGumbelVAE
        "ddp.pt": {f"module.model.{key}": value for key, value in weights.items()},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        converted = convert_paella_vqgan_gumbel(load_original(tmp_path / name)).state_dict()
        assert all(torch.equal(converted[key], value) for key, value in expected.items()), name
