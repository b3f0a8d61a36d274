"""Tokens from logits and back to noise: the pure tensor functions of discrete renoising (Paella, arXiv 2211.07292).

Locally typical sampling: Meister et al., arXiv 2202.00666. Confidence-ordered positions: MaskGIT, arXiv 2202.04200.
Nothing here draws a random number, and `discrete_renoising_step` reads no tensor back to the host (but for the
filter's histogram on a CPU), so that it compiles as one full graph. The checks of its inputs stand here too. The
scheduler draws, checks and remembers.

Letters in shape comments: b images, v token classes, (h, w) the token grid, n = b*h*w rows of logits.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-20  # inside the logarithms of the Gumbel draw, as in the original; vanishes below float32
_MIN_TEMPERATURE = 1e-10


def typical_filter(logits: Tensor, mass: float = 0.2, min_tokens: int = 1, *, chunk_rows: int | None = None) -> Tensor:
    """Locally typical filtering: keep the entries whose surprisal is nearest to the entropy (arXiv 2202.00666).

    Entries are ordered by `| -log p - H |`. Kept is everything up to and including the entry at which the
    accumulated probability reaches `mass`, and whatever ties with it; at least one entry, at least `min_tokens`.

    Args:
        logits: (n, v), any real dtype; `-inf` marks forbidden entries. The maths is float32.
        mass: probability to keep, in (0, 1]; 1 keeps everything.
        min_tokens: keep at least this many entries of a row (all of them in a shorter row), >= 1.
        chunk_rows: rows handled at a time; bounds the memory and changes no result. Default: by device.

    Returns:
        (n, v) float32: the logits, with `-inf` in place of what was removed.

    Raises:
        ValueError: `mass` outside (0, 1], `min_tokens` < 1, or logits that are not a matrix.
    """
    check_typical(mass, min_tokens)
    if logits.ndim != 2:
        raise ValueError(
            f"`logits` must be a matrix of (rows, classes), got shape {tuple(logits.shape)}: bring maps (b, v, h, w) "
            "to rows with `logits.permute(0, 2, 3, 1).flatten(0, 2)`."
        )
    chunks = [_filter_rows(rows.float(), mass, min_tokens) for rows in logits.split(chunk_rows or _chunk_rows(logits))]
    return torch.cat(chunks) if chunks else logits.float()


def _filter_rows(logits: Tensor, mass: float, min_tokens: int) -> Tensor:
    """`typical_filter` of one chunk, float32 (n, v)."""
    if mass == 1.0:  # exactly everything, whatever rounding makes of the accumulated probability
        return logits
    log_p = F.log_softmax(logits, dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p).nansum(dim=-1, keepdim=True)  # 0 * -inf of forbidden entries counts as 0
    score = (-log_p - entropy).abs()  # (n, v); +inf at forbidden entries, so they come last
    # Short rows sort as fast as they are counted. The histogram must look at its counts: an accelerator would have to
    # wait for them, and a graph would break.
    by_histogram = score.shape[-1] > 1024 and score.device.type == "cpu" and not torch.compiler.is_compiling()
    limit = _limit_by_histogram(score, p, mass) if by_histogram else _limit_by_sorting(score, p, mass)
    if min_tokens > 1:
        nearest = score.topk(min(min_tokens, score.shape[-1]), dim=-1, largest=False).values
        limit = limit.maximum(nearest[:, -1:])
    return logits.masked_fill(score > limit, -torch.inf)


def _limit_by_sorting(score: Tensor, p: Tensor, mass: float, reached: Tensor | float = 0.0) -> Tensor:
    """Score (n, 1) at which the probability, accumulated in the order of `score`, reaches `mass`.

    Args:
        score, p: (n, v).
        reached: (n, 1), probability accumulated before the first entry.
    """
    ordered, order = score.sort(dim=-1)
    cumulative = p.gather(-1, order).cumsum(dim=-1) + reached
    # the entry that crosses the mass; where rounding leaves the total below it, the last entry
    last = (cumulative < mass).sum(dim=-1, keepdim=True).clamp(max=score.shape[-1] - 1)
    return ordered.gather(-1, last)


def _limit_by_histogram(score: Tensor, p: Tensor, mass: float, num_bins: int = 2048) -> Tensor:
    """`_limit_by_sorting` without sorting it all: finds the bin in which the mass is reached, and sorts that.

    The bin of a score is a monotone function of it also in floating point, so bins never split the order.
    """
    largest = score.masked_fill(score.isinf(), 0.0).amax(dim=-1, keepdim=True)
    scale = (num_bins / largest).clamp(max=1e30)  # finite, so that 0 stays 0
    bins = (score * scale).clamp_(max=num_bins - 1).long()  # (n, v)
    totals = torch.zeros(len(p), num_bins).scatter_add_(-1, bins, p).cpu().double()  # this way is for CPUs
    cumulative = totals.cumsum(dim=-1)
    crossed = (cumulative < mass).sum(dim=-1, keepdim=True)
    # where rounding leaves all of them below the mass, the last bin with weight
    crossed = crossed.minimum((cumulative < cumulative[:, -1:]).sum(dim=-1, keepdim=True))
    reached = (cumulative - totals).gather(-1, crossed)
    inside = bins == crossed
    # what is left, a few entries a row: ragged, so padded by entries that come last and weigh nothing
    row, column = inside.nonzero(as_tuple=True)
    count = inside.sum(dim=-1)
    rank = torch.arange(len(row)) - (count.cumsum(dim=0) - count)[row]
    few = torch.full((len(p), int(count.max())), torch.inf)
    few_p = torch.zeros_like(few)
    few[row, rank], few_p[row, rank] = score[row, column], p[row, column]
    outermost = few.masked_fill(few.isinf(), -torch.inf).amax(dim=-1, keepdim=True)
    return _limit_by_sorting(few, few_p, mass, reached).minimum(outermost)


def _chunk_rows(logits: Tensor) -> int:
    # CPU: a chunk and its handful of temporaries stay in the core's cache (3 times faster at 8192 classes, measured);
    # accelerators: large launches with bounded memory; a compiled graph: no unrolled loop
    if torch.compiler.is_compiling():
        return max(1, logits.shape[0])
    return max(1, (131_072 if logits.device.type == "cpu" else 67_108_864) // max(1, logits.shape[-1]))


def check_typical(mass: float, min_tokens: int) -> None:
    """Mass and number of tokens that `typical_filter` can keep."""
    if not 0.0 < mass <= 1.0:
        raise ValueError(f"`typical_mass` must lie in (0, 1], got {mass}: 1 keeps every token, 0.2 is the original's.")
    if isinstance(min_tokens, bool) or not isinstance(min_tokens, int) or min_tokens < 1:
        raise ValueError(f"`typical_min_tokens` must be an integer >= 1, got {min_tokens!r}.")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """One of the allowed words."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_integer(name: str, value: int, low: int, high: int) -> int:
    """An integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"`{name}` must be an integer in {low}..{high} for this grid, got {value!r}.")
    return value


def check_temperature(temperature: Sequence[float]) -> tuple[float, float]:
    """First and last temperature as floats."""
    if (
        not isinstance(temperature, Sequence)
        or len(temperature) != 2
        or not all(isinstance(t, (int, float)) and math.isfinite(t) and t >= 0 for t in temperature)
    ):
        raise ValueError(f"`temperature` must be a pair (first, last) of finite numbers >= 0, got {temperature!r}.")
    return float(temperature[0]), float(temperature[1])


def check_levels(levels: Tensor, time_convention: str) -> None:
    """Levels of noise of a whole run that fall without a pause, the clean one last.

    Args:
        levels: (steps + 1,).
        time_convention: `v1` (0 = all noise, 1 = clean) or `v3` (the other way round).
    """
    falling = (levels.diff() > 0) if time_convention == "v1" else (levels.diff() < 0)
    if len(levels) < 2 or not bool(falling.all()) or not bool(((levels >= 0) & (levels <= 1)).all()):
        order = "rising from 0 (all noise) to below 1"
        if time_convention == "v3":
            order = "falling from 1 (all noise) to above 0"
        raise ValueError(f"`timesteps` must be strictly {order}, got {levels[:-1].tolist()}.")


def check_tokens(name: str, tokens: Tensor, shape: Sequence[int] | None = None) -> None:
    """A batch of maps of integer tokens, of the wanted shape if one is given."""
    if (
        not isinstance(tokens, Tensor)
        or tokens.is_floating_point()
        or tokens.is_complex()
        or tokens.dtype == torch.bool
    ):
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(
            f"`{name}` must be a tensor of integer tokens, got {kind}: images are encoded to tokens first."
        )
    if tokens.ndim < 2:
        raise ValueError(f"`{name}` must be a batch of token maps (b, h, w), got shape {tuple(tokens.shape)}.")
    if shape is not None and tokens.shape != shape:
        raise ValueError(f"`{name}` has shape {tuple(tokens.shape)}, expected {tuple(shape)} as the other tokens.")


def check_mask(name: str, mask: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """The mask as booleans of the whole shape. Integer and float masks must hold 0 and 1 only."""
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"`{name}` must hold only 0 and 1, got values in [{mask.min()}, {mask.max()}]: threshold it."
            )
        mask = mask == 1
    try:
        return mask.to(device).expand(tuple(shape))
    except RuntimeError as error:
        raise ValueError(f"`{name}` has shape {tuple(mask.shape)}, expected {tuple(shape)} (b, h, w).") from error


def check_logits(logits: Tensor, sample: Tensor, num_vec_classes: int) -> None:
    """Floating-point logits (b, v, h, w) of the tokens (b, h, w)."""
    check_tokens("sample", sample)
    if sample.ndim != 3 or logits.ndim != 4 or not logits.is_floating_point():
        raise ValueError(
            f"`model_output` must be floating-point logits (b, v, h, w) and `sample` tokens (b, h, w), got shapes "
            f"{tuple(logits.shape)} ({logits.dtype}) and {tuple(sample.shape)}."
        )
    expected = (sample.shape[0], num_vec_classes, *sample.shape[1:])
    if logits.shape != expected:
        raise ValueError(
            f"`model_output` has shape {tuple(logits.shape)}, expected {expected}: (b, num_vec_classes, h, w) for this"
            " `sample` and the scheduler's `num_vec_classes`."
        )


def unfit_positions(logits: Tensor) -> Tensor:
    """How many positions of (b, v, h, w) hold NaN, +inf, or nothing but -inf: (3,), on the device."""
    largest = logits.amax(dim=1)  # NaN, +inf or -inf exactly where a position cannot be sampled
    return torch.stack([largest.isnan().sum(), (largest == torch.inf).sum(), (largest == -torch.inf).sum()])


def sample_tokens(
    logits: Tensor,
    draws: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    sampling: str = "gumbel",
    typical_mass: float | None = None,
    typical_min_tokens: int = 1,
    chunk_rows: int | None = None,
) -> Tensor:
    """Draw one token per row of logits from `softmax(filter(logits) / temperature)`, by draws that are passed in.

    Args:
        logits: (n, v), any real dtype; the maths is float32.
        draws: float32, according to `sampling`.
        temperature: >= 0, a number or a scalar tensor; values below 1e-10 count as 1e-10 (argmax in effect).
        sampling: `gumbel` is `argmax(l / temperature - log(-log u))`, draws are uniforms u (n, v) in [0, 1).
            `race` is `argmax(p / q)`, draws are q ~ Exp(1) (n, v); it is what `torch.multinomial` computes.
            `inverse_cdf` takes uniforms (n, 2), for a block of classes and the place inside it: equal in law, and two
            orders of magnitude cheaper than a race over 8192 classes. `argmax` takes no draws.
        typical_mass: apply `typical_filter` with this mass first; None: no filter.
        typical_min_tokens: see `typical_filter`.
        chunk_rows: rows handled at a time; bounds the memory and changes no result. Default: by device.

    Returns:
        LongTensor (n,).

    Raises:
        ValueError: an unknown `sampling`, or draws of another shape than it takes.
    """
    n, v = logits.shape
    shapes = {"gumbel": (n, v), "race": (n, v), "inverse_cdf": (n, 2), "argmax": None}
    if sampling not in shapes:
        raise ValueError(f"`sampling` must be one of {', '.join(map(repr, shapes))}, got {sampling!r}.")
    if (None if draws is None else tuple(draws.shape)) != shapes[sampling]:
        got = None if draws is None else tuple(draws.shape)
        raise ValueError(f"`draws` for {sampling!r} must have shape {shapes[sampling]}, got {got}.")
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(float(temperature))
    temperature = temperature.to(device=logits.device, dtype=torch.float32).clamp(min=_MIN_TEMPERATURE)
    size = chunk_rows or _chunk_rows(logits)

    tokens = []
    for start in range(0, n, size):
        rows = logits[start : start + size].float()
        draw = None if draws is None else draws[start : start + size]
        if typical_mass is not None:
            rows = _filter_rows(rows, typical_mass, typical_min_tokens)
        if draw is None:
            drawn = rows.argmax(dim=-1)
        elif sampling == "gumbel":
            drawn = (rows / temperature - (-(draw + _EPS).log() + _EPS).log()).argmax(dim=-1)
        elif sampling == "race":
            p = (rows / temperature).softmax(dim=-1)
            drawn = (p / draw.clamp(min=torch.finfo(torch.float32).tiny)).argmax(dim=-1)
        else:
            drawn = _inverse_cdf((rows / temperature).softmax(dim=-1), draw)
        tokens.append(drawn)
    return torch.cat(tokens) if tokens else logits.new_zeros(0, dtype=torch.long)


def _inverse_cdf(p: Tensor, uniforms: Tensor) -> Tensor:
    """Two-level inverse CDF: a block of classes by its total, then a class inside it. p (n, v), uniforms (n, 2)."""
    size = 2 ** ((max(p.shape[-1] - 1, 1)).bit_length() // 2)  # about sqrt(v), so both levels are short
    blocks = F.pad(p, (0, -p.shape[-1] % size)).unflatten(-1, (-1, size))  # (n, v / size, size)
    block = _first_above(blocks.sum(dim=-1), uniforms[:, :1])
    inside = blocks.gather(1, block[..., None].expand(-1, -1, size)).squeeze(1)  # (n, size)
    return (block * size + _first_above(inside, uniforms[:, 1:])).squeeze(-1)


def _first_above(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index (n, 1) of the first running total above `uniforms` times the whole, never one of weight 0."""
    totals = weights.cumsum(dim=-1)
    above = (totals <= uniforms * totals[:, -1:]).sum(dim=-1, keepdim=True)
    # rounding may put u * total on the total itself: the entry that completed the total is the last with weight
    return above.minimum((totals < totals[:, -1:]).sum(dim=-1, keepdim=True))


