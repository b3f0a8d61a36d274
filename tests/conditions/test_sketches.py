"""Distance maps of sketches, against the definition."""

import pytest
import torch

from diffusers_ext.conditions.sketches import distance_map


def by_hand(lines: torch.Tensor) -> torch.Tensor:
    seeds = lines.nonzero()
    rows, columns = torch.meshgrid(*(torch.arange(size) for size in lines.shape), indexing="ij")
    steps = (rows[..., None] - seeds[:, 0]).abs() + (columns[..., None] - seeds[:, 1]).abs()
    return steps.amin(-1).clamp(max=255).to(torch.uint8)


@pytest.mark.parametrize("share", [0.5, 0.05, 0.005])
def test_is_the_city_block_distance(share):
    lines = torch.rand(2, 21, 33, generator=torch.Generator().manual_seed(0)) < share
    lines[:, 3, 4] = True
    found = distance_map(lines)
    assert found.dtype == torch.uint8
    for one, expected in zip(found, lines, strict=True):
        assert torch.equal(one, by_hand(expected))


def test_far_away_and_without_lines():
    lines = torch.zeros(1, 4, 300, dtype=torch.bool)
    assert torch.equal(distance_map(lines), torch.full((1, 4, 300), 255, dtype=torch.uint8))
    lines[:, :, 0] = True
    assert distance_map(lines)[0, 0, -40:].unique().tolist() == [255]
    assert distance_map(lines)[0, 0, 254] == 254


def test_rejects():
    with pytest.raises(TypeError, match="`lines` is torch.uint8.*Grey pixels are no lines"):
        distance_map(torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"`lines` has shape \(4, 4\)"):
        distance_map(torch.zeros(4, 4, dtype=torch.bool))
