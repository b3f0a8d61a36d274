"""Texts and pictures to the context tokens of Versatile Diffusion: all tokens of CLIP, projected and normalised.

Xu et al., arXiv 2211.08332, section 3.3; SHI-Labs/Versatile-Diffusion@cf0f4a2:lib/model_zoo/clip.py (MIT). One norm
for all tokens of a sample, that of the token which CLIP pools: only that one becomes a unit vector.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from ...models.blocks.wrappers import with_forward_hooks

# A picture of one grey value that stands for "no picture": mid-grey in the first release, black for texts since.
NULL_PICTURES = {"grey": 127, "black": 0}


def text_context(text_encoder: CLIPTextModelWithProjection, input_ids: Tensor) -> Tensor:
    """Tokens of texts (n, l), padding included, to a context (n, l, d); padding is attended to, as in the original."""
    out = text_encoder(input_ids)
    tokens = _project_texts(text_encoder, out.last_hidden_state)
    return tokens / out.text_embeds.norm(dim=-1)[:, None, None]


def image_context(
    image_encoder: CLIPVisionModelWithProjection, pixel_values: Tensor, token_weights: Tensor | None = None
) -> Tensor:
    """Prepared pictures (n, 3, h, w) to a context (n, 1 + patches, d), the token of the whole picture first.

    Args:
        token_weights: as `mask_to_token_weights` gives them; what they leave out is neither read nor passed on.
    """
    if token_weights is None:
        hidden_states = image_encoder(pixel_values).last_hidden_state
    else:
        hidden_states = _masked_hidden_states(image_encoder, pixel_values, token_weights)
    tokens = _project_pictures(image_encoder, hidden_states)
    tokens = tokens / tokens[:, :1].norm(dim=-1, keepdim=True)
    return tokens if token_weights is None else tokens * token_weights.to(tokens)


@with_forward_hooks
def _project_texts(text_encoder: Any, hidden_states: Tensor) -> Tensor:
    return text_encoder.text_projection(hidden_states)


@with_forward_hooks
def _project_pictures(image_encoder: Any, hidden_states: Tensor) -> Tensor:
    return image_encoder.visual_projection(image_encoder.vision_model.post_layernorm(hidden_states))


@with_forward_hooks  # it stands for the encoder's forward, so what was offloaded comes back for it
def _masked_hidden_states(image_encoder: Any, pixel_values: Tensor, token_weights: Tensor) -> Tensor:
    """The last hidden states of pictures whose embedded tokens are weighted, before the first layer reads them.

    Written out, since a hook on the encoder would also mask what another thread reads with it.
    """
    tower = image_encoder.vision_model
    embedded = tower.embeddings(pixel_values)
    return tower.encoder(inputs_embeds=tower.pre_layrnorm(embedded * token_weights.to(embedded))).last_hidden_state


def mask_to_token_weights(mask: Tensor, image_size: int, patch_size: int) -> Tensor:
    """Masks (n, 1, h, w) of any size, 1 = keep, 0 = leave out, to weights of the tokens (n, 1 + patches, 1).

    Each patch gets the mean of its part of the mask, the token of the whole picture that of the whole mask.
    """
    mask = F.interpolate(mask.float().clamp(0, 1), size=(image_size, image_size), mode="bilinear")
    patches = F.avg_pool2d(mask, patch_size).flatten(2).transpose(1, 2)  # (n, patches, 1)
    return torch.cat([mask.mean(dim=(2, 3))[:, None], patches], dim=1)


def prepare_pictures(feature_extractor: Any, images: list[Tensor], side: int) -> Tensor:
    """Pictures (3, H, W) in [0, 1] as the image encoder wants them, (n, 3, h, w).

    As in the original, each is stretched to a square first (of 512 pixels there), then to that of the encoder: two
    bicubic resizings of 8-bit pictures, and nothing for the feature extractor to crop.
    """
    pictures = [stretch_picture(image, side, side) for image in images]
    return feature_extractor(images=pictures, return_tensors="pt").pixel_values


def stretch_picture(image: Tensor, height: int, width: int) -> Image.Image:
    """(3, H, W) in [0, 1] as an 8-bit picture of another size; its aspect is not kept."""
    array = (image * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(array))
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BICUBIC)


def null_picture(kind: str, side: int) -> Tensor:
    """(3, side, side) of one grey value, see `NULL_PICTURES`."""
    return torch.full((3, side, side), NULL_PICTURES[kind] / 255)
