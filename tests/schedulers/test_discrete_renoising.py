"""The scheduler: grids, corruption, steps, draws, errors, and replays of the original's recorded runs."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Generator, Tensor

from diffusers_ext.guidance import classifier_free_guidance
from diffusers_ext.schedulers.scheduling_discrete_renoising import (
    DiscreteRenoisingScheduler,
    DiscreteRenoisingSchedulerOutput,
    RenoisingDraws,
)

many = settings(max_examples=200, deadline=None)
CASES = Path(__file__).parents[1] / "parity" / "cases" / "paella"
V3 = {"noise_schedule": "linear", "time_convention": "v3", "sampling": "multinomial", "typical_filtering": False}
V = 10

conventions = st.sampled_from(["v1", "v3"])
schedules = st.sampled_from(["cosine", "linear"])
seeds = st.integers(0, 2**31 - 1)


def make(**config) -> DiscreteRenoisingScheduler:
    return DiscreteRenoisingScheduler(V, **config)


def gen(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def tokens(seed: int = 0, b: int = 2, h: int = 4, w: int = 3) -> Tensor:
    return torch.randint(V, (b, h, w), generator=gen(seed))


def logits(seed: int = 0, b: int = 2, h: int = 4, w: int = 3) -> Tensor:
    return torch.randn(b, V, h, w, generator=gen(seed))


def certain(x: Tensor) -> Tensor:
    """Logits of a perfect model that knows the clean tokens x."""
    return 50.0 * torch.nn.functional.one_hot(x, V).movedim(-1, 1).float()


def run(scheduler: DiscreteRenoisingScheduler, x: Tensor, *, generator=None, mask=None, seed: int = 0) -> list[Tensor]:
    """Samples with a model whose logits depend on tokens and time, and returns every step's tokens."""
    table = torch.randn(V, V, generator=gen(seed)) * 2
    initial, steps = x, []
    for timestep in scheduler.timesteps:
        out = table[x].movedim(-1, 1) + float(timestep)
        x = scheduler.step(out, timestep, x, initial_noise=initial, mask=mask, generator=generator).prev_sample
        steps.append(x)
    return steps


# grids


@given(conventions, schedules, st.integers(1, 60), st.integers(0, 10**6), st.integers(0, 10**6))
@many
def test_every_grid_falls_in_noise_within_range(convention, schedule, steps, start, renoise):
    scheduler = make(time_convention=convention, noise_schedule=schedule)
    start, renoise = start % steps, renoise % (steps + 1)
    scheduler.set_timesteps(steps, start_index=start, renoise_steps=renoise)
    assert scheduler.num_inference_steps == steps
    assert len(scheduler) == len(scheduler.timesteps) == len(scheduler.renoise_levels) == steps - start
    assert scheduler.timesteps.dtype == scheduler.temperatures.dtype == torch.float32
    sign = 1 if convention == "v1" else -1
    assert (sign * scheduler.timesteps.diff() > 0).all()
    ratios = torch.cat([scheduler.noise_ratio(scheduler.timesteps), torch.zeros(1)])
    assert (ratios.diff() < 0).all() and ratios.max() <= 1
    kept = max(0, min(renoise, steps - 1) - start)  # steps that renoise to the level of the next one
    assert torch.equal(scheduler.renoise_levels[:kept], scheduler.timesteps[1 : kept + 1])
    assert (scheduler.noise_ratio(scheduler.renoise_levels[kept:]) == 0).all()


def test_v1_and_v3_grids_are_the_originals():
    scheduler = make()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [0.0, 0.25, 0.5, 0.75]
    assert scheduler.renoise_levels.tolist() == [0.25, 0.5, 0.75, 1.0]
    scheduler = make(**V3)
    scheduler.set_timesteps(4, t_start=0.8, t_end=0.4, renoise_steps=4)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([0.8, 0.7, 0.6, 0.5]))
    torch.testing.assert_close(scheduler.renoise_levels, torch.tensor([0.7, 0.6, 0.5, 0.4]))


