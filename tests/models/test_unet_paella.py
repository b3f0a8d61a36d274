import copy
import math

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F

from diffusers_ext.models.unet_paella import PaellaResBlock, PaellaUNet, paella_time_embedding

TINY = {
    "num_vq_embeddings": 24,
    "block_out_channels": (8, 12, 16),
    "down_layers_per_block": (1, 2, 1),
    "up_layers_per_block": (2, 1, 2),
    "condition_dim": 6,
    "time_embed_dim": 8,
    "layer_scale_init": 0.5,  # large enough that every block shows in the output
}


def tiny_unet(**overrides) -> PaellaUNet:
    torch.manual_seed(0)
    return PaellaUNet(**{**TINY, **overrides}).eval()


def inputs(batch: int = 2, height: int = 8, width: int = 12):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randint(0, 24, (batch, height, width), generator=generator)
    timestep = torch.rand(batch, generator=generator)
    return sample, timestep, torch.randn(batch, 6, generator=generator)


@torch.no_grad()
def test_defaults_are_the_published_network():
    with torch.device("meta"):
        unet = PaellaUNet()
    assert sum(parameter.numel() for parameter in unet.parameters()) == 577_995_184
    assert (unet.downsample_factor, unet.min_size) == (4, 8)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"block_out_channels": (8,), "down_layers_per_block": (2,), "up_layers_per_block": (1,)},
        {"block_out_channels": (8, 4), "down_layers_per_block": (1, 1), "up_layers_per_block": (1, 3)},
        {"kernel_size": 1},
        {"kernel_size": 5, "time_embed_dim": 7},
    ],
)
def test_shapes_down_to_the_smallest_grid(config):
    unet = tiny_unet(**config)
    side, wide = unet.min_size, unet.min_size + 3 * unet.downsample_factor
    sample, timestep, cond = inputs(3, side, wide)
    output = unet(sample, timestep, cond)
    assert output.sample.shape == (3, 24, side, wide)
    assert output.sample.permute(0, 2, 3, 1).is_contiguous()  # rows over the codebook, as loss and sampler want them
    assert torch.equal(unet(sample, timestep, cond, return_dict=False)[0], output.sample)


