"""The original's conditioners: text encoder, layout encoder, class embedder, spatial rescaler.

Rombach et al., arXiv 2112.10752, appendix E.2; CompVis/latent-diffusion@a506df5:ldm/modules/encoders/modules.py and
ldm/modules/x_transformer.py (code and weights MIT). The text encoder is a stock class, the others are those of
`models/encoders_ldm.py`.
"""

from collections.abc import Mapping
from typing import Any

from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import Tensor

from ..models.encoders_ldm import LDMClassEmbedder, LDMLayoutEncoder, LDMSpatialRescaler
from .keys import Rules, build_empty, count_heads, load_strict, rename_keys, require, unwrap_state_dict


def convert_ldm_bert(state_dict: Mapping[str, Any], *, num_heads: int = 8) -> LDMBertModel:
    """Converts the weights of the text encoder (`BERTEmbedder`), with its unused output head.

    Args:
        state_dict: original weights, the `cond_stage` of a checkpoint.
        num_heads: attention heads, 8 in all released models; their width is read off the shapes.

    Returns:
        diffusers' class in eval mode, in the dtype of the weights, without dropout. Call it without an attention mask:
        the original attends to padding.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite.
    """
    weights, sizes = _transformer(state_dict, num_heads)
    rules: Rules = [
        ("transformer.token_emb.weight", "model.embed_tokens.weight"),
        ("transformer.pos_emb.emb.weight", "model.embed_positions.weight"),
        ("transformer.norm.*", "model.layer_norm.*"),
        ("transformer.to_logits.*", "to_logits.*"),
        *_transformer_rules(
            sizes["layers"],
            "model.layers.{}.",
            norms=("self_attn_layer_norm", "final_layer_norm"),
            attention={
                "to_q": "self_attn.q_proj",
                "to_k": "self_attn.k_proj",
                "to_v": "self_attn.v_proj",
                "to_out": "self_attn.out_proj",
            },
            mlp=("fc1", "fc2"),
        ),
    ]
    config = LDMBertConfig(
        vocab_size=sizes["vocab"],
        max_position_embeddings=sizes["length"],
        encoder_layers=sizes["layers"],
        encoder_ffn_dim=sizes["mlp"],
        encoder_attention_heads=num_heads,
        head_dim=sizes["head_dim"],
        d_model=sizes["width"],
        dropout=0.0,
    )
    return load_strict(build_empty(LDMBertModel, config=config), rename_keys(weights, rules))


def convert_ldm_layout_encoder(state_dict: Mapping[str, Any], *, num_heads: int = 8) -> LDMLayoutEncoder:
    """Converts the layout transformer (`BERTEmbedder` with `use_tokenizer=False`); its unused head is left out.

    Args, errors: as `convert_ldm_bert`.

    Returns:
        In eval mode, in the dtype of the weights.
    """
    weights, sizes = _transformer(state_dict, num_heads)
    rules: Rules = [
        ("transformer.token_emb.weight", "token_embedding.weight"),
        ("transformer.pos_emb.emb.weight", "position_embedding.weight"),
        ("transformer.norm.*", "norm.*"),
        *_transformer_rules(
            sizes["layers"],
            "blocks.{}.",
            norms=("norm1", "norm3"),
            attention={"to_q": "attn1.to_q", "to_k": "attn1.to_k", "to_v": "attn1.to_v", "to_out": "attn1.to_out.0"},
            mlp=("ff.net.0.proj", "ff.net.2"),
        ),
    ]
    model = build_empty(
        LDMLayoutEncoder,
        vocab_size=sizes["vocab"],
        max_length=sizes["length"],
        hidden_size=sizes["width"],
        num_layers=sizes["layers"],
        num_attention_heads=num_heads,
        attention_head_dim=sizes["head_dim"],
    )
    return load_strict(model, rename_keys(weights, rules, ignore=("transformer.to_logits.*",)))


def convert_ldm_class_embedder(state_dict: Mapping[str, Any], *, null_class: int | None = None) -> LDMClassEmbedder:
    """Converts the original's `ClassEmbedder`; both sizes are read off the table.

    Args:
        state_dict: original weights, the `cond_stage` of a checkpoint.
        null_class: the row that means "no class": 1000 for the released LDM-4 on ImageNet (1001 rows).
    """
    weights = unwrap_state_dict(state_dict)
    require(weights, "a class embedder", "embedding.weight")
    num_class_embeds, embed_dim = weights["embedding.weight"].shape
    model = build_empty(
        LDMClassEmbedder, num_class_embeds=num_class_embeds, embed_dim=embed_dim, null_class=null_class
    )
    return load_strict(model, weights)


