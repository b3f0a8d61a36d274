"""ADM's network with low-resolution input and augmentation level: against the stock class where it can be."""

import inspect

import diffusers
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from peft import LoraConfig
from pipelines.tiny_cascaded import TINY, UPSCALER, tiny_cascaded_unet
from torch.nn import functional as F

from diffusers_ext.models.unet_cascaded import CascadedUNet

SAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LARGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
ABAR = torch.cos(torch.linspace(0.0, 1.5, 100, dtype=torch.float64)).square()[1:]  # 99 steps, falling
# resample -> how the stock class calls its blocks
STOCK_NAMES = {
    "conv": ("DownBlock2D", "UpBlock2D"),
    "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
}


def stock(unet: CascadedUNet, **changes) -> UNet2DModel:
    """The stock class with the weights of a network that it can express, under the same names."""
    config = unet.config
    down, up = STOCK_NAMES[config.resample]
    attends = config.attention_levels
    model = UNet2DModel(
        in_channels=config.in_channels + config.low_res_channels,
        out_channels=config.out_channels,
        down_block_types=tuple("AttnDownBlock2D" if a else down for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else up for a in reversed(attends)),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        downsample_type=config.resample,
        upsample_type=config.resample,
        norm_num_groups=config.norm_num_groups,
        attn_norm_num_groups=config.norm_num_groups,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        num_class_embeds=config.num_class_embeds,
        **changes,
    ).eval()
    model.load_state_dict(unet.state_dict())
    return model


@torch.no_grad()
@pytest.mark.parametrize("resample", ["resnet", "conv"])
@pytest.mark.parametrize("shift", ["scale_shift", "default"])
@pytest.mark.parametrize("classes", [None, 5])
def test_equal_to_the_stock_class_where_it_can_express_it(resample, shift, classes):
    unet = tiny_cascaded_unet(
        resample=resample, resnet_time_scale_shift=shift, num_class_embeds=classes, num_heads=None,
        num_head_channels=8, out_channels=6,
    )  # fmt: skip
    labels = None if classes is None else torch.tensor([1, 4])
    timesteps = torch.tensor([3, 700])
    expected = stock(unet, attention_head_dim=8)(SAMPLE, timesteps, labels).sample
    actual = unet(SAMPLE, timesteps, labels).sample
    assert actual.shape == (2, 6, 8, 8) and actual.std() > 0.01
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    assert unet.state_dict().keys() == stock(unet).state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_low_resolution_is_upsampled_and_comes_last(mode):
    unet = tiny_cascaded_unet(low_res_channels=2, low_res_upsampling=mode, num_heads=None, num_head_channels=16)
    low = torch.randn(2, 2, 4, 4)
    large = F.interpolate(low, (16, 16), mode=mode, align_corners=False)
    expected = stock(unet, attention_head_dim=16)(torch.cat([LARGE, large], dim=1), 5).sample
    torch.testing.assert_close(unet(LARGE, 5, low_res=low).sample, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(unet(LARGE, 5, low_res=large).sample, unet(LARGE, 5, low_res=low).sample)


@torch.no_grad()
def test_heads_are_constant_over_widths_and_survive_saving(tmp_path):
    unet = tiny_cascaded_unet(attention_levels=(True, True), num_heads=4)
    attention = [module for module in unet.modules() if isinstance(module, Attention)]
    assert len(attention) == 2 + 1 + 4 and {module.heads for module in attention} == {4}
    assert {module.inner_dim // module.heads for module in attention} == {4, 8}
    for module in attention:
        torch.nn.init.normal_(module.to_q.weight), torch.nn.init.normal_(module.to_k.weight)
    unet.save_pretrained(tmp_path)
    expected = unet.double()(SAMPLE.double(), 7).sample
    loaded = CascadedUNet.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.double()(SAMPLE.double(), 7).sample, expected)
    other = CascadedUNet.from_pretrained(tmp_path, num_heads=2).double()(SAMPLE.double(), 7).sample
    assert not torch.allclose(other, expected, atol=1e-4)
    assert {m.heads for m in tiny_cascaded_unet(num_heads=None).modules() if isinstance(m, Attention)} == {1}


def test_starts_as_the_prediction_zero_with_class_rows_of_unit_variance():
    torch.manual_seed(0)
    unet = CascadedUNet(**{**TINY, **UPSCALER})
    assert not unet(LARGE, 5, low_res=SAMPLE, augmentation_level=3).sample.any()
    labelled = CascadedUNet(**TINY, num_class_embeds=50)
    assert 0.9 < labelled.class_embedding.weight.std() < 1.1
    assert not unet.aug_embedding.linear_2.weight.any() and not unet.aug_embedding.linear_2.bias.any()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["timestep", "log_snr", "alpha_cumprod"])
