"""How many samples look like real images, and how many real images the samples cover; who prints it names the network.

Kynkäänniemi et al., arXiv 1904.06991, eq. 1 and 2: the images of a set span the union of the balls around their
feature vectors, each as large as the distance to the k-th nearest other vector of its set. The paper has VGG-16
features of 50,000 images a side and k = 3. Here the features are the caller's, so a figure is comparable only with
figures of the same network and the same numbers of images.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 1024  # of a block of distances


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of samples within the real images' manifold, and of real images within that of the samples."""

    precision: float
    recall: float


def precision_recall(features: Tensor, target: Tensor, *, num_neighbors: int = 3) -> PrecisionRecall:
    """Precision and recall of samples.

    Args:
        features: Vectors of the samples (n, d).
        target: Vectors of the real images (n', d).
        num_neighbors: k. A ball reaches to the k-th nearest other vector.

    Raises:
        ValueError: For vectors of different widths, `num_neighbors` below 1, and no more than k vectors on a side.
    """
    if features.ndim != 2 or target.ndim != 2 or features.shape[1] != target.shape[1]:
        raise ValueError(
            f"`features` and `target` must be (n, d) with one d, got {tuple(features.shape)} and "
            f"{tuple(target.shape)}."
        )
    if num_neighbors < 1 or min(len(features), len(target)) <= num_neighbors:
        raise ValueError(
            f"`num_neighbors` is {num_neighbors}, with {len(features)} samples and {len(target)} real images: it must "
            "be at least 1, and each side needs more vectors than that."
        )
    features, target = features.cpu().double(), target.cpu().double()
    return PrecisionRecall(
        precision=_share_within(features, target, num_neighbors), recall=_share_within(target, features, num_neighbors)
    )


def _share_within(vectors: Tensor, spanning: Tensor, num_neighbors: int) -> float:
    """Share of the vectors that lie in one of the balls around the spanning ones."""
    # the nearest one is the vector itself, so the k-th other one is number k + 1
    radii = torch.cat(
        [_distances(rows, spanning).kthvalue(num_neighbors + 1).values for rows in spanning.split(_ROWS)]
    )
    inside = [(_distances(rows, spanning) <= radii).any(dim=1) for rows in vectors.split(_ROWS)]
    return int(torch.cat(inside).sum()) / len(vectors)


def _distances(rows: Tensor, vectors: Tensor) -> Tensor:
    """(n, m), exactly 0 between equal vectors: not by way of scalar products."""
    return torch.cdist(rows, vectors, compute_mode="donot_use_mm_for_euclid_dist")
