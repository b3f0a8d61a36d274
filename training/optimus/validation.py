"""How held-out sentences come back."""

import json
from pathlib import Path

import torch
from torch import Tensor

from diffusers_ext.losses.sentences import gaussian_kl
from diffusers_ext.models.autoencoder_optimus import AutoencoderOptimus
from diffusers_ext.pipelines.versatile.optimus_text import read_sentences
from diffusers_ext.training.optimus.args import OptimusArgs
from diffusers_ext.training.optimus.data import Tokenizers
from diffusers_ext.training_utils.checkpoints import replace_file

ACTIVE_VARIANCE = 0.01  # of a latent's mean over the sentences: the original's measure of "in use"


@torch.no_grad()
def reconstruct(
    model: AutoencoderOptimus, batch: dict[str, Tensor], tokenizers: Tokenizers, args: OptimusArgs
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """How sentences come back, most probable token by token, from the means that they are encoded to.

    Returns:
        Figures to log, `exact` among them (the share of sentences that come back token by token), and what came back
        of each.
    """
    decoder, targets = tokenizers[1], batch["token_ids"]
    mean, logvar = model.encode(batch["input_ids"], return_dict=False)
    decoded = model.decode(mean, do_sample=False, max_length=args.max_length)
    wanted, found = read_sentences(decoder, targets), read_sentences(decoder, decoded)
    same = [
        [i for i in one if i != decoder.pad_token_id] == [i for i in other if i != decoder.pad_token_id]
        for one, other in zip(targets.tolist(), decoded.tolist(), strict=True)
    ]
    figures = {
        "exact": sum(same) / len(same),
        "kl": float(gaussian_kl(mean, logvar).sum(dim=1).mean()),
        "latent_std": float(mean.std()),
        "active_latents": float((mean.var(dim=0) > ACTIVE_VARIANCE).sum()),
    }
    return figures, [{"sentence": a, "reconstruction": b} for a, b in zip(wanted, found, strict=True)]


def write_pairs(pairs: list[dict[str, str]], sheet: Path) -> None:
    """One sentence a line, and what came back of it."""
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    replace_file(sheet, lambda path: path.write_text(lines, encoding="utf-8"))