def test_temperatures_are_a_line_over_the_whole_grid():
    scheduler = make(temperature=(2.0, 0.5))
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.temperatures, torch.tensor([2.0, 1.5, 1.0, 0.5]))
    scheduler.set_timesteps(4, start_index=2)
    torch.testing.assert_close(scheduler.temperatures, torch.tensor([1.0, 0.5]))
    scheduler.set_timesteps(3, temperature=(1.0, 0.0))
    torch.testing.assert_close(scheduler.temperatures, torch.tensor([1.0, 0.5, 0.0]))


def test_retrieve_timesteps_of_diffusers_works_with_and_without_a_list():
    scheduler = make()
    timesteps, steps = retrieve_timesteps(scheduler, 8, "cpu")
    assert steps == 8 and torch.equal(timesteps, torch.arange(8) / 8)
    timesteps, steps = retrieve_timesteps(scheduler, device="cpu", timesteps=[0.0, 0.5, 0.6])
    assert steps == 3
    torch.testing.assert_close(timesteps, torch.tensor([0.0, 0.5, 0.6]))
    torch.testing.assert_close(scheduler.renoise_levels, torch.tensor([0.5, 0.6, 1.0]))


# corruption


@pytest.mark.parametrize(
    "convention, schedule, levels, ratios",
    [
        ("v1", "cosine", [0.0, 1 / 3, 0.5, 1.0], [1.0, 3**0.5 / 2, 2**-0.5, 0.0]),
        ("v1", "linear", [0.0, 0.25, 1.0], [1.0, 0.75, 0.0]),
        ("v3", "linear", [1.0, 0.25, 0.0], [1.0, 0.25, 0.0]),
        ("v3", "cosine", [1.0, 0.5, 0.0], [1.0, 2**-0.5, 0.0]),
    ],
)
def test_noise_ratio_in_closed_form(convention, schedule, levels, ratios):
    scheduler = make(time_convention=convention, noise_schedule=schedule)
    torch.testing.assert_close(scheduler.noise_ratio(torch.tensor(levels)), torch.tensor(ratios))
    assert scheduler.noise_ratio(levels[-1]).item() == 0.0  # exactly: cos(pi / 2) is below 0 in float32


@given(conventions, schedules, seeds)
@many
def test_add_noise_at_the_ends(convention, schedule, seed):
    scheduler = make(time_convention=convention, noise_schedule=schedule)
    noisy, clean = (0.0, 1.0) if convention == "v1" else (1.0, 0.0)
    x, noise = tokens(seed), tokens(seed + 1)
    assert torch.equal(scheduler.add_noise(x, noise, clean, generator=gen(seed)), x)
    assert torch.equal(scheduler.add_noise(x, noise, noisy, generator=gen(seed)), noise)


@given(conventions, schedules, st.floats(0, 1), seeds)
@many
def test_add_noise_replaces_the_share_of_the_schedule(convention, schedule, level, seed):
    scheduler = make(time_convention=convention, noise_schedule=schedule)
    x = torch.zeros(1, 64, 64, dtype=torch.long)
    noisy, mask = scheduler.add_noise(x, None, level, generator=gen(seed), return_mask=True)
    assert noisy.dtype == x.dtype and ((noisy >= 0) & (noisy < V)).all()
    assert (noisy[~mask] == 0).all()
    p, n = scheduler.noise_ratio(level).item(), x.numel()
    assert abs(mask.sum().item() - n * p) <= 6 * (n * p * (1 - p)) ** 0.5 + 1
    # replacement may draw the token itself: a share 1 - 1/V of the replaced positions changes
    changed, expected = (noisy != x).sum().item(), p * (1 - 1 / V)
    assert abs(changed - n * expected) <= 6 * (n * expected * (1 - expected)) ** 0.5 + 1


def test_add_noise_draws_uniforms_then_tokens_from_each_images_own_generator():
    scheduler, x, r = make(), tokens(), torch.tensor([0.3, 0.8])
    noisy, mask = scheduler.add_noise(x, None, r, generator=[gen(5), gen(6)], return_mask=True)
    for k, seed in enumerate((5, 6)):
        g = gen(seed)
        replaced = torch.rand(x.shape[1:], generator=g) < torch.cos(r[k] * torch.pi / 2)
        expected = torch.where(replaced, torch.randint(V, x.shape[1:], generator=g), x[k])
        assert torch.equal(mask[k], replaced) and torch.equal(noisy[k], expected)
    alone = scheduler.add_noise(x[1:], None, r[1:], generator=[gen(6)])
    assert torch.equal(alone[0], noisy[1])


