"""Low-rank matrices (LoRA, arXiv 2106.09685) on any network, also on those that diffusers gives no adapters."""

from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

LORA_FILE = "pytorch_lora_weights.safetensors"


def add_lora(network: nn.Module, rank: int, targets: Sequence[str] | None = None) -> None:
    """Freezes `network` and puts trainable matrices of this rank beside its linear layers: all, or `targets`.

    Raises:
        ValueError: it has no linear layers.
    """
    network.requires_grad_(False)
    if targets is None:
        targets = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not targets:
        raise ValueError(f"{type(network).__name__} has no linear layers that LoRA could train.")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), network)


def save_lora(network: nn.Module, folder: str | Path, part: str | None = None) -> None:
    """Writes the matrices alone to `folder/pytorch_lora_weights.safetensors`, under the names that diffusers gives.

    Args:
        part: Of a pipeline whose matrices they are, where it is not the one that `load_lora_weights` takes for
            granted: their names begin with it, so that they do not get into the wrong network.
    """
    state = get_peft_model_state_dict(network, adapter_name="default")
    prefix = "" if part is None else f"{part}."
    tensors = {f"{prefix}{name}": value.detach().contiguous().cpu() for name, value in state.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder, LORA_FILE), metadata={"format": "pt"})


def merge_lora(network: nn.Module) -> None:
    """Adds the matrices to the weights, and leaves the network as it was built."""
    adapted = [(name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config
