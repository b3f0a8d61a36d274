"""The pure tensor functions: filter, draws, positions. Closed forms, laws, and properties over many inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_ext.schedulers.token_sampling import (
    discrete_renoising_step,
    least_confident_positions,
    replaced_positions,
    sample_tokens,
    typical_filter,
)

many = settings(max_examples=200, deadline=None)
seeds = st.integers(0, 2**31 - 1)
masses = st.one_of(st.floats(1e-6, 1.0), st.sampled_from([1e-6, 0.2, 0.5, 0.9999999, 1.0]))


def make_rows(kind: str, n: int, v: int, seed: int) -> Tensor:
    """Logits of the shapes that a filter may stumble over."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, v, generator=g)
    if kind == "uniform":
        return torch.full((n, v), 1.5)
    if kind == "one-hot":
        return torch.full((n, v), -torch.inf).scatter(1, torch.randint(v, (n, 1), generator=g), 3.0)
    if kind == "peaked":
        return noise * 20
    if kind == "tied":
        return torch.randint(-2, 3, (n, v), generator=g).float()
    if kind == "forbidden":
        noise = noise.masked_fill(torch.rand(n, v, generator=g) < 0.5, -torch.inf)
        return noise.scatter(1, torch.randint(v, (n, 1), generator=g), 0.0)
    return noise * 2


KINDS = ["plain", "uniform", "one-hot", "peaked", "tied", "forbidden"]


def plain_filter(logits: Tensor, mass: float, min_tokens: int) -> Tensor:
    """The filter as the paper states it, row by row, in float64."""
    out = torch.full_like(logits, -torch.inf)
    for i, row in enumerate(logits.double()):
        p = row.softmax(0)
        entropy = -sum(float(q * q.log()) for q in p if q > 0)
        order = sorted(range(len(row)), key=lambda j: abs(-float(p[j].log()) - entropy) if p[j] > 0 else float("inf"))
        total, count = 0.0, 0
        while count < len(order) and (total < mass or count < min_tokens):
            total += float(p[order[count]])
            count += 1
        out[i, order[:count]] = logits[i, order[:count]]
    return out