@torch.no_grad()
def test_block_equals_the_equation_of_the_paper():
    """The block written out position by position, without the layout and folding tricks of the module."""
    torch.manual_seed(0)
    block = PaellaResBlock(6, cond_dim=5, kernel_size=3, layer_scale_init=0.25, skip_channels=6).double()
    block.norm.weight.normal_()
    block.norm.bias.normal_()
    x, skip = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 6, 4, 5).double()  # (b, c, h, w)
    cond = torch.randn(2, 5).double()

    h = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), block.depthwise.weight, block.depthwise.bias, groups=6)
    w = block.cond_mapper(cond[:, None, None].expand(2, 4, 5, 5))  # (b, h, w, c), per position
    normed = F.layer_norm(h.permute(0, 2, 3, 1), (6,), block.norm.weight, block.norm.bias, 1e-6)
    h = block.norm.gain * w * normed + block.norm.shift * w
    h = torch.cat([h, skip.permute(0, 2, 3, 1)], dim=-1)
    h = block.channelwise[2](F.gelu(block.channelwise[0](h)))
    expected = x + 0.25 * h.permute(0, 3, 1, 2)

    actual = block(x.permute(0, 2, 3, 1), cond[:, None, None], skip.permute(0, 2, 3, 1))
    torch.testing.assert_close(actual.permute(0, 3, 1, 2), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_constant_condition_map_equals_the_global_condition():
    unet = tiny_unet()
    sample, timestep, cond = inputs()
    cond_map = cond[:, :, None, None].expand(-1, -1, *sample.shape[1:])
    torch.testing.assert_close(
        unet(sample, timestep, cond_map).sample, unet(sample, timestep, cond).sample, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_condition_map_acts_where_it_changes():
    unet = tiny_unet(block_out_channels=(8,), down_layers_per_block=(1,), up_layers_per_block=(1,))
    sample, timestep, cond = inputs(1, 8, 16)
    cond_map = cond[:, :, None, None].repeat(1, 1, 8, 16)
    changed = cond_map.clone()
    changed[..., 12:] += 1.0
    difference = (
        (unet(sample, timestep, changed).sample - unet(sample, timestep, cond_map).sample).abs().amax((0, 1, 2))
    )
    # two blocks of radius 1, and the condition enters after the first convolution
    assert difference[:11].max() == 0 and difference[12:].min() > 0


@torch.no_grad()
def test_condition_and_time_matter_in_every_block():
    unet = tiny_unet()
    sample, timestep, cond = inputs()
    seen = []
    blocks = [m for m in unet.modules() if isinstance(m, PaellaResBlock)]
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(args[1].flatten(1)))
    unet(sample, timestep, cond)
    expected = torch.cat([cond, paella_time_embedding(timestep, 8)], dim=1)
    assert len(seen) == len(blocks) == 9
    assert all(torch.equal(part, expected) for part in seen)
    first = unet(sample, timestep, cond).sample
    assert not torch.allclose(first, unet(sample, timestep, torch.zeros_like(cond)).sample)
    assert not torch.allclose(first, unet(sample, timestep * 0.5, cond).sample)


def test_time_embedding():
    r = torch.tensor([0.0, 1 / 3, 1.0])
    embedding = paella_time_embedding(r, 7)
    assert embedding.dtype == torch.float32 and embedding.shape == (3, 7)
    for row, value in zip(embedding.tolist(), r.tolist(), strict=True):
        phases = [10000 * math.cos(math.pi * value / 2) * 10000 ** (-k / 2) for k in range(3)]
        wanted = [math.sin(p) for p in phases] + [math.cos(p) for p in phases] + [0.0]
        assert row == pytest.approx(wanted, abs=2e-3)  # float32 phases up to 10000
    torch.testing.assert_close(paella_time_embedding(r.double(), 8), paella_time_embedding(r, 8))


@torch.no_grad()
def test_forms_of_timestep():
    unet = tiny_unet()
    sample, _, cond = inputs()
    expected = unet(sample, torch.tensor([0.25, 0.25]), cond).sample
    for timestep in (0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25, dtype=torch.float64)):
        assert torch.equal(unet(sample, timestep, cond).sample, expected)
    assert unet(sample, 0, cond).sample.shape == expected.shape


@torch.no_grad()
def test_guidance_may_be_mixed_before_the_head():
    unet = tiny_unet()
    sample, timestep, cond = inputs()
    features = [unet.forward_features(sample, timestep, c) for c in (torch.zeros_like(cond), cond)]
    logits = [unet(sample, timestep, c).sample for c in (torch.zeros_like(cond), cond)]
    assert torch.equal(unet.head(features[1]), logits[1])
    torch.testing.assert_close(unet.head(torch.lerp(*features, 5.0)), torch.lerp(*logits, 5.0), rtol=1e-5, atol=1e-5)


def test_initialisation():
    unet = tiny_unet(block_out_channels=(64, 64), down_layers_per_block=(8, 8), up_layers_per_block=(2, 2))
    blocks = {way: [m for m in levels.modules() if isinstance(m, PaellaResBlock)]
              for way, levels in (("down", unet.down_levels), ("up", unet.up_levels))}  # fmt: skip
    for way, count in (("down", 16), ("up", 4)):
        assert len(blocks[way]) == count
        for block in blocks[way]:
            # torch's default is uniform in +-1/sqrt(fan_in); the last weight is scaled by sqrt(1 / blocks of its way)
            bound = 1 / math.sqrt(256) * math.sqrt(1 / count)
            assert 0.95 * bound < block.channelwise[2].weight.abs().max() <= bound
            assert (block.layer_scale == 0.5).all()
            assert (block.norm.weight == 1).all() and (block.norm.bias == 0).all()
    scalars = torch.stack([p for b in blocks["down"] + blocks["up"] for p in (b.norm.gain, b.norm.shift)])
    assert abs(scalars.mean()) < 0.5 and 0.6 < scalars.std() < 1.4  # N(0, 1), 40 draws
    with torch.device("meta"):
        assert PaellaUNet().config.layer_scale_init == 1e-6