def test_add_noise_takes_injected_draws():
    scheduler, x, noise, u = make(), tokens(), tokens(1), torch.rand(2, 4, 3)
    noisy, mask = scheduler.add_noise(x, noise, 0.5, uniforms=u, return_mask=True)
    assert torch.equal(mask, u < 2**-0.5)
    assert torch.equal(scheduler.add_noise(x, noise, mask=mask.long()), noisy)
    assert torch.equal(noisy, torch.where(mask, noise, x))


# steps

configs = st.fixed_dictionaries(
    {
        "time_convention": conventions,
        "noise_schedule": schedules,
        "sampling": st.sampled_from(["gumbel", "multinomial", "argmax"]),
        "typical_filtering": st.booleans(),
        "typical_mass": st.floats(0.01, 1.0),
        "typical_min_tokens": st.integers(1, 12),
        "renoise_mode": st.sampled_from(["start", "prev", "rand"]),
        "renoise_positions": st.sampled_from(["random", "confidence"]),
        "temperature": st.tuples(st.floats(0, 3), st.floats(0, 3)),
    }
)


@given(configs, st.integers(1, 5), seeds, st.booleans())
@many
def test_steps_of_every_configuration(config, steps, seed, masked):
    scheduler = make(**config)
    scheduler.set_timesteps(steps)
    x = initial = tokens(seed)
    mask = torch.rand(x.shape, generator=gen(seed)) < 0.6 if masked else None
    kept = torch.zeros_like(x, dtype=torch.bool) if mask is None else ~mask
    g = gen(seed)
    for k, timestep in enumerate(scheduler.timesteps):
        given_x = x.clone()
        out = scheduler.step(logits(seed + k), timestep, x, initial_noise=initial, mask=mask, generator=g)
        assert torch.equal(x, given_x)  # nothing is changed in place
        for result in (out.prev_sample, out.pred_original_sample):
            assert result.dtype == torch.long and result.shape == x.shape
            assert ((result >= 0) & (result < V)).all()
        assert torch.equal(out.pred_original_sample[kept], initial[kept])
        if config["renoise_mode"] != "rand" or config["renoise_positions"] == "confidence":
            assert torch.equal(out.prev_sample[kept], initial[kept])
        x = out.prev_sample
    assert torch.equal(x, out.pred_original_sample)  # the last step does not renoise
    assert torch.equal(x[kept], initial[kept])


@pytest.mark.parametrize("config", [{}, V3, {"sampling": "argmax"}, {"typical_filtering": False}])
def test_a_perfect_model_recovers_the_clean_tokens(config):
    scheduler, clean = make(**config), tokens()
    scheduler.set_timesteps(6, start_index=2)
    x = initial = scheduler.add_noise(clean, None, scheduler.timesteps[0], generator=gen())
    assert not torch.equal(x, clean)
    for timestep in scheduler.timesteps:
        out = scheduler.step(certain(clean), timestep, x, initial_noise=initial, generator=gen(1))
        assert torch.equal(out.pred_original_sample, clean)
        x = out.prev_sample
    assert torch.equal(x, clean)


@pytest.mark.parametrize("mode", ["start", "prev", "rand"])
def test_renoised_positions_receive_what_the_mode_says(mode):
    scheduler, x, initial, fresh = make(renoise_mode=mode), tokens(1), tokens(2), tokens(3)
    scheduler.set_timesteps(4)
    u = torch.rand(x.shape, generator=gen(9))
    out = scheduler.step(
        logits(),
        0.25,
        x,
        initial_noise=initial,
        draws=RenoisingDraws(renoise_uniforms=u, renoise_tokens=fresh),
        generator=gen(),
    )
    replacement = {"start": initial, "prev": x, "rand": fresh}[mode]
    replaced = u < torch.cos(torch.tensor(0.5 * torch.pi / 2))  # the level of the next step
    assert torch.equal(out.prev_sample, torch.where(replaced, replacement, out.pred_original_sample))
    forced = scheduler.step(
        logits(),
        0.25,
        x,
        initial_noise=initial,
        draws=RenoisingDraws(renoise_mask=replaced, renoise_tokens=fresh),
        generator=gen(),
    )
    assert torch.equal(forced.prev_sample, out.prev_sample)


