"""ADM's U-Nets and upsamplers as stages of a cascade.

Dhariwal and Nichol, arXiv 2105.05233; openai/guided-diffusion@22e0df8:guided_diffusion/unet.py (code and weights MIT).
Cascaded Diffusion's own weights were not released. What the weights do not tell is in `adm_releases.py`.
"""

from collections.abc import Mapping
from typing import Any, Literal

from ..models.unet_cascaded import CascadedUNet
from ..pipelines.cascaded.pipeline_cascaded_base import CascadedBasePipeline
from ..pipelines.cascaded.pipeline_cascaded_upscale import CascadedUpscalePipeline
from ..schedulers.scheduling_respaced import adm_scheduler
from .adm import adm_rules, adm_sizes, split_qkv
from .adm_releases import adm_settings
from .keys import ATTENTION, build_empty, count_heads, load_strict, rename_keys, unwrap_state_dict

_ORDERS = {"legacy": "interleaved", "new": "blocked"}  # ADM's word -> that of `split_heads`


def convert_adm_pipeline(
    state_dict: Mapping[str, Any], *, release: str | None = None, **settings: Any
) -> CascadedBasePipeline | CascadedUpscalePipeline:
    """Converts a checkpoint of ADM to a stage of a cascade: its network, with the sampler that its README names.

    Args:
        state_dict: Original weights.
        release: The name of the file without its ending, such as "64x64_diffusion", or None for a model of one's own.
        settings: See `adm_settings`. A `small_resolution` makes it an upsampler.

    Returns:
        A `CascadedBasePipeline`, or for an upsampler a `CascadedUpscalePipeline`.

    Raises:
        ValueError: As `adm_settings` and `convert_adm_unet`.
    """
    chosen = adm_settings(release, **settings)
    unet = convert_adm_unet(
        state_dict,
        num_heads=chosen.num_heads,
        num_head_channels=chosen.num_head_channels,
        attention_order=chosen.attention_order,  # type: ignore[arg-type]
        is_upscaler=chosen.small_resolution is not None,
        sample_size=chosen.resolution,
        dropout=chosen.dropout,
    )
    is_learned = unet.config["out_channels"] == 2 * unet.config["in_channels"]
    scheduler = adm_scheduler(
        chosen.beta_schedule,  # type: ignore[arg-type]
        num_train_timesteps=chosen.num_train_timesteps,
        timestep_respacing=chosen.timestep_respacing,
        variance_type="learned_range" if is_learned else "fixed_large",
    )
    if chosen.small_resolution is None:
        return CascadedBasePipeline(unet, scheduler)
    return CascadedUpscalePipeline(unet, scheduler, low_res_size=chosen.small_resolution)


def convert_adm_unet(
    state_dict: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    attention_order: Literal["legacy", "new"] = "legacy",
    is_upscaler: bool = False,
    sample_size: int | None = None,
    dropout: float = 0.0,
    aug_cond_type: Literal["timestep", "log_snr", "alpha_cumprod"] | None = None,
) -> CascadedUNet:
    """Converts the weights of `UNetModel` or `SuperResModel`; sizes are read off the shapes, except for the heads.

    Args:
        state_dict: Original weights.
        num_heads: Number of heads of every attention, or None.
        num_head_channels: Width of every head, or None. Exactly one of the two is given, as the original's flags have
            it (there -1 means not given).
        attention_order: "new" for a model with `use_new_attention_order`, otherwise "legacy".
        is_upscaler: Whether it is a `SuperResModel`, whose second half of input channels is the upsampled image.
        sample_size: Side of the images, a note in the config.
        dropout: Of the residual blocks, for further training.
        aug_cond_type: Adds an embedding of the augmentation level to an upsampler, for further training. It starts
            with a layer of zeros, so that nothing changes.

    Returns:
        In eval mode, in the dtype of the weights.

    Raises:
        ValueError: Listing keys that are unknown, missing, misshaped or not finite; for heads and channels that do not
            fit, and levels of several depths.
    """
    weights = unwrap_state_dict(state_dict)
    sizes = adm_sizes(weights, "an ADM U-Net")
    if (num_heads is None) == (num_head_channels is None):
        raise ValueError(
            f"`num_heads` is {num_heads} and `num_head_channels` {num_head_channels}: pass the one that the "
            "original's flags set; the shapes do not tell."
        )
    if attention_order not in _ORDERS:
        raise ValueError(f"`attention_order` is {attention_order!r}: it must be one of {', '.join(_ORDERS)}.")
    if len(set(sizes.layers)) > 1:
        raise ValueError(f"The levels hold {sizes.layers} residual blocks; ADM's have the same number each.")
    stem = weights["input_blocks.0.0.weight"]
    channels = stem.shape[1]
    if stem.shape[0] != sizes.widths[0] or (is_upscaler and channels % 2):
        raise ValueError(
            f"The first convolution goes from {channels} to {stem.shape[0]} channels and the first level has "
            f"{sizes.widths[0]}: expected the same, and an even number of input channels of an upsampler."
        )
    attended = {width for width, attends in zip(sizes.widths, sizes.has_attention, strict=True) if attends}
    if num_heads is None:
        heads = {
            width: width // count_heads("num_head_channels", width, num_head_channels)
            for width in attended | {sizes.widths[-1]}
        }
    else:
        heads = {width: count_heads("num_heads", width, num_heads) for width in attended | {sizes.widths[-1]}}
    time_channels = weights["time_embed.0.weight"].shape[1]
    model = build_empty(
        CascadedUNet,
        sample_size=sample_size,
        in_channels=channels // 2 if is_upscaler else channels,
        out_channels=weights["out.2.weight"].shape[0],
        block_out_channels=tuple(sizes.widths),
        layers_per_block=sizes.layers[0],
        attention_levels=tuple(sizes.has_attention),
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        dropout=dropout,
        resnet_time_scale_shift="scale_shift" if sizes.scale_shift else "default",
        resample="resnet" if sizes.residual_resampling else "conv",
        num_class_embeds=weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else None,
        low_res_channels=channels // 2 if is_upscaler else 0,
        time_channels=None if time_channels == sizes.widths[0] else time_channels,
    )
    rules = adm_rules(sizes.layers, sizes.has_attention, ATTENTION)
    split = split_qkv(weights, heads, _ORDERS[attention_order])  # type: ignore[arg-type]
    model = load_strict(model, rename_keys(split, rules))
    if aug_cond_type is not None:
        model.add_augmentation_level(aug_cond_type)
    return model