def convert_ldm_spatial_rescaler(
    state_dict: Mapping[str, Any], *, num_stages: int = 2, multiplier: float = 0.5, method: str = "bilinear"
) -> LDMSpatialRescaler:
    """Converts the original's `SpatialRescaler`; the shapes tell the channels, the config the rest.

    Args:
        state_dict: original weights, the `cond_stage` of a checkpoint.
        num_stages, multiplier, method: how often, by what factor and how the map is resized.
    """
    weights = unwrap_state_dict(state_dict)
    require(weights, "a spatial rescaler", "channel_mapper.weight")
    out_channels, in_channels = weights["channel_mapper.weight"].shape[:2]
    model = build_empty(
        LDMSpatialRescaler,
        in_channels=in_channels,
        out_channels=out_channels,
        num_stages=num_stages,
        multiplier=multiplier,
        method=method,
        bias="channel_mapper.bias" in weights,
    )
    return load_strict(model, weights)


def convert_ldm_conditioner(
    checkpoint_part: Mapping[str, Tensor],
    task: str,
    *,
    null_class: int | None = None,
    num_stages: int = 2,
    first_stage: Mapping[str, Tensor] | None = None,
) -> LDMClassEmbedder | LDMBertModel | LDMLayoutEncoder | LDMSpatialRescaler | None:
    """What encodes the condition of a task, or None where nothing has to.

    Args:
        checkpoint_part: the `cond_stage` of a checkpoint.
        task: `class`, `text`, `layout`, `semantic`; or one without a conditioner of its own.
        null_class: see `convert_ldm_class_embedder`.
        num_stages: see `convert_ldm_spatial_rescaler`.
        first_stage: that of the checkpoint, which inpainting models repeat as their conditioner.

    Raises:
        ValueError: also for a conditioner where the task has none.
    """
    if task not in ("class", "text", "layout", "semantic"):
        repeated = {} if first_stage is None or task != "inpainting" else first_stage
        own = [key for key, value in checkpoint_part.items() if key not in repeated or not value.equal(repeated[key])]
        if own:
            raise ValueError(
                f"The checkpoint holds a conditioner ('cond_stage_model.': {', '.join(own[:3])} ...), which models "
                f"for {task!r} do not have: name the task that it was trained for."
            )
        return None
    if not checkpoint_part:
        raise ValueError(f"The checkpoint holds no conditioner ('cond_stage_model.'); models for {task!r} have one.")
    if task == "class":
        return convert_ldm_class_embedder(checkpoint_part, null_class=null_class)
    if task == "text":
        return convert_ldm_bert(checkpoint_part)
    if task == "layout":
        return convert_ldm_layout_encoder(checkpoint_part)
    return convert_ldm_spatial_rescaler(checkpoint_part, num_stages=num_stages)


def _transformer(state_dict: Mapping[str, Any], num_heads: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights of a `BERTEmbedder` and its sizes."""
    weights = unwrap_state_dict(state_dict)
    layer = "transformer.attn_layers.layers."
    embeddings = ("transformer.token_emb.weight", "transformer.pos_emb.emb.weight")
    require(weights, "a BERTEmbedder", *embeddings, layer + "0.1.to_q.weight", layer + "1.1.net.2.weight")
    vocab, width = weights["transformer.token_emb.weight"].shape
    inner = weights[layer + "0.1.to_q.weight"].shape[0]
    sizes = {
        "vocab": vocab,
        "width": width,
        "length": weights["transformer.pos_emb.emb.weight"].shape[0],
        "mlp": weights[layer + "1.1.net.2.weight"].shape[1],
        "head_dim": inner // count_heads("num_heads", inner, num_heads),
        "layers": (1 + max(int(key.split(".")[3]) for key in weights if key.startswith(layer))) // 2,
    }
    return weights, sizes


def _transformer_rules(
    num_layers: int, target: str, *, norms: tuple[str, str], attention: Mapping[str, str], mlp: tuple[str, str]
) -> Rules:
    """The original lists attention and MLP in turn, each with its normalisation before it."""
    rules: list[tuple[str, str]] = []
    for layer in range(num_layers):
        prefix, new = "transformer.attn_layers.layers.", target.format(layer)
        rules.append((f"{prefix}{2 * layer}.0.*", f"{new}{norms[0]}.*"))
        rules += [(f"{prefix}{2 * layer}.1.{old}.*", f"{new}{name}.*") for old, name in attention.items()]
        rules.append((f"{prefix}{2 * layer + 1}.0.*", f"{new}{norms[1]}.*"))
        rules.append((f"{prefix}{2 * layer + 1}.1.net.0.0.*", f"{new}{mlp[0]}.*"))
        rules.append((f"{prefix}{2 * layer + 1}.1.net.2.*", f"{new}{mlp[1]}.*"))
    return rules
