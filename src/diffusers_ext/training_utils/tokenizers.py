"""Small tokenizers, learnt from the captions or sentences of the data: byte-level BPE, which knows every text.

Pretrained vocabularies (CLIP's, BERT's, GPT-2's) are downloads; a small network trains on these instead. A recipe
learns them with `learn_once`, and checkpoints keep them, so that a resumed run has the tokenizer that it began with.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .args import TrainArgs

logger = logging.getLogger(__name__)

LEARNT = "learnt"  # folder of a checkpoint
SMALLEST_VOCABULARY = 259  # 256 bytes; start, end, padding
BERT_TOKENS = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
CLIP_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special: Mapping[str, str],
    *,
    lowercase: bool = False,
    max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer that puts its start token before a text and its end token behind it.

    Args:
        vocab_size: The largest size of the vocabulary; few texts give a smaller one.
        special: Start, end and padding token under the names that transformers gives them (`bos_token` or
            `cls_token`, ...): start before end, padding anywhere. They get the ids 0, 1, 2 in this order.
        lowercase: Whether capitals are read as small letters.
        max_length: What the tokenizer cuts texts to (`model_max_length`); unset, it cuts nothing.
    """
    form: Any = normalizers.NFC()
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([form, normalizers.Lowercase()]) if lowercase else form
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    start, end = (token for name, token in special.items() if name != "pad_token")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)]
    )
    window = {} if max_length is None else {"model_max_length": max_length}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **window)


def train_clip_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """CLIP's: in lower case. The end token, at which the text tower pools, has id 1: 2 would select legacy pooling."""
    return train_bpe(captions, vocab_size, CLIP_TOKENS, lowercase=True, max_length=max_length)


def read_captions(dataset: Any, column: str, limit: int = 20_000) -> list[str]:
    """All captions of the first `limit` rows, without decoding a picture."""
    rows = dataset.select_columns([column]).select(range(min(len(dataset), limit)))
    values = (row[column] for row in rows)
    return [text for value in values for text in ([value] if isinstance(value, str) else value)]


def learn_once(train: TrainArgs, name: str, learn: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The tokenizer that `learn` makes of the data; a resumed run reads it from the checkpoint.

    Learnt again from data that have changed it would give other numbers to the words, silently.
    """
    if train.origin.checkpoint is None:
        tokenizer = learn()
    else:
        folder = train.origin.checkpoint[0] / LEARNT / name
        if folder.is_dir():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            logger.warning("%s holds no %s (it is of an older version): it is learnt again.", folder.parents[1], name)
            tokenizer = learn()
    train.origin.learnt[name] = tokenizer
    return tokenizer


def save_learnt(train: TrainArgs, folder: Path) -> None:
    """Writes the tokenizers that were learnt into a checkpoint."""
    for name, tokenizer in train.origin.learnt.items():
        tokenizer.save_pretrained(folder / LEARNT / name)
