"""What a component carries that its files would not: refused before anything is written.

A folder holds a config and, by name, the weights of the network that the config describes. Adapters, fp8 storage,
weights that were replaced in place or lie elsewhere change the network without changing its config; saved like that,
it loads as another network or not at all.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.blocks.wrappers import unwrap
from .adapters import NETWORK, adapted_layers

_FILE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LISTED = 3  # weights that a message names


def check_saveable(components: dict[str, Any]) -> None:
    """Refuses components that would not load back as they are.

    Raises:
        ValueError: Naming the component, what it carries and the way out; for weights that are not finite.
    """
    for name, component in components.items():
        network = unwrap(component) if isinstance(component, nn.Module) else None
        if network is None:
            continue
        if problem := _unsaveable(name, network):
            raise ValueError(f"`{name}` ({type(network).__name__}) would not load back as it is: {problem}")
        broken = [key for key, value in network.state_dict().items() if not _is_finite(value)]
        if broken:
            raise ValueError(
                f"`{name}` ({type(network).__name__}) has weights that are not finite ({_listing(broken)}): nobody"
                " could use it, so nothing is saved. Load it again; after a cast to float16, save before the cast."
            )


def check_whole_files(folder: Path) -> None:
    """Refuses weight files that were cut short, by what their headers say; no weight is read.

    Raises:
        ValueError: Naming the file.
    """
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged or incomplete ({error}): copy or save it again.") from error


def _unsaveable(name: str, network: nn.Module) -> str | None:
    if not isinstance(network, (ModelMixin, PreTrainedModel)):
        return f"it cannot be saved. Assign the model that it wraps, for example `pipe.{name} = pipe.{name}.module`."
    if getattr(network, "hf_quantizer", None) is not None:
        return None  # its format holds what was quantised, and refuses what it cannot hold
    if adapted_layers(network):
        if name != NETWORK:
            return (
                "LoRA matrices lie beside its weights. Merge them into the weights, or take them out, before saving."
            )
        return (
            "LoRA matrices lie beside its weights. Call `pipe.fuse_lora()` if they are to stay, then "
            f"`pipe.unload_lora_weights()`. `pipe.{name}.save_lora_adapter(folder, adapter_name=...)` saves them."
        )
    weights = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    if absent := [key for key, value in weights.items() if value.is_meta]:
        return f"its weights are offloaded ({_listing(absent)}). Call `pipe.remove_all_hooks()`, or save before that."
    if strange := [k for k, v in weights.items() if v.is_floating_point() and v.dtype not in _FILE_DTYPES]:
        return (
            f"its weights are stored as {weights[strange[0]].dtype} ({_listing(strange)}), as after "
            "`enable_layerwise_casting`. Save before casting, or load the pipeline again and save that."
        )
    with init_empty_weights():
        wanted = _as_configured(network).state_dict()
    lacking = [key for key, value in wanted.items() if key not in weights or not _is_like(weights[key], value)]
    if lacking:
        return (
            f"its config describes weights that it does not have ({_listing(lacking)}): layers were replaced or "
            "quantised in place. Undo that, or save before it."
        )
    return None


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.dtype not in _FILE_DTYPES or bool(value.isfinite().all())


def _is_like(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.is_floating_point() == other.is_floating_point()


def _as_configured(network: Any) -> nn.Module:
    """The network that the saved config describes."""
    if isinstance(network, PreTrainedModel):
        return type(network)(network.config)
    return type(network).from_config(json.loads(network.to_json_string()))


def _listing(names: list[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