def replaced_positions(uniforms: Tensor, noise_ratio: Tensor, *, inclusive: bool = False) -> Tensor:
    """Bernoulli mask of replaced positions: `u < p` (v1), or `u <= p` (v3, `inclusive`); p = 0 replaces nothing."""
    return (uniforms <= noise_ratio) & (noise_ratio > 0) if inclusive else uniforms < noise_ratio


def least_confident_positions(
    confidence: Tensor, uniforms: Tensor, noise_ratio: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Boolean mask (b, h, w) of the `round(noise_ratio * positions)` least confident positions of every image.

    Args:
        confidence: (b, h, w), for instance the log-probability of the drawn token.
        uniforms: (b, h, w), orders positions of equal confidence.
        noise_ratio: share of the positions to choose, in [0, 1], broadcastable to (b, 1).
        mask: (b, h, w) bool; only these positions can be chosen, and the share is one of them.
    """
    eligible = torch.ones_like(confidence, dtype=torch.bool) if mask is None else mask
    eligible = eligible.flatten(1)
    first = uniforms.flatten(1).argsort(dim=-1)  # random order, kept among equals by the stable sort below
    score = confidence.flatten(1).masked_fill(~eligible, torch.inf)
    order = first.gather(-1, score.gather(-1, first).argsort(dim=-1, stable=True))
    count = (noise_ratio.reshape(-1, 1) * eligible.sum(dim=-1, keepdim=True)).round().long()  # (b, 1)
    chosen = torch.arange(order.shape[-1], device=order.device) < count  # (b, h*w), by rank
    chosen = torch.zeros_like(eligible).scatter(-1, order, chosen.expand_as(order))
    return (chosen & eligible).view_as(confidence)


def discrete_renoising_step(
    logits: Tensor,
    draws: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    sampling: str = "gumbel",
    typical_mass: float | None = None,
    typical_min_tokens: int = 1,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    replacement: Tensor | None = None,
    renoise_mask: Tensor | None = None,
    renoise_uniforms: Tensor | None = None,
    noise_ratio: Tensor | None = None,
    renoise_positions: str = "random",
    inclusive: bool = False,
) -> tuple[Tensor, Tensor]:
    """The tensor part of one sampling step: draw tokens, restore what is kept, put noise back.

    Pure: all draws come in as tensors, nothing is read back to the host, so `torch.compile(fullgraph=True)` takes it.

    Args:
        logits: (b, v, h, w), already guided, any real dtype; the maths is float32.
        draws: over rows of logits, in the order (b, h, w); with `temperature`, `sampling`, `typical_mass` and
            `typical_min_tokens` as `sample_tokens` takes them.
        mask: bool (b, h, w), True where tokens are generated; None: everywhere.
        known: LongTensor (b, h, w), read where `mask` is False.
        replacement: LongTensor (b, h, w), what renoised positions receive; None: no renoising.
        renoise_mask: bool (b, h, w), the renoised positions; None: chosen by the next three.
        renoise_uniforms: (b, h, w) uniforms in [0, 1).
        noise_ratio: share of the positions to renoise, a scalar tensor in [0, 1].
        renoise_positions: `random` (`replaced_positions`) or `confidence` (`least_confident_positions`).
        inclusive: see `replaced_positions`.

    Returns:
        `(prev_sample, pred_original_sample)`, LongTensors (b, h, w).
    """
    b, v, h, w = logits.shape
    rows = logits.permute(0, 2, 3, 1).reshape(-1, v)  # (b, v, h, w) -> (n, v)
    tokens = sample_tokens(
        rows,
        draws,
        temperature,
        sampling=sampling,
        typical_mass=typical_mass,
        typical_min_tokens=typical_min_tokens,
    )
    clean = tokens.view(b, h, w)
    if mask is not None and known is not None:
        clean = torch.where(mask, clean, known)
    if replacement is None:
        return clean, clean
    if renoise_mask is None:
        if renoise_uniforms is None or noise_ratio is None:
            raise ValueError("renoising needs `renoise_mask`, or `renoise_uniforms` and `noise_ratio`.")
        if renoise_positions == "confidence":
            # log-probability under the unfiltered prediction: the filter often leaves one token, at probability 1
            rows = rows.float()
            confidence = (rows.gather(-1, tokens[:, None]).squeeze(-1) - rows.logsumexp(dim=-1)).view(b, h, w)
            renoise_mask = least_confident_positions(confidence, renoise_uniforms, noise_ratio, mask=mask)
        else:
            renoise_mask = replaced_positions(renoise_uniforms, noise_ratio, inclusive=inclusive)
    return torch.where(renoise_mask, replacement, clean), clean
