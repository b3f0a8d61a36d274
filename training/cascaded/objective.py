"""What train_cascaded.py learns: the noise in a stage's images, given the class and a smaller image.

Ho et al., arXiv 2106.15282, sections 2 and 4; the hybrid loss is that of Nichol and Dhariwal, arXiv 2102.09672.
"""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from diffusers_ext.degradations.blur import blur_augmentation
from diffusers_ext.training.cascaded.args import CascadedArgs
from diffusers_ext.training_utils.noise_prediction import NoiseLoss
from diffusers_ext.training_utils.objective import Objective, check_predicts_noise, draw_integers, keep_condition


class CascadedObjective(Objective):
    """The network of one stage. No other stage is needed: the small images are made of the large ones.

    Args:
        pipe: The pipeline of the stage, whose network is trained.
        args: The options.
    """

    def __init__(self, pipe: Any, args: CascadedArgs):
        super().__init__()
        check_predicts_noise(pipe.scheduler)
        self.unet = pipe.unet
        self.pipe, self.args = pipe, args
        self.dropout_prob = args.dropout_of_condition
        self.num_timesteps = int(pipe.scheduler.config["num_train_timesteps"])
        self.noise_loss = NoiseLoss(pipe.scheduler, args)

    def losses(self, batch: dict[str, Any], generators: list[Generator], step: int) -> dict[str, Tensor]:
        """Draws per sample, in this order: dropping (where classes are dropped), timestep, noise, then those of
        `augment`.
        """
        images, labels = batch["image"], batch.get("label")
        if labels is not None and self.dropout_prob:
            keep = keep_condition(generators, self.dropout_prob).to(labels.device)
            labels = torch.where(keep, labels, self.unet.config["null_class"])
        timesteps = draw_integers(generators, self.args.min_timestep, self.num_timesteps).to(images.device)
        noise = randn_tensor(images.shape, generator=generators, device=images.device)
        low, level = self.augment(batch["low"], generators) if "low" in batch else (None, None)
        noisy = self.pipe.scheduler.add_noise(images, noise, timesteps)
        found = self.unet(noisy, timesteps, labels, low, level, return_dict=False)[0]
        terms = self.noise_loss(found, noise, images, noisy, timesteps)
        return {name: value.mean() for name, value in terms.items()}

    def augment(self, low: Tensor, generators: list[Generator]) -> tuple[Tensor, Tensor | None]:
        """The small images (b, 3, h, w) as the network sees them, and the levels (b,) that it is told.

        Blur draws two numbers a sample. Noise at random levels draws whether the image stays clean, the level, and the
        noise; at a fixed level it draws the noise alone.
        """
        args = self.args
        if args.augmentation == "blur":
            low_sigma, high_sigma = args.blur_sigma
            blurred = blur_augmentation(
                low, probability=args.blur_prob, sigma_range=(low_sigma, high_sigma), generator=generators
            )
            return blurred, None
        if args.augmentation == "none":
            return low, None
        scheduler = self.pipe.corrupter
        if args.truncation_level is not None:
            return scheduler.corrupt(low, args.truncation_level, generator=generators), None
        is_clean = torch.stack([torch.rand((), generator=g) for g in generators]) < args.clean_prob
        drawn = draw_integers(generators, 1, int(scheduler.config["num_train_timesteps"]) + 1)
        levels = torch.where(is_clean, 0, drawn)
        told = self.unet.level_of_steps(levels, scheduler.alphas_cumprod)
        return scheduler.corrupt(low, levels, generator=generators), told.to(low.device)
