"""Sentences to the tokens that `AutoencoderOptimus` reads, and back.

SHI-Labs/Versatile-Diffusion@cf0f4a2:lib/model_zoo/optimus.py (MIT). Difference: padding that was drawn within a
sentence is left out of the text.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tokenization import tokenize_texts, warn_of_cuts

MAX_WORD_PIECES = 77  # of a sentence, [CLS] and [SEP] not counted
MAX_SENTENCE_LENGTH = 30  # tokens that are decoded, <BOS> and <EOS> included

# "a pink car ." -> "a pink car.": spaces that only the tokenisation made
_SPACE_BEFORE = re.compile(r" (?=[.?!,]|n't|'(?:m|s|ve|re)(?:\W|$))")


def sentence_ids(
    tokenizer,
    sentences: Sequence[str],
    *,
    max_word_pieces: int = MAX_WORD_PIECES,
    lower_case: bool = True,
    pipe: Any = None,
) -> Tensor:
    """The encoder's tokens of sentences, integers (b, l): in lower case, cut, with [CLS] and [SEP], padded.

    Args:
        tokenizer: of the encoder; BERT's *cased* one in the released model.
        max_word_pieces: what a longer sentence is cut to.
        lower_case: Versatile Diffusion does so, although BERT's cased vocabulary knows more. Optimus itself does not.
        pipe: the pipeline that warns of what is cut off; None cuts without a word, as in training.
    """
    sentences = [sentence.lower() if lower_case else sentence for sentence in sentences]
    window = max_word_pieces + tokenizer.num_special_tokens_to_add()
    ids, cut = tokenize_texts(tokenizer, sentences, window, pad_to_window=False)
    if pipe is not None:
        warn_of_cuts(pipe, cut, window, "text autoencoder")
    return ids


def word_piece_window(tokenizer, optimus) -> int:
    """How many word pieces of a sentence `optimus` reads: 77 at most, as in Versatile Diffusion."""
    return min(MAX_WORD_PIECES, optimus.config["encoder_max_length"] - tokenizer.num_special_tokens_to_add())


def target_ids(tokenizer, sentences: Sequence[str], *, max_length: int = MAX_SENTENCE_LENGTH) -> Tensor:
    """The decoder's tokens of sentences, integers (b, l): <BOS>, the sentence (cut to fit), <EOS>, padding."""
    encoded = tokenizer(list(sentences), add_special_tokens=False, verbose=False)
    rows = [
        torch.tensor([tokenizer.bos_token_id, *ids[: max_length - 2], tokenizer.eos_token_id], dtype=torch.long)
        for ids in encoded.input_ids
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)


def read_sentences(tokenizer, token_ids: Tensor) -> list[str]:
    """The sentences in the decoder's tokens (b, l): what lies between <BOS> and the first <EOS>, tidied."""
    sentences = []
    for ids in token_ids.tolist():
        ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        sentences.append(_SPACE_BEFORE.sub("", " ".join(text.split())))
    return sentences


def vocabulary_options(encoder_tokenizer, decoder_tokenizer) -> dict[str, int]:
    """What `AutoencoderOptimus` has to know of the tokenizers that it is made for, as its arguments."""
    return {
        "encoder_vocab_size": len(encoder_tokenizer),
        "encoder_pad_token_id": encoder_tokenizer.pad_token_id,
        "decoder_vocab_size": len(decoder_tokenizer),
        "pad_token_id": decoder_tokenizer.pad_token_id,
        "bos_token_id": decoder_tokenizer.bos_token_id,
        "eos_token_id": decoder_tokenizer.eos_token_id,
    }
