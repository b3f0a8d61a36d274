"""Sentences to tokens and back, with tokenizers of the two kinds that Optimus has."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from diffusers_ext.pipelines.versatile.optimus_text import read_sentences, sentence_ids, target_ids


@pytest.fixture(scope="module")
def bert() -> PreTrainedTokenizerFast:
    """Word pieces of a cased vocabulary with BERT's ids of the special tokens: the example of the fact sheet."""
    words = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "a": 170, "pink": 5325, "car": 1610, ".": 119}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerFast:
    """Bytes without merges, with the three tokens appended as Optimus does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"pad_token": "<PAD>", "bos_token": "<BOS>", "eos_token": "<EOS>"})
    return fast


def test_the_encoder_reads_lower_case(bert):
    assert sentence_ids(bert, ["A pink car."]).tolist() == [[101, 170, 5325, 1610, 119, 102]]
    assert sentence_ids(bert, ["A pink car."], lower_case=False).tolist() == [[101, 100, 5325, 1610, 119, 102]]


def test_sentences_are_padded_and_cut_before_the_special_tokens(bert):
    assert sentence_ids(bert, ["a car", "pink"]).tolist() == [[101, 170, 1610, 102], [101, 5325, 102, 0]]
    assert sentence_ids(bert, ["car " * 90]).shape == (1, 79)  # 77 word pieces
    assert sentence_ids(bert, ["a pink car"], max_word_pieces=2).tolist() == [[101, 170, 5325, 102]]


def test_targets_begin_and_end(gpt2):
    pad, bos, eos = gpt2.pad_token_id, gpt2.bos_token_id, gpt2.eos_token_id
    assert (pad, bos, eos) == (256, 257, 258)
    ids = target_ids(gpt2, ["ab", "a"])
    a, b = gpt2("ab").input_ids
    assert ids.tolist() == [[bos, a, b, eos], [bos, a, eos, pad]]
    assert target_ids(gpt2, ["a" * 99]).shape == (1, 30)
    assert target_ids(gpt2, ["abab"], max_length=4).tolist() == [[bos, a, b, eos]]


def test_what_is_decoded_is_read_back(gpt2):
    texts = ["a pink car, isn't it? no.", "", "it's über 2 €"]
    assert read_sentences(gpt2, target_ids(gpt2, texts)) == texts


@pytest.mark.parametrize(
    ("drawn", "read"),
    [
        (" a  pink car .", "a pink car."),
        ("a car , or not ? yes !", "a car, or not? yes!"),
        ("she 's here ; they do n't", "she's here ; they don't"),
        ("the 'mean 'mug", "the 'mean 'mug"),
        ("a ring<PAD> here", "a ring here"),
        ("a ring<EOS> and more", "a ring"),
    ],
)
def test_texts_are_tidied(gpt2, drawn, read):
    ids = [gpt2.bos_token_id, *gpt2(drawn).input_ids]
    assert read_sentences(gpt2, torch.tensor([ids])) == [read]
