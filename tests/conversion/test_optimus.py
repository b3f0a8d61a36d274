"""Optimus checkpoints of every origin, key by key, and the tokenizers that belong to them."""

from argparse import Namespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffusers_ext import AutoencoderOptimus
from diffusers_ext.conversion.keys import load_original
from diffusers_ext.conversion.optimus import build_optimus_tokenizers, convert_optimus, take_optimus

TINY = {"encoder": (20, 8, 2, 16, 12), "decoder": (24, 12, 3, 14), "latent": 6}
HEADS = {"encoder_heads": 2, "decoder_heads": 3}
LINEAR, NORM = ("weight", "bias"), ("weight", "bias")


def optimus_shapes(encoder=(28996, 768, 12, 3072, 512), decoder=(50260, 768, 12, 1024), latent=768) -> dict:
    """Names and shapes of the original's state dict; each network as (words, width, layers, [MLP,] positions)."""
    words, wide, layers, mlp, places = encoder
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.embeddings.word_embeddings.weight": (words, wide),
        "encoder.embeddings.position_embeddings.weight": (places, wide),
        "encoder.embeddings.token_type_embeddings.weight": (2, wide),
        "encoder.linear.weight": (2 * latent, wide),
    }
    linear = {"encoder.pooler.dense": (wide, wide)}
    norms = ["encoder.embeddings.LayerNorm"]
    for layer in range(layers):
        stem = f"encoder.encoder.layer.{layer}."
        linear |= {f"{stem}attention.self.{name}": (wide, wide) for name in ("query", "key", "value")}
        linear |= {f"{stem}attention.output.dense": (wide, wide)}
        linear |= {f"{stem}intermediate.dense": (mlp, wide), f"{stem}output.dense": (wide, mlp)}
        norms += [f"{stem}attention.output.LayerNorm", f"{stem}output.LayerNorm"]
    shapes |= {f"{key}.weight": shape for key, shape in linear.items()}
    shapes |= {f"{key}.bias": shape[:1] for key, shape in linear.items()}
    shapes |= {f"{key}.{part}": (wide,) for key in norms for part in NORM}

    words, wide, layers, places = decoder
    stem = "decoder.transformer."
    shapes |= {
        "decoder.lm_head.weight": (words, wide),
        f"{stem}wte.weight": (words, wide),
        f"{stem}wpe.weight": (places, wide),
        f"{stem}linear.weight": (layers * wide, latent),
        f"{stem}linear_emb.weight": (wide, latent),
    }
    convolved = {}
    norms = [f"{stem}ln_f"]
    for layer in range(layers):
        block = f"{stem}h.{layer}."
        convolved |= {f"{block}attn.c_attn": (wide, 3 * wide), f"{block}attn.c_proj": (wide, wide)}
        convolved |= {f"{block}mlp.c_fc": (wide, 4 * wide), f"{block}mlp.c_proj": (4 * wide, wide)}
        norms += [f"{block}ln_1", f"{block}ln_2"]
        shapes[f"{block}attn.bias"] = (1, 1, places, places)
    shapes |= {f"{key}.weight": shape for key, shape in convolved.items()}
    shapes |= {f"{key}.bias": shape[1:] for key, shape in convolved.items()}
    return shapes | {f"{key}.{part}": (wide,) for key in norms for part in NORM}


def original(**sizes) -> dict[str, torch.Tensor]:
    weights = {key: torch.randn(shape) for key, shape in optimus_shapes(**{**TINY, **sizes}).items()}
    weights["decoder.lm_head.weight"] = weights["decoder.transformer.wte.weight"].clone()
    return weights


def is_left_out(key: str) -> bool:
    return key.endswith(".attn.bias") or key == "decoder.lm_head.weight"


