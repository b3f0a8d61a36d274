import copy
import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch.nn import functional as F

from diffusers_ext.models.blocks.versatile import FCLinear, FCResBlock, versatile_walk
from diffusers_ext.models.unet_versatile import VersatileUNet

TINY = {
    "data_types": {
        "image": {"kind": "map", "channels": 4},
        "text": {"kind": "vector", "channels": 6, "positions": 2},
    },
    "context_types": {"image": 10, "text": 12},
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "num_attention_heads": 2,
    "norm_num_groups": 4,
}
LENGTHS = {"image": 5, "text": 7, "audio": 3}  # tokens of a context


def tiny_unet(**overrides) -> VersatileUNet:
    torch.manual_seed(0)
    unet = VersatileUNet(**{**TINY, **overrides}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():  # nothing stays at zero, so that every block shows in the output
            if not parameter.any():
                parameter.normal_(std=0.3)
    return unet


def sample_of(unet: VersatileUNet, data_type: str, batch: int = 2, side: int = 4) -> torch.Tensor:
    sizes = unet.config.data_types[data_type]
    shape = (batch, sizes["channels"], side, side + 4) if sizes["kind"] == "map" else (batch, sizes["channels"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def context_of(unet: VersatileUNet, context_type: str, batch: int = 2, seed: int = 2) -> torch.Tensor:
    width = unet.config.context_types[context_type]
    generator = torch.Generator().manual_seed(seed + width)
    return torch.randn(batch, LENGTHS[context_type], width, generator=generator)


def run(unet: VersatileUNet, data_type: str = "image", context_type: str = "text", timestep=500, **options):
    context = context_of(unet, context_type)
    return unet(
        sample_of(unet, data_type), timestep, context, data_type=data_type, context_type=context_type, **options
    ).sample


def test_defaults_are_the_published_network():
    with torch.device("meta"):
        unet = VersatileUNet()
    sizes = {name: sum(p.numel() for p in group.parameters()) for name, group in unet.layer_groups().items()}
    assert sizes == {
        "global": 2_050_560,
        "data.image": 590_231_044,
        "data.text": 1_439_558_528,
        "context.image": 267_239_360,
        "context.text": 267_239_360,
    }
    assert sum(sizes.values()) == sum(p.numel() for p in unet.parameters()) == 2_566_318_852
    assert (len(unet.data_layers["image"]), unet.num_context_layers, unet.downsample_factor) == (30, 16, 8)


def test_walk_of_the_published_network():
    names = {"save": "S", "load": "L", "context": "c"}
    steps = versatile_walk((320, 640, 1280, 1280), (2, 2, 2, 2), (True, True, True, False))
    written = "".join(names.get(step.op, "d") for step in steps)
    down = "dS" + 2 * "dcS" + "dS" + 2 * "dcS" + "dS" + 2 * "dcS" + "dS" + 2 * "dS"
    up = 3 * "Ld" + "d" + 3 * "Ldc" + "d" + 3 * "Ldc" + "d" + 3 * "Ldc" + "d"
    assert written == down + "dcd" + up
    assert (written.count("d"), written.count("c"), written.count("S"), written.count("L")) == (30, 16, 12, 12)
    up_widths = [(s.in_channels, s.out_channels) for s in steps if s.op == "res"][-12:]
    assert (
        up_widths
        == [(2560, 1280)] * 5 + [(1920, 1280), (1920, 640), (1280, 640), (960, 640), (960, 320)] + [(640, 320)] * 2
    )


@torch.no_grad()
def test_fc_block_equals_its_equation():
    """Written out as linear algebra on a vector; features are ordered channel by channel."""
    block = FCResBlock(4, 6, positions=2, temb_channels=5, groups=2).double()
    for parameter in block.parameters():
        parameter.normal_()
    x, temb = torch.randn(3, 4, 2, 1).double(), torch.randn(3, 5).double()

    def norm(v, layer):
        grouped = v.reshape(3, 2, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return (centred / spread).reshape(3, -1) * layer.weight + layer.bias

    def swish(v):
        return v / (1 + torch.exp(-v))

    vector = torch.stack([x[:, c, s, 0] for c in range(4) for s in range(2)], dim=1)
    h = swish(norm(vector, block.norm1)) @ block.linear1.weight.T + block.linear1.bias
    h = h + swish(temb) @ block.time_emb_proj.weight.T + block.time_emb_proj.bias
    h = swish(norm(h, block.norm2)) @ block.linear2.weight.T + block.linear2.bias
    expected = h + vector @ block.linear_shortcut.weight.T + block.linear_shortcut.bias
    actual = block(x, temb)
    assert actual.shape == (3, 6, 2, 1)
    torch.testing.assert_close(actual, expected.reshape(3, 6, 2, 1))
    torch.testing.assert_close(block(vector, temb), actual)  # a flat vector is the same
    assert FCResBlock(4, 4, positions=2, temb_channels=5, groups=2).linear_shortcut is None
    assert FCLinear(6, (4, 2, 1))(torch.randn(3, 6)).shape == (3, 4, 2, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"block_out_channels": (8,), "attention_levels": (False,)},  # only the middle attends
        {"block_out_channels": (8, 8, 16), "layers_per_block": (1, 2, 1), "attention_levels": (False, True, True)},
    ],
)
def test_all_flows_of_all_shapes(config):
    unet = tiny_unet(**config)
    outputs = {}
    for data_type, context_type in product(("image", "text"), ("image", "text")):
        output = run(unet, data_type, context_type, timestep=torch.tensor([3, 500]))
        assert output.shape == sample_of(unet, data_type).shape
        outputs[data_type, context_type] = output
    assert not torch.allclose(outputs["image", "image"], outputs["image", "text"])
    assert not torch.allclose(outputs["text", "image"], outputs["text", "text"])
    unet_output = unet(sample_of(unet, "image"), 3, context_of(unet, "text"), return_dict=False)
    assert isinstance(unet_output, tuple) and unet_output[0].shape == (2, 4, 4, 8)


@torch.no_grad()
def test_a_third_data_type_and_a_third_context_type_need_only_names():
    third = {
        "data_types": {**TINY["data_types"], "depth": {"kind": "map", "channels": 1}},
        "context_types": {**TINY["context_types"], "audio": 14},
    }
    unet = tiny_unet(**third)
    assert len(unet.flows) == 9 and "audio-to-depth" in unet.flows
    for data_type, context_type in product(third["data_types"], third["context_types"]):
        assert run(unet, data_type, context_type).shape == sample_of(unet, data_type).shape
    contexts = [context_of(unet, name) for name in third["context_types"]]
    mixed = unet(
        sample_of(unet, "depth"), 5, contexts, data_type="depth", context_type=list(third["context_types"])
    ).sample
    assert mixed.shape == (2, 1, 4, 8)
    # the known flows do not change with it: the same weights give the same numbers
    two = tiny_unet()
    two.load_state_dict({name: unet.state_dict()[name] for name in two.state_dict()})
    assert torch.equal(run(two, "text", "image"), run(unet, "text", "image"))


@torch.no_grad()
@pytest.mark.parametrize(("data_type", "context_type"), list(product(("image", "text"), ("image", "text"))))
def test_which_groups_a_flow_reads(data_type, context_type):
    unet = tiny_unet()
    used = set()
    for name, group in unet.layer_groups().items():
        for module in group.modules():
            module.register_forward_pre_hook(lambda *_, name=name: used.add(name))
    run(unet, data_type, context_type)
    assert used == {"global", f"data.{data_type}", f"context.{context_type}"}


@torch.no_grad()
@pytest.mark.parametrize("data_type", ["image", "text"])
def test_mixing_by_ratio_is_a_sum_in_every_context_layer(data_type):
    unet, names = tiny_unet(), ["text", "image"]
    contexts, sample = [context_of(unet, name) for name in names], sample_of(unet, data_type)

    def mixed(*ratios):
        return unet(sample, 7, contexts, data_type=data_type, context_type=names, context_ratios=ratios or None).sample

    alone = [run(unet, data_type, name, timestep=7) for name in names]
    assert torch.equal(mixed(1, 0), alone[0]) and torch.equal(mixed(0, 2.5), alone[1])
    torch.testing.assert_close(mixed(3, 1), mixed(0.75, 0.25))  # divided by their sum
    assert torch.equal(mixed(), mixed(1, 1))

    before, after, mixtures = {}, {}, []  # of the first context layer

    def note(name):
        def hook(layer, inputs, output):
            before[name], after[name] = inputs[0], output[0]

        return hook

    for name in names:
        unet.context_layers[name][0].register_forward_hook(note(name))
    unet.data_layers[data_type][2].register_forward_pre_hook(lambda layer, inputs: mixtures.append(inputs[0]))
    mixed(0.3, 0.7)
    h = before["text"]
    assert torch.equal(h, before["image"])
    torch.testing.assert_close(mixtures[0], h + 0.3 * (after["text"] - h) + 0.7 * (after["image"] - h))


@torch.no_grad()
def test_one_type_may_occur_twice():
    unet = tiny_unet()
    first, second = context_of(unet, "image"), context_of(unet, "image", seed=9)
    sample = sample_of(unet, "image")
    same = unet(sample, 5, [first, first], context_type=["image", "image"]).sample
    torch.testing.assert_close(same, unet(sample, 5, first, context_type="image").sample)
    two = unet(sample, 5, [first, second[:, :2]], context_type=["image", "image"]).sample  # lengths may differ
    assert not torch.allclose(two, same)


@torch.no_grad()
def test_layer_mixing_runs_one_context_a_layer():
    unet = tiny_unet()
    names, sample = ["text", "image"], sample_of(unet, "image")
    contexts = [context_of(unet, name) for name in names]
    calls = []
    for name in names:
        for index, layer in enumerate(unet.context_layers[name]):
            layer.register_forward_pre_hook(lambda *_, name=name, index=index: calls.append((index, name)))
    choices = [1, 0, 0, 1]
    unet(sample, 5, contexts, context_type=names, layer_choices=choices)
    assert calls == [(index, names[choice]) for index, choice in enumerate(choices)]
    assert torch.equal(
        unet(sample, 5, contexts, context_type=names, layer_choices=[1] * 4).sample,
        unet(sample, 5, contexts[1], context_type="image").sample,
    )


def test_layer_choices_follow_the_ratios_and_the_generator():
    with torch.device("meta"):
        unet = VersatileUNet()
    draws = [unet.draw_layer_choices([3, 1], generator=torch.Generator().manual_seed(seed)) for seed in range(60)]
    assert all(len(choices) == 16 for choices in draws)
    share = sum(choice for choices in draws for choice in choices) / (60 * 16)
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / (60 * 16))
    assert draws[3] == unet.draw_layer_choices([0.75, 0.25], generator=torch.Generator().manual_seed(3))
    assert unet.draw_layer_choices([0, 1]) == [1] * 16


@torch.no_grad()
def test_forms_of_timestep():
    unet = tiny_unet()
    expected = run(unet, timestep=torch.tensor([250, 250]))
    for timestep in (250, 250.0, torch.tensor(250), torch.tensor([250])):
        assert torch.equal(run(unet, timestep=timestep), expected)
    assert not torch.allclose(run(unet, timestep=251), expected)


@torch.no_grad()
def test_starts_as_zero():
    """Every block is the identity at first and the prediction 0, as in the original."""
    unet = VersatileUNet(**TINY).eval()
    for data_type in ("image", "text"):
        assert not run(unet, data_type, "image").any()
    hidden = torch.randn(2, 8, 2, 1)
    layer = unet.context_layers["image"][0]
    assert torch.equal(layer(hidden, encoder_hidden_states=context_of(unet, "image"), return_dict=False)[0], hidden)


def loss_of(unet: VersatileUNet, data_type: str, context_type: str) -> torch.Tensor:
    return F.mse_loss(run(unet, data_type, context_type), sample_of(unet, data_type).flip(0))


@pytest.mark.parametrize("data_type", ["image", "text"])
def test_backward_reaches_every_parameter_of_the_flow_and_no_other(data_type):
    unet = tiny_unet().train()
    loss_of(unet, data_type, "image").backward()
    reached = {
        name for name, group in unet.layer_groups().items() if any(p.grad is not None for p in group.parameters())
    }
    assert reached == {"global", f"data.{data_type}", "context.image"}
    groups = unet.layer_groups()
    assert all(p.grad is not None and p.grad.any() for name in reached for p in groups[name].parameters())


@pytest.mark.parametrize("data_type", ["image", "text"])
def test_gradient_checkpointing_changes_nothing(data_type):
    plain = tiny_unet(dropout=0.0).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    calls = []
    for layer in checkpointed.data_layers[data_type]:
        layer.register_forward_pre_hook(lambda layer, _: calls.append(layer))
    for unet in (plain, checkpointed):
        loss_of(unet, data_type, "text").backward()
    residual = [step for step in plain.walk if step.op == "res"]
    assert len(calls) == len(plain.data_layers[data_type]) + len(residual)  # these ran twice
    for (name, expected), actual in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad, msg=name)
    checkpointed.disable_gradient_checkpointing()
    assert not checkpointed.is_gradient_checkpointing


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.08), (torch.float16, 0.02)])
def test_half_precision(dtype, tolerance):
    unet = tiny_unet()
    for data_type in ("image", "text"):
        expected = run(unet, data_type, "image")
        half = copy.deepcopy(unet).to(dtype)
        actual = half(
            sample_of(unet, data_type).to(dtype), 500, context_of(unet, "image"),
            data_type=data_type, context_type="image",
        ).sample  # fmt: skip
        assert actual.dtype == dtype
        assert (actual.float() - expected).abs().max() < tolerance * expected.abs().max()


