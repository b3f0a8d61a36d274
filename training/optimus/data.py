"""Sentences to the tokens of both networks, in the loader's processes: at module level, so that these can start."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diffusers_ext.data.crops import choose_text
from diffusers_ext.pipelines.versatile.optimus_text import sentence_ids, target_ids
from diffusers_ext.training.optimus.args import OptimusArgs

Tokenizers = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]  # the encoder's, the decoder's


def read_sample(example: dict, generator: torch.Generator, column: str, lower_case: bool) -> dict[str, str]:
    """One of the sentences of a row."""
    sentence = choose_text(example[column], generator)
    return {"sentence": sentence.lower() if lower_case else sentence}


def collate_samples(samples: list[dict[str, str]], tokenizers: Tokenizers, args: OptimusArgs) -> dict[str, Tensor]:
    """The tokens of both networks, (b, l) each."""
    encoder, decoder = tokenizers
    sentences = [sample["sentence"] for sample in samples]
    return {
        "input_ids": sentence_ids(
            encoder, sentences, max_word_pieces=args.max_word_pieces, lower_case=args.lower_case
        ),
        "token_ids": target_ids(decoder, sentences, max_length=args.max_length),
    }