def test_every_key_of_the_released_file_finds_its_place():
    """At full size by shapes, the numbers at a small one."""
    wanted = optimus_shapes()
    kept = sorted(torch.Size(shape).numel() for key, shape in wanted.items() if not is_left_out(key))
    with torch.device("meta"):
        full = AutoencoderOptimus()
    assert sorted(p.numel() for p in full.parameters()) == kept
    assert 4 * sum(torch.Size(s).numel() for k, s in wanted.items() if k != "decoder.lm_head.weight") == pytest.approx(
        1_016_873_389, rel=2e-4
    )  # bytes of optimus-vae.pth

    weights = original()
    model = convert_optimus(weights, **HEADS)
    values = [value for key, value in weights.items() if not is_left_out(key)]
    assert sum(p.numel() for p in model.parameters()) == sum(value.numel() for value in values)
    total = sum(float(value.double().sum()) for value in values)
    assert sum(float(p.detach().double().sum()) for p in model.parameters()) == pytest.approx(total, abs=1e-3)
    assert torch.equal(model.memory_projection.weight, weights["decoder.transformer.linear.weight"])
    assert torch.equal(model.embedding_projection.weight, weights["decoder.transformer.linear_emb.weight"])
    assert torch.equal(model.posterior_projection.weight, weights["encoder.linear.weight"])


def test_sizes_are_read_off_the_shapes(tmp_path):
    model = convert_optimus(original(), **HEADS, dropout=0.3)
    config = model.config
    assert not model.training and config.latent_dim == 6 and config.dropout == 0.3
    assert [config[f"encoder_{name}"] for name in ("vocab_size", "hidden_size", "num_layers", "max_length")] == [
        20, 8, 2, 12,
    ]  # fmt: skip
    assert config.encoder_intermediate_size == 16 and config.decoder_num_attention_heads == 3
    assert [config[f"decoder_{name}"] for name in ("vocab_size", "hidden_size", "num_layers", "max_length")] == [
        24, 12, 3, 14,
    ]  # fmt: skip
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (21, 22, 23)  # appended in this order
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 3, 2]])
    again = AutoencoderOptimus.from_pretrained(tmp_path).encode(ids).mean
    torch.testing.assert_close(again, model.encode(ids).mean)


def test_heads_follow_from_the_width_of_the_released_networks():
    weights = original(encoder=(20, 128, 1, 16, 12), decoder=(24, 64, 1, 14))
    config = convert_optimus(weights).config
    assert (config.encoder_num_attention_heads, config.decoder_num_attention_heads) == (2, 1)


@torch.no_grad()
def test_the_encoders_padding_can_be_another_token():
    weights, ids = original(), torch.tensor([[1, 3, 2, 5, 5], [1, 3, 0, 4, 2]])
    model = convert_optimus(weights, **HEADS, encoder_pad_token_id=5)
    assert model.config.encoder_pad_token_id == 5
    torch.testing.assert_close(model.encode(ids).mean[:1], model.encode(ids[:1, :3]).mean)
    assert not torch.allclose(model.encode(ids).mean, convert_optimus(weights, **HEADS).encode(ids).mean)


def inside_a_release(prefix: str):
    others = {"model.diffusion_model.time_embed.0.weight": torch.zeros(2), "autokl.quant_conv.bias": torch.zeros(3)}
    return lambda weights: {**others, **{prefix + key: value for key, value in weights.items()}}


@pytest.mark.parametrize(
    "wrap",
    [
        inside_a_release("optimus."),
        inside_a_release("vae.text."),
        lambda weights: {"state_dict": weights},
        lambda weights: {"iter": 5, "model_state_dict": {f"module.{k}": v for k, v in weights.items()}, "beta": 0.5},
    ],
    ids=["first release", "saved whole", "nested", "optimus itself"],
)
def test_every_origin_gives_the_same_model(wrap):
    weights = original()
    expected, found = (convert_optimus(w, **HEADS).state_dict() for w in (weights, wrap(weights)))
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert take_optimus(wrap(weights)).keys() == weights.keys()


def test_the_file_of_optimus_itself_is_read_without_running_code(tmp_path):
    weights = original()
    path = tmp_path / "training.bin"
    torch.save({"iter": 508523, "model_state_dict": weights, "args": Namespace(latent_size=6)}, path)
    assert convert_optimus(load_original(path), **HEADS).config.latent_dim == 6


