"""Which kernels a training uses where PyTorch's own choice is the slower one."""

from typing import Any

from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor, AttnProcessor
from torch import nn


def plain_attention(network: nn.Module) -> None:
    """Attention as plain matrix products: the same results, faster on a CPU.

    There the way back through the fused kernel is slow for small networks. Not for long sequences: the matrix of all
    pairs is kept.
    """
    for module in network.modules():
        if isinstance(module, Attention):  # with keys and values of its own for a condition, or without
            plain: Any = AttnProcessor() if module.added_kv_proj_dim is None else AttnAddedKVProcessor()
            module.set_processor(plain)
