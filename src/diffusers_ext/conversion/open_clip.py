"""open_clip weights to the CLIP of transformers, with the tokenizer and the picture preparation that belong to it.

mlfoundations/open_clip (MIT), keys of `open_clip.model.CLIP` and `CustomTextCLIP` with a ViT (version 3.3); Paella v1
uses its ViT-g-14, `laion2b_s12b_b42k` (weights MIT). The vectors are equal without normalisation.

What the weights do not tell is assumed to be what the plain ViT models have: class token pooling of pictures, pooling
of texts at the highest id, a causal mask, layer norms with eps 1e-5. CLIPA, SigLIP, CoCa and models with layer scale
have other keys and are refused; the "worldwide" models (pooled at an id of their own) have the same keys: not for this
converter. Difference: a text without the end-of-text token is pooled at its highest id by open_clip and at its first
position by transformers. Every tokenizer of CLIP ends every text with it.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from .keys import Rules, build_empty, count_heads, count_keys, load_strict, rename_keys, under, unwrap_state_dict

VISION_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # ViT-H, ViT-g, ViT-bigG, ViT-e; 64 in the others
VOCABULARY = 49408  # of the byte pair encoding that CLIP came with

_BLOCK: Rules = [
    ("ln_1.*", "layer_norm1.*"),
    ("attn.q_proj.*", "self_attn.q_proj.*"),
    ("attn.k_proj.*", "self_attn.k_proj.*"),
    ("attn.v_proj.*", "self_attn.v_proj.*"),
    ("attn.out_proj.*", "self_attn.out_proj.*"),
    ("ln_2.*", "layer_norm2.*"),
    ("mlp.c_fc.*", "mlp.fc1.*"),
    ("mlp.c_proj.*", "mlp.fc2.*"),
]
_TEXT: Rules = [
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *under("transformer.resblocks.{}.", "text_model.encoder.layers.{}.", _BLOCK),
    ("ln_final.*", "text_model.final_layer_norm.*"),
    ("text_projection", "text_projection.weight"),
]
_RULES: Rules = [
    ("logit_scale", "logit_scale"),
    *_TEXT,
    *under("text.", "", _TEXT),  # CustomTextCLIP
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),  # so spelt in transformers
    *under("visual.transformer.resblocks.{}.", "vision_model.encoder.layers.{}.", _BLOCK),
    ("visual.ln_post.*", "vision_model.post_layernorm.*"),
    ("visual.proj", "visual_projection.weight"),
]
# Where the sizes are read off, under the new names.
_SIZED = (
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
    "text_model.encoder.layers.0.mlp.fc1.weight",
    "text_projection.weight",
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.position_embedding.weight",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.encoder.layers.0.mlp.fc1.weight",
    "visual_projection.weight",
)


def convert_open_clip(
    state_dict: Mapping[str, Any],
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    quick_gelu: bool = False,
) -> CLIPModel:
    """Converts both towers of an open_clip ViT; every size but the number of heads is read off the shapes.

    Args:
        state_dict: original weights, flat, under `"state_dict"`, or of a DDP module.
        vision_heads: attention heads of the picture tower. When unset, its width divided by 80 for ViT-H, 88 for
            ViT-g, 104 for ViT-bigG, 112 for ViT-e (known by their widths), and 64 for every other.
        text_heads: attention heads of the text tower. When unset, its width divided by 64.
        quick_gelu: the towers were trained with OpenAI's approximation (open_clip's `...-quickgelu` and OpenAI's own
            weights) instead of the exact GELU. The weights do not tell.

    Returns:
        Both towers with their projections in eval mode, in the dtype of the weights. Its folder also loads as
        `CLIPTextModelWithProjection` and `CLIPVisionModelWithProjection`.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite; for a grid of patches that is not
            square; or for a width that the heads do not divide.
    """
    weights = rename_weights(state_dict)
    config = read_config(weights, vision_heads=vision_heads, text_heads=text_heads, quick_gelu=quick_gelu)
    return load_strict(build_empty(CLIPModel, config=config), weights)


def rename_weights(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights as `CLIPModel` names and shapes them.

    Raises:
        ValueError: listing keys that are unknown, or saying what is missing that no ViT is without.
    """
    weights = rename_keys(_take_apart(unwrap_state_dict(state_dict)), _RULES)
    missing = [key for key in _SIZED if key not in weights]
    if missing:
        raise ValueError(f"`state_dict` is not an open_clip ViT: there is nothing for {', '.join(missing)}.")
    return weights


