"""ADM's networks to `CascadedUNet`; their recorded numbers are in tests/parity (cdm)."""

import pytest
import torch
from conversion.ldm_originals import random_weights, unet_shapes
from diffusers import UNet2DModel

from diffusers_ext import CascadedBasePipeline, CascadedUpscalePipeline
from diffusers_ext.conversion.adm_releases import RELEASES, adm_settings
from diffusers_ext.conversion.cascaded import convert_adm_pipeline, convert_adm_unet
from diffusers_ext.models.unet_cascaded import CascadedUNet

_ADM = {"film": True, "updown": True, "out_channels": 6, "labels": 1000, "layers": 2}
# release -> sizes by its README's flags
SIZES = {
    "64x64_diffusion": {**_ADM, "ch": 192, "mult": (1, 2, 3, 4), "layers": 3, "attention": (2, 4, 8)},
    "128x128_diffusion": {**_ADM, "ch": 256, "mult": (1, 1, 2, 3, 4), "attention": (4, 8, 16)},
    "256x256_diffusion": {**_ADM, "ch": 256, "mult": (1, 1, 2, 2, 4, 4), "attention": (8, 16, 32)},
    "256x256_diffusion_uncond": {
        **_ADM, "ch": 256, "mult": (1, 1, 2, 2, 4, 4), "attention": (8, 16, 32), "labels": None,
    },
    "512x512_diffusion": {**_ADM, "ch": 256, "mult": (0.5, 1, 1, 2, 2, 4, 4), "attention": (16, 32, 64)},
    "64_256_upsampler": {
        **_ADM, "ch": 192, "mult": (1, 1, 2, 2, 4, 4), "attention": (8, 16, 32), "in_channels": 6,
    },
    "128_512_upsampler": {**_ADM, "ch": 192, "mult": (1, 1, 2, 2, 4, 4), "attention": (16, 32), "in_channels": 6},
}  # fmt: skip
PARAMETERS = {  # of ADM's table 4 in millions: 296, 422, 554, 559, and 312 and 309 for the upsamplers
    "64x64_diffusion": 295_904_454,
    "128x128_diffusion": 421_529_606,
    "256x256_diffusion": 553_838_086,
    "256x256_diffusion_uncond": 552_814_086,
    "512x512_diffusion": 558_997_638,
    "64_256_upsampler": 311_795_910,
    "128_512_upsampler": 308_835_270,
}
TINY = {"ch": 32, "mult": (1, 2), "layers": 1, "attention": (2,), "out_channels": 6, "film": True, "updown": True}


def count(values) -> int:
    return sum(torch.Size(getattr(value, "shape", value)).numel() for value in values)


def options(release: str) -> dict:
    settings = RELEASES[release]
    return {
        "num_heads": settings.num_heads,
        "num_head_channels": settings.num_head_channels,
        "attention_order": settings.attention_order,
        "is_upscaler": settings.small_resolution is not None,
    }


def test_every_release_has_its_sizes():
    assert SIZES.keys() == PARAMETERS.keys() == RELEASES.keys()


@pytest.mark.parametrize("release", RELEASES)
def test_every_key_of_a_release_finds_its_place(release):
    """Converted at 64 channels; at the released width the same keys have the released numbers of parameters."""
    shapes = unet_shapes(**SIZES[release])
    weights = random_weights(unet_shapes(**{**SIZES[release], "ch": 64}))
    narrow = convert_adm_unet(weights, **options(release), sample_size=RELEASES[release].resolution)
    assert count(narrow.parameters()) == count(weights.values())
    total = sum(float(value.double().sum()) for value in weights.values())
    assert sum(float(p.detach().double().sum()) for p in narrow.parameters()) == pytest.approx(total, abs=1e-2)

    widths = tuple(int(SIZES[release]["ch"] * m) for m in SIZES[release]["mult"])
    time_channels = None if widths[0] == SIZES[release]["ch"] else SIZES[release]["ch"]
    config = {**narrow.config, "block_out_channels": widths, "time_channels": time_channels}
    with torch.device("meta"):
        full = CascadedUNet.from_config(config)
    assert full.state_dict().keys() == narrow.state_dict().keys()
    assert count(full.parameters()) == count(shapes.values()) == PARAMETERS[release]
    assert (full.config["low_res_channels"] == 3) == ("upsampler" in release)
    assert full.config["in_channels"] == 3 and full.config["out_channels"] == 6
    assert full.config["num_class_embeds"] == (None if "uncond" in release else 1000)


@torch.no_grad()
def test_orders_of_attention_are_two():
    weights = random_weights(unet_shapes(**TINY))
    legacy, new = (
        convert_adm_unet(weights, num_heads=4, attention_order=order) for order in ("legacy", "new")
    )  # fmt: skip
    fused = weights["middle_block.1.qkv.weight"][..., 0]
    for unet, rows in ((new, fused), (legacy, fused.unflatten(0, (4, 3, -1)).transpose(0, 1).flatten(0, 2))):
        attention = unet.mid_block.attentions[0]
        joined = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
        assert torch.equal(joined, rows) and attention.heads == 4
    sample = torch.randn(1, 3, 8, 8)
    assert not torch.allclose(legacy(sample, 3).sample, new(sample, 3).sample, atol=1e-4)


