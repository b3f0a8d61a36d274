"""Pictures to the projected, un-normalised vectors of CLIP."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def image_vectors(feature_extractor, image_encoder, images: list[Tensor], device: torch.device | str) -> Tensor:
    """`(n, d)` of pictures `(3, H, W)` in [0, 1], of any sizes, resized as the feature extractor is configured."""
    pixels = prepare_pictures(feature_extractor, images)
    return image_encoder(pixels.to(device=device, dtype=image_encoder.dtype)).image_embeds


def prepare_pictures(feature_extractor, images: list[Tensor]) -> Tensor:
    """Pictures `(3, H, W)` in [0, 1] as the image encoder takes them, `(n, 3, h, w)`."""
    # as 8-bit PIL pictures: the one form in which every image processor resizes and rescales alike
    return feature_extractor(images=[pil_picture(image) for image in images], return_tensors="pt").pixel_values


def pil_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as an 8-bit picture."""
    array = (image * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array))
