"""Checkpoints of Versatile Diffusion, in the original's two layouts and in diffusers', to `VersatileUNet`.

Xu et al., arXiv 2211.08332; SHI-Labs/Versatile-Diffusion@cf0f4a2 (current layout) and @99f1831 (first release), code
MIT. All layouts hold the same blocks under other names: the first release those of ADM (see `adm.py`), diffusers its
own, the current one numbers in the order of running. So the names are made from the levels, and the shapes tell the
rest, except for the number of heads. The other networks of a checkpoint are in `versatile_checkpoint.py`.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ..models.blocks.versatile import versatile_walk
from ..models.unet_versatile import CONTEXT_TYPES, DATA_TYPES, VersatileUNet, flow_name
from ..pipelines.versatile.pipeline_versatile import VersatilePipeline
from .adm import ADM_RESNET, ADM_TIME, adm_blocks, adm_layers, adm_level_starts
from .keys import (
    Rules,
    build_empty,
    count_keys,
    listing,
    load_original,
    load_strict,
    rename_keys,
    require,
    under,
    unwrap_state_dict,
)

_UNETS = ("image_unet", "text_unet")  # folders of the repository


class _Layout(NamedTuple):
    """How a checkpoint names the blocks of a data and context type."""

    prefix: re.Pattern[str]  # what stands before the names, with the type
    first: str  # the data block that runs first
    context: str  # a context block that every type with contexts has


_LAYOUTS = {
    "current": _Layout(re.compile(r"diffuser\.(?P<type>\w+)\."), "data_blocks.0.0.", "context_blocks.0.0."),
    "first release": _Layout(
        re.compile(r"model\.diffusion_model\.unet_(?P<type>\w+)\."), "input_blocks.0.0.", "middle_block.1."
    ),
    "diffusers": _Layout(re.compile(r"(?P<type>\w+)_unet\."), "conv_in.", "mid_block.attentions.0."),
}
_TIME = re.compile(r"(?:.*\.)?(?P<own>time_embed(?:ding)?\.)")
_UNET = "a U-Net of Versatile Diffusion"


def convert_versatile_unet(
    state_dict: Mapping[str, Any], *, num_heads: int = 8, attention_levels: Sequence[bool] | None = None
) -> VersatileUNet:
    """Converts the multi-flow U-Net, of all flows or of some, in any of its three layouts.

    Args:
        state_dict: an original's U-Net under its full keys (of a whole checkpoint, the `unet` that
            `split_versatile_checkpoint` gives), or diffusers' two U-Nets with their keys under `image_unet.` and
            `text_unet.` (see `load_versatile_repository`).
        num_heads: heads of every attention, 8 in all released models.
        attention_levels: which levels have context layers. The shapes do not always tell in the current layout; None
            takes all but the last then, as in all released models.

    Returns:
        In eval mode, in the dtype of the weights.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite; if the layout is none of the
            three, or the attention levels do not fit.
    """
    config, weights = read_versatile_unet(state_dict, attention_levels=attention_levels)
    return load_strict(build_empty(VersatileUNet, num_attention_heads=num_heads, **config), weights)


def read_versatile_unet(
    state_dict: Mapping[str, Any], *, attention_levels: Sequence[bool] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration (without the heads) and the renamed weights, without building the network.

    Args, errors: as `convert_versatile_unet`. Tensors may be on the meta device.
    """
    weights = unwrap_state_dict(state_dict)
    types = {
        name: {match["type"]: match[0] for key in weights if (match := layout.prefix.match(key))}
        for name, layout in _LAYOUTS.items()
    }
    names = [name for name, found in types.items() if found]
    if len(names) != 1:
        raise ValueError(
            f"`state_dict` has the layout of {' and '.join(names) or 'nothing known'}: expected exactly one of "
            f"{', '.join(_LAYOUTS)}. It starts with {list(weights)[:3]}. For Stable Diffusion use "
            "`convert_stable_diffusion_unet`."
        )
    (name,) = names
    layout, prefixes = _LAYOUTS[name], types[name]
    strangers = [key for key in weights if not (_TIME.match(key) or key.startswith(tuple(prefixes.values())))]
    if strangers:
        raise ValueError(
            f"The checkpoint holds keys that this converter does not know: {listing(strangers)}. A checkpoint of "
            "several networks is taken apart by `split_versatile_checkpoint`."
        )
    data = {kind: p for kind, p in prefixes.items() if any(k.startswith(p + layout.first) for k in weights)}
    contexts = {kind: p for kind, p in prefixes.items() if any(k.startswith(p + layout.context) for k in weights)}
    if not data or not contexts:
        raise ValueError(
            f"The checkpoint holds the data groups {list(data)} and the context groups {list(contexts)}: at least one "
            "of each is needed."
        )
    return _read(weights, name, data, contexts, attention_levels)


