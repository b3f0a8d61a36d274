"""What an ADM checkpoint does not tell: the settings of the released models.

Dhariwal and Nichol, arXiv 2105.05233; openai/guided-diffusion@22e0df8:README.md (code and weights MIT). This file
imports no network, so that the command line can list the releases at once.
"""

from dataclasses import dataclass, replace
from typing import Any

ATTENTION_ORDERS = ("legacy", "new")
BETA_SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True)
class ADMSettings:
    """What the flags of a model say and its weights do not.

    Args:
        resolution: Side of the images in pixels.
        num_heads: Number of attention heads, or None.
        num_head_channels: Width of each head, or None. One of the two is given.
        attention_order: Order of the rows of an attention's one projection: "legacy" (for each head its queries, keys
            and values) or "new" (queries of all heads, then keys, then values).
        beta_schedule: "linear" or "cosine".
        dropout: That the model was trained with.
        small_resolution: Side of an upsampler's input in pixels, or None.
        num_train_timesteps: T.
        timestep_respacing: The steps that its README samples with.
    """

    resolution: int
    num_heads: int | None = None
    num_head_channels: int | None = None
    attention_order: str = "legacy"
    beta_schedule: str = "linear"
    dropout: float = 0.0
    small_resolution: int | None = None
    num_train_timesteps: int = 1000
    timestep_respacing: str = "250"


# by the names of the files
RELEASES = {
    "64x64_diffusion": ADMSettings(
        64, num_head_channels=64, attention_order="new", beta_schedule="cosine", dropout=0.1
    ),
    "128x128_diffusion": ADMSettings(128, num_heads=4),
    "256x256_diffusion": ADMSettings(256, num_head_channels=64),
    "256x256_diffusion_uncond": ADMSettings(256, num_head_channels=64),
    "512x512_diffusion": ADMSettings(512, num_head_channels=64),
    "64_256_upsampler": ADMSettings(256, num_heads=4, small_resolution=64),
    "128_512_upsampler": ADMSettings(512, num_head_channels=64, small_resolution=128),
}


def adm_settings(release: str | None = None, **replacements: Any) -> ADMSettings:
    """The settings of a released model, or of one's own.

    Args:
        release: A name of `RELEASES`, the file's without its ending.
        replacements: Fields of `ADMSettings`; None leaves them as they are. A number of heads replaces their width.

    Raises:
        ValueError: For an unknown release or word, or an own model without a resolution or heads.
    """
    if release is not None and release not in RELEASES:
        raise ValueError(f"`release` is {release!r}: it must be one of {', '.join(RELEASES)}.")
    given = {name: value for name, value in replacements.items() if value is not None}
    heads = given.keys() & {"num_heads", "num_head_channels"}
    if release is None and ("resolution" not in given or len(heads) != 1):
        raise ValueError(
            f"`release` is None: name one of {', '.join(RELEASES)}, or give `resolution` and one of `num_heads` and "
            "`num_head_channels`, as the original's flags have them; the weights do not tell."
        )
    if heads:
        given = {"num_heads": None, "num_head_channels": None, **given}
    settings = ADMSettings(**given) if release is None else replace(RELEASES[release], **given)
    for name, value, allowed in [
        ("attention_order", settings.attention_order, ATTENTION_ORDERS),
        ("beta_schedule", settings.beta_schedule, BETA_SCHEDULES),
    ]:
        if value not in allowed:
            raise ValueError(f"`{name}` is {value!r}: it must be one of {', '.join(allowed)}.")
    return settings
