"""Optimus checkpoints to `AutoencoderOptimus`: of Versatile Diffusion, and of Optimus itself.

Versatile Diffusion, SHI-Labs/Versatile-Diffusion@cf0f4a2 (MIT), publishes it as `optimus-vae.pth`; its first release
holds it under `optimus.` beside everything else, and a model saved whole in the current layout under `vae.text.`. The
weights of Optimus, ChunyuanLI/Optimus@f3190fe (MIT), lie in `checkpoint-full-<step>/training.bin` with the same names.

The diffusers-format repository of Versatile Diffusion holds no Optimus: diffusers never made text. Take it from
`optimus-vae.pth`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..models.autoencoder_optimus import AutoencoderOptimus
from .keys import Rules, build_empty, count_heads, count_keys, load_strict, rename_keys, unwrap_state_dict

PREFIXES = ("optimus.", "vae.text.")
SPECIAL_TOKENS = {"pad_token": "<PAD>", "bos_token": "<BOS>", "eos_token": "<EOS>"}  # appended in this order

_RULES: Rules = [
    ("encoder.linear.weight", "posterior_projection.weight"),
    ("encoder.*", "encoder.*"),
    ("decoder.transformer.linear_emb.weight", "embedding_projection.weight"),
    ("decoder.transformer.linear.weight", "memory_projection.weight"),
    ("decoder.transformer.*", "decoder.*"),
]
_CAUSAL_MASKS = "decoder.transformer.h.{}.attn.bias"  # buffers, in transformers now made on the fly
_TIED_HEAD = "decoder.lm_head.weight"

# What tells the sizes.
_SIZED = (
    "encoder.embeddings.word_embeddings.weight",
    "encoder.embeddings.position_embeddings.weight",
    "encoder.encoder.layer.0.intermediate.dense.weight",
    "encoder.linear.weight",
    "decoder.transformer.wte.weight",
    "decoder.transformer.wpe.weight",
)


def take_optimus(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of Optimus, without a prefix, of a checkpoint that holds it alone or along with other networks.

    Raises:
        ValueError: if there is no Optimus in it.
    """
    weights = unwrap_state_dict(state_dict.get("model_state_dict", state_dict))
    for prefix in PREFIXES:
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if own:
            weights = own
            break
    missing = [key for key in _SIZED if key not in weights]
    if missing:
        raise ValueError(
            f"`state_dict` holds no Optimus: it lacks {', '.join(missing)}. It starts with {list(weights)[:3]}. "
            "Versatile Diffusion's current checkpoints hold the diffuser only: convert `optimus-vae.pth`."
        )
    return weights