def convert_stable_diffusion_unet(
    state_dict: Mapping[str, Any], *, context_type: str = "image", num_heads: int = 8
) -> VersatileUNet:
    """A network of one flow that starts from Stable Diffusion 1.x: the first stage of the paper's training.

    Residual blocks become the image data group, transformers the context group, the time embedding the global one.

    Args:
        state_dict: a whole Stable Diffusion 1.x checkpoint, its U-Net, or diffusers' `UNet2DConditionModel`.
        context_type: what the transformers attend to: "image" for the paper's single flow (image variation), "text"
            for text-to-image, which the network then does as Stable Diffusion did.
        num_heads: heads of every attention, 8 in Stable Diffusion 1.x.

    Returns:
        In eval mode, in the dtype of the weights. `add_flows` gives it the other groups.

    Raises:
        ValueError: as `convert_versatile_unet`; for an unknown context type, or another Stable Diffusion than 1.x.
    """
    if context_type not in CONTEXT_TYPES:
        raise ValueError(f"`context_type` is {context_type!r}: expected one of {', '.join(CONTEXT_TYPES)}.")
    weights = unwrap_state_dict(state_dict)
    prefix = "model.diffusion_model."
    if unet := {key: value for key, value in weights.items() if key.startswith(prefix)}:
        weights = unet  # of a whole checkpoint
    else:
        prefix = ""
    _refuse_linear_projections(weights)
    layout = "diffusers" if "conv_in.weight" in weights else "first release"
    require(weights, "a U-Net of Stable Diffusion", f"{prefix}{_LAYOUTS[layout].first}weight")
    config, renamed = _read(weights, layout, {"image": prefix}, {context_type: prefix}, None)
    return load_strict(build_empty(VersatileUNet, num_attention_heads=num_heads, **config), renamed)


