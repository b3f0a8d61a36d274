"""Texts to the tokens that a text encoder reads, and the parts of them that it does not read.

One call of the tokenizer in one style yields both. A tokenizer of the Rust library keeps padding and truncation as a
setting of its own: two pipelines that share it in two threads, each of them calling with and without padding, tear
that setting between call and result. So padding and cutting happen here, and the setting never changes.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

# A tokenizer that was saved with padding loses that setting in its first call, which no other thread may interrupt.
_FIRST_CALL = threading.Lock()
_LEGACY_EOS = 2  # a CLIP config with this end-of-text id pools at the highest id instead of at the end-of-text token


def text_window(tokenizer: Any, text_encoder: Any) -> int:
    """How many tokens the text encoder reads, the first and the last included."""
    # a tokenizer saved without model_max_length reports 1e30, BERT's own 512
    return min(int(tokenizer.model_max_length), text_encoder.config.max_position_embeddings)


def text_ids(tokenizer: Any, text_encoder: Any, texts: Sequence[str], *, pipe: Any = None) -> Tensor:
    """Tokens of texts (n, l), padded and cut to what the text encoder reads.

    Args:
        pipe: The pipeline that warns of what is cut off. None cuts without a word, as in training.

    Raises:
        ValueError: The tokenizer is not the one that the text encoder was trained with.
    """
    window, config = text_window(tokenizer, text_encoder), text_encoder.config
    ids, cut = tokenize_texts(tokenizer, texts, window)
    if cut and pipe is not None:
        warn_of_cuts(pipe, cut, window)
    if int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"The tokenizer gives token {int(ids.max())}, the text encoder knows 0 to {config.vocab_size - 1}. Use"
            " the tokenizer that the text encoder was trained with."
        )
    eos = getattr(config, "eos_token_id", None)  # LDMBert, which does not pool, has none
    if eos not in (None, _LEGACY_EOS) and not bool((ids == eos).any(dim=1).all()):
        # transformers would pool at position 0: the same vector for every text, silently
        raise ValueError(
            f"The tokenizer ends no text with token {eos}, at which the text encoder pools"
            f" (text_encoder.config.eos_token_id); tokenizer.eos_token_id is {tokenizer.eos_token_id}."
            " Use the tokenizer that the text encoder was trained with."
        )
    return ids


def tokenize_texts(
    tokenizer: Any, texts: Sequence[str], window: int, *, pad_to_window: bool = True
) -> tuple[Tensor, list[str]]:
    """Tokens of texts, as `tokenizer(texts, padding=..., truncation=True, max_length=window)` gives them.

    Args:
        tokenizer: Its special tokens, its padding token and the sides on which it cuts and pads are followed.
        window: How many tokens are read, the first and the last included.
        pad_to_window: Pad to the window, else to the longest of the texts.

    Returns:
        Integers (n, l), and the parts of the texts that do not fit, in the order of the texts that have one.

    Raises:
        ValueError: The texts must be padded, but the tokenizer has no padding token.
    """
    with _FIRST_CALL:
        encoded = tokenizer(list(texts), return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
    rows, cut = [], []
    for ids, special in zip(encoded.input_ids, encoded.special_tokens_mask, strict=True):
        rows.append(list(ids))
        if len(ids) > window:
            rows[-1], rest = _cut(list(ids), list(special), window, from_left=tokenizer.truncation_side == "left")
            cut += [tokenizer.decode(rest)] if rest else []
    length = window if pad_to_window else max(map(len, rows))
    padding = tokenizer.pad_token_id
    if padding is None and any(len(row) < length for row in rows):
        raise ValueError(
            f"The tokenizer ({type(tokenizer).__name__}) has no padding token, so texts of several lengths make no"
            " batch: set `tokenizer.pad_token` to the one that the text encoder was trained with."
        )
    if tokenizer.padding_side == "left":
        rows = [[padding] * (length - len(row)) + row for row in rows]
    else:
        rows = [row + [padding] * (length - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.long), cut


def warn_of_cuts(pipe: Any, cut: Sequence[str], window: int, reader: str = "text encoder") -> None:
    """A warning for each part of a prompt that does not fit, from the logger of the pipeline that the user called."""
    logger = logging.get_logger(type(pipe).__module__)
    for part in cut:
        logger.warning(f"The {reader} reads {window} tokens; this part of the prompt was cut off: {part!r}")


def _cut(ids: list[int], special: list[int], window: int, *, from_left: bool) -> tuple[list[int], list[int]]:
    """The tokens that fit, first and last ones kept, and the tokens that do not.

    Args:
        special: 1 for the tokens that the tokenizer put before and behind the text.
    """
    if 0 not in special:
        return ids[:window], []
    start, end = special.index(0), len(special) - special[::-1].index(0)
    first, text, last = ids[:start], ids[start:end], ids[end:]
    room = max(window - len(first) - len(last), 0)
    kept, rest = (text[len(text) - room :], text[: len(text) - room]) if from_left else (text[:room], text[room:])
    return first + kept + last, rest
