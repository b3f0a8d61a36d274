"""The pictures of train_autoencoder.py: those of the steps, the first ones, and those of the validation."""

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from diffusers_ext.data.preprocessing import prepare_image
from diffusers_ext.training_utils.args import DataArgs
from diffusers_ext.training_utils.loop import LOSS_STREAM, keyed_generator


def read_picture(example: dict, generator: torch.Generator, data: DataArgs) -> Tensor:
    """One training picture; at module level, so that loader processes can be started with it on every platform."""
    return prepare_image(
        example[data.image_column], data.resolution, generator=generator,
        center_crop=data.center_crop, random_flip=data.random_flip,
    )  # fmt: skip


def first_pictures(
    train_set, count: int, data: DataArgs, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, list[Generator]]]:
    """The first `count` pictures of the data set in batches, each picture with a generator; equal on every process."""
    count = min(count, len(train_set))
    for start in range(0, count, 32):
        keys = range(start, min(start + 32, count))
        images = [read_picture(train_set[i], keyed_generator(seed, i), data) for i in keys]
        yield torch.stack(images).to(device), [keyed_generator(seed, i, LOSS_STREAM) for i in keys]


def validation_pictures(validation_set, count: int, data: DataArgs, device: torch.device) -> Iterator[Tensor]:
    """The first `count` pictures, their centres, 16 at a time."""
    for start in range(0, count, 16):
        rows = [validation_set[i] for i in range(start, min(start + 16, count))]
        yield torch.stack(
            [prepare_image(row[data.image_column], data.resolution, center_crop=True) for row in rows]
        ).to(device)
