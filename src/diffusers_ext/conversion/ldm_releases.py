"""What a latent-diffusion checkpoint does not tell: the settings of the released models, and of a user's own.

Rombach et al., arXiv 2112.10752, tables 12 to 15; CompVis/latent-diffusion@a506df5:models/ldm and configs (code and
weights MIT). Sizes, noise levels and a measured scale of the latents are read off a checkpoint. The rest stands in
its config. This file imports no network, so that the command line can list the releases at once.
"""

from dataclasses import dataclass, field, replace
from typing import Any

TASKS = ("unconditional", "class", "text", "layout", "semantic", "super_resolution", "inpainting")


@dataclass(frozen=True)
class LDMSettings:
    """What the config of a model says and its weights do not.

    Args:
        task: a name of `TASKS`.
        num_heads, num_head_channels: one of the two, of the U-Net.
        betas: first and last noise variance, for files without them.
        resolution: side of the training pictures in pixels.
        scale_factor: by which latents are multiplied before diffusion, unless the file holds a measured one.
        null_class: the class that means "none"; None: the model was trained without.
        num_classes: categories of a layout model.
        options: further arguments of the pipeline.
    """

    task: str
    num_heads: int | None = None
    num_head_channels: int | None = None
    betas: tuple[float, float] | None = None
    resolution: int = 256
    scale_factor: float | None = None
    null_class: int | None = None
    num_classes: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


_FACES = LDMSettings("unconditional", num_head_channels=32, betas=(0.0015, 0.0195))
_LANDSCAPES = LDMSettings("semantic", num_heads=8, betas=(0.0015, 0.0205))
# by the names of folders and configs in the original repository
RELEASES = {
    "celeba256": _FACES,
    "ffhq256": _FACES,
    "lsun_beds256": _FACES,
    "lsun_churches256": LDMSettings("unconditional", num_heads=8, betas=(0.0015, 0.0155)),
    "cin256": LDMSettings("class", num_head_channels=32, betas=(0.0015, 0.0195)),
    "cin256-v2": LDMSettings("class", num_heads=1, betas=(0.0015, 0.0195), null_class=1000),
    "txt2img-1p4B": LDMSettings("text", num_heads=8, betas=(0.00085, 0.012), scale_factor=0.18215),
    "text2img256": LDMSettings(  # nothing says that it learnt the empty text
        "text", num_head_channels=32, betas=(0.0015, 0.0195), options={"null_condition": False}
    ),
    "layout2img-openimages256": LDMSettings(
        "layout", num_head_channels=32, betas=(0.0015, 0.0205), num_classes=354, options={"use_other_flags": True}
    ),
    "semantic_synthesis256": _LANDSCAPES,
    "semantic_synthesis512": replace(_LANDSCAPES, resolution=512),
    "bsr_sr": LDMSettings("super_resolution", num_head_channels=32, betas=(0.0015, 0.0155)),
    "inpainting_big": LDMSettings("inpainting", num_heads=8, betas=(0.0015, 0.0205)),
}


def ldm_settings(task: str | None = None, release: str | None = None, **replacements: Any) -> LDMSettings:
    """The settings of a released model, or of one's own.

    Args:
        task: what the network was trained for; a release tells it, too.
        release: a name of `RELEASES`.
        replacements: fields of `LDMSettings`; None leaves them as they are. A number of heads replaces their width.

    Raises:
        ValueError: for an unknown task or release, neither of them, a task that is not the release's, or settings that
            the task does not have.
    """
    known = {"task": TASKS, "release": RELEASES}
    if task is None and release is None:
        raise ValueError(f"Name a `task` ({', '.join(TASKS)}) or a `release` ({', '.join(RELEASES)}).")
    for name, value in (("task", task), ("release", release)):
        if value is not None and value not in known[name]:
            raise ValueError(f"`{name}` is {value!r}: it must be one of {', '.join(known[name])}.")
    settings = LDMSettings(str(task)) if release is None else RELEASES[release]
    if task not in (None, settings.task):
        raise ValueError(f"`task` is {task!r}, but {release} is a model for {settings.task!r}: leave `task` out.")
    given = {name: value for name, value in replacements.items() if value is not None}
    for name, owner in (("null_class", "class"), ("num_classes", "layout")):
        if name in given and settings.task != owner:
            raise ValueError(
                f"`{name}` is {given[name]}, but only models for {owner!r} have it, not {settings.task!r}."
            )
    if given.keys() & {"num_heads", "num_head_channels"}:
        given = {"num_heads": None, "num_head_channels": None, **given}
    return replace(settings, **given)
