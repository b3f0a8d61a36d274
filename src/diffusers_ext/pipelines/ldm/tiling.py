"""Images and latents larger than a network can take: overlapping tiles, blended by their distance from the border.

Rombach et al., arXiv 2112.10752, section 4.3.2; original: CompVis/latent-diffusion@a506df5
:ldm/models/diffusion/ddpm.py (`split_input_params`, MIT), there for every call of the U-Net and for both ways through
the autoencoder. Differences: tiles reach the right and bottom border whatever the sizes; a tile is never larger than
its input; any aspect ratio; one row or column of tiles; tiles are blended one by one, so only one is in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileGrid:
    """Tiles over an input of a given size, and their weights in the result, which may be finer or coarser.

    A pixel's weight in its tile is its distance from the tile's nearest side, relative to the side's length and cut to
    [`min_weight`, `max_weight`]; the weights of all tiles over a pixel are divided by their sum. In the original a
    side that lies on the image's border counts like any other, so that along the border all tiles have the same
    least weight and their seams show; `count_outer_sides=False` mends that.

    Args:
        size: (height, width) of the input.
        kernel: (height, width) of a tile; cut to the input's.
        stride: (down, across) from tile to tile.
        up, down: factors between input and result: `up` for decoding, `down` for encoding, 1 for the U-Net.
        tie_breaker: also weight whole tiles by their distance from the border of the grid of tiles, cut to
            [`min_tie_weight`, `max_tie_weight`].
        count_outer_sides: whether sides on the image's border lower the weight, as in the original.

    Raises:
        ValueError: for tiles that leave gaps, or sizes that `down` does not divide.
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    up: int = 1
    down: int = 1
    min_weight: float = 0.01
    max_weight: float = 0.5
    tie_breaker: bool = False
    min_tie_weight: float = 0.01
    max_tie_weight: float = 0.5
    count_outer_sides: bool = True

    def __post_init__(self):
        if min(self.size) < 1 or min(self.kernel) < 1 or min(self.up, self.down) < 1 or self.min_weight <= 0:
            raise ValueError(
                f"`size` {self.size}, `kernel` {self.kernel}, `up` {self.up}, `down` {self.down} and `min_weight` "
                f"{self.min_weight} must be positive."
            )
        if any(not 1 <= step <= tile for step, tile in zip(self.stride, self.kernel, strict=True)):
            raise ValueError(
                f"`stride` is {self.stride} with `kernel` {self.kernel}: tiles must overlap or touch, so a stride "
                "lies between 1 and the kernel."
            )
        lengths = (*self.size, *self.kernel, *self.stride)
        if any(length % self.down for length in lengths):
            raise ValueError(
                f"`size` {self.size}, `kernel` {self.kernel} and `stride` {self.stride} must be multiples of `down`, "
                f"{self.down}."
            )

    @cached_property
    def tile_size(self) -> tuple[int, int]:
        """Of a tile of the input."""
        return min(self.kernel[0], self.size[0]), min(self.kernel[1], self.size[1])

    @cached_property
    def starts(self) -> tuple[list[int], list[int]]:
        """First rows and first columns of the tiles; the last tile ends at the border."""
        axes = []
        for length, tile, step in zip(self.size, self.tile_size, self.stride, strict=True):
            starts = list(range(0, length - tile + 1, step))
            if starts[-1] != length - tile:
                starts.append(length - tile)
            axes.append(starts)
        return axes[0], axes[1]

    def __len__(self) -> int:
        return len(self.starts[0]) * len(self.starts[1])

    def corners(self) -> Iterator[tuple[int, int]]:
        """(top, left) of each tile in the input, row by row."""
        return ((top, left) for top in self.starts[0] for left in self.starts[1])

    def boxes(self) -> list[tuple[float, float, float, float]]:
        """(x, y, width, height) of each tile relative to the input: the crop that a layout model is told."""
        (height, width), (rows, columns) = self.size, self.tile_size
        return [(left / width, top / height, columns / width, rows / height) for top, left in self.corners()]

    def cut(self, values: Tensor) -> Iterator[Tensor]:
        """The tiles (b, c, kh, kw) of an input (b, c, h, w), row by row."""
        if tuple(values.shape[-2:]) != tuple(self.size):
            raise ValueError(f"The input is {values.shape[-2]}x{values.shape[-1]}, the grid is for {self.size}.")
        rows, columns = self.tile_size
        return (values[..., top : top + rows, left : left + columns] for top, left in self.corners())

    @cached_property
    def _on_device(self) -> dict[torch.device, tuple[list[Tensor], Tensor]]:
        """Weights and their sum by device: they are the same in every step of a run."""
        return {}

    def _weights_and_sum(self, device: str | torch.device | None) -> tuple[list[Tensor], Tensor]:
        device = torch.device("cpu" if device is None else device)
        if device not in self._on_device:
            weights = list(self._make_weights(device))
            total = torch.zeros(self._scaled(self.size[0]), self._scaled(self.size[1]), device=device)
            for corner, weight in zip(self.corners(), weights, strict=True):
                self._window(total, corner).add_(weight)
            self._on_device[device] = weights, total
        return self._on_device[device]

    def weights(self, device: str | torch.device | None = None) -> Iterator[Tensor]:
        """The weights (kh', kw') of each tile in the result, before the division by their sum."""
        return iter(self._weights_and_sum(device)[0])

    def normalization(self, device: str | torch.device | None = None) -> Tensor:
        """Sum of the weights over each place of the result, (h', w')."""
        return self._weights_and_sum(device)[1]

    def _make_weights(self, device: torch.device) -> Iterator[Tensor]:
        sides = [self._scaled(side) for side in self.tile_size]
        rows, columns = self.starts
        ties = torch.ones(len(self))
        if self.tie_breaker:
            grid = border_weights((len(rows), len(columns)), self.min_tie_weight, self.max_tie_weight)
            ties = grid.flatten()
        made: dict[tuple, Tensor] = {}  # most tiles have the weights of another one
        for (top, left), tie in zip(self.corners(), ties.tolist(), strict=True):
            counted = (True, True, True, True)
            if not self.count_outer_sides:
                counted = (top != rows[0], top != rows[-1], left != columns[0], left != columns[-1])
            if (counted, tie) not in made:
                border = border_weights((sides[0], sides[1]), self.min_weight, self.max_weight, counted)
                made[counted, tie] = (border * tie).to(device)
            yield made[counted, tie]

    def apply(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Calls `function` with the tiles of all inputs, one place after the other, and blends what it returns.

        Args:
            function: of tiles (b, c_i, kh, kw), one of each input, to (b, c', kh', kw').
            inputs: (b, c_i, h, w), for instance latents and a map that is concatenated with them.

        Returns:
            (b, c', h', w'), in the dtype of the results.
        """

        def results() -> Iterator[Tensor]:
            for tiles in zip(*(self.cut(values) for values in inputs), strict=True):
                yield function(*tiles)

        return self.blend(results())

    def blend(self, tiles: Iterator[Tensor]) -> Tensor:
        """The weighted mean (b, c', h', w') of one result (b, c', kh', kw') for each tile, row by row."""
        total: Tensor | None = None
        device = dtype = None
        weights: Iterator[Tensor] = iter(())
        for corner, tile in zip(self.corners(), tiles, strict=True):
            if total is None:
                device, dtype = tile.device, tile.dtype
                sides = [self._scaled(side) for side in self.size]
                total = torch.zeros(*tile.shape[:2], *sides, device=device)  # float32 whatever the network's dtype
                weights = iter(self.weights(device))
            window = self._window(total, corner)
            if window.shape != tile.shape:
                raise ValueError(
                    f"A tile became {tuple(tile.shape)}, but `up` {self.up} and `down` {self.down} say "
                    f"{tuple(window.shape)}."
                )
            window.add_(tile.float() * next(weights))
        assert total is not None
        return (total / self.normalization(device)).to(dtype)

    def _scaled(self, length: int) -> int:
        return length * self.up // self.down

    def _window(self, values: Tensor, corner: tuple[int, int]) -> Tensor:
        top, left = (self._scaled(start) for start in corner)
        rows, columns = (self._scaled(side) for side in self.tile_size)
        return values[..., top : top + rows, left : left + columns]


@dataclass(frozen=True)
class Tiles:
    """The same tiles over an image and its latents: for the U-Net, and for both ways through the first stage."""

    latents: TileGrid
    encode: TileGrid
    decode: TileGrid

    @classmethod
    def build(
        cls,
        size: tuple[int, int],
        tile: int | tuple[int, int],
        stride: int | tuple[int, int] | None,
        factor: int,
    ) -> "Tiles":
        """The tiles over an image, which are never larger than the image.

        Args:
            size: (height, width) of the image in pixels.
            tile: side or (height, width) of a tile in pixels.
            stride: pixels from tile to tile, one or (down, across); by default half a tile, rounded down to whole
                latents.
            factor: of the first stage.
        """
        wanted = tile if isinstance(tile, (list, tuple)) else (tile, tile)
        tile = (min(wanted[0], size[0]), min(wanted[1], size[1]))
        if stride is None:
            stride = (max(tile[0] // factor // 2, 1) * factor, max(tile[1] // factor // 2, 1) * factor)
        steps = stride if isinstance(stride, (list, tuple)) else (stride, stride)
        stride = (min(steps[0], tile[0]), min(steps[1], tile[1]))
        coarse, coarse_tile, coarse_stride = (
            (rows // factor, columns // factor) for rows, columns in (size, tile, stride)
        )
        return cls(
            latents=TileGrid(coarse, coarse_tile, coarse_stride, count_outer_sides=False),
            encode=TileGrid(size, tile, stride, down=factor, count_outer_sides=False),
            decode=TileGrid(coarse, coarse_tile, coarse_stride, up=factor, count_outer_sides=False),
        )


def border_weights(
    size: tuple[int, int], low: float, high: float, counted: tuple[bool, bool, bool, bool] = (True, True, True, True)
) -> Tensor:
    """Distance (h, w) from the nearest side, 0 at the sides and 1/2 in the middle, cut to [low, high].

    An axis of length 1 has no sides to be near to: it does not count.

    Args:
        size: (h, w).
        low, high: limits of the result.
        counted: which sides there are: top, bottom, left, right.
    """
    distances = []
    for length, (first, last) in zip(size, (counted[:2], counted[2:]), strict=True):
        position = torch.linspace(0, 1, length) if length > 1 else torch.full((1,), 0.5)
        nowhere = torch.full_like(position, torch.inf)
        distances.append(torch.minimum(position if first else nowhere, 1 - position if last else nowhere))
    return torch.minimum(distances[0][:, None], distances[1][None, :]).clamp(low, high)
