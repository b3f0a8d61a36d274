"""Original latent-diffusion checkpoints, taken apart.

Rombach et al., arXiv 2112.10752; CompVis/latent-diffusion@a506df5 (code and weights MIT). A `.ckpt` of the original
holds several networks: `split_ldm_checkpoint` takes them apart, then each goes to its converter, in `ldm_unet.py`,
`ldm_autoencoder.py` and `ldm_encoders.py`. `convert_ldm_pipeline` (`diffusers-ext convert ldm`) does it all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ..schedulers.gaussian import ldm_scheduler
from .keys import SCHEDULE_BUFFERS, listing, unwrap_state_dict

_EMA_COUNTERS = ("decay", "num_updates")


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
        elif not SCHEDULE_BUFFERS.fullmatch(key):
            unknown.append(key)
    if not any(key.startswith("diffusion_model.") for key in parts["model"]):
        raise ValueError(
            "`state_dict` is no latent-diffusion checkpoint: nothing lies under 'model.diffusion_model.'. It starts "
            f"with {list(weights)[:3]}."
        )
    if unknown:
        raise ValueError(f"The checkpoint holds keys of no known part: {listing(unknown)}.")
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


def convert_ldm_schedule(betas: Tensor | None, otherwise: tuple[float, float] | None = None) -> DDIMScheduler:
    """The scheduler of a checkpoint's `betas` (T,), of which the first and the last say everything.

    Args:
        betas: as in the file.
        otherwise: the first and the last, for files without them.

    Raises:
        ValueError: if they are not the squares of evenly spaced numbers, as in all released models; or for neither.
    """
    if betas is None:
        if otherwise is None:
            raise ValueError("The checkpoint holds no `betas`: name the released model whose noise levels it has.")
        return ldm_scheduler(*otherwise)
    scheduler = ldm_scheduler(float(betas[0]), float(betas[-1]), num_train_timesteps=len(betas))
    if not betas.float().cpu().allclose(scheduler.betas, rtol=1e-4, atol=1e-8):
        raise ValueError(
            f"`betas` go from {float(betas[0]):.6g} to {float(betas[-1]):.6g}, but not as squares of evenly spaced "
            "numbers ('scaled_linear'): build a scheduler with `trained_betas` for them."
        )
    return scheduler


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
            f"The averaged weights do not fit the others. Without an average: {listing(missing) or 'none'}; "
            f"averages of nothing: {listing(strangers) or 'none'}. Pass use_ema=False to take the others."
        )
    return {key: averaged.get(name, own[key]) for key, name in names.items()}
