"""What Optimus learns: to give a sentence back from a draw of its posterior, which is held near N(0, 1)."""

from typing import Any

import torch
from torch import Generator, Tensor

from diffusers_ext.losses.sentences import free_bits, gaussian_kl, sentence_nll
from diffusers_ext.models.autoencoder_optimus import AutoencoderOptimus
from diffusers_ext.training.optimus.args import OptimusArgs
from diffusers_ext.training_utils.objective import Objective
from diffusers_ext.training_utils.schedules import CyclicalAnnealing


class SentenceObjective(Objective):
    """Cross-entropy of the sentence plus beta, which goes through cycles, times the divergence without free bits."""

    def __init__(self, model: AutoencoderOptimus, args: OptimusArgs, annealing: CyclicalAnnealing):
        super().__init__()
        self.model, self.args, self.annealing = model, args, annealing

    def losses(self, batch: dict[str, Tensor], generators: list[Generator], step: int) -> dict[str, Tensor]:
        """All but `loss` are for the log. Draws (d,) Gaussian values a sample, from the posterior."""
        token_ids, padding = batch["token_ids"], self.model.config["pad_token_id"]
        noise = torch.stack([torch.randn(self.model.config["latent_dim"], generator=g) for g in generators])
        logits, mean, logvar = self.model(**batch, noise=noise.to(token_ids.device), return_dict=False)
        nll = sentence_nll(logits, token_ids, pad_token_id=padding)  # (b,)
        divergence = gaussian_kl(mean, logvar)  # (b, d)
        is_token = token_ids != padding
        weighted = nll / is_token.sum(dim=1) if self.args.length_weighted_loss else nll
        right = (logits[:, :-1].argmax(dim=-1) == token_ids[:, 1:]) & is_token[:, 1:]
        beta = self.annealing(step)
        return {
            "loss": (weighted + beta * free_bits(divergence, self.args.free_bits)).mean(),
            "nll": nll.mean(),
            "kl": divergence.sum(dim=1).mean(),
            "beta": nll.new_full((), beta),
            "accuracy": (right.sum(dim=1) / is_token[:, 1:].sum(dim=1)).mean(),
        }

    # A checkpoint holds the autoencoder under its own names, as before there was an objective.

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        return self.model.state_dict(*args, **options)

    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        return self.model.load_state_dict(state_dict, *args, **options)