def test_renoise_mode_of_one_run():
    scheduler = make()
    scheduler.set_timesteps(4, renoise_mode="prev")
    x, everywhere = tokens(1), torch.ones(2, 4, 3)
    out = scheduler.step(logits(), 0.0, x, draws=RenoisingDraws(renoise_mask=everywhere), generator=gen())
    assert torch.equal(out.prev_sample, x)
    scheduler.set_timesteps(4)
    out = scheduler.step(
        logits(), 0.0, x, initial_noise=tokens(2), draws=RenoisingDraws(renoise_mask=everywhere), generator=gen()
    )
    assert torch.equal(out.prev_sample, tokens(2))


def test_renoising_stops_after_the_given_number_of_steps():
    scheduler = make(renoise_mode="rand")
    scheduler.set_timesteps(5, start_index=1, renoise_steps=3)
    renoised = []
    for timestep in scheduler.timesteps:
        out = scheduler.step(
            certain(tokens()),
            timestep,
            tokens(1),
            draws=RenoisingDraws(renoise_tokens=(tokens() + 1) % V),
            generator=gen(),
        )
        renoised.append(not torch.equal(out.prev_sample, out.pred_original_sample))
    assert renoised == [True, True, False, False]  # steps 1 and 2 of 0..4


def test_a_masked_run_with_fresh_tokens_corrupts_and_restores_what_is_kept():
    scheduler, initial = make(renoise_mode="rand"), tokens()
    scheduler.set_timesteps(3)
    mask, fresh = torch.zeros(2, 4, 3), (initial + 1) % V
    out = scheduler.step(
        logits(),
        0.0,
        initial,
        initial_noise=initial,
        mask=mask,
        draws=RenoisingDraws(renoise_mask=torch.ones(2, 4, 3), renoise_tokens=fresh),
    )
    assert torch.equal(out.prev_sample, fresh) and torch.equal(out.pred_original_sample, initial)
    out = scheduler.step(
        logits(), scheduler.timesteps[1], fresh, initial_noise=initial, mask=mask, generator=gen(), return_dict=True
    )
    assert torch.equal(out.pred_original_sample, initial)


def test_confidence_renoises_the_least_probable_tokens():
    scheduler = make(
        renoise_positions="confidence", sampling="argmax", noise_schedule="linear", typical_filtering=False
    )
    scheduler.set_timesteps(4)
    out, x = logits(), tokens(1)
    step = scheduler.step(out, 0.25, x, initial_noise=(out.argmax(1) + 1) % V, generator=gen())
    replaced = step.prev_sample != step.pred_original_sample
    probability = out.softmax(1).amax(1)
    for k in range(2):
        assert replaced[k].sum() == 6  # half of 12 at the next level, 0.5
        assert probability[k][replaced[k]].max() < probability[k][~replaced[k]].min()


# draws


@pytest.mark.parametrize("mode", ["start", "rand"])
@pytest.mark.parametrize("sampling, width", [("gumbel", V), ("multinomial", 2), ("argmax", 0)])
def test_documented_order_of_draws(sampling, width, mode):
    scheduler, x, initial = make(sampling=sampling, renoise_mode=mode), tokens(1), tokens(2)
    scheduler.set_timesteps(5)
    drawn = scheduler.step(logits(), 0.2, x, initial_noise=initial, generator=gen(3))
    g, injected = gen(3), {}
    if width:
        name = {"gumbel": "gumbel_uniforms", "multinomial": "cdf_uniforms"}[sampling]
        injected[name] = torch.rand(2 * 12, width, generator=g)
    injected["renoise_uniforms"] = torch.rand(2, 4, 3, generator=g)
    if mode == "rand":
        injected["renoise_tokens"] = torch.randint(V, (2, 4, 3), generator=g)
    untouched = gen(7)
    replayed = scheduler.step(
        logits(), 0.2, x, initial_noise=initial, generator=untouched, draws=RenoisingDraws(**injected)
    )
    assert torch.equal(drawn.prev_sample, replayed.prev_sample)
    assert torch.equal(drawn.pred_original_sample, replayed.pred_original_sample)
    assert torch.equal(untouched.get_state(), gen(7).get_state())  # what is injected is not drawn


