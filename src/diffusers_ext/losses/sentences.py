"""The two terms of a text autoencoder's loss: Optimus, arXiv 2004.04092, equations 1 and 7.

Original code (MIT): ChunyuanLI/Optimus@f3190fe:code/examples/big_ae/modules/vae.py.

Letters in shape comments: b sentences, l tokens, v words of the vocabulary, d latent width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sentence_nll(logits: Tensor, token_ids: Tensor, *, pad_token_id: int) -> Tensor:
    """-log p(sentence | latent) in nats: the cross-entropy of each token given those before it, summed. In float32.

    Args:
        logits: (b, l, v), those at position i are for the token at i + 1 (the last ones are not used).
        token_ids: integers (b, l), with <BOS> in front and padding, which does not count, behind.
        pad_token_id: the padding.

    Returns:
        (b,), float32.

    Raises:
        ValueError: on shapes that do not fit each other.
    """
    if logits.shape[:-1] != token_ids.shape or token_ids.ndim != 2:
        raise ValueError(
            f"`logits` must have shape (b, l, v) and `token_ids` (b, l), got {tuple(logits.shape)} and "
            f"{tuple(token_ids.shape)}."
        )
    predicted, target = logits[:, :-1].float(), token_ids[:, 1:]
    losses = F.cross_entropy(predicted.flatten(0, 1), target.flatten(), ignore_index=pad_token_id, reduction="none")
    return losses.view(target.shape).sum(dim=1)


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) || N(0, 1)) = 1/2 (mean^2 + e^logvar - logvar - 1) of each dimension: (b, d) in nats."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - logvar - 1.0)


def free_bits(divergence: Tensor, threshold: float) -> Tensor:
    """The divergence of each sentence without the dimensions that lie at or below `threshold`: they are free.

    Args:
        divergence: (b, d), as `gaussian_kl` gives it.
        threshold: nats of a dimension (the original's `dim_target_kl`). Above it the whole of it counts, so this has
            the gradient of equation 7's max(threshold, KL), and not its value.

    Returns:
        (b,).
    """
    return torch.where(divergence > threshold, divergence, 0.0).sum(dim=1)
