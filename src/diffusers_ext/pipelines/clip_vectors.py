"""Texts and pictures to the projected, un-normalised vectors of CLIP's two towers."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .tokenization import tokenize_texts

LEGACY_EOS = 2  # a CLIP config with this end-of-text id pools at the highest id instead of at the end-of-text token


def text_window(tokenizer, text_encoder) -> int:
    """How many tokens the text encoder reads, the first and the last included."""
    # a tokenizer saved without model_max_length reports 1e30, BERT's own 512
    return min(int(tokenizer.model_max_length), text_encoder.config.max_position_embeddings)


def text_ids(tokenizer, text_encoder, texts: list[str]) -> tuple[Tensor, list[str]]:
    """Tokens `(n, l)`, padded and cut to what the text encoder reads, and the parts that were cut off.

    Raises:
        ValueError: The tokenizer is not the one that the text encoder was trained with.
    """
    ids, cut = tokenize_texts(tokenizer, texts, text_window(tokenizer, text_encoder))
    vocab_size, eos = text_encoder.config.vocab_size, text_encoder.config.eos_token_id
    if int(ids.max()) >= vocab_size:
        raise ValueError(
            f"The tokenizer gives token {int(ids.max())}, the text encoder knows 0 to {vocab_size - 1}. Use"
            " the tokenizer that the text encoder was trained with."
        )
    if eos != LEGACY_EOS and not bool((ids == eos).any(dim=1).all()):
        # transformers would pool at position 0: the same vector for every text, silently
        raise ValueError(
            f"The tokenizer ends no text with token {eos}, at which the text encoder pools"
            f" (text_encoder.config.eos_token_id); tokenizer.eos_token_id is {tokenizer.eos_token_id}."
            " Use the tokenizer that the text encoder was trained with."
        )
    return ids, cut


def image_vectors(feature_extractor, image_encoder, images: list[Tensor], device: torch.device | str) -> Tensor:
    """`(n, d)` of pictures `(3, H, W)` in [0, 1], of any sizes, resized as the feature extractor is configured."""
    pixels = prepare_pictures(feature_extractor, images)
    return image_encoder(pixels.to(device=device, dtype=image_encoder.dtype)).image_embeds


def prepare_pictures(feature_extractor, images: list[Tensor]) -> Tensor:
    """Pictures `(3, H, W)` in [0, 1] as the image encoder takes them, `(n, 3, h, w)`."""
    # as 8-bit PIL pictures: the one form in which every image processor resizes and rescales alike
    arrays = [(image * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy() for image in images]
    pictures = [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]
    return feature_extractor(images=pictures, return_tensors="pt").pixel_values
