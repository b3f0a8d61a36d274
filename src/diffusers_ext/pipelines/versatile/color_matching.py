"""Colours of a variation drawn towards those of its source (Versatile Diffusion's colour adjustment).

Original: SHI-Labs/Versatile-Diffusion@cf0f4a2:app.py (mean and spread of each channel) and
@51dcd3b:lib/experiments/sd_default.py (distribution of each channel, in 8 bits), MIT.
"""

import numpy as np
import torch
from torch import Tensor

_BINS = 600


def adjust_colors(images: Tensor, sources: Tensor, how: str) -> Tensor:
    """Pictures (b, 3, h, w) in [0, 1] with the colours of others of as many, "simple" or by "histogram"."""
    if how == "simple":
        return match_color_statistics(images, sources)
    as_bytes = [(batch.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy() for batch in (images, sources)]
    adjusted = np.stack([match_color_distribution(*pair) for pair in zip(*as_bytes, strict=True)])
    return (torch.from_numpy(adjusted).permute(0, 3, 1, 2).float() / 255).to(images.device)


def match_color_statistics(images: Tensor, reference: Tensor) -> Tensor:
    """Gives each channel of each picture the mean and the standard deviation of the reference.

    Args:
        images: (b, 3, h, w) in [0, 1].
        reference: (1, 3, h', w') or (b, 3, h', w') in [0, 1].

    Returns:
        (b, 3, h, w) in [0, 1]. A channel of one value gets the reference's mean.
    """
    mean, std = _statistics(images)
    wanted_mean, wanted_std = _statistics(reference.to(images))
    spread = torch.where(std > 0, wanted_std / std.clamp_min(torch.finfo(std.dtype).tiny), 0)
    return ((images - mean) * spread + wanted_mean).clamp(0, 1)


def match_color_distribution(
    image: np.ndarray, reference: np.ndarray, *, keep: float = 0.5, histogram: bool = True
) -> np.ndarray:
    """The first release's adjustment: statistics, then the distribution of each channel, mixed with the original.

    Args:
        image: uint8 (h, w, 3).
        reference: uint8 (h', w', 3).
        keep: share of the unchanged picture in the result, in [0, 1].
        histogram: whether to match the distribution; otherwise only mean and standard deviation.

    Returns:
        uint8 (h, w, 3), cut off rather than rounded, as in the original.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"`keep` is {keep}: it is the share of the unchanged picture, between 0 and 1.")
    source, wanted = image.reshape(-1, 3).astype(np.float64), reference.reshape(-1, 3).astype(np.float64)
    spread = source.std(axis=0)
    scale = np.divide(wanted.std(axis=0), spread, out=np.zeros(3), where=spread > 0)
    changed = (source - source.mean(axis=0)) * scale + wanted.mean(axis=0)
    if histogram:
        changed = np.stack([_transfer(changed[:, c], wanted[:, c]) for c in range(3)], axis=1)
    mixed = changed * (1 - keep) + source * keep
    return mixed.clip(0, 255).astype(np.uint8).reshape(image.shape)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.mean(dim=(2, 3), keepdim=True), images.std(dim=(2, 3), keepdim=True)


def _transfer(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Maps values so that their cumulative distribution becomes that of `wanted`, on a common grid of bins."""
    low = min(values.min(), wanted.min()) - 1e-6
    high = max(values.max(), wanted.max()) + 1e-6
    edges = low + (high - low) * np.arange(_BINS + 1) / _BINS
    have, want = (np.cumsum(np.histogram(array, edges)[0]) / array.size for array in (values, wanted))
    mapped = np.interp(have, want, edges[:-1])
    mapped[have <= want[0]] = wanted.min() - 1e-6
    mapped[have >= want[-1]] = wanted.max() + 1e-6
    return np.interp(values, edges[:-1], mapped)