@torch.no_grad()
def test_save_and_load(tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path)
    loaded, info = VersatileUNet.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and loaded.flows == unet.flows == unet.known_flows
    assert loaded.config["flows"] is None and loaded.config["data_types"] == TINY["data_types"]
    for data_type, context_type in product(("image", "text"), ("image", "text")):
        assert torch.equal(run(loaded, data_type, context_type), run(unet, data_type, context_type))
    half = VersatileUNet.from_pretrained(tmp_path, dtype=torch.bfloat16, flows=["text-to-text"])
    assert half.dtype == torch.bfloat16 and not half.training


def resident_kib(path: Path) -> int:
    """How much of a file mapped by this process has been read into memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@torch.no_grad()
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells which pages were read, Linux only")
def test_a_flow_reads_only_its_groups(tmp_path):
    types = {"image": TINY["data_types"]["image"], "text": {"kind": "vector", "channels": 6, "positions": 4}}
    unet = tiny_unet(data_types=types, block_out_channels=(64, 128), norm_num_groups=8)
    sizes = {k: sum(p.nbytes for p in group.parameters()) for k, group in unet.layer_groups().items()}
    unet.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    part = VersatileUNet.from_pretrained(tmp_path, flows=["image-to-image"])
    needed = sizes["global"] + sizes["data.image"] + sizes["context.image"]
    assert sum(p.nbytes for p in part.parameters()) == needed < 0.4 * sum(sizes.values())  # memory
    assert torch.equal(run(part, "image", "image"), run(unet, "image", "image"))
    read = 1024 * resident_kib(weights)
    # the kernel maps up to 2 MiB around what is read; the groups lie in three runs, one of them at the end
    print(f"read {read:,} of {weights.stat().st_size:,} bytes; the flow has {needed:,}")
    assert needed <= read <= needed + 5 * 2**21 < weights.stat().st_size
    del part
    assert resident_kib(weights) == 0


@torch.no_grad()
def test_a_part_is_saved_as_a_part(tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "whole")
    for data_type in ("image", "text"):
        part = VersatileUNet.from_pretrained(tmp_path / "whole", flows=[f"image-to-{data_type}"])
        assert part.flows == part.config["flows"] == [f"image-to-{data_type}"]
        part.save_pretrained(tmp_path / data_type)
        again = VersatileUNet.from_pretrained(tmp_path / data_type)
        assert again.flows == part.flows
        assert torch.equal(run(again, data_type, "image"), run(unet, data_type, "image"))


def test_flows_that_are_unknown_or_not_there(tmp_path):
    tiny_unet(flows=["text-to-image", "image-to-image"]).save_pretrained(tmp_path)
    known = r"image-to-image, text-to-image, image-to-text, text-to-text"
    for flows, message in [
        (["text-to-img"], rf"`flows` is \['text-to-img'\], of which 'text-to-img' is unknown.*{known}"),
        ([], rf"`flows` is \[\]\. Pass a list of at least one of {known}"),
        ("text-to-image", r"`flows` is 'text-to-image'\. Pass a list"),
        (["text-to-image", "text-to-text"], r"without the layer groups data\.text\. It holds.*image, text-to-image\."),
    ]:
        with pytest.raises(ValueError, match=message):
            VersatileUNet.from_pretrained(tmp_path, flows=flows)
    with pytest.raises(ValueError, match=rf"'sound-to-image' is unknown.*{known}"):
        tiny_unet(flows=["sound-to-image"])
    part = VersatileUNet.from_pretrained(tmp_path, flows=["text-to-image"])
    with pytest.raises(
        ValueError, match=r"layers of image-to-image were not loaded; loaded flows are text-to-image\."
    ):
        run(part, "image", "image")
    with pytest.raises(ValueError, match=r"layers of text-to-text were not loaded.*flows=\['text-to-text'\]"):
        run(part, "text", "text")


@torch.no_grad()
def test_adding_flows_to_go_on_training():
    config = {"context_types": {"image": 12, "text": 12}}
    unet = tiny_unet(**config, flows=["image-to-image"]).double().train()
    before = run_double(unet, "image", "image")
    unet.add_flows(["text-to-image"], contexts_like="image")
    assert unet.flows == ["image-to-image", "text-to-image"] == unet.config["flows"]
    assert torch.equal(run_double(unet, "image", "image"), before)
    unet.add_flows(["text-to-text"])
    assert unet.flows == unet.known_flows and unet.config["flows"] is None
    assert {p.dtype for p in unet.parameters()} == {torch.float64} and unet.data_layers["text"].training
    assert torch.equal(run_double(unet, "image", "image"), before)
    pairs = zip(unet.context_layers["image"].parameters(), unet.context_layers["text"].parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)  # copied, not shared
    with pytest.raises(ValueError, match=r"`contexts_like` is 'sound'; loaded contexts are image, text\."):
        unet.add_flows(["text-to-text"], contexts_like="sound")


def run_double(unet, data_type, context_type):
    return unet(
        sample_of(unet, data_type).double(), 5, context_of(unet, context_type).double(),
        data_type=data_type, context_type=context_type,
    ).sample  # fmt: skip


@torch.no_grad()
def test_layerwise_casting_and_group_offloading():
    unet = tiny_unet()
    expected = run(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert unet.data_layers["image"][1].conv1.weight.dtype == torch.float8_e4m3fn
    assert (run(unet) - expected).abs().mean() < 0.2 * expected.abs().mean()
    unet = tiny_unet()
    unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(run(unet), expected)


def test_lora_trains_saves_loads_and_unloads(tmp_path):
    unet = tiny_unet()
    expected = {name: run(unet, name, "text").detach() for name in ("image", "text")}
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "linear1", "linear2"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights="gaussian"), "mine")
    assert torch.equal(run(unet, "text", "text"), expected["text"])  # B starts at zero
    trainable = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert trainable and all("lora" in name for name in trainable)
    optimizer = torch.optim.SGD(trainable.values(), lr=1.0)
    for _ in range(2):  # the first step moves B only
        optimizer.zero_grad()
        (loss_of(unet, "text", "text") + loss_of(unet, "image", "text")).backward()
        optimizer.step()
    tuned = {name: run(unet, name, "text").detach() for name in expected}
    assert all(not torch.allclose(tuned[name], expected[name]) for name in expected)
    unet.save_lora_adapter(tmp_path, adapter_name="mine")
    unet.unload_lora()
    assert torch.equal(run(unet, "text", "text"), expected["text"])
    fresh = tiny_unet()
    fresh.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, adapter_name="mine")
    for name, wanted in tuned.items():
        torch.testing.assert_close(run(fresh, name, "text"), wanted)


SMALLEST = {"block_out_channels": (8,), "attention_levels": (False,)}


@torch.no_grad()
def test_one_graph_a_flow():
    """Captured whole, for each flow and for a mixture: no graph break, no wait for the device."""
    unet = tiny_unet(**SMALLEST)
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for data_type, context_type in product(("image", "text"), ("image", "text")):
        sample, context = sample_of(unet, data_type), context_of(unet, context_type)
        options = {"data_type": data_type, "context_type": context_type, "return_dict": False}
        timestep = torch.tensor([10, 20])
        assert torch.equal(
            compiled(sample, timestep, context, **options)[0], unet(sample, timestep, context, **options)[0]
        )
    contexts = [context_of(unet, "text"), context_of(unet, "image")]
    sample = sample_of(unet, "image")
    for ratio in (0.3, 0.6, 0.8):  # from the second on the compiler holds the number symbolically
        options = {"context_type": ["text", "image"], "context_ratios": [ratio, 1 - ratio]}
        torch.testing.assert_close(
            compiled(sample, timestep, contexts, **options).sample, unet(sample, timestep, contexts, **options).sample
        )


@pytest.mark.slow
@torch.no_grad()
def test_inductor():
    torch._dynamo.reset()
    unet = tiny_unet(**SMALLEST)
    expected = {name: run(unet, name, "image") for name in ("image", "text")}
    compiled = torch.compile(unet, fullgraph=True)
    for name, wanted in expected.items():
        actual = compiled(
            sample_of(unet, name), 500, context_of(unet, "image"), data_type=name, context_type="image"
        ).sample
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


IMAGE, TEXT = torch.zeros(2, 4, 4, 8), torch.zeros(2, 6)
CONTEXT = torch.zeros(2, 7, 12)  # of text


@pytest.mark.parametrize(
    ("sample", "context", "options", "message"),
    [
        (IMAGE, CONTEXT, {"data_type": "sound"}, r"`data_type` is 'sound'; this network knows image, text\."),
        (IMAGE, CONTEXT, {"context_type": "sound"}, r"`context_type` is 'sound'; this network knows image, text\."),
        (IMAGE, [], {"context_type": []}, r"`context_type` is empty: pass at least one of image, text"),
        (TEXT, CONTEXT, {}, r"has shape \(2, 6\); image latents are \(b, 4, h, w\) with h and w multiples of 2"),
        (IMAGE[:, :3], CONTEXT, {}, r"`sample` has shape \(2, 3, 4, 8\); image latents are \(b, 4, h, w\)"),
        (IMAGE[:, :, :3], CONTEXT, {}, r"`sample` has shape \(2, 4, 3, 8\).*multiples of 2"),
        (IMAGE[:, :, :0], CONTEXT, {}, r"`sample` has shape \(2, 4, 0, 8\)"),
        (IMAGE, CONTEXT, {"data_type": "text"}, r"`sample` has shape \(2, 4, 4, 8\); text latents are \(b, 6\)\."),
        (IMAGE, CONTEXT, {"context_type": ["text", "image"]}, r"holds 1 contexts and `context_type` 2 types"),
        (IMAGE, [CONTEXT] * 2, {}, r"holds 2 contexts and `context_type` 1 types"),
        (IMAGE, CONTEXT[:, :, :9], {}, r"shape \(2, 7, 9\); for text and 2 samples it is \(2, tokens, 12\)"),
        (IMAGE, CONTEXT[:1], {}, r"shape \(1, 7, 12\); for text and 2 samples it is \(2, tokens, 12\)"),
        (IMAGE, CONTEXT[:, :0], {}, r"shape \(2, 0, 12\).*at least one token"),
        (IMAGE, CONTEXT, {"context_ratios": [0.0]}, r"`context_ratios` is \[0\.0\].*not all of them 0"),
        (IMAGE, CONTEXT, {"context_ratios": [-1.0]}, r"`context_ratios` is \[-1\.0\]"),
        (IMAGE, CONTEXT, {"context_ratios": [float("nan")]}, r"`context_ratios` is \[nan\]"),
        (IMAGE, CONTEXT, {"context_ratios": [0.5, 0.5]}, r"`context_ratios` is \[0\.5, 0\.5\]: pass 1 finite"),
        (IMAGE, CONTEXT, {"layer_choices": [0]}, r"`layer_choices` is \[0\]: pass 4 indices below 1"),
        (IMAGE, CONTEXT, {"layer_choices": [0, 0, 0, 1]}, r"`layer_choices` is \[0, 0, 0, 1\]"),
        (IMAGE, CONTEXT, {"timestep": torch.zeros(3)}, r"`timestep` has shape \(3,\).*\(2,\) for 2 samples"),
        (IMAGE, CONTEXT, {"timestep": torch.zeros(2, 1)}, r"`timestep` has shape \(2, 1\)"),
    ],
)  # fmt: skip
def test_bad_input(sample, context, options, message):
    options = dict(options)
    with pytest.raises(ValueError, match=message):
        tiny_unet()(sample, options.pop("timestep", 5), context, **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data_types": {}}, r"`data_types` has the names \[\]: give at least one"),
        ({"context_types": {"a b": 4}}, r"`context_types` has the names \['a b'\]"),
        ({"context_types": {"keys": 4}}, r"`context_types` has the names \['keys'\]"),
        ({"context_types": {"text": 0}}, r"`context_types` is \{'text': 0\}: widths.*at least 1"),
        ({"data_types": {"x": {"kind": "cube", "channels": 1}}}, r"describes x as .*'cube'.*kind 'map' with channels"),
        ({"data_types": {"x": {"channels": 1}}}, r"describes x as \{'channels': 1\}: allowed are kind 'map'"),
        ({"data_types": {"x": {"kind": "vector", "channels": 1}}}, r"kind 'vector' with channels and positions"),
        ({"data_types": {"x": {"kind": "map", "channels": 0}}}, r"all at least 1"),
        ({"block_out_channels": ()}, r"`block_out_channels` is \(\)"),
        ({"layers_per_block": (1, 1, 1)}, r"`layers_per_block` \(1, 1, 1\).*one entry in all three"),
        ({"layers_per_block": 0}, r"`layers_per_block` \(0, 0\).*at least one layer"),
        ({"attention_levels": (True,)}, r"`attention_levels` \(True,\)"),
        ({"norm_num_groups": 3}, r"\[8, 16\] are no multiples of both `norm_num_groups` \(3\)"),
        ({"num_attention_heads": 16}, r"\[8\] are no multiples.*`num_attention_heads` \(16\)"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**config)


@torch.no_grad()
def test_takes_attention_processors():
    unet = tiny_unet()
    plain = run(unet)
    unet.set_attn_processor(AttnProcessor())
    assert unet.attn_processors and {type(one) for one in unet.attn_processors.values()} == {AttnProcessor}
    torch.testing.assert_close(run(unet), plain, atol=1e-4, rtol=1e-4)
