"""A checkpoint of Versatile Diffusion taken apart, and its CLIP as the two towers that the pipeline takes.

SHI-Labs/Versatile-Diffusion@99f1831, the first release, keeps all networks in one file, among them a copy of
transformers' `CLIPModel` (openai/clip-vit-large-patch14, MIT). @cf0f4a2 has one file for each, and CLIP from the Hub,
where that folder serves as it is. The U-Net's converter is in `versatile.py`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from .keys import (
    SCHEDULE_BUFFERS,
    build_empty,
    count_heads,
    count_keys,
    listing,
    load_strict,
    require,
    unwrap_state_dict,
)

# Where the parts of a checkpoint lie: current layout, first release.
_PARTS = {
    "unet": ("diffuser.", "model.diffusion_model."),
    "vae": ("vae.image.", "autokl."),
    "optimus": ("vae.text.", "optimus."),
    "clip": ("ctx.image.model.", "ctx.text.model.", "clip.model."),
}
ACTIVATIONS = ("quick_gelu", "gelu")  # OpenAI's, and that of most CLIPs since
_NO_WEIGHTS = re.compile(r"logit_scale|(text|vision)_model\.embeddings\.position_ids")


@dataclass(frozen=True)
class VersatileCheckpoint:
    """The parts of an original checkpoint: the U-Net under its full keys, the others under those of their own models.

    Attributes:
        unet: for `convert_versatile_unet`.
        vae: of the image autoencoder (Stable Diffusion's), empty where it is a file of its own.
        optimus: of the text autoencoder, likewise.
        clip: of transformers' `CLIPModel`, likewise.
    """

    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    optimus: dict[str, Tensor]
    clip: dict[str, Tensor]


def split_versatile_checkpoint(state_dict: Mapping[str, Any]) -> VersatileCheckpoint:
    """Takes a checkpoint of either layout apart.

    Args:
        state_dict: original weights, flat or under `"state_dict"`.

    Raises:
        ValueError: for keys of no known part, or if there is no U-Net.
    """
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in _PARTS}
    unknown = []
    for key, value in unwrap_state_dict(state_dict).items():
        for name, prefixes in _PARTS.items():
            if prefix := next((prefix for prefix in prefixes if key.startswith(prefix)), None):
                # the image and the text context are one CLIP, which the current layout may hold twice
                parts[name].setdefault(key if name == "unet" else key.removeprefix(prefix), value)
                break
        else:
            if not SCHEDULE_BUFFERS.fullmatch(key):
                unknown.append(key)
    if unknown:
        raise ValueError(f"The checkpoint holds keys of no known part: {listing(sorted(unknown))}.")
    if not parts["unet"]:
        raise ValueError(
            "`state_dict` is no checkpoint of Versatile Diffusion: nothing lies under 'diffuser.' (current layout) or "
            "'model.diffusion_model.' (first release)."
        )
    return VersatileCheckpoint(**parts)


def convert_versatile_clip(
    state_dict: Mapping[str, Any],
    *,
    text_heads: int | None = None,
    vision_heads: int | None = None,
    eos_token_id: int = 2,
    hidden_act: str = "quick_gelu",
) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
    """Converts both towers; every size but the number of heads is read off the shapes.

    Args:
        state_dict: the `clip` of `split_versatile_checkpoint`, or a `CLIPModel`'s own.
        text_heads, vision_heads: attention heads; by default the width divided by 64.
        eos_token_id: at which texts are pooled. The original's 2 stands for the highest id of each text.
        hidden_act: activation of both towers, "quick_gelu" (as in the original) or "gelu".

    Returns:
        Both towers in eval mode, in the dtype of the weights.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite; for an unknown activation.
    """
    if hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"`hidden_act` is {hidden_act!r}: expected one of {', '.join(ACTIVATIONS)}, as CLIP's config says."
        )
    weights = {key: value for key, value in unwrap_state_dict(state_dict).items() if not _NO_WEIGHTS.fullmatch(key)}
    text = {key: value for key, value in weights.items() if key.startswith("text_")}
    vision = {key: value for key, value in weights.items() if key.startswith(("vision_", "visual_"))}
    if unknown := sorted(weights.keys() - text.keys() - vision.keys()):
        raise ValueError(f"The checkpoint holds keys that this converter does not know: {listing(unknown)}.")
    text_config = _text_config(text, text_heads, eos_token_id, hidden_act)
    vision_config = _vision_config(vision, vision_heads, hidden_act)
    return (
        load_strict(build_empty(CLIPTextModelWithProjection, config=text_config), text),
        load_strict(build_empty(CLIPVisionModelWithProjection, config=vision_config), vision),
    )


def _text_config(
    weights: Mapping[str, Tensor], heads: int | None, eos_token_id: int, hidden_act: str
) -> CLIPTextConfig:
    embeddings = [f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position")]
    mlp = "text_model.encoder.layers.0.mlp.fc1.weight"
    require(weights, "CLIP's text tower", *embeddings, mlp, "text_projection.weight")
    vocab_size, width = weights[embeddings[0]].shape
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=weights[mlp].shape[0],
        projection_dim=weights["text_projection.weight"].shape[0],
        num_hidden_layers=count_keys(weights, "text_model.encoder.layers.", ".mlp.fc1.weight"),
        num_attention_heads=count_heads("text_heads", width, heads),
        max_position_embeddings=weights[embeddings[1]].shape[0],
        hidden_act=hidden_act,
        eos_token_id=eos_token_id,
    )


def _vision_config(weights: Mapping[str, Tensor], heads: int | None, hidden_act: str) -> CLIPVisionConfig:
    patches, positions = (f"vision_model.embeddings.{name}_embedding.weight" for name in ("patch", "position"))
    mlp = "vision_model.encoder.layers.0.mlp.fc1.weight"
    require(weights, "CLIP's picture tower", patches, positions, mlp, "visual_projection.weight")
    width, _, patch_size, _ = weights[patches].shape
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=weights[mlp].shape[0],
        projection_dim=weights["visual_projection.weight"].shape[0],
        num_hidden_layers=count_keys(weights, "vision_model.encoder.layers.", ".mlp.fc1.weight"),
        num_attention_heads=count_heads("vision_heads", width, heads),
        image_size=math.isqrt(weights[positions].shape[0] - 1) * patch_size,
        patch_size=patch_size,
        hidden_act=hidden_act,
    )
