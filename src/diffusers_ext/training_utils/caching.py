"""Training from a cache (`cache.py`) of what frozen networks make of the pictures."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from .args import DataArgs


def check_cacheable(
    cache_dir: str | None, data: DataArgs, kept: str, *, crop_scale: tuple[float, float] | None = None
) -> None:
    """Refuses a cache together with pictures that are another one in every epoch.

    Args:
        cache_dir: `--cache_dir`; nothing is refused without it.
        kept: What it holds of a picture: "latents", "tokens".
        crop_scale: Of a recipe that has the option.

    Raises:
        ValueError: there is augmentation; names the ways out.
    """
    options = "--random_flip" if crop_scale is None else "--random_flip and --crop_scale"
    if cache_dir and (data.random_flip or not data.center_crop or crop_scale not in (None, (1.0, 1.0))):
        raise ValueError(
            f"--cache_dir keeps one set of {kept} a picture, which excludes augmentation: pass --center_crop and "
            f"leave out {options}, or leave out --cache_dir."
        )


class CachedRows(Dataset):
    """Rows whose pictures are replaced by what a cache holds of them; the other columns are read as before."""

    def __init__(self, cache: Dataset, rows: Any, columns: Sequence[str]):
        """`rows` has `select_columns`, as a data set of `datasets` or `NamedRows` have it."""
        self.cache, self.size = cache, len(rows)
        self.others = rows.select_columns(list(dict.fromkeys(columns))) if columns else None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        others = {} if self.others is None else self.others[index]
        return {**others, **self.cache[index]}
