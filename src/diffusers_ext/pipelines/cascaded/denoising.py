"""What a stage of a cascade tells its network in a denoising step, and what the network predicts."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...guidance import Inputs


@dataclass(frozen=True)
class StageCondition:
    """What the network is told besides the noisy images. All of it may be missing.

    Args:
        labels: Class numbers (b,).
        null_labels: The row that stands for "no class", (b,). The low-resolution image is the same in both branches.
        low_res: Low-resolution images (b, c, h', w') as the network takes them, noise included.
        level: How much noise `low_res` carries (b,), in the network's own unit.
    """

    labels: Tensor | None = None
    null_labels: Tensor | None = None
    low_res: Tensor | None = None
    level: Tensor | None = None

    def branches(self, scaled: Tensor) -> tuple[Inputs, Inputs | None]:
        """The inputs of the conditional and of the null branch, for `both_branches` and `predict`."""
        low_res = None if self.low_res is None else self.low_res.to(scaled)
        cond = (scaled, self.labels, low_res, self.level)
        return cond, None if self.null_labels is None else (scaled, self.null_labels, low_res, self.level)

    def replace_embeds(self, changed: dict[str, Tensor]) -> "StageCondition":
        """The condition with the classes that a callback returned."""
        labels = changed.get("prompt_embeds", self.labels)
        return replace(self, labels=labels, null_labels=changed.get("negative_prompt_embeds", self.null_labels))


def predict(
    unet: Any,
    timestep: Tensor,
    channels: int,
    scaled: Tensor,
    labels: Tensor | None = None,
    low_res: Tensor | None = None,
    level: Tensor | None = None,
) -> Tensor:
    """The first `channels` of the network's prediction: with or without those of a learned variance."""
    prediction = unet(scaled, timestep, labels, low_res, level, return_dict=False)[0]
    return prediction[:, :channels]
