"""Checkpoints of Versatile Diffusion as others wrote them, from the facts about their layouts, with random weights.

The names are spelt out here a second time, from the layer table of the original, so that the converters are not tested
against themselves.
"""

import torch
from torch import Tensor

from diffusers_ext.models.unet_versatile import VersatileUNet

TINY = {
    "data_types": {
        "image": {"kind": "map", "channels": 4},
        "text": {"kind": "vector", "channels": 6, "positions": 2},
    },
    "context_types": {"image": 12, "text": 12},
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "num_attention_heads": 4,
}
LAYOUTS = ("current", "first release", "diffusers")
RESIDUAL = {
    "norm1": "in_layers.0",
    "{}1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "{}2": "out_layers.3",
    "{}_shortcut": "skip_connection",
}


def tiny_unet(seed: int = 0, **overrides) -> VersatileUNet:
    """No weight is zero, so that every one shows in the output."""
    torch.manual_seed(seed)
    unet = VersatileUNet(**{**TINY, **overrides}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return unet


def original_weights(unet: VersatileUNet, layout: str) -> dict[str, Tensor]:
    """The weights of `unet` under the names of a layout."""
    config = unet.config
    names = block_names(layout, config.layers_per_block, config.attention_levels)
    weights = time_weights(unet, layout)
    for name, layers in unet.data_layers.items():
        kind, places = config.data_types[name]["kind"], [place for place in names if place[1] != "context"]
        for layer, (place, op) in zip(layers, places, strict=True):
            for key, value in layer.state_dict().items():
                weights[type_prefix(layout, name) + place + block_key(key, op, kind, layout)] = value
    for name, layers in unet.context_layers.items():
        places = [place for place in names if place[1] == "context"]
        for layer, (place, _) in zip(layers, places, strict=True):
            weights |= {type_prefix(layout, name) + place + key: value for key, value in layer.state_dict().items()}
    return weights


def type_prefix(layout: str, name: str) -> str:
    return {
        "current": f"diffuser.{name}.",
        "first release": f"model.diffusion_model.unet_{name}.",
        "diffusers": f"{name}_unet.",
    }[layout]


def time_weights(unet: VersatileUNet, layout: str) -> dict[str, Tensor]:
    own = unet.time_embedding.state_dict()
    if layout == "diffusers":
        return {f"{name}_unet.time_embedding.{key}": value for name in ("image", "text") for key, value in own.items()}
    prefix = "diffuser.image.time_embed." if layout == "current" else "model.diffusion_model.time_embed."
    return {prefix + key.replace("linear_1", "0").replace("linear_2", "2"): value for key, value in own.items()}


def block_names(layout: str, layers, attention: tuple[bool, ...]) -> list[tuple[str, str]]:
    """(name, step of the walk) of all blocks of a type, in the order of running."""
    layers = [layers] * len(attention) if isinstance(layers, int) else list(layers)
    levels, counts, found = len(layers), {"data": 0, "context": 0}, []

    def add(op: str, first_release: str, diffusers: str) -> None:
        kind = "context" if op == "context" else "data"
        current = f"{kind}_blocks.{counts[kind]}.0."
        counts[kind] += 1
        found.append(({"current": current, "first release": first_release, "diffusers": diffusers}[layout], op))

    add("in", "input_blocks.0.0.", "conv_in.")
    block = 0
    for level in range(levels):
        for layer in range(layers[level]):
            block += 1
            add("res", f"input_blocks.{block}.0.", f"down_blocks.{level}.resnets.{layer}.")
            if attention[level]:
                add("context", f"input_blocks.{block}.1.", f"down_blocks.{level}.attentions.{layer}.")
        if level < levels - 1:
            block += 1
            add("down", f"input_blocks.{block}.0.", f"down_blocks.{level}.downsamplers.0.")
    add("res", "middle_block.0.", "mid_block.resnets.0.")
    add("context", "middle_block.1.", "mid_block.attentions.0.")
    add("res", "middle_block.2.", "mid_block.resnets.1.")
    block = -1
    for place, level in enumerate(reversed(range(levels))):
        for layer in range(layers[level] + 1):
            block += 1
            add("res", f"output_blocks.{block}.0.", f"up_blocks.{place}.resnets.{layer}.")
            if attention[level]:
                add("context", f"output_blocks.{block}.1.", f"up_blocks.{place}.attentions.{layer}.")
        if level > 0:
            add("up", f"output_blocks.{block}.{2 if attention[level] else 1}.", f"up_blocks.{place}.upsamplers.0.")
    add("out", "out.", "")
    return found


def block_key(key: str, op: str, kind: str, layout: str) -> str:
    """A name within a data layer of ours as the layout has it."""
    own, _, suffix = key.rpartition(".")
    if op == "res":
        layer = "conv" if kind == "map" else "linear"
        for ours, original in RESIDUAL.items():
            if ours.format(layer) == own:
                theirs = ours.format("conv") if layout == "diffusers" else original
                return f"{theirs}.{suffix}"
        raise KeyError(key)
    if op == "out":
        is_norm = own == "norm"
        if layout == "diffusers":
            return f"{'conv_norm_out' if is_norm else 'conv_out'}.{suffix}"
        return f"{0 if is_norm else 2}.{suffix}"
    if kind == "map" and op in ("down", "up"):
        return f"{'op' if op == 'down' and layout != 'diffusers' else 'conv'}.{suffix}"
    return suffix
