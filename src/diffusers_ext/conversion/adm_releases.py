"""What an ADM checkpoint does not tell: the settings of the released models.

Dhariwal and Nichol, arXiv 2105.05233; openai/guided-diffusion@22e0df8:README.md (code and weights MIT). This file
imports no network, so that the command line can list the releases at once.
"""

from dataclasses import dataclass


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
