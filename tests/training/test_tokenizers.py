"""The small tokenizers that recipes learn from their data, and which of a batch's conditions are kept."""

import pytest
from datasets import Dataset

from diffusers_ext.conversion.optimus import SPECIAL_TOKENS
from diffusers_ext.training_utils.objective import keep_condition
from diffusers_ext.training_utils.plan import keyed_generator
from diffusers_ext.training_utils.tokenizers import (
    SMALLEST_VOCABULARY,
    read_captions,
    train_bpe,
    train_clip_tokenizer,
)

CAPTIONS = ["a large red circle", "a small blue star", "a red star"] * 4


def test_a_tokenizer_of_clip_knows_every_text_in_lower_case():
    tokenizer = train_clip_tokenizer(CAPTIONS, 300, 12)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert SMALLEST_VOCABULARY < len(tokenizer) <= 300 and tokenizer.model_max_length == 12
    ids = tokenizer("A RED Tür ☃").input_ids
    assert ids[0] == 0 and ids[-1] == 1 and ids == tokenizer("a red tür ☃").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a red tür ☃"
    assert len(tokenizer("a red star").input_ids) < len("a red star")  # words were learnt, not letters


@pytest.mark.parametrize("special", [SPECIAL_TOKENS, {"pad_token": "[P]", "cls_token": "[C]", "sep_token": "[S]"}])
def test_special_tokens_come_first_in_their_order(special):
    tokenizer = train_bpe(CAPTIONS, SMALLEST_VOCABULARY, special)
    assert tokenizer.convert_tokens_to_ids(list(special.values())) == [0, 1, 2] and len(tokenizer) == 259
    _, start, end = (getattr(tokenizer, f"{name}_id") for name in special)
    ids = tokenizer("A B").input_ids
    assert (ids[0], ids[-1]) == (start, end) and tokenizer.decode(ids[1:-1]).strip() == "A B"


def test_captions_of_the_first_rows_are_read():
    rows = Dataset.from_dict({"text": [["a", "b"], ["c"], ["d"]]})
    assert read_captions(rows, "text", limit=2) == ["a", "b", "c"]
    assert read_captions(Dataset.from_dict({"text": ["a", "b"]}), "text") == ["a", "b"]


def test_the_kept_fraction_of_conditions_is_what_is_asked_for():
    generators = [keyed_generator(0, i) for i in range(4000)]
    kept = keep_condition(generators, 0.1).float().mean()
    assert abs(kept - 0.9) < 4 * (0.1 * 0.9 / 4000) ** 0.5
    assert keep_condition(generators[:50], 0.0).all() and not keep_condition(generators[:50], 1.0).any()
