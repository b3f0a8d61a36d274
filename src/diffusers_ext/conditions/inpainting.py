"""What an inpainting model of latent diffusion sees of picture and mask, and how its result is put in.

Rombach et al., arXiv 2112.10752, section 4.5; original: CompVis/latent-diffusion@a506df5:scripts/inpaint.py (MIT).
Masks are 1 (or True) in the hole, which is to be filled, and 0 where the picture is kept.
"""

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional as F


def masked_image(image: Tensor, mask: Tensor) -> Tensor:
    """The picture with a black hole, in [-1, 1]: its encoding is half of the condition.

    Args:
        image: (b, c, h, w) in [-1, 1].
        mask: (b, 1, h, w), 1 in the hole.
    """
    return (image + 1) * (1 - mask.to(image)) - 1


def latent_mask(mask: Tensor, size: tuple[int, int] | list[int]) -> Tensor:
    """The mask at latent size, -1 to keep and 1 in the hole, nearest neighbour: the other half of the condition.

    Args:
        mask: (b, 1, h, w), 1 in the hole.
        size: height and width of the latents.
    """
    signed = 2 * mask.float() - 1
    return F.interpolate(signed, size=tuple(size), mode="nearest")


def continue_pixels(images: Tensor, unknown: Tensor) -> Tensor:
    """Pictures whose unknown pixels have the colour of the nearest known one, each.

    An encoder sees further than the patch that one token or latent stands for: what lies beside a hole, or at the
    border of a picture on a larger canvas, would be encoded as the neighbour of what will not be there.

    Args:
        images: (b or 1, c, h, w).
        unknown: bool (b or 1, h, w); each has a known pixel.

    Returns:
        (b, c, h, w).
    """
    count = max(len(images), len(unknown))
    continued = []
    for k, image in enumerate(images.expand(count, -1, -1, -1)):
        one = unknown[k % len(unknown)].cpu().numpy()
        nearest = distance_transform_edt(one, return_distances=False, return_indices=True)
        rows, columns = torch.from_numpy(nearest).long()
        continued.append(image[:, rows, columns])
    return torch.stack(continued)


def composite(image: Tensor, mask: Tensor, predicted: Tensor) -> Tensor:
    """The picture with its hole filled from the prediction; what was known stays untouched.

    Args:
        image: (b, c, h, w) in [-1, 1].
        mask: (b, 1, h, w), 1 in the hole.
        predicted: decoded sample (b, c, h, w), nominally in [-1, 1]; clamped.

    Returns:
        (b, c, h, w) in [0, 1].
    """
    mask = mask.to(image)
    return (1 - mask) * (image + 1) / 2 + mask * ((predicted + 1) / 2).clamp(0, 1)
