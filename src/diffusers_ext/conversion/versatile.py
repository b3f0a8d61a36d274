"""Checkpoints of Versatile Diffusion, in the original's two layouts and in diffusers', to `VersatileUNet`.

Xu et al., arXiv 2211.08332; SHI-Labs/Versatile-Diffusion@cf0f4a2 (current layout) and @99f1831 (first release), code
MIT. All layouts hold the same blocks under other names. Put into the order in which the network runs them, a block has
the same number in each, and the shapes tell the configuration, except for the number of heads. The other networks of a
checkpoint are in `versatile_checkpoint.py`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

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
from ..pipelines.pipeline_versatile import VersatilePipeline
from .keys import Rules, build_empty, load_original, load_strict, rename_keys, under, unwrap_state_dict

# The layouts of a U-Net: what stands before the name of a block.
_LAYOUTS = {
    "current": re.compile(r"diffuser\.(?P<type>\w+)\."),
    "first release": re.compile(r"model\.diffusion_model\.unet_(?P<type>\w+)\."),
    "diffusers": re.compile(r"(?P<type>\w+)_unet\."),
}
_STABLE_DIFFUSION = re.compile(r"(?:model\.diffusion_model\.)?(?P<type>)")
_TIME = re.compile(r"(?:.*\.)?(?:time_embed|time_embedding)\.")
_TRANSFORMER = ("norm.", "proj_in.", "transformer_blocks.", "proj_out.")
# Names of a block, and its place in the order of running; the current layout counts data and context blocks apart.
_PLACES: list[tuple[re.Pattern[str], Callable[..., tuple[int, ...]]]] = [
    (re.compile(pattern), place)
    for pattern, place in (
        (r"(data|context)_blocks\.(\d+)\.0\.", lambda kind, i: (("data", "context").index(kind), int(i))),
        (r"input_blocks\.(\d+)\.(\d+)\.", lambda i, part: (0, int(i), int(part))),
        (r"middle_block\.(\d+)\.", lambda part: (1, int(part))),
        (r"output_blocks\.(\d+)\.(\d+)\.", lambda i, part: (2, int(i), int(part))),
        (r"out\.", lambda: (3,)),
        (r"conv_in\.", lambda: (0,)),
        (r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", lambda level, *turn: (0, int(level), *_turn(*turn))),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.", lambda level: (0, int(level) + 1)),
        (r"mid_block\.(resnets|attentions)\.(\d+)\.", lambda *turn: (1, *_turn(*turn))),
        (r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", lambda level, *turn: (2, int(level), *_turn(*turn))),
        (r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda level: (2, int(level) + 1)),
        (r"(?=conv_norm_out\.|conv_out\.)", lambda: (3,)),
    )
]
# Names within a block: the original's and diffusers', then ours; {} is "conv" for maps and "linear" for vectors.
_RESIDUAL = [
    (("in_layers.0", "norm1"), "norm1"),
    (("in_layers.2", "conv1"), "{}1"),
    (("emb_layers.1", "time_emb_proj"), "time_emb_proj"),
    (("out_layers.0", "norm2"), "norm2"),
    (("out_layers.3", "conv2"), "{}2"),
    (("skip_connection", "conv_shortcut"), "{}_shortcut"),
]
_HEAD = (("0", "conv_norm_out"), ("2", "conv_out"))
_UNETS = ("image_unet", "text_unet")  # folders of the repository
_TIME_RULES: Rules = [
    (f"{source}.*", f"time_embedding.linear_{layer}.*")
    for layer, sources in ((1, ("0", "linear_1")), (2, ("2", "linear_2")))
    for source in sources
]


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
    names = [name for name, pattern in _LAYOUTS.items() if any(map(pattern.match, weights))]
    if len(names) != 1:
        raise ValueError(
            f"`state_dict` has the layout of {' and '.join(names) or 'nothing known'}: expected exactly one of "
            f"{', '.join(_LAYOUTS)}. It starts with {list(weights)[:3]}. For Stable Diffusion use "
            "`convert_stable_diffusion_unet`."
        )
    blocks, time = _blocks(weights, _LAYOUTS[names[0]])
    data = {name: found for name, every in blocks.items() if (found := [b for b in every if not b.is_context])}
    contexts = {name: found for name, every in blocks.items() if (found := [b for b in every if b.is_context])}
    order = None
    if names[0] != "current" and data:
        order = [block.is_context for block in max(blocks.values(), key=len)]
    return _assemble(data, contexts, time, order, attention_levels)


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
    if unet := {key: value for key, value in weights.items() if key.startswith("model.diffusion_model.")}:
        weights = unet  # of a whole checkpoint
    _refuse_linear_projections(weights)
    all_blocks, time = _blocks(weights, _STABLE_DIFFUSION)
    blocks = all_blocks.get("", [])
    data, contexts = ([block for block in blocks if block.is_context == wanted] for wanted in (False, True))
    order = [block.is_context for block in blocks]
    config, renamed = _assemble({"image": data}, {context_type: contexts}, time, order, None)
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


@dataclass
class _Block:
    """A block of a checkpoint: `prefix` and a name within the block make the whole key."""

    prefix: str
    weights: dict[str, Tensor]

    @property
    def is_context(self) -> bool:
        return all(name.startswith(_TRANSFORMER) for name in self.weights)

    @property
    def is_residual(self) -> bool:
        return any(self.get(names) is not None for names, _ in _RESIDUAL)

    def get(self, names: Sequence[str]) -> Tensor | None:
        return next((self.weights[key] for name in names if (key := f"{name}.weight") in self.weights), None)


def _refuse_linear_projections(weights: Mapping[str, Tensor]) -> None:
    """Stable Diffusion 2.x has linear layers around its transformers, and heads of 64 instead of 8 in number."""
    for key, value in weights.items():
        if key.endswith((".proj_in.weight", ".proj_out.weight")) and value.ndim == 2:
            raise ValueError(
                f"`state_dict` holds {key} of shape {tuple(value.shape)}, a linear layer as in Stable Diffusion 2.x "
                "and XL: expected Stable Diffusion 1.x, where it is a convolution of shape (channels, channels, 1, 1)."
                " Pass a checkpoint of 1.x, such as sd-v1-4.ckpt."
            )


def _turn(kind: str, index: str) -> tuple[int, int]:
    return int(index), ("resnets", "attentions").index(kind)


def _blocks(
    weights: Mapping[str, Tensor], layout: re.Pattern[str]
) -> tuple[dict[str, list[_Block]], dict[str, dict[str, Tensor]]]:
    """The blocks of each type in the order of running, and the time embeddings by their prefix."""
    found: dict[str, dict[tuple[int, ...], _Block]] = {}
    time: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in weights.items():
        if match := _TIME.match(key):
            time.setdefault(match[0], {})[key[match.end() :]] = value
            continue
        if (owner := layout.match(key)) is None:
            unknown.append(key)
            continue
        for pattern, place in _PLACES:
            if match := pattern.match(key, owner.end()):
                blocks = found.setdefault(owner["type"], {})
                block = blocks.setdefault(place(*match.groups()), _Block(key[: match.end()], {}))
                block.weights[key[match.end() :]] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"The checkpoint holds keys that this converter does not know: {', '.join(unknown[:20])}. A checkpoint of "
            "several networks is taken apart by `split_versatile_checkpoint`."
        )
    return {name: [blocks[place] for place in sorted(blocks)] for name, blocks in found.items()}, time


def _assemble(
    data: Mapping[str, list[_Block]],
    contexts: Mapping[str, list[_Block]],
    time: Mapping[str, dict[str, Tensor]],
    order: Sequence[bool] | None,
    attention_levels: Sequence[bool] | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights under the names of `VersatileUNet`.

    Args:
        order: whether each block is a context block, in the order of running, where the layout tells.
    """
    if not data or not contexts or not time:
        raise ValueError(
            f"The checkpoint holds the data groups {list(data)}, the context groups {list(contexts)} and "
            f"{len(time)} time embeddings: at least one of each is needed."
        )
    data_types = {name: _latents(name, blocks) for name, blocks in data.items()}
    name, blocks = next(iter(data.items()))
    layers, widths = _levels(name, blocks, data_types[name].get("positions", 1))
    context_widths = [_need(block, ("norm",)).shape[0] for block in next(iter(contexts.values()))]
    levels = _attention_levels(widths, layers, context_widths, order, attention_levels)
    config = {
        "data_types": DATA_TYPES | data_types,  # the others can be added and trained
        "context_types": CONTEXT_TYPES | {name: _context_width(blocks[0]) for name, blocks in contexts.items()},
        "block_out_channels": tuple(widths),
        "layers_per_block": tuple(layers),
        "attention_levels": levels,
        "flows": [flow_name(context, name) for name in data for context in contexts],
    }
    ops = [s.op for s in versatile_walk(widths, layers, levels) if s.op not in ("context", "save", "load")]
    weights: dict[str, Tensor] = {}
    for name, blocks in data.items():
        if len(blocks) != len(ops):
            raise ValueError(f"The data group {name} has {len(blocks)} blocks; its shapes ask for {len(ops)}.")
        for index, (block, op) in enumerate(zip(blocks, ops, strict=True)):
            rules = data_layer_rules(data_types[name]["kind"], op)
            weights |= _renamed(block, f"data_layers.{name}.{index}.", rules)
    for name, blocks in contexts.items():
        for index, block in enumerate(blocks):
            weights |= _renamed(block, f"context_layers.{name}.{index}.", [("*", "*")])
    return config, weights | _time_weights(time)


