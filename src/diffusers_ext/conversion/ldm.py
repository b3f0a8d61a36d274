"""Original latent-diffusion checkpoints to models of diffusers and of this package.

Rombach et al., arXiv 2112.10752; CompVis/latent-diffusion@a506df5 (code and weights MIT). A `.ckpt` of the original
holds several networks: `split_ldm_checkpoint` takes them apart, then each goes to its converter. Those of the
autoencoders are in `ldm_autoencoder.py`.

The U-Nets and the text encoder are stock classes; for the conditioners of the tasks that diffusers lacks see
`models/encoders_ldm.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ..models.encoders_ldm import LDMClassEmbedder, LDMLayoutEncoder, LDMSpatialRescaler
from ..models.unet_ldm import LDMUNet
from ..pipelines.ldm_denoising import ldm_scheduler
from .keys import Rules, build_empty, load_strict, rename_keys, under, unwrap_state_dict

_SCHEDULE_BUFFERS = re.compile(
    r"alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod|"
    r"sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar"
)
_EMA_COUNTERS = ("decay", "num_updates")

_ADM_RESNET: Rules = [
    ("in_layers.0.*", "norm1.*"),
    ("in_layers.2.*", "conv1.*"),
    ("emb_layers.1.*", "time_emb_proj.*"),
    ("out_layers.0.*", "norm2.*"),
    ("out_layers.3.*", "conv2.*"),
    ("skip_connection.*", "conv_shortcut.*"),
]
_QKV_ATTENTION: Rules = [
    ("norm.*", "group_norm.*"),
    ("q.*", "to_q.*"),
    ("k.*", "to_k.*"),
    ("v.*", "to_v.*"),
    ("proj_out.*", "to_out.0.*"),
]
_SPATIAL_TRANSFORMER: Rules = [
    (name, name) for name in ("norm.*", "proj_in.*", "transformer_blocks.{}.*", "proj_out.*")
]


@dataclass(frozen=True)
class LDMCheckpoint:
    """The parts of an original checkpoint, under the keys that the converters take.

    `cond_stage` is empty for unconditional models, and for conditions that have no network of their own; where the
    condition is encoded by the first stage (inpainting), it repeats the autoencoder. `scale_factor` is None unless it
    was measured in the training (`scale_by_std`): then it belongs into the autoencoder's converter.
    """

    unet: dict[str, Tensor]
    first_stage: dict[str, Tensor]
    cond_stage: dict[str, Tensor]
    betas: Tensor | None
    scale_factor: float | None


def split_ldm_checkpoint(state_dict: Mapping[str, Any], *, use_ema: bool | None = None) -> LDMCheckpoint:
    """Takes a latent-diffusion checkpoint apart, and chooses between weights and their averages.

    Args:
        state_dict: original weights, flat or under `"state_dict"`; of a whole model, or of a first stage alone.
        use_ema: take the averaged weights, which the original samples with; None: wherever there are any. Only the
            U-Net is averaged in the released models, never the conditioner.

    Raises:
        ValueError: if it is no such checkpoint, for keys of no known part, or if averaged weights are asked for and
            missing or incomplete.
    """
    weights = unwrap_state_dict(state_dict)
    if "encoder.conv_in.weight" in weights:  # a first stage alone
        return LDMCheckpoint({}, _choose_average(weights, use_ema), {}, None, None)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "first_stage_model": {}, "cond_stage_model": {}}
    buffers: dict[str, Tensor] = {}
    unknown = []
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        if part in parts:
            parts[part][rest] = value
        elif part == "model_ema":
            parts["model"][key] = value
        elif key in ("betas", "scale_factor"):
            buffers[key] = value
        elif not _SCHEDULE_BUFFERS.fullmatch(key):
            unknown.append(key)
    if not any(key.startswith("diffusion_model.") for key in parts["model"]):
        raise ValueError(
            "`state_dict` is no latent-diffusion checkpoint: nothing lies under 'model.diffusion_model.'. It starts "
            f"with {list(weights)[:3]}."
        )
    if unknown:
        raise ValueError(f"The checkpoint holds keys of no known part: {', '.join(unknown)}.")
    model = _choose_average(parts["model"], use_ema)
    rest = [_choose_average(parts[name], None if use_ema else use_ema) for name in list(parts)[1:]]
    scale = buffers.get("scale_factor")
    return LDMCheckpoint(
        unet={key.removeprefix("diffusion_model."): value for key, value in model.items()},
        first_stage=rest[0],
        cond_stage=rest[1],
        betas=buffers.get("betas"),
        scale_factor=None if scale is None else float(scale),
    )


def convert_ldm_schedule(betas: Tensor) -> DDIMScheduler:
    """The scheduler of a checkpoint's `betas` (T,), of which the first and the last say everything.

    Raises:
        ValueError: if they are not the squares of evenly spaced numbers, as in all released models.
    """
    scheduler = ldm_scheduler(float(betas[0]), float(betas[-1]), num_train_timesteps=len(betas))
    if not betas.float().cpu().allclose(scheduler.betas, rtol=1e-4, atol=1e-8):
        raise ValueError(
            f"`betas` go from {float(betas[0]):.6g} to {float(betas[-1]):.6g}, but not as squares of evenly spaced "
            "numbers ('scaled_linear'): build a scheduler with `trained_betas` for them."
        )
    return scheduler


def convert_ldm_unet(
    state_dict: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    sample_size: int | None = None,
    dropout: float = 0.0,
) -> UNet2DModel | UNet2DConditionModel:
    """Converts the weights of the original's `UNetModel`; every size is read off the shapes, except for the heads.

    Args:
        state_dict: original weights, as `split_ldm_checkpoint` gives them.
        num_heads, num_head_channels: exactly one of the two, from the original's config: a constant number of heads,
            or a constant width of each.
        sample_size: side of the latents (the original's `image_size`), a note in the config.
        dropout: of the residual blocks, for further training.

    Returns:
        In eval mode, in the dtype of the weights: a `UNet2DConditionModel` if there is cross-attention (class, text,
        layout), else a `UNet2DModel` (unconditional, concatenated conditions), or a `LDMUNet` where self-attention
        has a constant number of heads on levels of several widths.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite; for heads that do not fit; for
            residual resampling together with cross-attention, which diffusers cannot express.
    """
    weights = unwrap_state_dict(state_dict)
    _require(weights, "a latent-diffusion U-Net", "input_blocks.0.0.weight", "middle_block.1.norm.weight")
    if (num_heads is None) == (num_head_channels is None):
        raise ValueError(
            f"`num_heads` is {num_heads} and `num_head_channels` {num_head_channels}: pass the one that the "
            "original's config sets; the shapes do not tell."
        )
    layers, num_levels = _unet_depth(weights)
    first = [f"input_blocks.{1 + level * (layers + 1)}." for level in range(num_levels)]  # first layer of each level
    widths = [weights[prefix + "0.out_layers.3.weight"].shape[0] for prefix in first]
    has_attention = [prefix + "1.norm.weight" in weights for prefix in first]
    is_transformer = "middle_block.1.proj_in.weight" in weights
    residual_resampling = any(".in_layers." in key for key in weights if re.match(r"output_blocks\.\d+\.[12]\.", key))
    if widths[0] != weights["input_blocks.0.0.weight"].shape[0]:
        raise ValueError(
            f"The U-Net starts with {weights['input_blocks.0.0.weight'].shape[0]} channels and its first level has "
            f"{widths[0]}: diffusers needs the same, that is a `channel_mult` that starts with 1."
        )
    if is_transformer and residual_resampling:
        raise ValueError(
            "The U-Net has both cross-attention and residual resampling (`resblock_updown`): no class of diffusers "
            "has both, and no released model."
        )
    heads = {width: _heads(width, num_heads, num_head_channels) for width in widths}
    film = weights[first[0] + "0.emb_layers.1.weight"].shape[0] == 2 * widths[0]
    config: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "dropout": dropout,
        "resnet_time_scale_shift": "scale_shift" if film else "default",
        "num_class_embeds": weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else None,
    }

    if is_transformer:
        depth = 1 + max(
            int(key.split(".")[3]) for key in weights if key.startswith("middle_block.1.transformer_blocks.")
        )
        context = weights["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        config |= {
            "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in has_attention),
            "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(has_attention)),
            "attention_head_dim": tuple(heads[width] for width in widths),  # a misnomer: it is the number of heads
            "cross_attention_dim": context,
            "transformer_layers_per_block": depth,
        }
        model = build_empty(UNet2DConditionModel, **config)
    else:
        resampling = "Resnet{}sampleBlock2D" if residual_resampling else "{}Block2D"
        down, up = ((f"Attn{side}Block2D", resampling.format(side)) for side in ("Down", "Up"))
        config |= {
            "down_block_types": tuple(down[0] if a else down[1] for a in has_attention),
            "up_block_types": tuple(up[0] if a else up[1] for a in reversed(has_attention)),
            "downsample_type": "resnet" if residual_resampling else "conv",
            "upsample_type": "resnet" if residual_resampling else "conv",
            "attn_norm_num_groups": 32,  # else diffusers leaves out the mid block's normalisation with scale_shift
        }
        attended = [width for width, a in zip(widths, has_attention, strict=True) if a] + widths[-1:]
        head_dims = {width // heads[width] for width in attended}
        if len(head_dims) == 1:
            model = build_empty(UNet2DModel, attention_head_dim=head_dims.pop(), **config)
        else:
            model = build_empty(LDMUNet, num_attention_heads=num_heads, **config)
        weights = _split_qkv(weights, heads)
    rules = _unet_rules(weights, layers, num_levels, _SPATIAL_TRANSFORMER if is_transformer else _QKV_ATTENTION)
    return load_strict(model, rename_keys(weights, rules))


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
            attention={"to_q": "self_attn.q_proj", "to_k": "self_attn.k_proj", "to_v": "self_attn.v_proj",
                       "to_out": "self_attn.out_proj"},
            mlp=("fc1", "fc2"),
        ),
    ]  # fmt: skip
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
    _require(weights, "a class embedder", "embedding.weight")
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
    _require(weights, "a spatial rescaler", "channel_mapper.weight")
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


def _choose_average(weights: dict[str, Tensor], use_ema: bool | None) -> dict[str, Tensor]:
    """Weights, or their averages: these lie under `model_ema.` by the names of the weights without dots."""
    prefix = "model_ema."
    averaged = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    own = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    if use_ema is None:
        use_ema = bool(averaged)
    if not use_ema:
        return own
    if not averaged:
        raise ValueError("`use_ema` is True, but the checkpoint holds no averaged weights ('model_ema.').")
    names = {key: key.replace(".", "") for key in own}
    missing = [key for key, name in names.items() if name not in averaged and not key.startswith("loss.")]
    strangers = sorted(averaged.keys() - set(names.values()) - set(_EMA_COUNTERS))
    if missing or strangers:
        raise ValueError(
            f"The averaged weights do not fit the others. Without an average: {', '.join(missing) or 'none'}; "
            f"averages of nothing: {', '.join(strangers) or 'none'}. Pass use_ema=False to take the others."
        )
    return {key: averaged.get(name, own[key]) for key, name in names.items()}


def _unet_depth(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """(layers per level, levels), told by where upsampling ends the first level on the way up."""
    total = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("output_blocks."))
    resampling = re.compile(r"output_blocks\.(\d+)\.[12]\.(?:conv\.weight|in_layers\.2\.weight)")
    ends = [int(match[1]) for key in weights if (match := resampling.fullmatch(key))]
    per_level = 1 + min(ends) if ends else total
    return per_level - 1, total // per_level


def _unet_rules(weights: Mapping[str, Tensor], layers: int, num_levels: int, attention: Rules) -> Rules:
    rules: list[tuple[str, str]] = [
        ("time_embed.0.*", "time_embedding.linear_1.*"),
        ("time_embed.2.*", "time_embedding.linear_2.*"),
        ("label_emb.*", "class_embedding.*"),
        ("input_blocks.0.0.*", "conv_in.*"),
        *under("middle_block.0.", "mid_block.resnets.0.", _ADM_RESNET),
        *under("middle_block.1.", "mid_block.attentions.0.", attention),
        *under("middle_block.2.", "mid_block.resnets.1.", _ADM_RESNET),
        ("out.0.*", "conv_norm_out.*"),
        ("out.2.*", "conv_out.*"),
    ]
    for level in range(num_levels):
        target = f"down_blocks.{level}."
        for layer in range(layers):
            source = f"input_blocks.{1 + level * (layers + 1) + layer}."
            rules += under(source + "0.", f"{target}resnets.{layer}.", _ADM_RESNET)
            rules += under(source + "1.", f"{target}attentions.{layer}.", attention)
        source = f"input_blocks.{(level + 1) * (layers + 1)}.0."
        rules += [(source + "op.*", target + "downsamplers.0.conv.*")]
        rules += under(source, target + "downsamplers.0.", _ADM_RESNET)

        target = f"up_blocks.{level}."
        for layer in range(layers + 1):
            source = f"output_blocks.{level * (layers + 1) + layer}."
            rules += under(source + "0.", f"{target}resnets.{layer}.", _ADM_RESNET)
            upsampling = 1  # the element after the attention, if there is one
            if source + "1.norm.weight" in weights:
                rules += under(source + "1.", f"{target}attentions.{layer}.", attention)
                upsampling = 2
            if layer == layers:
                rules += [(f"{source}{upsampling}.conv.*", target + "upsamplers.0.conv.*")]
                rules += under(f"{source}{upsampling}.", target + "upsamplers.0.", _ADM_RESNET)
    return rules


def _split_qkv(weights: Mapping[str, Tensor], heads: Mapping[int, int]) -> dict[str, Tensor]:
    """One convolution to queries, keys and values, interleaved head by head, as three."""
    split: dict[str, Tensor] = {}
    for key, value in weights.items():
        stem, found, kind = key.rpartition("qkv.")
        if not found:
            split[key] = value
            continue
        width = value.shape[0] // 3
        grouped = value.reshape(heads.get(width, 1), 3, -1, *value.shape[1:])  # (heads, 3, d, ...)
        for index, name in enumerate("qkv"):
            split[f"{stem}{name}.{kind}"] = grouped[:, index].reshape(width, *value.shape[1:])
    return split


def _heads(width: int, num_heads: int | None, num_head_channels: int | None) -> int:
    divisor = num_heads or num_head_channels or 0
    if divisor < 1 or width % divisor:
        name = "num_heads" if num_heads is not None else "num_head_channels"
        raise ValueError(f"`{name}` is {divisor}, but a level has {width} channels, which it does not divide.")
    return num_heads if num_heads is not None else width // divisor


def _transformer(state_dict: Mapping[str, Any], num_heads: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights of a `BERTEmbedder` and its sizes."""
    weights = unwrap_state_dict(state_dict)
    layer = "transformer.attn_layers.layers."
    _require(
        weights, "a BERTEmbedder", "transformer.token_emb.weight", "transformer.pos_emb.emb.weight",
        layer + "0.1.to_q.weight", layer + "1.1.net.2.weight",
    )  # fmt: skip
    vocab, width = weights["transformer.token_emb.weight"].shape
    inner = weights[layer + "0.1.to_q.weight"].shape[0]
    if num_heads < 1 or inner % num_heads:
        raise ValueError(f"`num_heads` is {num_heads}, but the attention is {inner} wide, which it does not divide.")
    sizes = {
        "vocab": vocab,
        "width": width,
        "length": weights["transformer.pos_emb.emb.weight"].shape[0],
        "mlp": weights[layer + "1.1.net.2.weight"].shape[1],
        "head_dim": inner // num_heads,
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


def _require(weights: Mapping[str, Tensor], what: str, *keys: str) -> None:
    missing = [key for key in keys if key not in weights]
    if missing:
        raise ValueError(
            f"`state_dict` is not {what}: it lacks {', '.join(missing)}. It starts with {list(weights)[:3]}."
        )
