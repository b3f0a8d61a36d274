"""Original Paella v1 checkpoints to the models of this package.

Token predictor: dome272/Paella@b1f88ef `DenoiseUNet` (weights MIT); files such as `f8_600000.pt` (text),
`f8_img_40000.pt` (image embeddings). Tokenizer: ai-forever/ru-dalle@0255cec `GumbelVQ`, file
`vqgan.gumbelf8-sber.model.ckpt`, whose keys are those of taming-transformers.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..models.unet_paella import PaellaUNet
from ..models.vq_gumbel import GumbelVQModel
from ..models.vq_paella import PaellaVQModel
from .keys import Rules, build_empty, count_keys, load_strict, rename_keys, require, under, unwrap_state_dict
from .taming import taming_autoencoder

_PAELLA_BLOCK: Rules = [
    ("gamma", "layer_scale"),
    ("depthwise.1.*", "depthwise.*"),  # index 0 is the reflection padding
    ("ln.gamma", "norm.gain"),
    ("ln.beta", "norm.shift"),
    ("ln.ln.*", "norm.*"),
    ("channelwise.{}.*", "channelwise.{}.*"),
    ("cond_mapper.*", "cond_mapper.*"),
]


def convert_paella_unet(state_dict: Mapping[str, Any], *, time_embed_dim: int = 64) -> PaellaUNet:
    """Converts the weights of `DenoiseUNet`; every size is read off the shapes.

    Text and image fine-tunes are the same network: `f8_600000.pt` and `f8_img_40000.pt` convert alike.

    Args:
        state_dict: original weights, flat, under `"state_dict"`, or of a DDP module (`module.`).
        time_embed_dim: the original's `c_r`. The shapes only tell its sum with the width of the condition.

    Returns:
        The network in eval mode, in the dtype of the weights.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite.
    """
    weights = unwrap_state_dict(state_dict)
    require(weights, "a Paella v1 DenoiseUNet", "embedding.weight", "down_blocks.0.0.cond_mapper.weight")
    num_levels = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("down_blocks."))
    down_layers = [count_keys(weights, f"down_blocks.{level}.", ".gamma") for level in range(num_levels)]
    up_layers = [count_keys(weights, f"up_blocks.{level}.", ".gamma") for level in range(num_levels)]

    rules: list[tuple[str, str]] = [("embedding.*", "token_embedding.*"), ("clf.*", "proj_out.*")]
    for level in range(num_levels):
        if level > 0:  # the strided convolution comes first
            rules.append((f"down_blocks.{level}.0.weight", f"down_levels.{level}.downsample.weight"))
            rules.append((f"down_blocks.{level}.0.bias", f"down_levels.{level}.downsample.bias"))
        for layer in range(down_layers[level]):
            source = f"down_blocks.{level}.{layer + (level > 0)}."
            rules += under(source, f"down_levels.{level}.blocks.{layer}.", _PAELLA_BLOCK)
        for layer in range(up_layers[level]):
            rules += under(f"up_blocks.{level}.{layer}.", f"up_levels.{level}.blocks.{layer}.", _PAELLA_BLOCK)
        if level < num_levels - 1:  # the transposed convolution comes last
            source, target = f"up_blocks.{level}.{up_layers[level]}", f"up_levels.{level}.upsample"
            rules += [(f"{source}.weight", f"{target}.weight"), (f"{source}.bias", f"{target}.bias")]
    renamed = rename_keys(weights, rules)

    num_vq_embeddings = weights["embedding.weight"].shape[0]
    cond_dim = weights["down_blocks.0.0.cond_mapper.weight"].shape[1]
    if time_embed_dim >= cond_dim:
        raise ValueError(
            f"`time_embed_dim` is {time_embed_dim}, but condition and time together have {cond_dim} channels: pass "
            "the `c_r` that the checkpoint was trained with."
        )
    model = build_empty(
        PaellaUNet,
        num_vq_embeddings=num_vq_embeddings,
        block_out_channels=tuple(
            renamed[f"down_levels.{level}.blocks.0.layer_scale"].shape[0] for level in range(num_levels)
        ),
        down_layers_per_block=tuple(down_layers),
        up_layers_per_block=tuple(up_layers),
        condition_dim=cond_dim - time_embed_dim,
        time_embed_dim=time_embed_dim,
        kernel_size=weights["down_blocks.0.0.depthwise.1.weight"].shape[-1],
    )
    return load_strict(model, renamed)


def convert_paella_vqgan_gumbel(
    state_dict: Mapping[str, Any],
    *,
    sample_size: int = 256,
    norm_num_groups: int = 32,
    ignore: Iterable[str] = ("loss.*",),
) -> GumbelVQModel:
    """Converts the weights of the f8 Gumbel-VQGAN (or one of other sizes); every size is read off the shapes.

    Args:
        state_dict: original weights, flat, under `"state_dict"`, of a DDP module (`module.`), or of ruDALL-E's shell
            around the tokenizer (`model.`).
        sample_size: side of the pictures it was trained on, a note in the config only.
        norm_num_groups: groups of the normalisations, 32 throughout taming-transformers.
        ignore: patterns of keys to leave out. The released file was saved from the training and is loaded non-strictly
            by its own repository; `loss.*` are the perceptual network and the discriminator. Any other key is an error
            that names it: add a pattern here if it is none of encoder, decoder and quantizer.

    Returns:
        The tokenizer in eval mode, in the dtype of the weights.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite; or for a first level that is wider
            than the first convolution (`ch_mult` does not start with 1), which `VQModel` cannot express.
    """
    weights = unwrap_state_dict(state_dict)
    if all(key.startswith("model.") for key in weights):  # `get_vae().state_dict()`
        weights = {key.removeprefix("model."): value for key, value in weights.items()}
    require(weights, "a Gumbel-VQGAN", "encoder.conv_in.weight", "quantize.embed.weight", "quantize.proj.weight")
    config, rules = taming_autoencoder(weights)
    rules += [("quantize.embed.weight", "quantize.embedding.weight"), ("quantize.proj.*", "quantize_proj.*")]
    model = build_empty(
        GumbelVQModel,
        **config,
        latent_channels=weights["encoder.conv_out.weight"].shape[0],
        sample_size=sample_size,
        num_vq_embeddings=weights["quantize.embed.weight"].shape[0],
        norm_num_groups=norm_num_groups,
        vq_embed_dim=weights["quantize.embed.weight"].shape[1],
    )
    return load_strict(model, rename_keys(weights, rules, ignore=ignore))


def convert_paella_vqgan(state_dict: Mapping[str, Any], *, scale_factor: float = 0.3764) -> PaellaVQModel:
    """Converts the weights of Paella's own f4 tokenizer (`vqgan_f4.pt`), or of diffusers' class of the same name.

    Args:
        state_dict: original weights, flat, under `"state_dict"`, or of a DDP module (`module.`).
        scale_factor: of the latents, which no weight tells.

    Returns:
        The tokenizer in eval mode, in the dtype of the weights.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite.
    """
    weights = unwrap_state_dict(state_dict)
    require(weights, "Paella's f4 tokenizer", "in_block.1.weight", "up_blocks.0.0.weight", "out_block.0.weight")
    levels = 1 + count_keys(weights, "down_blocks.", ".weight")  # that are the strided convolutions between them
    block = re.compile(r"up_blocks\.(\d+)\.gammas")
    first_level = [int(match[1]) for key in weights if (match := block.fullmatch(key))]
    rules: list[tuple[str, str]] = [(f"{part}.*", f"{part}.*") for part in ("in_block", "down_blocks", "up_blocks")]
    rules += [("out_block.*", "out_block.*"), ("vquantizer.codebook.weight", "vquantizer.embedding.weight")]
    renamed = rename_keys(weights, [*rules, ("vquantizer.embedding.weight", "vquantizer.embedding.weight")])
    embed_dim, latent_channels = weights["up_blocks.0.0.weight"].shape[:2]
    pixels = weights["in_block.1.weight"].shape[1] // 3  # of a folded patch; three colours
    model = build_empty(
        PaellaVQModel,
        up_down_scale_factor=math.isqrt(pixels),
        levels=levels,
        bottleneck_blocks=len(first_level) - (levels - 1),
        embed_dim=embed_dim,
        latent_channels=latent_channels,
        num_vq_embeddings=renamed["vquantizer.embedding.weight"].shape[0],
        scale_factor=scale_factor,
    )
    return load_strict(model, renamed)