def test_a_way_that_was_not_trained_is_left_out():
    weights = original()
    model = convert_optimus(weights, **HEADS, latent_as_memory=False)
    assert model.memory_projection is None and model.config.latent_as_memory is False
    weights["decoder.transformer.linear.weight"] = torch.zeros(1)  # not looked at
    convert_optimus(weights, **HEADS, latent_as_memory=False)


STRICT = [
    (lambda w: w.pop("encoder.linear.weight"), "holds no Optimus: it lacks encoder.linear.weight.*optimus-vae.pth"),
    (lambda w: w.pop("encoder.pooler.dense.bias"), r"missing: encoder\.pooler\.dense\.bias"),
    (lambda w: w.pop("decoder.transformer.linear.weight"), r"missing: memory_projection\.weight"),
    (lambda w: w.update({"encoder.cls.bias": torch.zeros(2)}), r"unknown: encoder\.cls\.bias"),
    (lambda w: w.update({"prior.loc": torch.zeros(2)}), r"does not know: prior\.loc"),
    (
        lambda w: w.update({"decoder.transformer.ln_f.bias": torch.zeros(5)}),
        r"misshaped: decoder\.ln_f\.bias \(5,\) i",
    ),
    (lambda w: w["decoder.transformer.wpe.weight"].fill_(float("inf")), r"not finite: decoder\.wpe\.weight"),
    (lambda w: w["decoder.lm_head.weight"].add_(1), r"`decoder\.lm_head\.weight` is no copy of"),
]


@pytest.mark.parametrize(("change", "message"), STRICT)
def test_it_is_converted_strictly(change, message):
    weights = original()
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert_optimus(weights, **HEADS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "`encoder_heads` is None, but the attention is 8 wide, which is no multiple of 64",
        ),
        (
            {"encoder_heads": 2, "decoder_heads": 5},
            "`decoder_heads` is 5, but the attention is 12 wide: pass a divisor",
        ),
        ({"encoder_heads": 0, "decoder_heads": 3}, "`encoder_heads` is 0"),
        ({**HEADS, "encoder_pad_token_id": 20}, "`encoder_pad_token_id` is 20, but `encoder_vocab_size` is 20"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        convert_optimus(original(), **options)


def test_a_diffuser_alone_is_refused():
    with pytest.raises(ValueError, match="the diffuser only: convert `optimus-vae.pth`"):
        convert_optimus({"diffuser.image.time_embed.0.weight": torch.zeros(2)})


def saved_tokenizer(folder, words: list[str], **special: str) -> str:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


def test_tokenizers_get_the_three_words_and_must_fit(tmp_path):
    names = {
        "encoder_name_or_path": saved_tokenizer(tmp_path / "bert", ["[PAD]", "a", "[UNK]"], pad_token="[PAD]"),
        "decoder_name_or_path": saved_tokenizer(tmp_path / "gpt2", ["a", "ring", "?"]),
    }
    model = convert_optimus(original(encoder=(3, 8, 1, 8, 12), decoder=(6, 12, 1, 14)), **HEADS)
    encoder, decoder = build_optimus_tokenizers(model, **names)
    assert decoder.convert_tokens_to_ids(["<PAD>", "<BOS>", "<EOS>"]) == [3, 4, 5]
    assert (decoder.pad_token_id, decoder.bos_token_id, decoder.eos_token_id, encoder.pad_token_id) == (3, 4, 5, 0)
    larger = convert_optimus(original(encoder=(4, 8, 1, 8, 12), decoder=(6, 12, 1, 14)), **HEADS)
    with pytest.raises(ValueError, match="`encoder_vocab_size` of the model is 4, but 3 in the tokenizer '.*bert'"):
        build_optimus_tokenizers(larger, **names)
    for argument in names:
        nowhere = {**names, argument: str(tmp_path / "nowhere")}
        with pytest.raises(ValueError, match=f"`{argument}` is '.*nowhere': there is no such folder .* Pass a folder"):
            build_optimus_tokenizers(model, **nowhere)
