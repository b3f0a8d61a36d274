"""The training loop of two optimizers: an objective against a discriminator."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn
from torch.utils.data import default_collate

from ..losses.adversarial import adaptive_weight, generator_loss, gradient_penalty
from .args import TrainArgs
from .objective import Objective
from .optimizers import build_optimizer
from .plan import MicroBatch
from .run import Run


class AdversarialObjective(Objective):
    """An objective whose pictures a discriminator judges.

    Its `losses` also returns the pictures "fake" and "real" (b, c, h, w), and with a `last_weight` "reconstruction":
    the part of the loss against which the adversarial term is weighed.
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
        generator_loss: `scores of fakes -> adversarial term`, which the objective lowers.
        penalty: Weight of the gradient penalty of its loss (WGAN-GP), for which every sample draws one more number.
        goes_first: Whether it is trained before the objective in a step, so that the adversarial term comes from its
            new weights.

    Raises:
        ValueError: `fresh_forward` needs the objective's new weights, which `goes_first` does not wait for.
    """

    network: nn.Module
    start: int
    loss: Callable[[Tensor, Tensor], Tensor]
    weight: float = 1.0
    learning_rate: float | None = None
    fresh_forward: bool = False
    generator_loss: Callable[[Tensor], Tensor] = generator_loss
    penalty: float = 0.0
    goes_first: bool = False

    def __post_init__(self):
        if self.fresh_forward and self.goes_first:
            raise ValueError(
                "`fresh_forward` and `goes_first` are both set, but pictures of the new weights come after the step "
                "of the objective."
            )

    def losses(
        self, scored: nn.Module, real: Tensor, fake: Tensor, generators: Sequence[Generator]
    ) -> dict[str, Tensor]:
        """The loss "disc_loss", and "disc_penalty", the part of it that is the penalty.

        Args:
            scored: The network, as accelerate has prepared it.
            real, fake: Pictures (b, c, h, w); no gradient reaches what made them.
            generators: One a sample, for the penalty's draws.
        """
        real_scores, fake_scores = scored(real), scored(fake)
        loss = self.loss(real_scores.float(), fake_scores.float())
        if not self.penalty:
            return {"disc_loss": loss}
        epsilon = torch.stack([torch.rand(1, 1, 1, generator=g) for g in generators]).to(real)
        penalty = gradient_penalty(scored, real, fake, epsilon, self.penalty)
        return {"disc_loss": loss + penalty, "disc_penalty": penalty}


def fit_adversarial(
    accelerator: Accelerator,
    objective: AdversarialObjective,
    opponent: Opponent | None,
    dataset: Any,
    args: TrainArgs,
    *,
    transform: Callable[[Any, Generator], Any],
    collate: Callable = default_collate,
    num_workers: int = 0,
    on_validate: Callable[[int], Mapping[str, float]] | None = None,
    parameter_groups: Sequence[dict[str, Any]] | None = None,
    averaged: nn.Module | None = None,
) -> bool:
    """Trains `objective` and from its start on `opponent`: in each step first the one, then the other (the other way
    round with `goes_first`); see `fit` for the arguments.

    A step with the opponent has one micro-batch, since its balance is that of a whole batch.
    """
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer, schedule = build_optimizer(parameter_groups or trained, args)
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
        accelerator, args, parts, dataset, transform=transform, collate=collate, num_workers=num_workers,
        on_validate=on_validate, averaged=averaged,
    )  # fmt: skip
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    if opponent is not None:
        disc, disc_optimizer = accelerator.prepare(opponent.network, disc_optimizer)
        if opponent.penalty:  # torch cannot differentiate twice through what a launcher's --dynamo_backend compiles
            disc = getattr(disc, "_orig_mod", disc)

    def train_opponent(
        rival: Opponent, found: Mapping[str, Tensor], micro: MicroBatch, batch: Any, generators: list[Generator]
    ) -> None:
        with accelerator.autocast():
            fake = found["fake"].detach()
            if rival.fresh_forward:
                with torch.no_grad():
                    fake = objective.fake(batch, generators, run.step).float()  # the generators go on: new draws
            losses = rival.losses(disc, found["real"], fake, generators)
        run.backward(losses, micro, "disc_loss")
        accelerator.unscale_gradients(disc_optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in judges if p.grad is not None])
        run.update(disc_optimizer, disc_schedule, norm, losses["disc_loss"], of="the discriminator")

    with run:
        for step, window in run.steps():
            rival = opponent if opponent is not None and step >= opponent.start else None
            objective.before_step(window[0].batch, window[0].own, step, accelerator)
            for micro in window:
                with run.micro_step(micro, prepared) as (batch, generators):
                    with accelerator.autocast():
                        found = dict(prepared(batch, generators, step))
                    if rival is not None and rival.goes_first:
                        train_opponent(rival, found, micro, batch, generators)
                    if rival is not None:
                        with accelerator.autocast():
                            disc.requires_grad_(False)  # its gradients belong to its own step
                            found["adversarial"] = rival.generator_loss(disc(found["fake"]).float())
                            found["adaptive_weight"] = balance(
                                found, objective.last_weight, rival.weight, accelerator.scaler
                            )
                            found["loss"] = found["loss"] + found["adaptive_weight"] * found["adversarial"]
                            disc.requires_grad_(True)
                    run.backward(found, micro)
                objective.observe(found, micro.weight, accelerator)
            norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
            run.update(optimizer, schedule, norm, run.values["loss"])
            if rival is not None and not rival.goes_first:
                train_opponent(rival, found, micro, batch, generators)
            run.end_step()
    return run.end()


def refuse_micro_steps(train: TrainArgs, why: str, otherwise: str) -> None:
    """Refuses micro-steps with an opponent, also those that `--total_batch_size` makes on this many processes.

    Args:
        why: The reason, as part of the message.
        otherwise: The option that does without the opponent.

    Raises:
        ValueError: Names the batch a process that needs none.
    """
    steps, batch = train.gradient_accumulation_steps, train.train_batch_size
    if steps > 1:
        asked = "--gradient_accumulation_steps" if train.total_batch_size is None else "--total_batch_size"
        raise ValueError(
            f"{asked}={getattr(train, asked[2:])} makes {steps} micro-steps of {batch} samples a process, but {why}: "
            f"pass --train_batch_size {steps * batch}, more processes, or {otherwise}."
        )


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