def test_level_of_augmentation(kind):
    torch.manual_seed(0)
    plain = tiny_cascaded_unet(low_res_channels=3)
    expected = plain(LARGE, 5, low_res=SAMPLE).sample
    unet = CascadedUNet.from_config(plain.config, aug_cond_type=kind).eval()
    missing, unexpected = unet.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all(key.startswith("aug_embedding.") for key in missing)
    plain.add_augmentation_level(kind)  # the same, in place
    assert plain.config.aug_cond_type == kind and plain.state_dict().keys() == unet.state_dict().keys()
    assert torch.equal(plain(LARGE, 5, low_res=SAMPLE, augmentation_level=0.5).sample, expected)
    with pytest.raises(ValueError, match=rf"own `aug_cond_type` '{kind}': a level is added to a super-resolution"):
        plain.add_augmentation_level(kind)
    levels = unet.level_of_steps(torch.tensor([0, 60]), ABAR)
    assert torch.equal(unet(LARGE, 5, low_res=SAMPLE, augmentation_level=levels).sample, expected)  # zeros: unchanged

    torch.nn.init.normal_(unet.aug_embedding.linear_2.weight)

    def run(level):
        return unet(LARGE, 5, low_res=SAMPLE, augmentation_level=level).sample

    both = run(levels)
    clean = {"timestep": 0, "log_snr": 20.0, "alpha_cumprod": 1.0}[kind]
    assert torch.equal(run(clean), run(None)) and float(levels[0]) == clean
    torch.testing.assert_close(both[:1], run(None)[:1])
    torch.testing.assert_close(both[1:], run(unet.level_of_steps(60, ABAR))[1:])
    assert not torch.allclose(both[1:], run(None)[1:], atol=1e-3)
    if kind == "log_snr":
        assert torch.equal(run(float("inf")), run(None))


def test_a_base_stage_gets_no_level():
    with pytest.raises(ValueError, match="`low_res_channels` 0 and"):
        tiny_cascaded_unet().add_augmentation_level("timestep")
    with pytest.raises(ValueError, match="`aug_cond_type` is 'sigma': it must be one of"):
        tiny_cascaded_unet(low_res_channels=3).add_augmentation_level("sigma")


def test_levels_in_the_unit_of_the_network():
    abar = ABAR[[0, 59, 98]].float()
    steps = torch.tensor([1.0, 60.0, 99.0])
    for kind, expected in [
        ("timestep", steps),
        ("alpha_cumprod", abar),
        ("log_snr", (abar / (1 - abar)).log()),
    ]:
        unet = tiny_cascaded_unet(low_res_channels=3, aug_cond_type=kind)
        torch.testing.assert_close(unet.level_of_steps(steps, ABAR), expected, rtol=1e-5, atol=1e-5)
        between = unet.level_of_steps(60.5, ABAR)
        assert min(unet.level_of_steps(60, ABAR), unet.level_of_steps(61, ABAR)) < between
        assert between < max(unet.level_of_steps(60, ABAR), unet.level_of_steps(61, ABAR))
        for wrong in (-1, 99.5, float("nan")):
            with pytest.raises(ValueError, match=r"`steps` is .*must lie between 0 \(clean\) and 99"):
                unet.level_of_steps(wrong, ABAR)
    with pytest.raises(ValueError, match="takes no augmentation level"):
        tiny_cascaded_unet().level_of_steps(3, ABAR)


@torch.no_grad()
def test_forms_of_timestep_and_width_of_the_time_embedding():
    unet = tiny_cascaded_unet(time_channels=32)  # as the 512 network of ADM: wider than the first level
    assert unet.time_embedding.linear_1.weight.shape == (128, 32)
    expected = unet(SAMPLE, torch.tensor([250, 250])).sample
    for timestep in (250, 250.0, torch.tensor(250), torch.tensor([250])):
        assert torch.equal(unet(SAMPLE, timestep).sample, expected)
    assert not torch.allclose(unet(SAMPLE, 250.5).sample, expected, atol=1e-7)