@pytest.mark.parametrize("mass", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("min_tokens", [1, 4])
def test_typical_filter_is_the_published_rule(mass, min_tokens):
    logits = make_rows("plain", 20, 50, seed=3)
    assert torch.equal(typical_filter(logits, mass, min_tokens), plain_filter(logits, mass, min_tokens))


@given(st.sampled_from(KINDS), st.integers(2, 40), seeds, masses, st.integers(1, 50))
@many
def test_typical_filter_keeps_the_smallest_typical_set(kind, v, seed, mass, min_tokens):
    logits = make_rows(kind, 3, v, seed)
    filtered = typical_filter(logits, mass, min_tokens)
    kept = filtered.isfinite()
    assert torch.equal(filtered[kept], logits[kept])
    p = logits.softmax(-1)
    assert ((p * kept).sum(-1) >= mass - 1e-5).all()
    assert (kept.sum(-1) >= logits.isfinite().sum(-1).clamp(max=min_tokens)).all()
    if mass == 1.0:
        assert torch.equal(filtered, logits)
        return
    log_p = logits.double().log_softmax(-1)
    score = (-log_p + (log_p.exp() * log_p).nansum(-1, keepdim=True)).abs()
    outermost = score.masked_fill(~kept, -1).amax(-1, keepdim=True)
    allowed = logits.isfinite()
    assert (score.masked_fill(kept | ~allowed, torch.inf).amin(-1, keepdim=True) >= outermost - 1e-5).all()
    inner = kept & (
        score < outermost - 1e-5
    )  # without the outermost entries (and their ties) too little would be left
    too_little = (p * inner).sum(-1) < mass + 1e-5
    assert (too_little | (inner.sum(-1) < min_tokens)).all()


@given(st.sampled_from(KINDS), seeds, st.lists(masses, min_size=2, max_size=2))
@many
def test_typical_sets_are_nested(kind, seed, pair):
    logits = make_rows(kind, 2, 17, seed)
    small, large = (typical_filter(logits, mass).isfinite() for mass in sorted(pair))
    assert (small <= large).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mass", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("min_tokens", [1, 100])
def test_short_cut_of_the_filter_equals_the_full_sort(kind, mass, min_tokens, monkeypatch):
    logits = make_rows(kind, 12, 3000, seed=5)
    short = typical_filter(logits, mass, min_tokens)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # takes the branch of the compiled graph
    assert torch.equal(short, typical_filter(logits, mass, min_tokens))


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_chunks_change_nothing(rows):
    logits, u = make_rows("plain", 7, 90, seed=1), torch.rand(7, 90)
    assert torch.equal(typical_filter(logits, chunk_rows=rows), typical_filter(logits))
    tokens = sample_tokens(logits, u, typical_mass=0.4)
    assert torch.equal(sample_tokens(logits, u, typical_mass=0.4, chunk_rows=rows), tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_filter_and_draws_compute_in_float32(dtype):
    logits, u = make_rows("plain", 30, 40, seed=1).to(dtype), torch.rand(30, 40)
    assert typical_filter(logits, 0.3).dtype == torch.float32
    assert torch.equal(typical_filter(logits, 0.3), typical_filter(logits.float(), 0.3))
    assert torch.equal(sample_tokens(logits, u), sample_tokens(logits.float(), u))


def make_draws(sampling: str, n: int, v: int) -> Tensor | None:
    g = torch.Generator().manual_seed(11)
    if sampling == "race":
        return torch.empty(n, v).exponential_(generator=g)
    return None if sampling == "argmax" else torch.rand(n, 2 if sampling == "inverse_cdf" else v, generator=g)


@pytest.mark.parametrize("sampling", ["gumbel", "race", "inverse_cdf"])
@pytest.mark.parametrize("temperature, mass", [(1.0, None), (0.5, None), (2.0, None), (1.0, 0.6), (0.7, 0.3)])
def test_every_draw_follows_the_filtered_and_tempered_softmax(sampling, temperature, mass):
    n, v = 30_000, 11
    row = torch.randn(1, v, generator=torch.Generator().manual_seed(2)) * 1.5
    logits = row.expand(n, v)
    tokens = sample_tokens(logits, make_draws(sampling, n, v), temperature, sampling=sampling, typical_mass=mass)
    p = (row if mass is None else typical_filter(row, mass)).div(temperature).softmax(-1)[0].double()
    count = tokens.bincount(minlength=v).double()
    assert (count[p == 0] == 0).all()
    chi2 = ((count - n * p) ** 2 / (n * p))[p > 0].sum()
    assert chi2 < 30, f"chi-square {chi2:.1f} on at most 10 degrees of freedom (the draws are seeded)"


def test_inverse_cdf_follows_the_law_over_many_classes():
    n, v = 60_000, 300  # several blocks, the last one padded
    row = torch.randn(1, v, generator=torch.Generator().manual_seed(2))
    tokens = sample_tokens(row.expand(n, v), make_draws("inverse_cdf", n, v), sampling="inverse_cdf")
    expected = n * row.softmax(-1)[0].double()
    chi2 = ((tokens.bincount(minlength=v) - expected) ** 2 / expected).sum()
    assert 200 < chi2 < 400, f"chi-square {chi2:.1f} on 299 degrees of freedom"


@given(st.integers(2, 200), seeds)
@many
def test_inverse_cdf_never_draws_what_has_no_probability(v, seed):
    logits = make_rows("forbidden", 9, v, seed)
    edge = torch.tensor([0.0, 0.5, 1 - 2**-24])
    tokens = sample_tokens(logits, torch.cartesian_prod(edge, edge), sampling="inverse_cdf")
    assert ((tokens >= 0) & (tokens < v)).all()
    assert logits.gather(1, tokens[:, None]).isfinite().all()


@given(st.sampled_from(KINDS), st.sampled_from(["gumbel", "race", "inverse_cdf", "argmax"]), seeds, masses)
@many
def test_drawn_tokens_are_allowed_tokens(kind, sampling, seed, mass):
    logits = make_rows(kind, 5, 80, seed)
    draws = make_draws(sampling, 5, 80)
    for temperature in (0.0, 1.0, 100.0):
        tokens = sample_tokens(logits, draws, temperature, sampling=sampling, typical_mass=mass)
        assert typical_filter(logits, mass).gather(1, tokens[:, None]).isfinite().all()


def test_gumbel_draws_among_what_the_filter_left():
    logits, u = make_rows("plain", 40, 500, seed=4), torch.rand(40, 500)
    gumbel = -(-(u + 1e-20).log() + 1e-20).log()
    expected = (typical_filter(logits, 0.4) / 0.8 + gumbel).argmax(-1)
    assert torch.equal(sample_tokens(logits, u, 0.8, typical_mass=0.4), expected)


def test_race_is_what_torch_multinomial_computes():
    p = make_rows("plain", 40, 50, seed=4).softmax(-1)
    torch.manual_seed(9)
    expected = torch.multinomial(p, 1)[:, 0]
    torch.manual_seed(9)
    q = torch.empty_like(p).exponential_()
    assert torch.equal(sample_tokens(p.log(), q, sampling="race"), expected)


@pytest.mark.parametrize("sampling", ["gumbel", "race", "inverse_cdf"])
def test_temperature_zero_is_argmax(sampling):
    logits = make_rows("plain", 40, 50, seed=4)
    assert torch.equal(sample_tokens(logits, make_draws(sampling, 40, 50), 0.0, sampling=sampling), logits.argmax(-1))


def test_replaced_positions_at_the_ends():
    u = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24])
    for inclusive in (False, True):
        assert not replaced_positions(u, torch.tensor(0.0), inclusive=inclusive).any()
        assert replaced_positions(u, torch.tensor(1.0), inclusive=inclusive).all()
    half = torch.tensor(0.5)
    assert replaced_positions(u, half).tolist() == [True, True, False, False]
    assert replaced_positions(u, half, inclusive=True).tolist() == [True, True, True, False]


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), seeds, st.booleans())
@many
def test_least_confident_positions_are_as_many_as_asked_and_the_least(h, w, ratio, seed, masked):
    g = torch.Generator().manual_seed(seed)
    confidence = torch.randint(-3, 1, (3, h, w), generator=g).float()  # with ties
    mask = torch.rand(3, h, w, generator=g) < 0.6 if masked else None
    chosen = least_confident_positions(confidence, torch.rand(3, h, w, generator=g), torch.tensor(ratio), mask=mask)
    eligible = torch.ones_like(chosen) if mask is None else mask
    assert (chosen <= eligible).all()
    assert torch.equal(chosen.flatten(1).sum(1), (eligible.flatten(1).sum(1) * torch.tensor(ratio)).round().long())
    highest = confidence.masked_fill(~chosen, -torch.inf).flatten(1).amax(1)
    assert (confidence.masked_fill(chosen | ~eligible, torch.inf).flatten(1).amin(1) >= highest).all()