def test_backward_reaches_every_parameter():
    unet = tiny_unet().train()
    sample, timestep, cond = inputs()
    F.cross_entropy(unet(sample, timestep, cond).sample, sample).backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradient_checkpointing_changes_nothing():
    plain = tiny_unet().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    calls = []
    for block in checkpointed.modules():
        if isinstance(block, PaellaResBlock):
            block.register_forward_pre_hook(lambda *_: calls.append(1))
    for unet in (plain, checkpointed):
        sample, timestep, cond = inputs()
        F.cross_entropy(unet(sample, timestep, cond).sample, sample).backward()
    assert len(calls) == 18  # nine blocks, once forward and once again backward
    for (name, expected), actual in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(expected.grad, actual.grad), name
    checkpointed.disable_gradient_checkpointing()
    assert not checkpointed.is_gradient_checkpointing


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_weights(dtype, tolerance):
    unet = tiny_unet()
    sample, timestep, cond = inputs()
    expected = unet(sample, timestep, cond).sample
    actual = unet.to(dtype)(sample, timestep, cond).sample
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().max() < tolerance * expected.abs().max()


def test_bf16_autocast_trains_like_fp32():
    unet = tiny_unet().train()
    sample, timestep, cond = inputs()
    losses, gradients = [], []
    for enabled in (False, True):
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = unet(sample, timestep, cond).sample
        assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        losses.append(F.cross_entropy(logits.float(), sample))
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
        assert gradients[-1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=0.02)
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


@torch.no_grad()
def test_save_and_load(tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path)
    loaded, info = PaellaUNet.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert {name: loaded.config[name] for name in TINY} == {
        name: list(v) if isinstance(v, tuple) else v for name, v in TINY.items()
    }
    assert torch.equal(loaded(*inputs()).sample, unet(*inputs()).sample)
    half = PaellaUNet.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and not half.training
    assert torch.equal(half(*inputs()).sample, unet.to(torch.bfloat16)(*inputs()).sample)


@torch.no_grad()
def test_layerwise_casting_and_group_offloading():
    sample, timestep, cond = inputs()
    unet = tiny_unet()
    expected = unet(sample, timestep, cond).sample
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert unet.down_levels[0].blocks[0].cond_mapper.weight.dtype == torch.float8_e4m3fn
    assert (unet(sample, timestep, cond).sample - expected).abs().mean() < 0.1 * expected.abs().mean()

    for options in ({"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}):
        unet = tiny_unet()
        unet.enable_group_offload(onload_device=torch.device("cpu"), **options)
        assert torch.equal(unet(sample, timestep, cond).sample, expected)


def test_lora_trains_saves_loads_and_unloads(tmp_path):
    sample, timestep, cond = inputs()
    unet = tiny_unet()
    expected = unet(sample, timestep, cond).sample.detach()
    unet.requires_grad_(False)
    targets = ["cond_mapper", "channelwise.0", "channelwise.2"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights="gaussian"), "mine")
    assert torch.equal(unet(sample, timestep, cond).sample, expected)  # B starts at zero
    trainable = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert len(trainable) == 9 * 3 * 2 and all("lora" in name for name in trainable)
    optimizer = torch.optim.SGD(trainable.values(), lr=10.0)
    for _ in range(2):  # the first step moves B only
        optimizer.zero_grad()
        F.cross_entropy(unet(sample, timestep, cond).sample, sample).backward()
        optimizer.step()
    assert all(p.grad.any() for p in trainable.values())
    tuned = unet(sample, timestep, cond).sample.detach()
    assert not torch.allclose(tuned, expected)

    unet.save_lora_adapter(tmp_path, adapter_name="mine")
    unet.unload_lora()
    assert torch.equal(unet(sample, timestep, cond).sample, expected)
    fresh = tiny_unet()
    fresh.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, adapter_name="mine")
    torch.testing.assert_close(fresh(sample, timestep, cond).sample, tuned)
    fresh.fuse_lora()
    fresh.unload_lora()
    torch.testing.assert_close(fresh(sample, timestep, cond).sample, tuned)