def read_config(
    weights: Mapping[str, Tensor], *, vision_heads: int | None, text_heads: int | None, quick_gelu: bool
) -> CLIPConfig:
    """The configuration that renamed weights tell; the arguments are those of `convert_open_clip`."""
    vocab_size, text_width = weights["text_model.embeddings.token_embedding.weight"].shape
    vision_width, channels, patch_size, _ = weights["vision_model.embeddings.patch_embedding.weight"].shape
    num_patches = weights["vision_model.embeddings.position_embedding.weight"].shape[0] - 1  # without the class token
    grid = math.isqrt(num_patches)
    if grid * grid != num_patches:
        raise ValueError(f"The picture tower has {num_patches} patches: CLIPVisionModel needs a square grid.")
    activation = "quick_gelu" if quick_gelu else "gelu"
    projection_dim = weights["text_projection.weight"].shape[0]
    return CLIPConfig(
        projection_dim=projection_dim,
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "intermediate_size": weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "projection_dim": projection_dim,
            "num_hidden_layers": count_keys(weights, "text_model.encoder.layers.", ".mlp.fc1.weight"),
            "num_attention_heads": count_heads("text_heads", text_width, text_heads),
            "max_position_embeddings": weights["text_model.embeddings.position_embedding.weight"].shape[0],
            "hidden_act": activation,
            # open_clip pools at the highest id: the end of text, the last of the vocabulary. transformers pools at the
            # first place of this id (at the highest id if it is 2, which is the same), whatever id pads behind it.
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "projection_dim": projection_dim,
            "num_hidden_layers": count_keys(weights, "vision_model.encoder.layers.", ".mlp.fc1.weight"),
            "num_attention_heads": count_heads(
                "vision_heads", vision_width, vision_heads, VISION_HEAD_WIDTHS.get(vision_width, 64)
            ),
            "num_channels": channels,
            "image_size": grid * patch_size,
            "patch_size": patch_size,
            "hidden_act": activation,
        },
    )


def build_open_clip_processors(
    model: CLIPModel, preprocessing: Mapping[str, Any] | None = None
) -> tuple[CLIPTokenizer, CLIPImageProcessor]:
    """What feeds `model`: the tokenizer with the vocabulary that open_clip ships, and the picture preparation.

    Token ids equal those of `open_clip.get_tokenizer` up to the end of the text (open_clip pads with 0, this tokenizer
    with the end-of-text id; neither changes the vector), except that HTML entities and wrongly decoded letters are
    left as they are, which open_clip repairs first. Pictures: shorter side and centre crop to the tower's size,
    bicubic, CLIP's mean and standard deviation.

    Args:
        preprocessing: what open_clip notes of pictures (`visual.preprocess_cfg`): some weights have another mean.

    Raises:
        ImportError: open_clip, whose package holds the vocabulary, is not installed.
        ValueError: the text tower has another vocabulary, or pictures are resized in another way.
    """
    config: Any = model.config
    text, vision = config.text_config, config.vision_config
    if text.vocab_size != VOCABULARY:
        raise ValueError(
            f"The text tower knows {text.vocab_size} tokens and open_clip's vocabulary has {VOCABULARY}: this model "
            "has a tokenizer of its own, take it from where the weights come from."
        )
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise ImportError(
            'CLIP\'s vocabulary lies in the open_clip package: pip install open_clip_torch (extra "train")'
        ) from error
    original = SimpleTokenizer()
    vocabulary = {piece: number for piece, number in original.encoder.items() if number < VOCABULARY - 2}
    vocabulary |= {"<|startoftext|>": VOCABULARY - 2, "<|endoftext|>": VOCABULARY - 1}
    merges: Any = list(original.bpe_ranks)  # pairs, as the tokenizers library takes them
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=text.max_position_embeddings)
    side, noted = vision.image_size, dict(preprocessing or {})
    resizing = noted.get("interpolation", "bicubic"), noted.get("resize_mode", "shortest")
    if resizing != ("bicubic", "shortest"):
        raise ValueError(
            f"open_clip prepares pictures for these weights by {' and '.join(resizing)}, but this converter knows "
            "bicubic and shortest."
        )
    normal: dict[str, Any] = {f"image_{name}": list(noted[name]) for name in ("mean", "std") if name in noted}
    size, crop = {"shortest_edge": side}, {"height": side, "width": side}
    return tokenizer, CLIPImageProcessor(size=size, crop_size=crop, **normal)