def test_equal_confidence_is_broken_by_the_uniforms_not_by_place():
    u = torch.rand(1, 4, 4)
    chosen = least_confident_positions(torch.zeros(1, 4, 4), u, torch.tensor(0.25))
    assert torch.equal(chosen.flatten(), u.flatten() <= u.flatten().sort().values[3])


def step_inputs(b: int = 2, v: int = 70, h: int = 3, w: int = 2) -> dict:
    g = torch.Generator().manual_seed(8)
    return {
        "logits": torch.randn(b, v, h, w, generator=g),
        "draws": torch.rand(b * h * w, v, generator=g),
        "temperature": torch.tensor(0.8),
        "typical_mass": 0.3,
        "mask": torch.rand(b, h, w, generator=g) < 0.7,
        "known": torch.randint(v, (b, h, w), generator=g),
        "replacement": torch.randint(v, (b, h, w), generator=g),
        "renoise_uniforms": torch.rand(b, h, w, generator=g),
        "noise_ratio": torch.tensor(0.5),
    }


@pytest.mark.parametrize("positions", ["random", "confidence"])
def test_tensor_step_compiles_as_one_full_graph(positions):
    inputs = step_inputs()
    eager = discrete_renoising_step(**inputs, renoise_positions=positions)
    # aot_eager traces the whole graph, and breaks on a host read, without the minute that a C++ compiler takes
    compiled = torch.compile(discrete_renoising_step, fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, compiled(**inputs, renoise_positions=positions), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["gumbel", "inverse_cdf"])
def test_tensor_step_compiles_with_inductor(sampling):
    inputs = step_inputs()
    if sampling == "inverse_cdf":
        inputs["draws"] = inputs["draws"][:, :2]
    eager = discrete_renoising_step(**inputs, sampling=sampling)
    for a, b in zip(
        eager, torch.compile(discrete_renoising_step, fullgraph=True)(**inputs, sampling=sampling), strict=True
    ):
        assert torch.equal(a, b)


def test_tensor_step_by_hand():
    inputs = step_inputs()
    prev, clean = discrete_renoising_step(**inputs)
    rows = inputs["logits"].permute(0, 2, 3, 1).reshape(-1, 70)
    drawn = sample_tokens(rows, inputs["draws"], 0.8, typical_mass=0.3).view(2, 3, 2)
    assert torch.equal(clean, torch.where(inputs["mask"], drawn, inputs["known"]))
    assert torch.equal(prev, torch.where(inputs["renoise_uniforms"] < 0.5, inputs["replacement"], clean))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, u: typical_filter(x, 0.0), r"`typical_mass` must lie in \(0, 1\], got 0.0"),
        (lambda x, u: typical_filter(x, 1.01), r"`typical_mass` must lie in \(0, 1\], got 1.01"),
        (lambda x, u: typical_filter(x, float("nan")), r"`typical_mass` must lie in \(0, 1\], got nan"),
        (lambda x, u: typical_filter(x, 0.2, 0), "`typical_min_tokens` must be an integer >= 1, got 0"),
        (lambda x, u: typical_filter(x, 0.2, 1.5), "`typical_min_tokens` must be an integer >= 1, got 1.5"),
        (lambda x, u: typical_filter(x[None]), r"`logits` must be a matrix .* got shape \(1, 4, 6\).*permute"),
        (lambda x, u: sample_tokens(x, u, sampling="nucleus"), "`sampling` must be one of 'gumbel'.*got 'nucleus'"),
        (lambda x, u: sample_tokens(x, u[:, :3]), r"`draws` for 'gumbel' must have shape \(4, 6\), got \(4, 3\)"),
        (lambda x, u: sample_tokens(x), r"`draws` for 'gumbel' must have shape \(4, 6\), got None"),
        (
            lambda x, u: discrete_renoising_step(
                x.T.reshape(1, 6, 2, 2), u, replacement=torch.zeros(1, 2, 2, dtype=torch.long)
            ),
            "renoising needs `renoise_mask`, or `renoise_uniforms` and `noise_ratio`",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 6), torch.rand(4, 6))