def load_versatile_repository(
    folder: str | Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32, **components: Any
) -> VersatilePipeline:
    """Reads a repository in diffusers' format; save the result to have it in this package's.

    diffusers' pipelines swapped the modules of its two U-Nets in place for each flow, and current versions refuse its
    index, which names classes by their former folder. Here it is read part by part, and all but the U-Nets is stock.
    There is no Optimus in it, as diffusers never made texts: pass one converted from the original's file.

    Args:
        folder: a local copy, for instance `huggingface_hub.snapshot_download("shi-labs/versatile-diffusion")`.
        variant: of the weights' file names, such as "fp16".
        dtype: of all weights.
        components: of `VersatilePipeline`, in place of the folder's or beside them, such as `optimus`.

    Raises:
        FileNotFoundError: naming what the folder lacks.
        ValueError: as `convert_versatile_unet`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`folder` is {str(folder)!r}, which is no folder here. Download it first: hf download <repository> "
            '--exclude "pretrained_pth/*" --local-dir <folder>'
        )
    if missing := [name for name in _UNETS if not (folder / name).is_dir()]:
        raise FileNotFoundError(
            f"`folder` is {str(folder)!r}: it has no {' and no '.join(missing)}, so it is no repository of Versatile "
            "Diffusion in diffusers' format."
        )
    weights: dict[str, Tensor] = {}
    for name in _UNETS:
        for key, value in load_original(_find_weights(folder / name, variant)).items():
            weights[f"{name}.{key}"] = value.to(dtype)
    config, renamed = read_versatile_unet(weights)
    heads = _read_config(folder / "image_unet").get("attention_head_dim", 8)  # a misnomer: it is the number of heads
    heads = heads if isinstance(heads, int) else heads[0]
    unet = load_strict(build_empty(VersatileUNet, num_attention_heads=heads, **config), renamed)
    options = {"dtype": dtype} | ({} if variant is None else {"variant": variant})
    stock: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "vae": (AutoencoderKL, "vae", options),
        "text_encoder": (CLIPTextModelWithProjection, "text_encoder", options),
        "image_encoder": (CLIPVisionModelWithProjection, "image_encoder", options),
        "tokenizer": (CLIPTokenizer, "tokenizer", {}),
        "feature_extractor": (CLIPImageProcessor, "image_feature_extractor", {}),
    }
    if "scheduler" not in components:
        stock["scheduler"] = (_scheduler_class(folder), "scheduler", {})
    for name, (cls, subfolder, given) in stock.items():
        if name not in components:
            components[name] = cls.from_pretrained(folder, subfolder=subfolder, **given)
    return VersatilePipeline(unet=unet, **components)


def _refuse_linear_projections(weights: Mapping[str, Tensor]) -> None:
    """Stable Diffusion 2.x has linear layers around its transformers, and heads of 64 instead of 8 in number."""
    for key, value in weights.items():
        if key.endswith((".proj_in.weight", ".proj_out.weight")) and value.ndim == 2:
            raise ValueError(
                f"`state_dict` holds {key} of shape {tuple(value.shape)}, a linear layer as in Stable Diffusion 2.x "
                "and XL: expected Stable Diffusion 1.x, where it is a convolution of shape (channels, channels, 1, 1)."
                " Pass a checkpoint of 1.x, such as sd-v1-4.ckpt."
            )


def _read(
    weights: Mapping[str, Tensor],
    layout: str,
    data: Mapping[str, str],
    contexts: Mapping[str, str],
    attention_levels: Sequence[bool] | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights under the names of `VersatileUNet`.

    Args:
        layout: a name of `_LAYOUTS`.
        data, contexts: what stands before the names of each type's data and context blocks.
        attention_levels: see `convert_versatile_unet`.
    """
    prefixes = {*data.values(), *contexts.values()}
    names = {key.removeprefix(prefix) for key in weights for prefix in prefixes if key.startswith(prefix)}
    layers, told = _levels(layout, names)
    data_names, context_names = _block_names(layout, layers, told or [True] * len(layers))
    first = {name: weights[f"{prefix}{_LAYOUTS[layout].first}weight"] for name, prefix in data.items()}
    kinds = {name: "map" if weight.ndim == 4 else "vector" for name, weight in first.items()}
    rules: list[tuple[str, str]] = []
    for name, prefix in data.items():
        for index, source in enumerate(data_names):
            rules += under(prefix + source, f"data_layers.{name}.{index}.", data_layer_rules(kinds[name]))
    for name, prefix in contexts.items():
        rules += [(f"{prefix}{source}*", f"context_layers.{name}.{i}.*") for i, source in enumerate(context_names)]
    blocks = {key: value for key, value in weights.items() if not _TIME.match(key)}
    renamed = rename_keys(blocks, rules) | _time_weights(weights)

    data_types: dict[str, dict[str, Any]] = {}
    widths: list[int] = []
    for name, kind in kinds.items():
        inner, layer = ("", "conv") if kind == "map" else ("linear.", "linear")
        width, channels = renamed[f"data_layers.{name}.0.{inner}weight"].shape[:2]
        data_types[name], positions = {"kind": kind, "channels": channels}, 1
        if kind == "vector":
            positions = width // _rows(renamed, f"data_layers.{name}.{len(data_names) - 1}.norm.weight")
            data_types[name]["positions"] = positions
        starts = [f"data_layers.{name}.{number}.{layer}2.weight" for number in adm_level_starts(layers)]
        widths = widths or [_rows(renamed, key) // positions for key in starts]
    context_keys = {name: f"context_layers.{name}.0.transformer_blocks.0.attn2.to_k.weight" for name in contexts}
    require(renamed, _UNET, *context_keys.values())
    fitting = [told] if told is not None else _fitting_attention_levels(renamed, next(iter(contexts)), widths, layers)
    config = {
        "data_types": DATA_TYPES | data_types,  # the others can be added and trained
        "context_types": CONTEXT_TYPES | {name: renamed[key].shape[1] for name, key in context_keys.items()},
        "block_out_channels": tuple(widths),
        "layers_per_block": tuple(layers),
        "attention_levels": _choose_attention_levels(fitting, attention_levels),
        "flows": [flow_name(context, name) for name in data for context in contexts],
    }
    return config, renamed


def _levels(layout: str, names: Collection[str]) -> tuple[list[int], tuple[bool, ...] | None]:
    """Residual blocks of each level on the way down, finest first, and which have contexts, if the names tell it."""
    first = None  # context block of each level
    if layout == "first release":
        layers = adm_layers(names)
        first = [f"input_blocks.{number}.1." for number in adm_level_starts(layers)]
    elif layout == "diffusers":
        levels = range(len({name.split(".")[1] for name in names if name.startswith("down_blocks.")}))
        layers = [count_keys(names, f"down_blocks.{level}.resnets.", ".conv2.weight") for level in levels]
        first = [f"down_blocks.{level}.attentions.0." for level in levels]
    else:  # runs of residual blocks lie between the others; that of the deepest level holds the middle, too
        numbers = {int(name.split(".")[1]) for name in names if name.startswith("data_blocks.")}
        residual = {int(name.split(".")[1]) for name in names if re.match(r"data_blocks\.\d+\.0\.\w+_layers", name)}
        runs = [len(list(run)) for found, run in groupby(sorted(numbers), residual.__contains__) if found]
        layers = [*runs[: len(runs) // 2], (runs[len(runs) // 2] - 3) // 2] if runs else []
    if not layers or min(layers) < 1:
        raise ValueError(f"The levels hold {layers} residual blocks: each needs one at least. Keys are missing.")
    if first is None:
        return layers, None
    return layers, tuple(any(name.startswith(start) for name in names) for start in first)


def _block_names(layout: str, layers: Sequence[int], attention_levels: Sequence[bool]) -> tuple[list[str], list[str]]:
    """The names of the data blocks and of the context blocks, both in the order of running."""
    blocks = list(adm_blocks(layers, attention_levels))
    groups = [[b for b in blocks if b.op != "attention"], [b for b in blocks if b.op == "attention"]]
    if layout == "first release":
        data, contexts = ([block.adm for block in group] for group in groups)
    elif layout == "diffusers":
        data, contexts = ([block.diffusers for block in group] for group in groups)
    else:  # numbers; there are as many context blocks as the levels have that `attention_levels` will name
        data = [f"data_blocks.{number}.0." for number in range(len(groups[0]))]
        contexts = [f"context_blocks.{number}.0." for number in range(len(groups[1]))]
    return data, contexts


def data_layer_rules(kind: str) -> Rules:
    """Names within a data layer of a kind, "map" or "vector": the original's and diffusers' to ours."""
    residual = [*ADM_RESNET, *((target, target) for _, target in ADM_RESNET)]
    head = [("0.*", "norm.*"), ("conv_norm_out.*", "norm.*"), ("2.*", "proj.*"), ("conv_out.*", "proj.*")]
    if kind == "map":  # down- and upsampling, first layer
        same = [(name, name) for name in ("conv.*", "weight", "bias")]
        return [*residual, *head, ("op.*", "conv.*"), *same]
    residual = [(source, target.replace("conv", "linear")) for source, target in residual]
    head = [(source, target.replace("proj", "proj.linear")) for source, target in head]
    return [*residual, *head, ("weight", "linear.weight"), ("bias", "linear.bias")]


def _time_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The one time embedding, under our names. diffusers' layout holds a copy of it in each U-Net."""
    copies: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        if match := _TIME.match(key):
            copies.setdefault(match[0], {})[match["own"] + key[match.end() :]] = value
    if not copies:
        raise ValueError("The checkpoint holds no time embedding ('time_embed.' or 'time_embedding.').")
    (prefix, first), *others = copies.items()
    for other_prefix, other in others:
        same = first.keys() == other.keys() and all(
            value.is_meta or torch.equal(value, other[name]) for name, value in first.items()
        )
        if not same:
            raise ValueError(f"{prefix} and {other_prefix} differ: the flows must share one time embedding.")
    return rename_keys(first, [*ADM_TIME, *((target, target) for _, target in ADM_TIME)])


def _rows(weights: Mapping[str, Tensor], key: str) -> int:
    require(weights, _UNET, key)
    return weights[key].shape[0]


def _fitting_attention_levels(
    weights: Mapping[str, Tensor], context: str, widths: Sequence[int], layers: Sequence[int]
) -> list[tuple[bool, ...]]:
    """The choices of levels that give context blocks of the widths that a type has."""
    number = count_keys(weights, f"context_layers.{context}.", ".norm.weight")
    found = [_rows(weights, f"context_layers.{context}.{index}.norm.weight") for index in range(number)]
    return [
        levels
        for levels in product((True, False), repeat=len(widths))
        if [step.out_channels for step in versatile_walk(widths, layers, levels) if step.op == "context"] == found
    ]


def _choose_attention_levels(fitting: Sequence[tuple[bool, ...]], wanted: Sequence[bool] | None) -> tuple[bool, ...]:
    """The user's levels if they fit; without a wish the only ones that fit, or those of the released models."""
    released = [levels for levels in fitting if all(levels[:-1]) and not levels[-1]]
    candidates = released or fitting if wanted is None else [levels for levels in fitting if levels == tuple(wanted)]
    if len(candidates) != 1:
        raise ValueError(
            f"`attention_levels` is {wanted}; the context blocks fit {list(fitting) or 'no choice of levels'}: pass "
            "one of these."
        )
    return candidates[0]


def _find_weights(folder: Path, variant: str | None) -> Path:
    suffix = f".{variant}" if variant else ""
    names = [f"diffusion_pytorch_model{suffix}.{kind}" for kind in ("safetensors", "bin")]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        there = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(f"{str(folder)!r} holds none of {', '.join(names)}; it holds {', '.join(there)}.")
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _scheduler_class(folder: Path) -> Any:
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no scheduler/scheduler_config.json; pass `scheduler`.")
    return getattr(diffusers, json.loads(path.read_text())["_class_name"])