@given(configs, seeds)
@settings(max_examples=50, deadline=None)
def test_each_image_depends_on_its_own_generator_only(config, seed):
    scheduler = make(**config)
    scheduler.set_timesteps(3)
    x = tokens(seed, b=3)
    together = run(scheduler, x, generator=[gen(seed), gen(seed + 1), gen(seed + 2)])
    alone = run(scheduler, x[1:2], generator=[gen(seed + 1)])
    single = run(scheduler, x[1:2], generator=gen(seed + 1))
    for a, b, c in zip(together, alone, single, strict=True):
        assert torch.equal(a[1:2], b) and torch.equal(b, c)


def test_random_tokens_start_a_run():
    scheduler = make()
    x = scheduler.random_tokens((2, 4, 3), generator=[gen(1), gen(2)])
    assert torch.equal(x[1], torch.randint(V, (4, 3), generator=gen(2)))
    many_tokens = scheduler.random_tokens((1, 100, 100), generator=gen())
    assert many_tokens.min() == 0 and many_tokens.max() == V - 1


def test_runs_are_independent_of_what_ran_before():
    used, fresh = make(), make()
    used.set_timesteps(3, temperature=(3.0, 0.1), renoise_steps=1, start_index=1, renoise_mode="rand")
    run(used, tokens(), generator=gen(8))
    for scheduler in (used, fresh):
        scheduler.set_timesteps(5)
    expected = run(fresh, tokens(), generator=gen())
    for _ in range(2):  # and again without a new grid
        assert all(torch.equal(a, b) for a, b in zip(run(used, tokens(), generator=gen()), expected, strict=True))
    backwards = used.step(logits(), used.timesteps[3], tokens(), initial_noise=tokens(), generator=gen())
    again = copy.deepcopy(used).step(logits(), 0.6, tokens(), initial_noise=tokens(), generator=gen())
    assert torch.equal(backwards.prev_sample, again.prev_sample)  # any step at any time, by tensor or number


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_precision_are_computed_in_float32(dtype):
    scheduler = make()
    scheduler.set_timesteps(4)
    out = logits().to(dtype)
    a, b = (
        scheduler.step(x, torch.tensor([0.25, 0.25]), tokens(), initial_noise=tokens(), generator=gen())
        for x in (out, out.float())
    )
    assert torch.equal(a.prev_sample, b.prev_sample)


# a real scheduler


def test_config_round_trip(tmp_path):
    config = {**V3, "typical_mass": 0.7, "renoise_positions": "confidence", "temperature": (0.7, 0.3)}
    scheduler = make(**config)
    scheduler.save_pretrained(tmp_path)
    loaded = DiscreteRenoisingScheduler.from_pretrained(tmp_path)
    assert {**loaded.config} == {
        name: value for name, value in scheduler.config.items() if name != "_use_default_values"
    }
    for name, value in {"num_vec_classes": V, **config}.items():
        kept = loaded.config[name]
        assert (tuple(kept) if isinstance(value, tuple) else kept) == value
    for s in (scheduler, loaded):
        s.set_timesteps(4)
    assert torch.equal(loaded.temperatures, scheduler.temperatures)
    changed = DiscreteRenoisingScheduler.from_config(loaded.config, renoise_mode="prev")
    assert changed.config["renoise_mode"] == "prev" and changed.config["typical_mass"] == 0.7


def test_members_that_diffusers_counts_on():
    scheduler, x = make(), tokens()
    assert scheduler.order == 1 and scheduler.init_noise_sigma == 1.0
    assert scheduler.scale_model_input(x, scheduler.timesteps[0]) is x
    assert DiscreteRenoisingScheduler in scheduler.compatibles
    assert all(isinstance(cls, type) for cls in scheduler.compatibles)
    assert len(scheduler) == 12 and scheduler.num_inference_steps is None
    scheduler.set_timesteps(4)
    out = scheduler.step(logits(), 0.0, x, initial_noise=x, generator=gen())
    assert isinstance(out, DiscreteRenoisingSchedulerOutput)
    plain = scheduler.step(logits(), 0.0, x, initial_noise=x, generator=gen(), return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], out.prev_sample) and torch.equal(plain[1], out.pred_original_sample)