@torch.no_grad()
def test_one_graph():
    """Captured whole, with a global condition and with a map: no graph break, no wait for the device."""
    unet = tiny_unet(block_out_channels=(8, 8), down_layers_per_block=(1, 1), up_layers_per_block=(1, 1))
    sample, timestep, cond = inputs()
    cond_map = torch.randn(2, 6, *sample.shape[1:])
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for arguments in ((sample, timestep, cond), (sample, timestep, cond_map)):
        assert torch.equal(compiled(*arguments).sample, unet(*arguments).sample)


@pytest.mark.slow
@torch.no_grad()
def test_inductor():
    torch._dynamo.reset()
    unet = tiny_unet(block_out_channels=(8, 8), down_layers_per_block=(1, 1), up_layers_per_block=(1, 1))
    arguments = inputs()
    expected = unet(*arguments).sample
    torch.testing.assert_close(torch.compile(unet, fullgraph=True)(*arguments).sample, expected)


@pytest.mark.slow
def test_repeated_blocks_compile():
    torch._dynamo.reset()
    unet = tiny_unet(block_out_channels=(8, 8), down_layers_per_block=(1, 1), up_layers_per_block=(1, 1))
    arguments = inputs()
    expected = unet(*arguments).sample
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(unet(*arguments).sample, expected)


SAMPLE, TIMESTEP, COND = inputs()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((SAMPLE.float(), TIMESTEP, COND), TypeError, r"`sample` holds torch.float32.*token indices"),
        ((SAMPLE > 3, TIMESTEP, COND), TypeError, r"`sample` holds torch.bool"),
        ((SAMPLE[0], TIMESTEP, COND), ValueError, r"`sample` has shape \(8, 12\).*\(batch, height, width\)"),
        ((SAMPLE[:, :, :11], TIMESTEP, COND), ValueError, r"8x11 tokens.*multiples of 4.*nearest valid grid is 8x12"),
        ((SAMPLE[:, :4], TIMESTEP, COND), ValueError, r"4x12 tokens.*at least 8.*nearest valid grid is 8x12"),
        ((SAMPLE[:, :0], TIMESTEP, COND), ValueError, r"0x12 tokens.*nearest valid grid is 8x12"),
        ((SAMPLE + 20, TIMESTEP, COND), ValueError, r"tokens from 2\d to \d+, the codebook has 0\.\.23"),
        ((SAMPLE - 30, TIMESTEP, COND), ValueError, r"tokens from -30 to -\d+, the codebook has 0\.\.23"),
        ((SAMPLE, TIMESTEP, COND[:, :5]), ValueError, r"shape \(2, 5\).*\(2, 6\).*\(2, 6, 8, 12\)"),
        ((SAMPLE, TIMESTEP, COND[:1]), ValueError, r"`condition_embeds` has shape \(1, 6\)"),
        ((SAMPLE, TIMESTEP, COND[:, None]), ValueError, r"`condition_embeds` has shape \(2, 1, 6\)"),
        ((SAMPLE, TIMESTEP, torch.zeros(2, 6, 4, 6)), ValueError, r"shape \(2, 6, 4, 6\).*\(2, 6, 8, 12\)"),
        ((SAMPLE, TIMESTEP[:, None], COND), ValueError, r"`timestep` has shape \(2, 1\).*\(2,\) for 2 token grids"),
        ((SAMPLE, torch.zeros(3), COND), ValueError, r"`timestep` has shape \(3,\)"),
        ((SAMPLE, 999, COND), ValueError, r"`timestep` is 999, the network takes r in \[0, 1\]"),
        ((SAMPLE, float("nan"), COND), ValueError, r"`timestep` is nan"),
    ],
)  # fmt: skip
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny_unet()(*arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_out_channels": (8, 16)}, r"have \(2, 3, 3\) entries"),
        ({"block_out_channels": (), "down_layers_per_block": (), "up_layers_per_block": ()}, r"have \(0, 0, 0\)"),
        ({"up_layers_per_block": (1, 0, 1)}, r"`up_layers_per_block` is \(1, 0, 1\).*at least one layer"),
        ({"time_embed_dim": 3}, r"`time_embed_dim` is 3.*at least 4"),
        ({"kernel_size": 4}, r"`kernel_size` is 4.*odd"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**config)
