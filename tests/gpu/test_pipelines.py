"""Every public pipeline on a GPU: device, generators, half precision, offloading that really moves, one graph.

The cases are those of `tests/pipelines/contract.py`: a new family is tested by its line there.
"""

import pytest
import torch
from pipelines.contract import CASES, ONE_EACH, networks, owner_of, sample
from pipelines.tiny_paella import quiet

from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.schedulers.scheduling_discrete_renoising import DiscreteRenoisingScheduler

ALL = pytest.mark.parametrize("name", CASES)
EACH = pytest.mark.parametrize("name", ONE_EACH)


def devices(pipe) -> set[str]:
    return {tensor.device.type for part in networks(pipe).values() for tensor in part.parameters()}


def assert_near(found, expected) -> None:
    """Texts are equal; of pictures 95 % of the values are: a token whose draw was close may come out as another."""
    if isinstance(expected, list):
        assert found == expected
        return
    assert found.shape == expected.shape and bool(torch.isfinite(found).all())
    far = (found.float().cpu() - expected.float().cpu()).abs() > 2e-3
    assert float(far.float().mean()) < 0.05, f"{float(far.float().mean()):.0%} of the values differ"


@ALL
def test_the_device_changes_no_result(name, device):
    """The draws come from a generator on the CPU, as everywhere in diffusers."""
    expected = sample(CASES[name].build(), name)
    pipe = CASES[name].build().to(device)
    assert devices(pipe) == {device.type}
    assert_near(sample(pipe, name), expected)


@ALL
def test_a_generator_on_the_device_repeats_itself(name, device):
    pipe = CASES[name].build().to(device)
    first, second = (sample(pipe, name, generator=torch.Generator(device).manual_seed(5)) for _ in range(2))
    assert_near(second, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@ALL
def test_half_precision(name, dtype, device):
    pipe = CASES[name].build().to(device, dtype)
    result = sample(pipe, name)
    assert pipe.dtype == dtype and devices(pipe) == {device.type}
    assert isinstance(result, list) or bool(torch.isfinite(result).all())


def watch(pipe) -> dict[str, set[str]]:
    """Where the weights of each network are whenever it runs."""
    seen: dict[str, set[str]] = {}
    for name, part in networks(pipe).items():
        own = [module for module in part.modules() if any(True for _ in module.parameters(recurse=False))]
        for module in own:
            forward = module.forward

            def told(*args, forward=forward, module=module, name=name, **kwargs):
                seen.setdefault(name, set()).update(x.device.type for x in module.parameters(recurse=False))
                return forward(*args, **kwargs)

            module.forward = told
    return seen


@EACH
def test_model_offload_moves(name, device):
    expected = sample(CASES[name].build().to(device), name)
    pipe = CASES[name].build()
    seen = watch(pipe)
    pipe.enable_model_cpu_offload(device=device)
    found = sample(pipe, name)
    assert seen and all(places == {device.type} for places in seen.values()), seen
    pipe.maybe_free_model_hooks()
    assert devices(pipe) == {"cpu"}
    assert_near(found, expected)


@EACH
def test_sequential_offload_moves(name, device):
    if device.type == "cpu":
        pytest.skip("accelerate takes no CPU for it; the contract tests do it by hand")
    expected = sample(CASES[name].build().to(device), name)
    pipe = CASES[name].build()
    seen = watch(pipe)
    pipe.enable_sequential_cpu_offload(device=device)
    found = sample(pipe, name)
    assert seen and all(places == {device.type} for places in seen.values()), seen
    assert devices(pipe) <= {"meta", "cpu"}
    assert_near(found, expected)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@EACH
def test_group_offload_moves(name, stream, device):
    if stream and device.type == "cpu":
        pytest.skip("streams are a GPU's")
    expected = sample(CASES[name].build().to(device), name)
    pipe = CASES[name].build()
    # diffusers' VQModel declares that it cannot
    unfit = [part for part, network in networks(pipe).items() if not getattr(network, "_supports_group_offloading", 1)]
    pipe.enable_group_offload(
        onload_device=device, offload_type="leaf_level", use_stream=stream, exclude_modules=unfit
    )
    for part in unfit:
        networks(pipe)[part].to(device)
    found = sample(pipe, name)
    offloaded = [part for key, part in networks(pipe).items() if key not in unfit]
    assert {tensor.device.type for part in offloaded for tensor in part.parameters()} == {"cpu"}
    assert_near(found, expected)


@EACH
def test_the_network_is_one_graph(name, device):
    """`fullgraph=True` fails at the first break. A GPU compiles it to the end."""
    pipe = CASES[name].build().to(device)
    expected = sample(pipe, name)
    torch._dynamo.reset()
    found = [part for part in networks(pipe) if "unet" in part]
    assert found, f"no network of {type(pipe).__name__} is called a unet: say here which is compiled"
    for part in found:
        backend = "eager" if device.type == "cpu" else "inductor"
        owner, place = owner_of(pipe, part)
        setattr(owner, place, torch.compile(networks(pipe)[part], fullgraph=True, backend=backend))
    assert_near(sample(pipe, name), expected)


def test_a_generator_of_another_device_is_refused(device):
    if device.type == "cpu":
        pytest.skip("needs a second kind of device")
    pipe = quiet(CASES["paella"].build())
    assert isinstance(pipe, PaellaPipeline)
    with pytest.raises(ValueError, match=f"generator is on {device.type}"):
        pipe("a star", generator=torch.Generator(device))


def test_cpu_generators_serve_tokens_on_the_device(device):
    """The tokens are drawn alike, wherever they are."""
    scheduler = DiscreteRenoisingScheduler(num_vec_classes=24)
    draw = torch.Generator().manual_seed(0)
    tokens, logits = torch.randint(24, (2, 4, 4), generator=draw), torch.randn(2, 24, 4, 4, generator=draw)
    results = []
    for place in ("cpu", device):
        scheduler.set_timesteps(4, place)
        noise, step = ([torch.Generator().manual_seed(seed) for seed in seeds] for seeds in ((1, 2), (3, 4)))
        x = scheduler.add_noise(tokens.to(place), None, torch.tensor([0.2, 0.4]), generator=noise)
        out = scheduler.step(logits.to(place), scheduler.timesteps[1], x, initial_noise=tokens, generator=step)
        assert out.prev_sample.device.type == torch.device(place).type
        results.append(out.prev_sample.cpu())
    assert torch.equal(*results)
