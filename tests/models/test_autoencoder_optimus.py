"""The text autoencoder: against the definition written out, cached against plain decoding, draws, saving, refusals."""

import math

import pytest
import torch
from torch.nn import functional as F

from diffusers_ext import AutoencoderOptimus
from diffusers_ext.models.autoencoder_optimus import filter_logits

TINY = {
    "latent_dim": 6, "encoder_vocab_size": 20, "encoder_hidden_size": 8, "encoder_intermediate_size": 16,
    "encoder_num_layers": 2, "encoder_num_attention_heads": 2, "encoder_max_length": 12, "decoder_vocab_size": 24,
    "decoder_hidden_size": 8, "decoder_num_layers": 2, "decoder_num_attention_heads": 2, "decoder_max_length": 14,
    "pad_token_id": 21, "bos_token_id": 22, "eos_token_id": 23, "dropout": 0.0,
}  # fmt: skip


def tiny(**options) -> AutoencoderOptimus:
    """Weights of a size at which every part changes the numbers."""
    model = AutoencoderOptimus(**{**TINY, **options}).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower() and "ln_" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def sentences() -> torch.Tensor:
    return torch.tensor([[1, 5, 9, 13, 2], [1, 7, 2, 0, 0]])


@torch.no_grad()
def test_the_decoder_is_gpt2_with_the_latent_added_and_remembered():
    """Against the definition: positions from 1, a key that is its own value before the sentence, causal attention."""
    model = tiny()
    latents, ids = torch.randn(2, 6), torch.randint(0, 24, (2, 5))
    gpt2, table = model.decoder, model.decoder.wte.weight
    x = table[ids] + gpt2.wpe.weight[1:6] + (latents @ model.embedding_projection.weight.T)[:, None]
    memory = (latents @ model.memory_projection.weight.T).view(2, 2, 2, 1, 4)  # sentence, layer, head, 1, width
    visible = torch.cat([torch.ones(5, 1), torch.ones(5, 5).tril()], dim=1).bool()
    for layer, block in enumerate(gpt2.h):
        h = F.layer_norm(x, (8,), block.ln_1.weight, block.ln_1.bias)
        projected = h @ block.attn.c_attn.weight + block.attn.c_attn.bias
        q, k, v = (part.view(2, 5, 2, 4).transpose(1, 2) for part in projected.split(8, dim=-1))
        k, v = (torch.cat([memory[:, layer], part], dim=2) for part in (k, v))
        scores = (q @ k.transpose(-1, -2) / 2.0).masked_fill(~visible, -math.inf)
        attended = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(2, 5, 8)
        x = x + attended @ block.attn.c_proj.weight + block.attn.c_proj.bias
        h = F.layer_norm(x, (8,), block.ln_2.weight, block.ln_2.bias)
        h = F.gelu(h @ block.mlp.c_fc.weight + block.mlp.c_fc.bias, approximate="tanh")
        x = x + h @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
    expected = F.layer_norm(x, (8,), gpt2.ln_f.weight, gpt2.ln_f.bias) @ table.T
    torch.testing.assert_close(model.predict(latents, ids), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_posterior_is_a_projection_of_the_pooled_output_and_blind_to_padding():
    model, ids = tiny(), sentences()
    posterior = model.encode(ids)
    pooled = model.encoder(ids, attention_mask=(ids > 0).long()).pooler_output
    moments = pooled @ model.posterior_projection.weight.T
    torch.testing.assert_close(torch.cat([posterior.mean, posterior.logvar], dim=1), moments)
    alone = model.encode(ids[1:, :3])
    torch.testing.assert_close(alone.mean, posterior.mean[1:], atol=1e-5, rtol=1e-4)
    mean, logvar = model.encode(ids, torch.ones_like(ids), return_dict=False)
    assert torch.equal(mean[0], posterior.mean[0]) and not torch.allclose(mean[1], posterior.mean[1])


@pytest.mark.parametrize(
    "ways", [{}, {"latent_as_memory": False}, {"latent_as_embedding": False}], ids=lambda ways: " ".join(ways)
)
@pytest.mark.parametrize("options", [{"do_sample": False}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8}])
def test_the_cache_changes_no_token(ways, options):
    model, latents = tiny(**ways), torch.randn(4, 6)
    decoded = [
        model.decode(
            latents, max_length=13, use_cache=use_cache, generator=torch.Generator().manual_seed(3), **options
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*decoded) and decoded[0].shape[0] == 4
    if not options.get("do_sample", True):  # each token is the most probable one after those before it, read at once
        predicted = model.predict(latents, decoded[0]).argmax(-1)
        is_word = torch.isin(decoded[0][:, 1:], torch.tensor([21, 23]), invert=True)
        assert is_word.any() and (predicted[:, :-1] == decoded[0][:, 1:])[is_word].all()


def test_sentences_end_are_cut_and_are_padded():
    model, latents = tiny(), torch.randn(3, 6)
    greedy = {"do_sample": False, "max_length": 9}
    endless = model.decode(latents, **greedy)
    assert endless.shape == (3, 9) and (endless[:, 0] == 22).all() and (endless[:, -1] == 23).all()
    model.register_to_config(eos_token_id=int(endless[0, 3]))  # so the first sentence ends there
    ends = model.decode(latents, **greedy)
    first = [int((row == model.config.eos_token_id).int().argmax()) for row in ends]
    assert first[0] <= 3 and all((row[at + 1 :] == 21).all() for row, at in zip(ends, first, strict=True))
    assert ends.shape[1] == max(first) + 1  # no further than the longest
    torch.testing.assert_close(ends[:, :2], endless[:, :2])


def test_a_generator_for_each_sentence_makes_it_independent_of_the_batch():
    model, latents = tiny(), torch.randn(3, 6)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]

    together = model.decode(latents, generator=generators(), max_length=10)
    for row, generator in enumerate(generators()):
        alone = model.decode(latents[row : row + 1], generator=[generator], max_length=10)[0]
        assert torch.equal(together[row, : len(alone)], alone) and (together[row, len(alone) :] == 21).all()


