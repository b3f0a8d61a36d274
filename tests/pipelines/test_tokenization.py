"""One call in one style gives tokens and what was cut off; it equals the tokenizer's own padding and cutting."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pipelines.tiny_paella import tiny_tokenizer
from pipelines.tiny_versatile import tiny_optimus
from transformers import AutoTokenizer

from diffusers_ext.pipelines.tokenization import tokenize_texts

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
TEXTS = ["", "a red circle", "a red circle " * 30, "a <|pad|> <eos> [SEP] blue thing", "  "]


def _saved_tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINTS / "paella-scenes-64", subfolder="tokenizer")


@pytest.mark.parametrize("make", [tiny_tokenizer, lambda: tiny_optimus()[1], _saved_tokenizer])
@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_the_tokenizers_own_cutting_and_padding(make, side):
    own, ours = make(), make()
    for tokenizer in (own, ours):
        tokenizer.truncation_side = tokenizer.padding_side = side
    for window in (2, 3, 10, 32):
        for padding, to_window in (("max_length", True), (True, False)):
            wanted = own(TEXTS, padding=padding, truncation=True, max_length=window, return_tensors="pt").input_ids
            found, _ = tokenize_texts(ours, TEXTS, window, pad_to_window=to_window)
            assert torch.equal(found, wanted)


def test_quotes_what_does_not_fit_without_specials_or_padding():
    words = "a red circle on the left of a blue star"
    ids, cut = tokenize_texts(tiny_tokenizer(), ["a star", words, words.replace("star", "ring")], 10)
    assert ids.shape == (3, 10)
    assert cut == ["blue star", "blue ring"]


def test_a_tokenizer_without_padding_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"PreTrainedTokenizerFast|TokenizersBackend.*`tokenizer\.pad_token`"):
        tokenize_texts(tokenizer, ["a", "a star"], 10, pad_to_window=False)


def test_a_shared_tokenizer_serves_threads_that_ask_for_other_windows():
    tokenizer = _saved_tokenizer()  # saved with padding and truncation on: its first call changes that
    texts = ["a red circle", "a large blue star on the left"]
    wanted = {window: tokenize_texts(_saved_tokenizer(), texts, window) for window in (4, 8, 32)}

    def ask(window: int) -> bool:
        found = [tokenize_texts(tokenizer, texts, window) for _ in range(100)]
        return all(torch.equal(ids, wanted[window][0]) and cut == wanted[window][1] for ids, cut in found)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(ask, (4, 8, 32)))