def convert_optimus(
    state_dict: Mapping[str, Any],
    *,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
    encoder_pad_token_id: int = 0,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    latent_as_embedding: bool = True,
    latent_as_memory: bool = True,
    dropout: float = 0.1,
) -> AutoencoderOptimus:
    """Converts Optimus; every size but the number of heads is read off the shapes.

    Args:
        state_dict: original weights: of Optimus alone, or of a checkpoint that holds it (see the module), of which
            all other networks are left to their own converters.
        encoder_heads, decoder_heads: attention heads of BERT and GPT-2; the width divided by 64 when unset.
        encoder_pad_token_id: what fills up the encoder's input, 0 in BERT.
        pad_token_id, bos_token_id, eos_token_id: of the decoder; when unset the last three of the vocabulary, where
            Optimus appends <PAD>, <BOS>, <EOS>.
        latent_as_embedding, latent_as_memory: how the decoder was trained to read the latents. With False the
            projection for it is left out.
        dropout: for further training.

    Returns:
        In eval mode, in the dtype of the weights.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite; for a width that the heads do not
            divide; for a token id beyond the vocabulary; or for an output head that is no copy of the embedding table.
    """
    weights = take_optimus(state_dict)
    vocab_size, width = weights["decoder.transformer.wte.weight"].shape
    _check_head(weights)
    ignore = [_CAUSAL_MASKS, _TIED_HEAD]
    if not latent_as_embedding:
        ignore.append("decoder.transformer.linear_emb.weight")
    if not latent_as_memory:
        ignore.append("decoder.transformer.linear.weight")
    renamed = rename_keys(weights, _RULES, ignore=ignore)
    encoder_vocab_size, encoder_width = weights["encoder.embeddings.word_embeddings.weight"].shape
    model = build_empty(
        AutoencoderOptimus,
        latent_dim=weights["encoder.linear.weight"].shape[0] // 2,
        encoder_vocab_size=encoder_vocab_size,
        encoder_hidden_size=encoder_width,
        encoder_intermediate_size=weights["encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
        encoder_num_layers=count_keys(weights, "encoder.encoder.layer.", ".intermediate.dense.weight"),
        encoder_num_attention_heads=count_heads("encoder_heads", encoder_width, encoder_heads),
        encoder_max_length=weights["encoder.embeddings.position_embeddings.weight"].shape[0],
        decoder_vocab_size=vocab_size,
        decoder_hidden_size=width,
        decoder_num_layers=count_keys(weights, "decoder.transformer.h.", ".mlp.c_fc.weight"),
        decoder_num_attention_heads=count_heads("decoder_heads", width, decoder_heads),
        decoder_max_length=weights["decoder.transformer.wpe.weight"].shape[0],
        encoder_pad_token_id=encoder_pad_token_id,
        pad_token_id=vocab_size - 3 if pad_token_id is None else pad_token_id,
        bos_token_id=vocab_size - 2 if bos_token_id is None else bos_token_id,
        eos_token_id=vocab_size - 1 if eos_token_id is None else eos_token_id,
        latent_as_embedding=latent_as_embedding,
        latent_as_memory=latent_as_memory,
        dropout=dropout,
    )
    return load_strict(model, renamed)


def build_optimus_tokenizers(
    model: AutoencoderOptimus,
    *,
    encoder_name_or_path: str = "bert-base-cased",
    decoder_name_or_path: str = "gpt2",
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The tokenizers of `model`'s encoder and decoder, from those of the networks that it was made of.

    Args:
        model: converted; its token ids must be those of the tokenizers.
        encoder_name_or_path, decoder_name_or_path: Hub ids or folders of BERT's and GPT-2's tokenizers. The decoder's
            gets <PAD>, <BOS> and <EOS> appended where it lacks them.

    Raises:
        ValueError: the vocabularies are not those of the model, or a tokenizer is not there.
    """
    config: Any = model.config
    encoder = _load_tokenizer("encoder_name_or_path", encoder_name_or_path)
    decoder = _load_tokenizer("decoder_name_or_path", decoder_name_or_path)
    decoder.add_special_tokens(SPECIAL_TOKENS)
    wanted = {
        "encoder_vocab_size": (len(encoder), encoder_name_or_path),
        "encoder_pad_token_id": (encoder.pad_token_id, encoder_name_or_path),
        "decoder_vocab_size": (len(decoder), decoder_name_or_path),
        "pad_token_id": (decoder.pad_token_id, decoder_name_or_path),
        "bos_token_id": (decoder.bos_token_id, decoder_name_or_path),
        "eos_token_id": (decoder.eos_token_id, decoder_name_or_path),
    }
    for name, (found, source) in wanted.items():
        if config[name] != found:
            raise ValueError(
                f"`{name}` of the model is {config[name]}, but {found} in the tokenizer {source!r}: name the "
                "tokenizers that the model was trained with (`encoder_name_or_path`, `decoder_name_or_path`)."
            )
    return encoder, decoder


def _load_tokenizer(argument: str, place: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(place)
    except OSError as error:
        raise ValueError(
            f"`{argument}` is {place!r}: there is no such folder with a tokenizer, and the Hub has it not or is out "
            "of reach. Pass a folder with the tokenizer's files."
        ) from error


def _check_head(weights: Mapping[str, Tensor]) -> None:
    head, table = weights.get(_TIED_HEAD), weights["decoder.transformer.wte.weight"]
    if head is not None and not torch.equal(head, table):
        raise ValueError(
            f"`{_TIED_HEAD}` is no copy of `decoder.transformer.wte.weight`: AutoencoderOptimus has one for both."
        )