# bad input


def step(scheduler=None, **changes):
    if scheduler is None:
        scheduler = make()
        scheduler.set_timesteps(4)
    arguments = {"model_output": logits(), "timestep": 0.25, "sample": tokens(), "initial_noise": tokens()}
    arguments.update(changes)
    return scheduler.step(**arguments)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_vec_classes": 1}, "`num_vec_classes` must be an integer >= 2, got 1"),
        ({"noise_schedule": "sigmoid"}, "`noise_schedule` must be one of 'cosine', 'linear', got 'sigmoid'"),
        ({"time_convention": "v2"}, "`time_convention` must be one of 'v1', 'v3', got 'v2'"),
        ({"sampling": "greedy"}, "`sampling` must be one of 'gumbel', 'multinomial', 'argmax', got 'greedy'"),
        ({"renoise_mode": "noise"}, "`renoise_mode` must be one of 'start', 'prev', 'rand', got 'noise'"),
        ({"renoise_positions": "all"}, "`renoise_positions` must be one of 'random', 'confidence', got 'all'"),
        ({"typical_mass": 0.0}, r"`typical_mass` must lie in \(0, 1\], got 0.0"),
        ({"typical_mass": 1.5}, r"`typical_mass` must lie in \(0, 1\], got 1.5"),
        ({"typical_min_tokens": 0}, "`typical_min_tokens` must be an integer >= 1, got 0"),
        ({"temperature": (1.0,)}, r"`temperature` must be a pair .* got \(1.0,\)"),
        ({"temperature": 1.0}, "`temperature` must be a pair .* got 1.0"),
        ({"temperature": (1.0, -0.1)}, r"`temperature` must be a pair .* got \(1.0, -0.1\)"),
        ({"temperature": (float("nan"), 1.0)}, "`temperature` must be a pair .* got"),
    ],
)
def test_bad_configuration_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        DiscreteRenoisingScheduler(**config)


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        ({}, {"num_inference_steps": 0}, "`num_inference_steps` must be >= 1, got 0"),
        ({}, {"num_inference_steps": 2.5}, "`num_inference_steps` must be an integer >= 1, got 2.5"),
        ({}, {}, "`num_inference_steps` must be an integer >= 1, got None"),
        ({}, {"num_inference_steps": 4, "start_index": 4}, r"`start_index` must be an integer in 0..3 .* got 4"),
        ({}, {"num_inference_steps": 4, "start_index": -1}, r"`start_index` must be an integer in 0..3 .* got -1"),
        ({}, {"num_inference_steps": 4, "renoise_steps": 5}, r"`renoise_steps` must be an integer in 0..4 .* got 5"),
        ({}, {"num_inference_steps": 4, "renoise_mode": "x"}, "`renoise_mode` must be one of .* got 'x'"),
        ({}, {"num_inference_steps": 4, "temperature": (1, -1)}, "`temperature` must be a pair"),
        ({}, {"num_inference_steps": 4, "t_start": 0.5}, "`t_start` and `t_end` belong to the v3 .* `start_index`"),
        (V3, {"num_inference_steps": 4, "t_start": 1.5}, "`t_start` <= 1 is needed, got t_start=1.5"),
        (V3, {"num_inference_steps": 4, "t_start": 0.2, "t_end": 0.4}, "got t_start=0.2 and t_end=0.4"),
        ({}, {"num_inference_steps": 2, "timesteps": [0.0, 0.5]}, "`timesteps` is the whole grid"),
        ({}, {"timesteps": [0.5, 0.0]}, r"`timesteps` must be strictly rising from 0 .* got \[0.5, 0.0\]"),
        ({}, {"timesteps": [0.0, 1.0]}, "`timesteps` must be strictly rising"),
        ({}, {"timesteps": []}, "`timesteps` must be strictly rising"),
        (V3, {"timesteps": [0.0, 0.5]}, "`timesteps` must be strictly falling from 1"),
        (V3, {"timesteps": [1.2, 0.5]}, "`timesteps` must be strictly falling from 1"),
    ],
)
def test_bad_grid_is_named(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**config).set_timesteps(**arguments)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"timestep": 0.3},
            ValueError,
            r"`timestep` must be one of `timesteps` .* got \[0.3.*\]; this run has \[0.0, ",
        ),
        ({"timestep": torch.tensor([0.25, 0.5])}, ValueError, "the same for the whole batch"),
        ({"sample": tokens().float()}, TypeError, "`sample` must be a tensor of integer tokens, got torch.float32"),
        ({"model_output": logits()[0]}, ValueError, r"`model_output` must be floating-point logits .* \(10, 4, 3\)"),
        ({"model_output": logits(b=1)}, ValueError, r"shape \(1, 10, 4, 3\), expected \(2, 10, 4, 3\)"),
        ({"model_output": logits()[:, :9]}, ValueError, r"expected \(2, 10, 4, 3\): .* `num_vec_classes`"),
        ({"initial_noise": None}, ValueError, "`initial_noise` is needed .* the run started from"),
        ({"initial_noise": tokens(b=1)}, ValueError, r"`initial_noise` has shape \(1, 4, 3\), expected \(2, 4, 3\)"),
        (
            {"mask": torch.full((2, 4, 3), 0.5)},
            ValueError,
            "`mask` must hold only 0 and 1, got values in .* threshold",
        ),
        ({"mask": torch.ones(2, 8, 6)}, ValueError, r"`mask` has shape \(2, 8, 6\), expected \(2, 4, 3\)"),
        ({"generator": [gen()]}, ValueError, "one per image: got 1 entries for a batch of 2"),
        ({"generator": [gen(), 3]}, ValueError, "`generator` must be one torch.Generator, or one per image"),
        (
            {"draws": RenoisingDraws(gumbel_uniforms=torch.rand(2, 12, V))},
            ValueError,
            r"`gumbel_uniforms` has shape .* expected \(24, 10\)",
        ),
        (
            {"draws": RenoisingDraws(exponentials=torch.rand(24, V))},
            ValueError,
            "draws `exponentials` do not fit sampling='gumbel'.*`gumbel_",
        ),
        (
            {"draws": RenoisingDraws(renoise_uniforms=torch.rand(1, 4, 3))},
            ValueError,
            r"`renoise_uniforms` has shape \(1, 4, 3\), expected",
        ),
    ],
)
def test_bad_step_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        step(**changes)


