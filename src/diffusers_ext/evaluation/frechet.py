"""The Frechet distance between two sets of feature vectors; who prints it names the network that made them.

Heusel et al., arXiv 1706.08500, eq. 6. With Inception features of the published kind it is the FID; here the features
are the caller's, so a figure is comparable only with figures of the same network and the same number of pictures.
"""

import torch
from torch import Tensor


def frechet_distance(features: Tensor, target: Tensor) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^1/2) of the means and covariances of feature vectors (n, d) and (n', d).

    Few vectors (n < d) give singular covariances; the distance is still defined, but biased upwards.

    Raises:
        ValueError: fewer than two vectors on a side, or vectors of different widths.
    """
    if features.ndim != 2 or target.ndim != 2 or features.shape[1] != target.shape[1]:
        raise ValueError(
            f"`features` and `target` must be (n, d) with one d, got {tuple(features.shape)} and "
            f"{tuple(target.shape)}."
        )
    if min(len(features), len(target)) < 2:
        raise ValueError(
            f"A covariance needs at least 2 pictures a side, got {len(features)} and {len(target)}: raise "
            "--validation_samples, or use more pictures."
        )
    (mean, root), (target_mean, target_root) = _moments(features), _moments(target)
    # With C = R^T R, the eigenvalues of C C' are the squared singular values of R R'^T.
    cross = torch.linalg.svdvals(root @ target_root.T).sum()
    distance = (mean - target_mean).square().sum() + root.square().sum() + target_root.square().sum() - 2 * cross
    return max(0.0, float(distance))  # rounding


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and a factor R (min(n, d), d) of the covariance R^T R, in float64."""
    features = features.cpu().double()
    mean = features.mean(0)
    return mean, torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R
