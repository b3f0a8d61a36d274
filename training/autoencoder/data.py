"""The pictures of train_autoencoder.py: those of the steps, and those of the validation."""

import torch
from torch import Tensor

from diffusers_ext.data.crops import prepare_image
from diffusers_ext.training_utils.args import DataArgs


def read_picture(example: dict, generator: torch.Generator, data: DataArgs) -> Tensor:
    """One training picture; at module level, so that loader processes can be started with it on every platform."""
    return prepare_image(
        example[data.image_column], data.resolution, generator=generator,
        center_crop=data.center_crop, random_flip=data.random_flip,
    )  # fmt: skip


def read_centre(example: dict, generator: torch.Generator, data: DataArgs) -> Tensor:
    """One picture of a validation, the same each time."""
    return prepare_image(example[data.image_column], data.resolution, center_crop=True)