def test_step_needs_a_grid():
    with pytest.raises(ValueError, match="call `set_timesteps` before `step`"):
        step(make())


@pytest.mark.parametrize(
    "value, where, message",
    [
        (float("nan"), (0, 3, 1, 1), r"2 of 240 logits are non-finite \(2 NaN, 0 \+inf\), 0 positions"),
        (float("inf"), (0, 3, 1, 1), r"2 of 240 logits are non-finite \(0 NaN, 2 \+inf\), 0 positions"),
        (
            -float("inf"),
            (0, slice(None), 1, 1),
            r"0 of 240 logits are non-finite .* 2 positions hold nothing but -inf",
        ),
    ],
)
@pytest.mark.parametrize("sampling", ["gumbel", "multinomial", "argmax"])
def test_logits_that_cannot_be_sampled_stop_before_any_draw(value, where, message, sampling):
    scheduler, out, g = make(sampling=sampling), logits(), gen()
    scheduler.set_timesteps(4)
    out[where] = value
    out[(1, *where[1:])] = value
    with pytest.raises(ValueError, match=r"step index 1 \(timestep 0.25\): " + message):
        step(scheduler, model_output=out, generator=g)
    assert torch.equal(g.get_state(), gen().get_state())


@pytest.mark.parametrize(
    "value, message",
    [
        (float("nan"), r"2 positions hold logits that are non-finite \(2 NaN, 0 \+inf\), 0 positions"),
        (float("inf"), r"2 positions hold logits that are non-finite \(0 NaN, 2 \+inf\), 0 positions"),
        (-float("inf"), r"0 positions .* 2 positions hold nothing but -inf"),
    ],
)
def test_a_loop_may_ask_once_at_its_end_whether_all_could_be_sampled(value, message):
    scheduler, out = make(), logits()
    scheduler.set_timesteps(4)
    unchecked = []
    for index in range(3):
        step(scheduler, model_output=out, timestep=scheduler.timesteps[index], step_index=index, unchecked=unchecked)
    scheduler.check_sampled(unchecked)
    scheduler.check_sampled([])
    out[0, :, 1, 1] = out[1, :, 0, 1] = value
    step(scheduler, model_output=out, timestep=0.25, step_index=1, unchecked=unchecked)
    with pytest.raises(ValueError, match=r"step index 1 \(timestep 0.25\): " + message):
        scheduler.check_sampled(unchecked)


