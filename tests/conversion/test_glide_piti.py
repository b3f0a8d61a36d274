"""Converters of GLIDE and PITI: sizes of the released files, both kinds of PITI's files, what is refused."""

import math

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from parity.case import Case
from parity.test_parity import BUNDLED

from diffusers_ext import PITIEncoder
from diffusers_ext.conversion.glide import convert_glide_text_encoder, convert_glide_unet
from diffusers_ext.conversion.piti import convert_piti, convert_piti_encoder


def weights(name: str) -> dict[str, torch.Tensor]:
    return Case(BUNDLED / "piti" / name).weights()


COMMON = {
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_dim": 512,
    "attention_head_dim": 64,
    "class_embed_type": "simple_projection",
    "projection_class_embeddings_input_dim": 512,
    "out_channels": 6,
}


@pytest.mark.parametrize(
    "channels, widths, layers, plain, count",
    [
        (3, (192, 384, 576, 768), 3, 1, 308_728_902),
        (6, (192, 192, 384, 384, 768, 768), 2, 3, 322_059_462),
    ],
)
def test_stock_unet_has_the_published_number_of_parameters(channels, widths, layers, plain, count):
    attending = len(widths) - plain
    with init_empty_weights():
        unet = UNet2DConditionModel(
            in_channels=channels,
            block_out_channels=widths,
            layers_per_block=layers,
            down_block_types=("ResnetDownsampleBlock2D",) * plain + ("SimpleCrossAttnDownBlock2D",) * attending,
            up_block_types=("SimpleCrossAttnUpBlock2D",) * attending + ("ResnetUpsampleBlock2D",) * plain,
            **COMMON,
        )
    assert sum(p.numel() for p in unet.parameters()) == count


def test_an_encoder_of_the_first_stage_and_of_a_whole_model_are_the_same():
    whole = weights("piti_mask")
    alone = {key.removeprefix("encoder."): value for key, value in whole.items() if key.startswith("encoder.")}
    first, second = (convert_piti_encoder(w, num_heads=4) for w in (whole, alone))
    assert isinstance(first, PITIEncoder) and dict(first.config) == dict(second.config)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    with pytest.raises(ValueError, match="encoder alone .* `convert_piti_encoder`"):
        convert_piti(alone)


def test_inpainting_models_are_told_by_their_channels():
    base = weights("glide_base_unet")
    stem = base["input_blocks.0.0.weight"]
    base["input_blocks.0.0.weight"] = torch.cat([stem, stem, stem[:, :1]], dim=1)
    unet = convert_glide_unet(base, num_head_channels=16)
    assert (unet.config["in_channels"], unet.config["sample_size"]) == (7, 64)
    upsampler = weights("glide_superres_unet")
    stem = upsampler["input_blocks.0.0.weight"]
    upsampler["input_blocks.0.0.weight"] = torch.cat([stem, stem[:, :4]], dim=1)
    unet = convert_glide_unet(upsampler, num_head_channels=32)
    assert (unet.config["in_channels"], unet.config["sample_size"]) == (10, 256)


@pytest.mark.parametrize(
    "refused, message",
    [
        (lambda: convert_glide_text_encoder(weights("piti_mask")), "not a GLIDE model: it lacks token_embedding"),
        (lambda: convert_glide_text_encoder(weights("glide_base_unet")), "`num_heads` is None.*32 wide"),
        (lambda: convert_glide_unet(weights("perceptual_vgg22")), "not a GLIDE U-Net: it lacks input_blocks"),
        (lambda: convert_glide_unet(weights("glide_base_unet"), num_head_channels=48), "`num_head_channels` is 48"),
        (
            lambda: convert_glide_unet(weights("glide_base_unet") | {"more": torch.ones(1)}, num_head_channels=16),
            "keys that this converter does not know: more",
        ),
        (lambda: convert_piti(weights("glide_base_unet")), "not a PITI model: it lacks encoder.cls_token"),
        (lambda: convert_piti(weights("piti_mask") | {"more": torch.ones(1)}), "keys of neither .*: more"),
        (
            lambda: convert_piti_encoder(weights("piti_mask") | {"encoder.more": torch.ones(1)}, num_heads=4),
            "does not know: more",
        ),
        (
            lambda: convert_piti_encoder(
                weights("piti_mask") | {"encoder.positional_embedding": torch.ones(1, 256, 48)}, num_heads=4
            ),
            "256 position rows: expected one more than a square",
        ),
        (
            lambda: convert_piti_encoder(
                weights("piti_mask") | {"encoder.cls_token": torch.full((1, 1, 48), math.nan)}, num_heads=4
            ),
            "not finite: class_token.weight",
        ),
    ],
)
def test_other_checkpoints_are_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()