def load_open_clip(name: str) -> dict[str, Any]:
    """A CLIP that open_clip loads, as the components of a pipeline: the towers in float32, in eval mode.

    Args:
        name: `<model>/<tag or file>`, as `open_clip.create_model` knows them: `ViT-g-14/laion2b_s12b_b42k`, or
            `ViT-B-32/some/folder/weights.safetensors`. Weights of a tag that are not in open_clip's cache are
            downloaded.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: open_clip knows no such model or tag, or the model is none that transformers' CLIP can hold.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f'"open_clip:{name}" needs the open_clip package: pip install open_clip_torch (extra "train")'
        ) from error
    model, _, weights = name.partition("/")
    config: Any = open_clip.get_model_config(model)
    if not weights or config is None:
        raise ValueError(
            f'"open_clip:{name}" must be open_clip:<model>/<tag or file>, such as '
            f"open_clip:ViT-g-14/laion2b_s12b_b42k; the models are {', '.join(open_clip.list_models())}."
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights not in tags and not Path(weights).is_file():
        raise ValueError(
            f'"open_clip:{name}": {weights!r} is no file and no tag of {model}; its tags are '
            f"{', '.join(tags) or 'none'}."
        )
    quick_gelu = bool(config.get("quick_gelu", False))
    if weights in tags and open_clip.get_pretrained_cfg(model, weights).get("quick_gelu", False) != quick_gelu:
        raise ValueError(
            f'"open_clip:{name}": these weights were trained with{"out" if quick_gelu else ""} the quick GELU, which '
            f"{model} has{'' if quick_gelu else ' not'}: name the model "
            f"{model.removesuffix('-quickgelu') if quick_gelu else model + '-quickgelu'}."
        )
    original: Any = open_clip.create_model(model, pretrained=weights, precision="fp32", device="cpu")
    vision, text = config["vision_cfg"], config["text_cfg"]
    width = vision["width"] if isinstance(vision.get("width"), int) else 0  # a ResNet has other keys, and is refused
    clip = convert_open_clip(
        original.state_dict(),
        vision_heads=width // vision.get("head_width", 64) or None,
        text_heads=text.get("heads", 8),
        quick_gelu=quick_gelu,
    )
    tokenizer, feature_extractor = build_open_clip_processors(clip, original.visual.preprocess_cfg)
    towers = split_towers(clip)
    return {"tokenizer": tokenizer, "feature_extractor": feature_extractor, **towers}


def split_towers(clip: CLIPModel) -> dict[str, Any]:
    """The two towers of a CLIP with their projections, each as the model that a pipeline holds."""
    config: Any = clip.config
    weights = clip.state_dict()
    towers: dict[str, Any] = {}
    for name, kind, part in (
        ("text_encoder", CLIPTextModelWithProjection, "text"),
        ("image_encoder", CLIPVisionModelWithProjection, "vision"),
    ):
        prefixes = (f"{part}_model.", "text_projection." if part == "text" else "visual_projection.")
        own = {key: value for key, value in weights.items() if key.startswith(prefixes)}
        towers[name] = load_strict(build_empty(kind, config=getattr(config, f"{part}_config")), own)
    return towers


def _take_apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Splits the fused input projections, and turns projections that multiply from the right into linear layers'."""
    parts = {}
    for key, value in weights.items():
        if match := re.fullmatch(r"(.*\.attn\.)in_proj_(weight|bias)", key):
            for name, part in zip("qkv", value.chunk(3), strict=False):  # a misshaped one is load_strict's to report
                parts[f"{match[1]}{name}_proj.{match[2]}"] = part
        elif key in ("text_projection", "text.text_projection", "visual.proj") and value.ndim == 2:
            parts[key] = value.T
        else:
            parts[key] = value
    return parts
