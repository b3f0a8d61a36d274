"""Tiles: the identity in every geometry, seams, and the original's defects mended."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusers_ext.pipelines.ldm.tiling import TileGrid, border_weights


@pytest.mark.parametrize("options", [{}, {"tie_breaker": True}, {"count_outer_sides": False}], ids=str)
@pytest.mark.parametrize(
    ("size", "kernel", "stride"),
    [
        ((16, 16), (8, 8), (4, 4)),
        ((17, 22), (8, 8), (4, 4)),  # remainders
        ((12, 31), (8, 10), (5, 3)),  # neither square nor even
        ((5, 6), (8, 8), (4, 4)),  # below the tile: one tile
        ((8, 20), (8, 8), (4, 4)),  # one row
        ((20, 8), (8, 8), (8, 8)),  # one column, no overlap
        ((3, 3), (1, 1), (1, 1)),
    ],
)
def test_the_identity_stays_the_identity(size, kernel, stride, options):
    values = torch.randn(2, 3, *size)
    grid = TileGrid(size, kernel, stride, **options)
    torch.testing.assert_close(grid.apply(lambda tile: tile, values), values)
    assert len(list(grid.cut(values))) == len(grid) == len(list(grid.weights())) == len(grid.boxes())
    assert grid.normalization().min() > 0


def test_up_and_down_for_an_autoencoder_without_a_receptive_field():
    values = torch.randn(1, 2, 9, 14)
    up = TileGrid((9, 14), (4, 6), (2, 3), up=2)
    doubled = F.interpolate(values, scale_factor=2)
    torch.testing.assert_close(up.apply(lambda tile: F.interpolate(tile, scale_factor=2), values), doubled)
    down = TileGrid((18, 28), (8, 12), (4, 6), down=2)
    torch.testing.assert_close(down.apply(lambda tile: F.avg_pool2d(tile, 2), doubled), values)


def test_several_inputs_are_cut_alike_and_boxes_name_the_places():
    latents, maps = torch.randn(1, 2, 10, 12), torch.randn(1, 1, 10, 12)
    grid = TileGrid((10, 12), (6, 6), (4, 4))
    torch.testing.assert_close(grid.apply(lambda x, c: x + c, latents, maps), latents + maps)
    assert grid.starts == ([0, 4], [0, 4, 6])
    assert grid.boxes()[1] == pytest.approx((4 / 12, 0, 6 / 12, 6 / 10))


def largest_step(grid):
    """Along the rows, where every tile has a brightness of its own; and along the outermost row alone."""
    shades = iter(torch.rand(len(grid)).tolist())
    blended = grid.apply(lambda tile: torch.full_like(tile, next(shades)), torch.zeros(1, 1, 32, 32))
    assert blended.std() > 0.05
    steps = (blended[0, 0, :, 1:] - blended[0, 0, :, :-1]).abs()
    return steps[8:-8].max().item(), steps[0].max().item()


def test_blending_hides_the_seams_of_tiles_that_disagree():
    inside, outermost = largest_step(TileGrid((32, 32), (16, 16), (8, 8)))
    assert inside < 0.25 < outermost  # the original: along the border all tiles weigh the same, and the seam shows
    torch.manual_seed(0)
    inside, outermost = largest_step(TileGrid((32, 32), (16, 16), (8, 8), count_outer_sides=False))
    assert inside < 0.25 and outermost < 0.25


def test_a_network_sees_tiles_only_but_the_result_is_close_to_that_of_the_whole():
    network = nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)
    values = torch.randn(1, 1, 40, 40)
    tiled = TileGrid((40, 40), (16, 16), (8, 8), count_outer_sides=False).apply(network, values)
    error = (tiled - network(values)).abs()
    assert error.max() < 0.05 * network(values).abs().max()  # the side of a tile weighs 0.01
    assert error.median() < 1e-6


def test_weights_by_hand():
    weights = border_weights((5, 3), 0.01, 0.4)
    assert weights[:, 1].tolist() == pytest.approx([0.01, 0.25, 0.4, 0.25, 0.01])
    assert weights[:, 0].tolist() == pytest.approx([0.01] * 5)
    assert border_weights((1, 3), 0.01, 0.5).tolist() == [pytest.approx([0.01, 0.5, 0.01])]
    assert border_weights((2, 5), 0.01, 0.5, (False, False, False, True))[1].tolist() == pytest.approx(
        [0.5, 0.5, 0.5, 0.25, 0.01]
    )
    grid = TileGrid((6, 6), (2, 2), (2, 2), tie_breaker=True)
    ties = torch.stack(list(grid.weights()))[:, 0, 0] / 0.01
    assert ties.tolist() == pytest.approx([0.01] * 4 + [0.5] + [0.01] * 4)


def test_half_precision_is_blended_in_float32():
    values = torch.randn(1, 1, 12, 12, dtype=torch.float16)
    result = TileGrid((12, 12), (8, 8), (4, 4)).apply(lambda tile: tile, values)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result, values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TileGrid((8, 8), (4, 4), (5, 4)), r"`stride` is \(5, 4\) with `kernel` \(4, 4\).*overlap or touch"),
        (lambda: TileGrid((8, 0), (4, 4), (4, 4)), r"`size` \(8, 0\).*must be positive"),
        (lambda: TileGrid((8, 8), (4, 4), (4, 4), min_weight=0.0), r"`min_weight` 0\.0 must be positive"),
        (lambda: TileGrid((9, 8), (4, 4), (4, 4), down=2), r"must be multiples of `down`, 2"),
        (lambda: TileGrid((8, 8), (4, 4), (4, 4)).cut(torch.zeros(1, 1, 8, 9)), r"input is 8x9.*for \(8, 8\)"),
        (
            lambda: TileGrid((8, 8), (4, 4), (4, 4), up=2).apply(lambda tile: tile, torch.zeros(1, 1, 8, 8)),
            r"A tile became \(1, 1, 4, 4\), but `up` 2 and `down` 1 say \(1, 1, 8, 8\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_are_made_once():
    grid = TileGrid((24, 40), (16, 16), (8, 8), count_outer_sides=False)
    assert all(one is other for one, other in zip(grid.weights(), grid.weights(), strict=True))
    assert grid.normalization() is grid.normalization()
    assert len({id(weight) for weight in grid.weights()}) < len(grid)  # many tiles have the same
    torch.testing.assert_close(grid.apply(lambda tile: tile, torch.ones(1, 1, 24, 40)), torch.ones(1, 1, 24, 40))
