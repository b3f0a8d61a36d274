"""How well an autoencoder gives pictures back: PSNR, a perceptual distance, a Frechet distance, each by its name."""

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from .frechet import frechet_distance
from .image_quality import psnr

logger = logging.getLogger(__name__)

# dB. What `scenes` trained shows scenes with 28 to 41, and photographs with 11 to 19: blots
LEAST_PSNR = 20.0


class Distance(Protocol):
    """A perceptual distance; `name` says which network's features it compares."""

    name: str

    def __call__(self, image: Tensor, target: Tensor, /) -> Tensor: ...


class Features(Protocol):
    """A network whose vectors (b, d) stand for pictures (b, 3, h, w)."""

    name: str

    def embed(self, image: Tensor, /) -> Tensor: ...


@torch.no_grad()
def reconstruction_figures(
    batches: Iterable[Tensor],
    reconstruct: Callable[[Tensor], Tensor],
    *,
    distance: Distance | None = None,
    features: Features | None = None,
) -> dict[str, float]:
    """Figures over all pictures of `batches`, (b, 3, h, w) in [-1, 1] each.

    Args:
        reconstruct: `(pictures) -> the same pictures by way of the latents`, in [-1, 1].
        distance: Its mean over the pictures is reported under its name.
        features: The Frechet distance of its vectors is reported as `rfid-<name>`; it depends on the number of
            pictures, which is reported as `pictures`.

    Returns:
        `psnr` (the mean of the pictures' own values, in dB), the two distances, and `pictures`.
    """
    sums: dict[str, float] = {}
    vectors: list[tuple[Tensor, Tensor]] = []
    count = 0
    for originals in batches:
        pictures = reconstruct(originals)
        values = {"psnr": psnr(pictures, originals)}
        if distance is not None:
            values[distance.name] = float(distance(pictures, originals).mean())
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value * len(originals)
        if features is not None:
            vectors.append((features.embed(pictures), features.embed(originals)))
        count += len(originals)
    if count == 0:
        raise ValueError("`batches` holds no picture.")
    figures = {name: value / count for name, value in sums.items()}
    if features is not None:
        made, real = (torch.cat(side) for side in zip(*vectors, strict=True))
        figures[f"rfid-{features.name}"] = frechet_distance(made, real)
    return figures | {"pictures": float(count)}


def warn_of_first_stage(
    batches: Iterable[Tensor], reconstruct: Callable[[Tensor], Tensor], name: str, way_out: str
) -> float:
    """The PSNR of a first stage on pictures that a training is about to use, with a warning if it does not show them.

    Whatever is trained on its latents draws nothing better than it shows.

    Args:
        batches: Some of the pictures, (b, 3, h, w) in [-1, 1] each.
        reconstruct: `(pictures) -> the same pictures by way of the latents`.
        name: Of the first stage, as the user wrote it.
        way_out: What to do, for the message.
    """
    figures = reconstruction_figures(batches, lambda pictures: reconstruct(pictures).clamp(-1, 1))
    if figures["psnr"] < LEAST_PSNR:
        logger.warning(
            "The first stage %s does not show these pictures: it gives %d of them back with a PSNR of %.1f dB, and "
            "below about %.0f dB nothing that is trained on it looks like them, however long. %s",
            name, figures["pictures"], figures["psnr"], LEAST_PSNR, way_out,
        )  # fmt: skip
    return figures["psnr"]