def test_gradients_reach_everything_also_with_checkpointing():
    torch.manual_seed(0)
    unet = tiny_cascaded_unet(**UPSCALER, num_class_embeds=4, dropout=0.0).train()
    gradients = []
    for on in (False, True):
        unet.enable_gradient_checkpointing() if on else unet.disable_gradient_checkpointing()
        unet.zero_grad()
        output = unet(LARGE, 9, torch.tensor([0, 3]), low_res=SAMPLE, augmentation_level=torch.tensor([0, 70])).sample
        output.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
    assert all(gradient.any() for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@torch.no_grad()
def test_dropout_is_there_in_training_only():
    unet = tiny_cascaded_unet(dropout=0.5)
    expected = unet(SAMPLE, 5).sample
    assert torch.equal(unet(SAMPLE, 5).sample, expected)
    assert not torch.allclose(unet.train()(SAMPLE, 5).sample, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    torch.manual_seed(0)
    unet = tiny_cascaded_unet(**UPSCALER, num_class_embeds=4)
    call = {"class_labels": torch.tensor([0, 3]), "low_res": SAMPLE, "augmentation_level": 40}
    expected = unet(LARGE, 999, **call).sample
    actual = unet.to(dtype)(LARGE.to(dtype), 999, **call).sample
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
def test_takes_adapters_and_attention_processors(tmp_path):
    torch.manual_seed(0)
    unet, other = tiny_cascaded_unet(), tiny_cascaded_unet()
    other.load_state_dict(unet.state_dict())
    plain = unet(SAMPLE, 3).sample
    unet.set_attn_processor(AttnProcessor())
    assert {type(one) for one in unet.attn_processors.values()} == {AttnProcessor}
    torch.testing.assert_close(unet(SAMPLE, 3).sample, plain, atol=1e-4, rtol=1e-4)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = unet(SAMPLE, 3).sample
    assert not torch.allclose(adapted, plain, atol=1e-6)
    unet.save_lora_adapter(tmp_path)
    other.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors", prefix=None)
    torch.testing.assert_close(other(SAMPLE, 3).sample, adapted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_repeated_blocks_compile():
    """Attention, of which a program a level is enough; with residual blocks torch would give up."""
    torch._dynamo.reset()
    wide = {"block_out_channels": (16, 24, 32, 48), "attention_levels": (False, True, True, True), "num_heads": 2}
    unet = tiny_cascaded_unet(**wide, layers_per_block=2)
    expected = unet(SAMPLE, 3).sample
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(unet(SAMPLE, 3).sample, expected)


CONSTRUCTIONS = {
    r"`resample` is 'pool': it must be one of resnet, conv": {"resample": "pool"},
    r"`resnet_time_scale_shift` is 'film'": {"resnet_time_scale_shift": "film"},
    r"`low_res_upsampling` is 'nearest'": {"low_res_upsampling": "nearest"},
    r"`aug_cond_type` is 'sigma'": {"aug_cond_type": "sigma"},
    r"`num_heads` is 2 and `num_head_channels` 8: pass one": {"num_head_channels": 8},
    r"`num_heads` is 5, but levels with attention are 32, 32 wide": {"num_heads": 5},
    r"`num_head_channels` is 0, but": {"num_heads": None, "num_head_channels": 0},
    r"give each level one entry": {"attention_levels": (True,)},
    r"at least one layer": {"layers_per_block": 0},
    r"\[20\] are no multiples of `norm_num_groups` \(8\)": {"block_out_channels": (20, 32)},
    r"`null_class` is 3, but `num_class_embeds` is None": {"null_class": 3},
    r"`null_class` is 3, but `num_class_embeds` is 3": {"null_class": 3, "num_class_embeds": 3},
    r"`num_class_embeds` is 0": {"num_class_embeds": 0},
    r"`low_res_channels` is 0 and `aug_cond_type` 'timestep'": {"aug_cond_type": "timestep"},
}


@pytest.mark.parametrize("message", CONSTRUCTIONS)
def test_sizes_that_do_not_fit(message):
    with pytest.raises(ValueError, match=message):
        CascadedUNet(**{**TINY, **CONSTRUCTIONS[message]})


ZERO = torch.tensor([0, 0])
CALLS = [  # message, the network, what differs from a call that it takes
    (r"`sample` has shape \(2, 3, 7, 8\).*multiples of 2", {}, {"sample": torch.zeros(2, 3, 7, 8)}),
    (r"`sample` has shape \(2, 4, 8, 8\)", {}, {"sample": torch.zeros(2, 4, 8, 8)}),
    (r"`timestep` has shape \(3,\)", {}, {"timestep": torch.zeros(3)}),
    (r"`low_res` has shape .*base stage", {}, {"low_res": SAMPLE}),
    (r"`low_res` is missing: a super-resolution stage", UPSCALER, {"low_res": None}),
    (r"`low_res` has shape \(1, 3, 8, 8\): for 2 samples", UPSCALER, {"low_res": SAMPLE[:1]}),
    (r"`augmentation_level` is 3, but the network was trained without", {}, {"augmentation_level": 3}),
    (r"`augmentation_level` has shape \(3,\)", UPSCALER, {"augmentation_level": torch.zeros(3)}),
    (r"`class_labels` is given, but the network has no classes", {}, {"class_labels": ZERO}),
    (r"`class_labels` is missing: pass integers from 0 to 4", {"num_class_embeds": 5}, {}),
    (r"`class_labels` is torch.float32", {"num_class_embeds": 5}, {"class_labels": ZERO.float()}),
    (r"of shape \(1,\): expected", {"num_class_embeds": 5}, {"class_labels": ZERO[:1]}),
    (r"`class_labels` goes from 0 to 5, the classes", {"num_class_embeds": 5}, {"class_labels": torch.tensor([0, 5])}),
]


@torch.no_grad()
@pytest.mark.parametrize(("message", "network", "call"), CALLS)
def test_calls_that_do_not_fit(message, network, call):
    unet = tiny_cascaded_unet(**network)
    fitting = {"sample": SAMPLE, "timestep": 5} | ({"low_res": SAMPLE} if "low_res_channels" in network else {})
    with pytest.raises(ValueError, match=message):
        unet(**{**fitting, **call})


def test_forward_is_the_interface():
    names = list(inspect.signature(CascadedUNet.forward).parameters)
    assert names == ["self", "sample", "timestep", "class_labels", "low_res", "augmentation_level", "return_dict"]
    output = tiny_cascaded_unet()(SAMPLE, 3)
    assert isinstance(output, diffusers.models.unets.unet_2d.UNet2DOutput)
