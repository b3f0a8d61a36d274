"""Original first stages of latent diffusion: every released layout, with the attention that others drop."""

import pytest
import torch
from conversion.ldm_originals import AUTOENCODERS, autoencoder_shapes, checkpoint, random_weights
from diffusers import AutoencoderKL, VQModel

from diffusers_ext.conversion.ldm import split_ldm_checkpoint
from diffusers_ext.conversion.ldm_autoencoder import convert_ldm_autoencoder_kl, convert_ldm_vq

TINY = {"mult": (1, 2), "z": 4, "ch": 32, "layers": 1, "attention": (1,)}


def converter(sizes: dict):
    return convert_ldm_vq if sizes.get("codes") else convert_ldm_autoencoder_kl


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_every_key_of_a_released_autoencoder_finds_its_place(name):
    """Converted at 32 channels; at 128 the same keys have the released numbers of parameters."""
    sizes, millions = AUTOENCODERS[name]
    shapes = autoencoder_shapes(**sizes)
    numbers = sorted(torch.Size(shape).numel() for shape in shapes.values())
    assert sum(numbers) / 1e6 == pytest.approx(millions, abs=0.06)
    weights = random_weights(autoencoder_shapes(**{**sizes, "ch": 32, **({"codes": 7} if "codes" in sizes else {})}))
    assert weights.keys() == shapes.keys()
    narrow = converter(sizes)(weights)
    assert sum(p.numel() for p in narrow.parameters()) == sum(value.numel() for value in weights.values())
    total = sum(float(value.double().sum()) for value in weights.values())
    assert sum(float(p.detach().double().sum()) for p in narrow.parameters()) == pytest.approx(total, abs=1e-3)
    levels = ["Attn" in kind for kind in narrow.config.down_block_types]
    assert levels == [level in sizes.get("attention", ()) for level in range(len(sizes["mult"]))]
    assert narrow.config.mid_block_add_attention == sizes.get("mid_attention", True)

    config = {**narrow.config, "block_out_channels": tuple(128 * m for m in sizes["mult"])}
    if "codes" in sizes:
        config["num_vq_embeddings"] = sizes["codes"]
    with torch.device("meta"):
        full = type(narrow).from_config(config).state_dict()
    assert full.keys() == narrow.state_dict().keys()
    assert sorted(value.numel() for value in full.values()) == numbers


@torch.no_grad()
@pytest.mark.parametrize("codes", [None, 6])
@pytest.mark.parametrize(
    "sizes",
    [
        TINY,
        {**TINY, "mult": (1,), "attention": ()},
        {**TINY, "mult": (1, 1, 2), "attention": (0, 2), "layers": 2, "mid_attention": False},
    ],
)
def test_sizes_are_read_off_the_shapes(sizes, codes, tmp_path):
    weights = random_weights(autoencoder_shapes(**sizes, codes=codes))
    convert, stock = (convert_ldm_vq, VQModel) if codes else (convert_ldm_autoencoder_kl, AutoencoderKL)
    model = convert({"state_dict": weights}, scale_factor=0.5, sample_size=64)
    assert type(model) is stock and not model.training
    assert (model.config.scaling_factor, model.config.sample_size) == (0.5, 64)
    assert convert(weights).config.scaling_factor == 1.0
    assert tuple(model.config.block_out_channels) == tuple(32 * m for m in sizes["mult"])
    assert model.config.layers_per_block == sizes["layers"]
    image = torch.randn(2, 3, 8, 16)
    encoded = model.encode(image)
    latents = encoded.latents if codes else encoded.latent_dist.mode()
    factor = 2 ** (len(sizes["mult"]) - 1)
    assert latents.shape == (2, 4, 8 // factor, 16 // factor)
    picture = model.decode(latents).sample
    assert picture.shape == image.shape and picture.isfinite().all()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(stock.from_pretrained(tmp_path).decode(latents).sample, picture, atol=1e-4, rtol=1e-4)


def test_attention_inside_the_levels_is_kept_value_by_value():
    weights = random_weights(autoencoder_shapes(**TINY))
    vae = convert_ldm_autoencoder_kl(weights)
    pairs = [
        ("encoder.down.1.attn.0.q.weight", vae.encoder.down_blocks[1].attentions[0].to_q.weight),
        ("encoder.down.1.attn.0.norm.bias", vae.encoder.down_blocks[1].attentions[0].group_norm.bias),
        ("decoder.up.1.attn.1.proj_out.weight", vae.decoder.up_blocks[0].attentions[1].to_out[0].weight),
        ("decoder.up.0.block.1.conv2.bias", vae.decoder.up_blocks[1].resnets[1].conv2.bias),
        ("decoder.mid.block_2.norm1.weight", vae.decoder.mid_block.resnets[1].norm1.weight),
    ]
    for key, actual in pairs:
        assert torch.equal(actual.flatten(), weights[key].flatten()), key


def test_codebook_may_be_narrower_than_the_latents():
    vqvae = convert_ldm_vq(random_weights(autoencoder_shapes(**TINY, codes=6, embed_dim=2)))
    assert (vqvae.config.latent_channels, vqvae.config.vq_embed_dim) == (4, 2)


def test_losses_are_left_out_and_nothing_else():
    weights = random_weights(autoencoder_shapes(**TINY))
    leftovers = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(1)}
    convert_ldm_autoencoder_kl({**weights, **leftovers})
    with pytest.raises(ValueError, match=r"does not know: colorize\."):
        convert_ldm_autoencoder_kl({**weights, **leftovers, "colorize": torch.zeros(1)})
    convert_ldm_autoencoder_kl({**weights, "colorize": torch.zeros(1)}, ignore=("colorize",))