def _renamed(block: _Block, target: str, rules: Rules) -> dict[str, Tensor]:
    original = {block.prefix + name: value for name, value in block.weights.items()}
    return rename_keys(original, under(block.prefix, target, rules))


def data_layer_rules(kind: str, op: str) -> Rules:
    """Names within a data layer: the original's and diffusers' to ours.

    Args:
        kind: of the data type, "map" or "vector".
        op: the step of the walk, "in", "res", "down", "up" or "out".
    """
    layer, inner = ("conv", "") if kind == "map" else ("linear", "linear.")
    if op == "res":
        return [(f"{source}.*", f"{target.format(layer)}.*") for sources, target in _RESIDUAL for source in sources]
    if op == "out":
        targets = ("norm.*", f"proj.{inner}*")
        return [(f"{source}.*", new) for sources, new in zip(_HEAD, targets, strict=True) for source in sources]
    if op == "in" or kind == "vector":
        return [("*", f"{inner}*")]
    return [("op.*", "conv.*"), ("conv.*", "conv.*")]  # down, up


def _time_weights(time: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The one time embedding; diffusers' layout holds a copy of it in each U-Net."""
    (prefix, first), *others = time.items()
    for other_prefix, other in others:
        same = first.keys() == other.keys() and all(
            value.is_meta or torch.equal(value, other[name]) for name, value in first.items()
        )
        if not same:
            raise ValueError(f"{prefix} and {other_prefix} differ: the flows must share one time embedding.")
    return _renamed(_Block(prefix, first), "", _TIME_RULES)


def _need(block: _Block, names: Sequence[str]) -> Tensor:
    weight = block.get(names)
    if weight is None:
        raise ValueError(f"The checkpoint lacks {block.prefix}{names[0]}.weight; it has {sorted(block.weights)[:8]}.")
    return weight


def _latents(name: str, blocks: Sequence[_Block]) -> dict[str, Any]:
    """What a data type's first block takes, as `VersatileUNet` describes it."""
    first = blocks[0].weights.get("weight")
    if first is None or first.ndim not in (2, 4):
        raise ValueError(f"The data group {name} does not start with a convolution or a linear layer.")
    if first.ndim == 4:
        return {"kind": "map", "channels": first.shape[1]}
    channels = _need(blocks[-1], _HEAD[0]).shape[0]
    return {"kind": "vector", "channels": first.shape[1], "positions": first.shape[0] // channels}


def _levels(name: str, blocks: Sequence[_Block], positions: int) -> tuple[list[int], list[int]]:
    """(layers, widths) of the levels, finest first, told by the runs of residual blocks between resampling blocks."""
    runs: list[list[_Block]] = []
    for block in blocks:
        if not block.is_residual:
            runs.append([])
        elif runs:
            runs[-1].append(block)
    runs = runs[:-1]  # nothing follows the head
    deepest = len(runs) // 2
    layers = [len(run) for run in runs[:deepest]] + [(len(runs[deepest]) - 3) // 2] if runs else []
    if len(runs) % 2 == 0 or min(layers) < 1:
        raise ValueError(
            f"The data group {name} has runs of {[len(run) for run in runs]} residual blocks: expected the way down, "
            "the middle and the way back up."
        )
    last = [run[count - 1] for run, count in zip(runs, layers, strict=False)]
    return layers, [_need(block, _RESIDUAL[4][0]).shape[0] // positions for block in last]


def _context_width(block: _Block) -> int:
    return _need(block, ("transformer_blocks.0.attn2.to_k",)).shape[1]


def _attention_levels(
    widths: Sequence[int],
    layers: Sequence[int],
    context_widths: Sequence[int],
    order: Sequence[bool] | None,
    wanted: Sequence[bool] | None,
) -> tuple[bool, ...]:
    """Which levels have context layers: what fits the widths of the context blocks and, if known, their order."""
    fitting = []
    for levels in product((True, False), repeat=len(widths)):
        walk = versatile_walk(widths, layers, levels)
        same_widths = [step.out_channels for step in walk if step.op == "context"] == list(context_widths)
        walked = [step.op == "context" for step in walk if step.op not in ("save", "load")]
        if same_widths and (order is None or walked == list(order)):
            fitting.append(levels)
    released = (*(True,) * (len(widths) - 1), False)
    choice = released if wanted is None and released in fitting else None
    if wanted is not None and tuple(wanted) in fitting:
        choice = tuple(map(bool, wanted))  # 1 and 0 will do
    elif wanted is None and len(fitting) == 1:
        choice = fitting[0]
    if choice is None:
        raise ValueError(
            f"`attention_levels` is {wanted}; the context blocks fit {fitting or 'no choice of levels'}: pass one of "
            "these."
        )
    return choice


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
