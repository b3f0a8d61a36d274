"""Ranks of a context's tokens; the original's numbers are a parity case (vd/disentangle)."""

import pytest
import torch

from diffusers_ext.conditions.focus import RANKS, focus_scales, rescale_ranks, select_ranks


def tokens(batch: int = 2, count: int = 30, width: int = 40) -> torch.Tensor:
    """Singular values that fall, as those of a picture's tokens do."""
    fall = torch.diag(0.8 ** torch.arange(count, dtype=torch.float32))
    return torch.randn(batch, count, count) @ fall @ torch.randn(batch, count, width) + 3


def test_scales_go_from_meaning_over_everything_to_style():
    assert focus_scales(0.5) == [1.0] * RANKS
    assert focus_scales(0) == [0.0, 0.0] + [1.0] * (RANKS - 2)
    assert focus_scales(1) == [1.0] * 5 + [0.0] * (RANKS - 5)
    for level, nearer in ((0.1, 0.3), (0.9, 0.7)):  # nearer to 0.5 keeps more of every rank
        assert all(a <= b for a, b in zip(focus_scales(level), focus_scales(nearer), strict=True))
        assert focus_scales(level) != focus_scales(nearer)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.8, 1.0])
def test_spread_and_batch(level):
    x = tokens()
    y = rescale_ranks(x, level)
    torch.testing.assert_close(y.std(dim=(1, 2)), x.std(dim=(1, 2)))
    torch.testing.assert_close(y[1:], rescale_ranks(x[1:], level), rtol=1e-4, atol=1e-4)  # one by one as well
    half = rescale_ranks(x.half(), level)
    assert half.dtype == torch.float16 and (half.float() - y).abs().max() < 0.05 * y.abs().max()
    assert rescale_ranks(x, 0.5) is x


def test_style_has_few_ranks_and_meaning_lacks_the_first():
    x = tokens(1)

    def singular_values(y):
        return torch.linalg.svdvals(y[0] - y[0].mean(dim=-1, keepdim=True))

    style = singular_values(rescale_ranks(x, 1.0))
    assert (style[:5] > 0.01 * style[0]).all() and (style[6:] < 1e-3 * style[0]).all()
    first, rest = select_ranks(x, 0, 2), select_ranks(x, 2, 30)
    mean = x.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(first + rest - mean, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(singular_values(first)[:2], singular_values(x)[:2], rtol=1e-4, atol=1e-4)
    few = select_ranks(tokens(1, count=3), 0, 50)  # fewer tokens than ranks
    assert few.shape == (1, 3, 40)


def test_iterations_come_near_the_exact_ranks_on_wide_and_on_tall_tokens():
    for x in (tokens(), tokens().transpose(1, 2)):
        near = select_ranks(x, 0, 5, iterations=60, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(near, select_ranks(x, 0, 5), rtol=1e-3, atol=1e-3)
        again = select_ranks(x, 0, 5, iterations=2, generator=torch.Generator().manual_seed(1))
        assert torch.equal(
            again, select_ranks(x, 0, 5, iterations=2, generator=torch.Generator().manual_seed(1))
        ) and not torch.allclose(again, near)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rescale_ranks(tokens(), 1.5), r"`level` is 1\.5: it lies between 0 \(semantic\) and 1 \(style\)"),
        (lambda: rescale_ranks(tokens()[0], 0.2), r"`tokens` has shape \(30, 40\): expected \(batch, tokens, width\)"),
        (lambda: rescale_ranks(tokens()[:, :0], 0.2), r"`tokens` has shape \(2, 0, 40\)"),
        (lambda: select_ranks(tokens(), 2, 2), r"`start` is 2 and `stop` 2: .* at least one is kept"),
        (lambda: select_ranks(tokens(), -1, 2), r"`start` is -1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_other_numbers_of_ranks():
    assert focus_scales(0, ranks=6, dropped=2, kept=3) == [0.0] * 3 + [1.0] * 3
    assert focus_scales(1, ranks=6, dropped=2, kept=3) == [1.0] * 3 + [0.0] * 3
    tokens = torch.randn(1, 12, 10, generator=torch.Generator().manual_seed(0))
    style = rescale_ranks(tokens, 1, ranks=6, dropped=2, kept=3)
    assert torch.linalg.matrix_rank(style - tokens.mean(-1, keepdim=True) * style.std() / tokens.std()) <= 4
    with pytest.raises(ValueError, match=r"`ranks` is 2, `dropped` 2 and `kept` 3: 0 <= dropped < ranks"):
        focus_scales(0, ranks=2, dropped=2, kept=3)
