"""What a CLIP is trained on: images, and one text of each column for every image."""

import logging

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from diffusers_ext.data.crops import choose_text, prepare_image
from diffusers_ext.training.clip.args import ONE_PICTURE, ClipArgs
from diffusers_ext.training_utils.args import DataArgs

logger = logging.getLogger(__name__)


def text_columns(args: ClipArgs, data: DataArgs) -> list[str]:
    """The columns that a text of each sample is drawn from: captions, paraphrases, wrong captions."""
    negatives = [args.negative_caption_column] * args.num_negative_captions
    return [column for column in (data.caption_column, args.paraphrase_column, *negatives) if column]


def check_captions(captions: list[str], args: ClipArgs) -> None:
    """Says how many captions differ; with a single one there is nothing to tell apart.

    Raises:
        ValueError: all are equal, and no other loss was asked for.
    """
    distinct = len(set(captions))
    logger.info("%d distinct captions among %d; equal ones count as one", distinct, len(captions))
    if distinct < 2 and not args.has_other_losses:
        raise ValueError(
            f"The training pictures have {len(captions)} captions, of which {distinct} differ: {ONE_PICTURE} Caption "
            "them apart, or pass --negative_caption_column or --caption_weight."
        )


# At module level, so that loader processes can be started with them on every platform.


def read_sample(example: dict, generator: torch.Generator, data: DataArgs, columns: list[str]):
    """The picture (3, h, w), and one text of each column."""
    image = prepare_image(
        example[data.image_column], data.resolution, generator=generator,
        center_crop=data.center_crop, random_flip=data.random_flip,
    )  # fmt: skip
    return image, [choose_text(example[column], generator) for column in columns]


def collate_samples(samples: list, tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Pictures (b, 3, h, w), token ids (n * b, l): all captions, then those of every further column; their mask."""
    images, texts = zip(*samples, strict=True)
    flat = [text for column in zip(*texts, strict=True) for text in column]
    ids = tokenizer(flat, padding=True, truncation=True, return_tensors="pt")  # to its model_max_length
    return {"pixel_values": torch.stack(images), "input_ids": ids.input_ids, "attention_mask": ids.attention_mask}