@torch.no_grad()
def test_a_plain_network_also_loads_in_the_stock_class():
    weights = random_weights(unet_shapes(**TINY, labels=5))
    unet = convert_adm_unet(weights, num_head_channels=32)
    stock = UNet2DModel(
        out_channels=6,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=32,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=5,
    ).eval()
    stock.load_state_dict(unet.state_dict())
    call = (torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 4]))
    torch.testing.assert_close(unet(*call).sample, stock(*call).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_upsampler_may_get_a_level_and_computes_the_same():
    weights = random_weights(unet_shapes(**TINY, in_channels=6))
    call = {"sample": torch.randn(2, 3, 16, 16), "timestep": 500, "low_res": torch.randn(2, 3, 8, 8)}
    plain = convert_adm_unet(weights, num_heads=2, is_upscaler=True)
    levelled = convert_adm_unet(weights, num_heads=2, is_upscaler=True, aug_cond_type="log_snr")
    added = levelled.state_dict().keys() - plain.state_dict().keys()
    assert added and all(key.startswith("aug_embedding.") for key in added)
    assert torch.equal(levelled(**call, augmentation_level=-3.0).sample, plain(**call).sample)
    assert not levelled.training


@pytest.mark.parametrize("release", ["64x64_diffusion", "64_256_upsampler"])
def test_a_release_becomes_a_stage_with_its_sampler(release, tmp_path):
    settings = RELEASES[release]
    weights = random_weights(unet_shapes(**{**SIZES[release], "ch": 64, "layers": 1, "labels": 10}))
    pipe = convert_adm_pipeline(weights, release=release)
    pipe.save_pretrained(tmp_path)
    kind = CascadedBasePipeline if settings.small_resolution is None else CascadedUpscalePipeline
    loaded = kind.from_pretrained(tmp_path)
    assert type(pipe) is kind and loaded.unet.config["sample_size"] == settings.resolution
    assert (loaded.unet.config["num_heads"], loaded.unet.config["num_head_channels"]) == (
        settings.num_heads,
        settings.num_head_channels,
    )
    scheduler = loaded.scheduler
    scheduler.set_timesteps()
    assert len(scheduler.timesteps) == 250 and scheduler.config["variance_type"] == "learned_range"
    assert (scheduler.config["beta_schedule"] == "linear") == ("upsampler" in release)
    if kind is CascadedUpscalePipeline:
        assert loaded.config["low_res_size"] == 64


def test_a_model_without_learned_variance_and_of_ones_own():
    weights = random_weights(unet_shapes(**{**TINY, "out_channels": 3}))
    pipe = convert_adm_pipeline(
        weights, resolution=16, num_head_channels=16, num_train_timesteps=4000, beta_schedule="cosine",
        timestep_respacing="ddim25",
    )  # fmt: skip
    assert pipe.scheduler.config["variance_type"] == "fixed_large" and len(pipe.scheduler) == 4000
    images = pipe(num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (1, 3, 16, 16) and images.isfinite().all()
    assert adm_settings("64_256_upsampler", num_head_channels=32).num_heads is None


WEIGHTS = random_weights(unet_shapes(**TINY))
REFUSED = {
    r"`num_heads` is None and `num_head_channels` None: pass the one": lambda: convert_adm_unet(WEIGHTS),
    r"`num_heads` is 2 and `num_head_channels` 2": lambda: convert_adm_unet(WEIGHTS, num_heads=2, num_head_channels=2),
    r"`num_heads` is 5, but the attention is 64 wide": lambda: convert_adm_unet(WEIGHTS, num_heads=5),
    r"`attention_order` is 'old'": lambda: convert_adm_unet(WEIGHTS, num_heads=2, attention_order="old"),
    r"even number of input channels": lambda: convert_adm_unet(WEIGHTS, num_heads=2, is_upscaler=True),
    r"`low_res_channels` 0": lambda: convert_adm_unet(WEIGHTS, num_heads=2, aug_cond_type="timestep"),
    r"does not know: out\.7": lambda: convert_adm_unet({**WEIGHTS, "out.7": torch.zeros(1)}, num_heads=2),
    r"is not an ADM U-Net: it lacks input_blocks": lambda: convert_adm_unet({"a": torch.zeros(1)}, num_heads=2),
    r"The levels hold \[.*\] residual blocks; ADM": lambda: convert_adm_unet(
        {**WEIGHTS, **random_weights(unet_shapes(**{**TINY, "layers": 2}))}, num_heads=2
    ),
    r"`release` is '64x64': it must be one of 64x64_diffusion": lambda: adm_settings("64x64"),
    r"`release` is None: name one of .*or give `resolution` and one of": lambda: convert_adm_pipeline(
        WEIGHTS, resolution=16
    ),
    r"`beta_schedule` is 'sine'": lambda: adm_settings("64x64_diffusion", beta_schedule="sine"),
    r"from 3 to 16 channels and the first level has 32": lambda: convert_adm_unet(
        random_weights(unet_shapes(**TINY, start=16)), num_heads=2
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