def test_a_step_goes_by_its_index():
    scheduler = make()
    scheduler.set_timesteps(4)
    by_time, by_index = (step(scheduler, generator=gen(), timestep=0.5, **more) for more in ({}, {"step_index": 2}))
    assert torch.equal(by_time.prev_sample, by_index.prev_sample)
    other = step(scheduler, generator=gen(), timestep=0.5, step_index=0)
    assert not torch.equal(other.prev_sample, by_index.prev_sample)
    with pytest.raises(ValueError, match=r"`step_index` must be an integer in 0\.\.3 for this grid, got 4"):
        step(scheduler, timestep=0.5, step_index=4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s, x: s.add_noise(x), ValueError, "`timesteps` is needed"),
        (lambda s, x: s.add_noise(x.float(), None, 0.5), TypeError, "`original_samples` must be a tensor of integer"),
        (lambda s, x: s.add_noise(x[0, 0], None, 0.5), ValueError, "`original_samples` must be a batch of token maps"),
        (
            lambda s, x: s.add_noise(x, None, 1.5),
            ValueError,
            r"`timesteps` are levels of noise in \[0, 1\], got \[1.5",
        ),
        (lambda s, x: s.add_noise(x, None, torch.tensor(float("nan"))), ValueError, r"\[0, 1\], got \[nan"),
        (lambda s, x: s.add_noise(x, None, torch.rand(3)), ValueError, r"shape \(3,\) for a batch of 2"),
        (lambda s, x: s.add_noise(x, x[:1], 0.5), ValueError, r"`noise` has shape \(1, 4, 3\), expected \(2, 4, 3\)"),
        (lambda s, x: s.add_noise(x, None, 0.5, generator=[gen()]), ValueError, "got 1 entries for a batch of 2"),
        (
            lambda s, x: s.add_noise(x, None, 0.5, uniforms=torch.rand(2, 4)),
            ValueError,
            "injected `uniforms` has shape",
        ),
    ],
)
def test_bad_corruption_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(make(), tokens())


# the original's recorded runs, from their recorded logits (parity runs the network as well)


@pytest.mark.parametrize("name", ["v3_sample_txt2img", "v3_sample_init_x"])
def test_recorded_v3_runs_replay_from_their_logits(name):
    facts = json.loads((CASES / name / "case.json").read_text())
    record, call = load_file(CASES / name / "io.safetensors"), facts["call"]
    scheduler = DiscreteRenoisingScheduler(facts["ctor"]["num_labels"], **V3, temperature=tuple(call["temperature"]))
    scheduler.set_timesteps(
        call["steps"], renoise_steps=call["renoise_steps"], t_start=call["t_start"], t_end=call["t_end"]
    )
    guidance = call["cfg"] if isinstance(call["cfg"], list) else [call["cfg"]] * 2
    guidance = torch.linspace(*guidance, call["steps"])
    x = record.get("init_x", record["init_noise"])
    for k, timestep in enumerate(scheduler.timesteps):
        here = {n.removeprefix(f"step{k:02d}_"): v for n, v in record.items() if n.startswith(f"step{k:02d}_")}
        assert torch.equal(x, here["tokens_in"]) and (timestep == here["t"]).all()
        assert torch.equal(scheduler.temperatures[k : k + 1], here["temperature"])
        out = here["logits_cond"]
        if "logits_uncond" in here:
            out = classifier_free_guidance(out, here["logits_uncond"], guidance[k])
        result = scheduler.step(
            out,
            timestep,
            x,
            initial_noise=record["init_noise"],
            draws=RenoisingDraws(exponentials=here["exp_q"], renoise_uniforms=here.get("renoise_u")),
        )
        assert torch.equal(result.pred_original_sample, here["sampled"])
        x = result.prev_sample
        assert torch.equal(x, here["tokens_out"])
    assert torch.equal(x, record["final_tokens"])
