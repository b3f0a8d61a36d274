"""Style and meaning in the local tokens of a picture's context, told apart by rank (Versatile Diffusion, section 4.3).

Xu et al., arXiv 2211.08332: the leading singular directions of the CLIP tokens of a picture carry its style, the
others what is on it. Original: SHI-Labs/Versatile-Diffusion@cf0f4a2:app.py (levels), @51dcd3b:inference.py (ranks).
Difference: an exact decomposition instead of a randomised one, and one sample does not depend on the others.
"""

import math

import torch
from torch import Tensor

RANKS = 20  # ranks that the levels tell apart
SEMANTIC_DROPPED = 1  # at level 0 the ranks 0 to 1 are gone
STYLE_KEPT = 5  # at level 1 the ranks 0 to 4 are left


def focus_scales(
    level: float, *, ranks: int = RANKS, dropped: int = SEMANTIC_DROPPED, kept: int = STYLE_KEPT
) -> list[float]:
    """What `rescale_ranks` multiplies the singular values with, one factor for each of the leading ranks.

    Both ends fade in exponentially with the level, from no change at 0.5: rank by rank along a line that is cut off
    at 0.

    Args:
        level: 0 keeps the meaning, 0.5 everything, 1 the style.
        ranks: leading ranks that the levels tell apart (`q` of the original).
        dropped: at level 0 the ranks 0 to this one are gone (`max_drop_rank[0]`).
        kept: at level 1 so many ranks are left (`max_drop_rank[1]`).
    """
    if not 0 <= level <= 1:
        raise ValueError(f"`level` is {level}: it lies between 0 (semantic) and 1 (style), 0.5 changes nothing.")
    if not (0 <= dropped < ranks and 0 <= kept <= ranks):
        raise ValueError(
            f"`ranks` is {ranks}, `dropped` {dropped} and `kept` {kept}: 0 <= dropped < ranks and 0 <= kept <= ranks "
            "are needed."
        )
    scales = [1.0] * ranks
    grown = math.exp(2 * (level - 0.5))
    if level < 0.5:
        fraction = (grown - math.exp(-1)) / (1 - math.exp(-1))  # 0 at level 0, 1 at level 0.5
        start = fraction * (1 + dropped) - dropped
        for rank in range(dropped + 1):
            scales[rank] = max(0.0, start + (1 - start) * rank / (dropped + 1))
    elif level > 0.5:
        fraction = (grown - math.e) / (1 - math.e)  # 1 at level 0.5, 0 at level 1
        end = fraction * (1 + ranks - kept) - (ranks - kept)
        for rank in range(kept, ranks):
            scales[rank] = max(0.0, end + (1 - end) * (ranks - 1 - rank) / (ranks - kept))
    return scales


def rescale_ranks(
    tokens: Tensor, level: float, *, ranks: int = RANKS, dropped: int = SEMANTIC_DROPPED, kept: int = STYLE_KEPT
) -> Tensor:
    """Moves the focus of a context towards meaning or style.

    Args:
        tokens: local tokens of a picture's context (b, n, d), without the class token.
        level: 0 keeps the meaning, 0.5 everything, 1 the style.
        ranks: as for `focus_scales`; so are `dropped` and `kept`.

    Returns:
        Tokens of the same shape, dtype and standard deviation.
    """
    scales = focus_scales(level, ranks=ranks, dropped=dropped, kept=kept)
    if level == 0.5:
        return tokens
    mean, u, s, vh = _decompose(tokens)
    count = min(ranks, s.shape[-1])
    factors = torch.ones_like(s) if level < 0.5 else torch.zeros_like(s)  # of the ranks beyond
    factors[..., :count] = torch.tensor(scales[:count], dtype=s.dtype, device=s.device)
    changed = mean + (u * (s * factors)[..., None, :]) @ vh
    changed = changed * (_std(tokens.float()) / _std(changed))
    return changed.to(tokens.dtype)


def select_ranks(
    tokens: Tensor,
    start: int,
    stop: int,
    *,
    iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Tokens (b, n, d) of which only the ranks start .. stop - 1 are left, as in the first release.

    It keeps the style with (0, 10) or (0, 2), and the meaning with (1, 50) or (2, 50).

    Args:
        iterations: None decomposes exactly; a number finds the ranks by that many subspace iterations from random
            directions, for the original's numbers (10, and not converged: errors of 1e-3 of the tokens).
        generator: of the random directions; they are drawn on its device.
    """
    if not 0 <= start < stop:
        raise ValueError(f"`start` is {start} and `stop` {stop}: ranks are counted from 0, and at least one is kept.")
    if iterations is None:
        mean, u, s, vh = _decompose(tokens)
    else:
        mean, u, s, vh = _approximate(tokens, stop, iterations, generator)
    kept = slice(start, stop)
    return (mean + (u[..., kept] * s[..., None, kept]) @ vh[..., kept, :]).to(tokens.dtype)


def _decompose(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean of each token, U, S, V^T) of the tokens without their means, in float32."""
    if tokens.ndim != 3 or tokens.numel() == 0:
        raise ValueError(f"`tokens` has shape {tuple(tokens.shape)}: expected (batch, tokens, width), not empty.")
    values = tokens.float()
    mean = values.mean(dim=-1, keepdim=True)
    u, s, vh = torch.linalg.svd(values - mean, full_matrices=False)
    return mean, u, s, vh


def _approximate(
    tokens: Tensor, rank: int, iterations: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_decompose`, but only `rank` ranks, by randomised subspace iteration (arXiv 0909.4061, algorithm 4.4)."""
    values = tokens.float()
    mean = values.mean(dim=-1, keepdim=True)
    centred = values - mean
    is_wide = centred.shape[-2] < centred.shape[-1]
    matrix = centred.mT if is_wide else centred
    device = generator.device if generator is not None else matrix.device
    directions = torch.randn(matrix.shape[-1], rank, generator=generator, device=device).to(matrix)
    basis = torch.linalg.qr(matrix @ directions).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    u = basis @ u
    return (mean, vh.mT, s, u.mT) if is_wide else (mean, u, s, vh)


def _std(tokens: Tensor) -> Tensor:
    return tokens.std(dim=(-2, -1), keepdim=True)