def test_draws_have_the_predicted_distribution():
    model, count = tiny(), 4000
    latents = torch.randn(1, 6)
    first = model.decode(latents.expand(count, 6), max_length=3, generator=torch.Generator().manual_seed(0))[:, 1]
    expected = model.predict(latents, torch.tensor([[22]]))[0, 0].softmax(-1)
    found = torch.bincount(first, minlength=24) / count
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 1e-3).all()
    greedy = model.decode(latents, max_length=8, do_sample=False)
    for options in ({"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}):
        assert torch.equal(model.decode(latents, max_length=8, **options), greedy)


def test_filters_by_hand():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    kept = lambda **options: filter_logits(logits, **options).isfinite().tolist()  # noqa: E731
    assert kept() == [True] * 4 and kept(top_k=9) == [True] * 4
    assert kept(top_k=1) == [True, False, False, False]
    assert kept(top_k=2) == [True, True, True, False]  # what equals the second stays
    assert kept(top_p=0.3) == [True, False, False, False]  # the most probable one always
    assert kept(top_p=0.6) == [True, True, False, False] or kept(top_p=0.6) == [True, False, True, False]
    assert kept(top_p=0.95) == [True] * 4
    batch = filter_logits(torch.stack([logits, logits.flip(0)]), top_k=1)
    assert batch.isfinite().tolist() == [[True, False, False, False], [False, False, False, True]]


def test_a_training_step_reaches_every_weight():
    model, ids = tiny().train(), sentences()
    targets = torch.tensor([[22, 4, 5, 23], [22, 6, 23, 21]])
    noise = torch.randn(2, 6)
    out = model(ids, targets, noise=noise)
    F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.posterior_projection.weight.grad.abs().sum() > 0
    latents = out.mean + (0.5 * out.logvar).exp() * noise
    torch.testing.assert_close(out.logits, model.predict(latents, targets))
    logits, mean, logvar = model(ids, targets, return_dict=False)
    torch.testing.assert_close(logits, model.predict(mean, targets))
    assert logvar.shape == mean.shape == (2, 6)
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        model.enable_gradient_checkpointing()


@pytest.mark.parametrize("ways", [{}, {"latent_as_memory": False}])
def test_it_loads_as_it_was_saved(tmp_path, ways):
    model = tiny(**ways)
    model.save_pretrained(tmp_path)
    again = AutoencoderOptimus.from_pretrained(tmp_path)
    assert not again.training and all(again.config[name] == model.config[name] for name in {**TINY, **ways})
    options = {"generator": torch.Generator().manual_seed(1), "max_length": 9}
    latents = model.encode(sentences()).mean
    torch.testing.assert_close(again.encode(sentences()).mean, latents)
    options_again = {**options, "generator": torch.Generator().manual_seed(1)}
    assert torch.equal(again.decode(latents, **options), model.decode(latents, **options_again))
    for dtype in (torch.float16, torch.bfloat16):
        half = AutoencoderOptimus.from_pretrained(tmp_path, dtype=dtype)
        assert half.encode(sentences()).mean.dtype == dtype
        assert half.decode(latents.to(dtype), max_length=9).dtype == torch.long


def test_it_has_the_released_size():
    """`optimus-vae.pth` has 1,016,873,389 bytes: the weights, and a causal mask of 1024 x 1024 for each layer."""
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoencoderOptimus().parameters())
    assert 4 * (count + 12 * 1024 * 1024) == pytest.approx(1_016_873_389, rel=2e-4)


MODEL_ERRORS = [
    ({"latent_as_embedding": False, "latent_as_memory": False}, "both False: the decoder would not see the latents"),
    ({"encoder_num_attention_heads": 3}, "`encoder_num_attention_heads` is 3, but `encoder_hidden_size` is 8"),
    ({"decoder_num_attention_heads": 0}, "`decoder_num_attention_heads` is 0, but `decoder_hidden_size` is 8"),
    ({"encoder_pad_token_id": 20}, "`encoder_pad_token_id` is 20, but `encoder_vocab_size` is 20"),
    ({"eos_token_id": -1}, "`eos_token_id` is -1, but `decoder_vocab_size` is 24: it must lie between 0 and 23"),
]


@pytest.mark.parametrize(("options", "message"), MODEL_ERRORS)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderOptimus(**{**TINY, **options})


def decode(**options):
    return lambda model: model.decode(torch.zeros(2, 6), **options)


CALL_ERRORS = [
    (lambda m: m.encode(torch.zeros(2, 3)), r"`input_ids` is torch\.float32 of shape \(2, 3\): expected integers"),
    (lambda m: m.encode(torch.zeros(3).long()), r"shape \(3,\): expected integers of shape \(sentences, tokens\)"),
    (lambda m: m.encode(torch.zeros(2, 0).long()), r"of shape \(2, 0\)"),
    (lambda m: m.encode(torch.zeros(1, 13).long()), "holds 13 tokens a sentence, this model reads at most 12: cut"),
    (lambda m: m.encode(torch.tensor([[1, 20]])), "`input_ids` goes from 1 to 20, the vocabulary from 0 to 19: use"),
    (lambda m: m.encode(sentences(), torch.ones(2, 4)), r"`attention_mask` has the shape \(2, 4\), but `input_ids`"),
    (lambda m: m.predict(torch.zeros(2, 5), sentences()), r"`latents` is torch\.float32 of shape \(2, 5\).*es, 6\)"),
    (lambda m: m.predict(torch.zeros(2, 6).long(), sentences()), r"`latents` is torch\.int64"),
    (lambda m: m.predict(torch.zeros(3, 6), sentences()), "`token_ids` holds 2 sentences, but `latents` 3"),
    (lambda m: m.predict(torch.zeros(1, 6), torch.zeros(1, 14).long()), "this model reads at most 13"),
    (lambda m: m(sentences(), sentences(), noise=torch.zeros(2, 5)), r"`noise` has the shape \(2, 5\), the latents"),
    (lambda m: m.decode(torch.zeros(6)), r"`latents` is torch\.float32 of shape \(6,\)"),
    (decode(max_length=1), "`max_length` is 1: it must lie between 2 .* and 13"),
    (decode(max_length=14), "`max_length` is 14"),
    (decode(max_length=5, temperature=0.0), r"`temperature` is 0\.0: it must be > 0 \(do_sample=False"),
    (decode(max_length=5, temperature=math.inf), "`temperature` is inf"),
    (decode(max_length=5, top_k=-1), "`top_k` is -1: it must be 0"),
    (decode(max_length=5, top_p=0.0), r"`top_p` is 0\.0: it must lie in \(0, 1\]"),
    (decode(max_length=5, generator=[torch.Generator()]), "`generator` is a list of 1, but there are 2 latents"),
    (lambda m: filter_logits(torch.zeros(3), top_p=1.5), r"`top_p` is 1\.5"),
]


@pytest.mark.parametrize(("call", "message"), CALL_ERRORS)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())
