"""What a set of images looks like, as vectors for a Frechet distance: of plain pixels, or of a CLIP."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

_SIDE = 8  # of what is compared without a network


def pixel_features(images: Tensor) -> Tensor:
    """The pixels of images (n, 3, H, W) at 8 x 8, as vectors (n, 192): colours and their places, no detail."""
    return F.interpolate(images.float(), (_SIDE, _SIDE), mode="area").flatten(1)


def clip_features(folder: str | Path) -> Callable[[Tensor], Tensor]:
    """What the saved image encoder of a CLIP sees in images (n, 3, H, W) in [0, 1]: vectors (n, d) of length 1.

    Args:
        folder: A pipeline with an `image_encoder` and its preparation in `feature_extractor` or `image_processor`, or
            a folder that holds both files.
    """
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    root = Path(folder)
    parts = [root / name for name in ("feature_extractor", "image_processor", ".") if (root / name).is_dir()]
    prepared = next((part for part in parts if (part / "preprocessor_config.json").is_file()), None)
    if prepared is None:
        raise ValueError(f"{str(folder)!r} holds no preprocessor_config.json: name a saved pipeline or CLIP.")
    processor = CLIPImageProcessor.from_pretrained(prepared)
    inner = root / "image_encoder"
    network = CLIPVisionModelWithProjection.from_pretrained(inner if inner.is_dir() else root).eval()
    side = int(network.config.image_size)  # type: ignore[arg-type]  # transformers allows a pair; CLIP has none
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (processor.image_mean, processor.image_std))

    @torch.no_grad()
    def see(images: Tensor) -> Tensor:
        pixels = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return F.normalize(network((pixels - mean) / std).image_embeds, dim=-1)

    return see
