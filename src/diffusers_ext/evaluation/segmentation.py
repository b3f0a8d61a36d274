"""How well label maps agree."""

from collections.abc import Sequence

import numpy as np


def mean_iou(
    found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], num_classes: int, *, left_out: Sequence[int] = ()
) -> float:
    """Intersection over union of each class, counted over all pixels of all maps, and averaged over the classes.

    A class that neither side shows is left out; a label of `num_classes` or more in `found` is right nowhere.

    Args:
        found, wanted: maps (h, w) of integers, pair by pair of one shape.
        num_classes: labels are 0 to `num_classes` - 1.
        left_out: classes that do not enter the average, such as the ground.

    Returns:
        In [0, 1]; not-a-number if no class is left.

    Raises:
        ValueError: other numbers or shapes of maps, or a label of `wanted` outside the range.
    """
    if len(found) != len(wanted) or not len(wanted):
        raise ValueError(f"`found` holds {len(found)} maps, `wanted` {len(wanted)}: they must pair up, at least one.")
    counts = np.zeros((num_classes + 1, num_classes), dtype=np.int64)  # one row more: labels that are none
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if one.shape != other.shape:
            raise ValueError(f"Map {i} of `found` is {one.shape}, that of `wanted` {other.shape}; they must agree.")
        if other.min() < 0 or other.max() >= num_classes:
            raise ValueError(
                f"Map {i} of `wanted` holds labels from {other.min()} to {other.max()}; they must lie between 0 and "
                f"`num_classes` - 1 = {num_classes - 1}."
            )
        labels = np.minimum(one.astype(np.int64), num_classes)
        counts += np.bincount(
            (labels * num_classes + other.astype(np.int64)).ravel(), minlength=counts.size
        ).reshape(counts.shape)  # fmt: skip
    shared = np.diagonal(counts)  # of the first `num_classes` rows
    union = counts[:-1].sum(axis=1) + counts.sum(axis=0) - shared
    counted = union > 0
    counted[list(left_out)] = False
    return float((shared[counted] / union[counted]).mean()) if counted.any() else float("nan")
