"""Original autoencoders of latent diffusion, KL-regularised and vector-quantised, to the stock classes of diffusers.

Rombach et al., arXiv 2112.10752, appendix G; CompVis/latent-diffusion@a506df5:ldm/models/autoencoder.py and
CompVis/taming-transformers@3ba01b2 (code and weights MIT). diffusers' own converter drops the attention inside the
levels, which kl-f16, kl-f32, vq-f8 and vq-f16 have, and knows no codebook.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor

from .keys import build_empty, load_strict, rename_keys, require, unwrap_state_dict
from .taming import taming_autoencoder


def convert_ldm_autoencoder_kl(
    state_dict: Mapping[str, Any],
    *,
    scale_factor: float = 1.0,
    sample_size: int = 256,
    ignore: Iterable[str] = ("loss.*",),
) -> AutoencoderKL:
    """Converts the weights of the original's `AutoencoderKL`; every size is read off the shapes.

    Args:
        state_dict: original weights, of a first-stage file or as `split_ldm_checkpoint` gives them.
        scale_factor: by which latents are multiplied before diffusion: the checkpoint's own if it has one, 0.18215
            for the text model, 1 otherwise.
        sample_size: side of the pictures it was trained on, a note in the config.
        ignore: patterns of keys to leave out; `loss.*` are perceptual network and discriminator, saved along.

    Returns:
        In eval mode, in the dtype of the weights.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite; or for sizes that `AutoencoderKL`
            cannot express: `embed_dim` unlike `z_channels`, or `ch_mult` that does not start with 1.
    """
    weights = _weights(state_dict)
    require(weights, "a KL autoencoder", "encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight")
    embed_dim, latent_channels = weights["post_quant_conv.weight"].shape[1::-1]
    if embed_dim != latent_channels or weights["quant_conv.weight"].shape[0] != 2 * embed_dim:
        raise ValueError(
            f"The autoencoder has `embed_dim` {embed_dim} and `z_channels` {latent_channels}: AutoencoderKL needs the "
            "same, as in all released models."
        )
    config, rules = taming_autoencoder(weights)
    model = build_empty(
        AutoencoderKL,
        **config,
        latent_channels=latent_channels,
        sample_size=sample_size,
        scaling_factor=scale_factor,
    )
    return load_strict(model, rename_keys(weights, rules, ignore=ignore))


def convert_ldm_vq(
    state_dict: Mapping[str, Any],
    *,
    scale_factor: float = 1.0,
    sample_size: int = 256,
    ignore: Iterable[str] = ("loss.*",),
) -> VQModel:
    """Converts the weights of the original's `VQModel` or `VQModelInterface`; every size is read off the shapes.

    Args, errors: as `convert_ldm_autoencoder_kl`, but `embed_dim` is free. Released VQ latents are not scaled.

    Returns:
        In eval mode, in the dtype of the weights. `encode` gives the latents before quantisation, which diffusion
        works on; `decode` quantises first.
    """
    weights = _weights(state_dict)
    require(weights, "a VQ autoencoder", "encoder.conv_in.weight", "quantize.embedding.weight")
    config, rules = taming_autoencoder(weights)
    model = build_empty(
        VQModel,
        **config,
        latent_channels=weights["encoder.conv_out.weight"].shape[0],
        num_vq_embeddings=weights["quantize.embedding.weight"].shape[0],
        vq_embed_dim=weights["quantize.embedding.weight"].shape[1],
        sample_size=sample_size,
        scaling_factor=scale_factor,
    )
    rules = [*rules, ("quantize.embedding.weight", "quantize.embedding.weight")]
    return load_strict(model, rename_keys(weights, rules, ignore=ignore))


def convert_ldm_first_stage(state_dict: Mapping[str, Any], **options: Any) -> AutoencoderKL | VQModel:
    """One of the two above, whichever the weights are of; arguments and errors are theirs."""
    if not state_dict:
        raise ValueError("The checkpoint holds no first stage ('first_stage_model.').")
    weights = _weights(state_dict)
    convert = convert_ldm_vq if "quantize.embedding.weight" in weights else convert_ldm_autoencoder_kl
    return convert(weights, **options)


def _weights(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = unwrap_state_dict(state_dict)
    if any(key.startswith("model_ema.") for key in weights):
        raise ValueError(
            "The file holds every weight twice, also averaged ('model_ema.'): choose with `split_ldm_checkpoint(..., "
            "use_ema=...).first_stage`."
        )
    return weights