def test_first_stage_of_a_whole_checkpoint_and_averaged_ones():
    weights = random_weights(autoencoder_shapes(**TINY))
    file = checkpoint({"out.2.bias": torch.zeros(1)}, first_stage=weights, scale_factor=0.25)
    parts = split_ldm_checkpoint(file)
    vae = convert_ldm_autoencoder_kl(parts.first_stage, scale_factor=parts.scale_factor)
    assert vae.config.scaling_factor == 0.25
    assert torch.equal(vae.quant_conv.bias, weights["quant_conv.bias"])
    averaged = weights | {f"model_ema.{key.replace('.', '')}": value + 1 for key, value in weights.items()}
    with pytest.raises(
        ValueError, match=r"every weight twice.*`split_ldm_checkpoint\(\.\.\., use_ema=\.\.\.\)\.first"
    ):
        convert_ldm_autoencoder_kl(averaged)
    vae = convert_ldm_autoencoder_kl(split_ldm_checkpoint(averaged).first_stage)
    assert torch.equal(vae.quant_conv.bias, weights["quant_conv.bias"] + 1)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, lambda w: w.pop("quant_conv.weight"), r"not a KL autoencoder: it lacks quant_conv\.weight"),
        ({"codes": 6}, lambda w: w.pop("quantize.embedding.weight"), r"not a VQ autoencoder: it lacks quantize\.emb"),
        ({"embed_dim": 2}, None, r"`embed_dim` 2 and `z_channels` 4: AutoencoderKL needs the same"),
        ({}, lambda w: w.pop("encoder.down.1.attn.0.k.bias"), r"missing: encoder\.down_blocks\.1\.attentions\.0"),
        ({}, lambda w: w.pop("decoder.up.1.upsample.conv.bias"), r"missing: decoder\.up_blocks\.0\.upsamplers\.0\.co"),
        ({}, lambda w: w.update({"encoder.mid.attn_2.q.bias": torch.zeros(64)}), r"not know: encoder\.mid\.attn_2\.q"),
        ({}, lambda w: w["quant_conv.bias"].fill_(float("nan")), r"not finite: quant_conv\.bias"),
        ({}, lambda w: w.update({"quant_conv.bias": torch.zeros(9)}), r"misshaped: quant_conv\.bias \(9,\) inst"),
        ({}, lambda w: w.update({"encoder.conv_in.weight": torch.zeros(16, 3, 3, 3)}), r"starts with 16 .*`ch_mult`"),
    ],
)  # fmt: skip
def test_autoencoders_are_converted_strictly(options, change, message):
    weights = random_weights(autoencoder_shapes(**TINY, **options))
    if change is not None:
        change(weights)
    with pytest.raises(ValueError, match=message):
        converter(options)(weights)
