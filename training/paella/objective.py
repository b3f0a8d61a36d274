"""What Paella learns: the tokens of an image, all at once, from noised ones.

Rampas et al., arXiv 2211.07292 (first version), section 3.
"""

from typing import Any

import torch
from torch import Generator, Tensor

from diffusers_ext.losses.discrete import token_cross_entropy
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.training.paella.args import PaellaArgs
from diffusers_ext.training.paella.conditions import Condition, Encoders
from diffusers_ext.training_utils.objective import Objective, keep_condition


class PaellaObjective(Objective):
    """The token predictor's loss, and with `--train_text_encoder` that of the tower before it."""

    def __init__(self, pipe: PaellaPipeline, condition: Condition, encoders: Encoders, args: PaellaArgs):
        super().__init__()
        self.unet, self.scheduler = pipe.unet, pipe.scheduler
        self.text_encoder = pipe.text_encoder if args.train_text_encoder else None
        self.condition, self.encoders, self.args = condition, encoders, args

    def losses(self, batch: dict[str, Any], generators: list[Generator], step: int) -> dict[str, Tensor]:
        """Draws per sample, in this order: dropped or not, time, then those of `scheduler.add_noise`."""
        tokens = batch["tokens"] if "tokens" in batch else self.encoders.tokens(batch["image"])  # a cache has them
        condition = self.condition.tensor(batch, self.encoders)
        keep = keep_condition(generators, self.args.cond_dropout_prob).to(tokens.device)
        r = torch.stack([torch.rand((), generator=g) for g in generators]).to(tokens.device)
        noised = self.scheduler.add_noise(tokens, None, r, generator=generators)
        logits = self.predict(noised, r, condition, keep).float()
        loss = token_cross_entropy(logits, tokens, label_smoothing=self.args.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == tokens).float().mean()}

    def predict(self, noised: Tensor, r: Tensor, condition: Tensor, keep: Tensor) -> Tensor:
        """Logits (b, v, h, w); a sample that is not kept (b,) gets the zero vector as its condition."""
        if self.text_encoder is not None:
            condition = self.text_encoder(condition).text_embeds
        condition = condition * keep.to(condition).view(-1, *[1] * (condition.ndim - 1))
        return self.unet(noised, r, condition, return_dict=False)[0]
