"""The training loop of two optimizers: an objective against a discriminator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn

from ..losses.adversarial import adaptive_weight, generator_loss
from .args import TrainArgs
from .objective import Objective
from .optimizers import build_optimizer
from .run import Run


class AdversarialObjective(Objective):
    """An objective whose pictures a discriminator judges.

    Its `losses` also returns the pictures "fake" and "real" (b, c, h, w), and "reconstruction": the part of the loss
    against which the adversarial term is weighed.
    """

    @property
    def last_weight(self) -> Tensor | None:
        """The generator's last weight: the adversarial term gets the weight that makes its gradient there as long as
        the reconstruction's (VQGAN, arXiv 2012.09841, equation 7). `None`: a constant weight."""
        return None

    def fake(self, batch: Any, generators: list[Generator], step: int) -> Tensor:
        """Pictures for the discriminator once more, from the step's new weights and new draws, without gradients."""
        raise NotImplementedError


@dataclass(frozen=True)
class Opponent:
    """The discriminator, and how it is trained.

    Args:
        network: Pictures (b, c, h, w) -> scores.
        start: The first step with it.
        loss: `(scores of real pictures, scores of fakes) -> loss`.
        weight: Of the adversarial term.
        learning_rate: That of the arguments when unset.
        fresh_forward: Whether it sees `objective.fake` instead of the pictures of the objective's own step.
    """

    network: nn.Module
    start: int
    loss: Callable[[Tensor, Tensor], Tensor]
    weight: float = 1.0
    learning_rate: float | None = None
    fresh_forward: bool = False


def fit_adversarial(
    accelerator: Accelerator,
    objective: AdversarialObjective,
    opponent: Opponent | None,
    dataset: Any,
    args: TrainArgs,
    *,
    transform: Callable[[Any, Generator], Any],
    num_workers: int = 0,
    on_validate: Callable[[int], Mapping[str, float]] | None = None,
    averaged: nn.Module | None = None,
) -> bool:
    """Trains `objective` and from its start on `opponent`: in each step first the one, then the other; see `fit`.

    A step with the opponent has one micro-batch, since its balance is that of a whole batch.
    """
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer, schedule = build_optimizer(trained, args)
    parts = {"objective": objective, "optimizer": optimizer, "lr_scheduler": schedule}
    if opponent is not None:
        judges = list(opponent.network.parameters())
        disc_optimizer, disc_schedule = build_optimizer(judges, args, opponent.learning_rate)
        parts |= {
            "discriminator": opponent.network,
            "disc_optimizer": disc_optimizer,
            "disc_lr_scheduler": disc_schedule,
        }
    run = Run(
        accelerator, args, parts, dataset, transform=transform, num_workers=num_workers, on_validate=on_validate,
        averaged=averaged,
    )  # fmt: skip
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    if opponent is not None:
        disc, disc_optimizer = accelerator.prepare(opponent.network, disc_optimizer)
    with run:
        for step, window in run.steps():
            rival = opponent if opponent is not None and step >= opponent.start else None
            objective.before_step(window[0].batch, window[0].own, step, accelerator)
            for micro in window:
                with run.micro_step(micro, prepared) as (batch, generators):
                    with accelerator.autocast():
                        found = dict(prepared(batch, generators, step))
                        if rival is not None:
                            disc.requires_grad_(False)  # its gradients belong to its own step
                            found["adversarial"] = generator_loss(disc(found["fake"]).float())
                            found["adaptive_weight"] = balance(
                                found, objective.last_weight, rival.weight, accelerator.scaler
                            )
                            found["loss"] = found["loss"] + found["adaptive_weight"] * found["adversarial"]
                            disc.requires_grad_(True)
                    run.backward(found, micro)
                objective.observe(found, micro.weight, accelerator)
            norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
            run.update(optimizer, schedule, norm, run.values["loss"])
            if rival is not None:
                with accelerator.autocast():
                    fake = found["fake"].detach()
                    if rival.fresh_forward:
                        with torch.no_grad():
                            fake = objective.fake(batch, generators, step).float()  # the generators go on: new draws
                    real, fake = disc(found["real"]), disc(fake)
                    disc_loss = rival.loss(real.float(), fake.float())
                run.backward({"disc_loss": disc_loss}, micro, "disc_loss")
                accelerator.unscale_gradients(disc_optimizer)
                norm = torch.nn.utils.get_total_norm([p.grad for p in judges if p.grad is not None])
                run.update(disc_optimizer, disc_schedule, norm, disc_loss, of="the discriminator")
            run.end_step()
    return run.end()


def balance(
    found: Mapping[str, Tensor], last_weight: Tensor | None, weight: float, scaler: torch.amp.GradScaler | None = None
) -> Tensor:
    """What the adversarial term is multiplied by; in fp16 both terms are scaled as the loss will be."""
    adversarial = found["adversarial"]
    if last_weight is None:
        return torch.full_like(adversarial.detach(), weight)
    # scaling a 1 reads the scale without waiting for the device
    scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=adversarial.device))
    return weight * adaptive_weight(found["reconstruction"], adversarial, last_weight, scale)
