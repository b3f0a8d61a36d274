"""What train_autoencoder.py shows as it runs: figures of held-out pictures, and a sheet of them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_ext.evaluation.image_quality import picture_grid
from diffusers_ext.evaluation.reconstruction import reconstruction_figures
from diffusers_ext.losses.perceptual import CLIPDistance
from diffusers_ext.training.autoencoder.data import read_centre
from diffusers_ext.training.autoencoder.objective import FirstStage
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.validation import first_rows, save_sheet


@dataclass
class Validation:
    """`(step) -> figures`, for `fit_adversarial`."""

    objective: FirstStage
    features: CLIPDistance | None
    rows: Any
    count: int
    data: DataArgs
    train: TrainArgs
    device: torch.device

    def __call__(self, step: int) -> dict[str, float]:
        perceptual = self.objective.frozen["perceptual"]
        if perceptual is not None:
            perceptual.eval()
        seen: list[Tensor] = []

        def reconstruct(originals: Tensor) -> Tensor:
            decoded, details = self.objective.reconstruct(originals)
            decoded = decoded.clamp(-1, 1)
            if not seen:
                pairs = torch.stack([originals, decoded], 1).flatten(0, 1)
                save_sheet(picture_grid(pairs, columns=8), self.train, step)
            seen.append(details)
            return decoded

        read = partial(read_centre, data=self.data)
        batches = first_rows(self.rows, self.count, read, self.train.seed, batch_size=16, device=self.device)
        images = (image for image, _ in batches)
        figures = reconstruction_figures(images, reconstruct, distance=perceptual, features=self.features)
        figures = {f"validation_{name}": value for name, value in figures.items()}
        return figures | self.objective.figures(torch.cat(seen))
