"""The encoders of GLIDE and PITI: sizes of the releases, saving, what they refuse. Numbers: tests/parity."""

import pytest
import torch
from accelerate import init_empty_weights

from diffusers_ext import GlideTextEncoder, PITIEncoder

TEXT = {"vocab_size": 50, "max_length": 12, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}
PITI = {"in_channels": 1, "sample_size": 32, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}
TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
MAPS = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
CASES = {GlideTextEncoder: (TEXT, TOKENS), PITIEncoder: (PITI, MAPS)}


@pytest.mark.parametrize("channels, count", [(3, 29_286_400), (1, 29_283_264), (6, 29_291_104)])
def test_released_encoders_have_the_published_number_of_parameters(channels, count):
    with init_empty_weights():
        encoder = PITIEncoder(channels)
    assert sum(p.numel() for p in encoder.parameters()) == count


def test_released_text_tower_has_the_published_number_of_parameters():
    with init_empty_weights():
        encoder = GlideTextEncoder()
    # the whole base model without its U-Net (piti.md, sections 0 and 1)
    assert sum(p.numel() for p in encoder.parameters()) == 385_030_726 - 308_728_902


@pytest.mark.parametrize("model_class", CASES, ids=lambda c: c.__name__)
def test_save_and_load(model_class, tmp_path):
    config, inputs = CASES[model_class]
    model = model_class(**config).eval()
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert dict(loaded.config).items() >= config.items()
    assert torch.equal(loaded(inputs).last_hidden_state, model(inputs).last_hidden_state)


@pytest.mark.parametrize("model_class", CASES, ids=lambda c: c.__name__)
def test_half_precision_and_gradient_checkpointing(model_class):
    config, inputs = CASES[model_class]
    model = model_class(**config)
    model.enable_gradient_checkpointing()
    expected = model(inputs).pooler_output
    expected.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("padding"))
    model = model.to(torch.bfloat16)
    output = model(inputs.bfloat16() if inputs.is_floating_point() else inputs)
    assert output.pooler_output.dtype == torch.bfloat16 and output.last_hidden_state.isfinite().all()


@torch.no_grad()
def test_padding_hides_the_token_but_not_the_place():
    encoder = GlideTextEncoder(**TEXT).eval()
    mask = torch.arange(12)[None].expand(2, -1) < 5
    other = TOKENS.clone()
    other[:, 5:] = 7
    assert torch.equal(encoder(TOKENS, mask).last_hidden_state, encoder(other, mask.int()).last_hidden_state)
    empty = encoder(TOKENS, torch.zeros_like(mask)).last_hidden_state
    assert torch.equal(empty[0], empty[1]) and not torch.equal(empty[0, 0], empty[0, 1])


@torch.no_grad()
def test_tokens_of_a_map_are_in_the_order_of_rows():
    """Without a transformer, a token sees its own surroundings only."""
    encoder = PITIEncoder(1, 64, hidden_size=16, num_layers=1, num_attention_heads=2).eval()
    assert encoder(torch.ones(1, 1, 64, 64)).last_hidden_state.shape == (1, 16, 16)
    assert encoder.cnn(torch.ones(1, 1, 64, 64)).shape == (1, 16, 4, 4)


@pytest.mark.parametrize(
    "refused, message",
    [
        (lambda: GlideTextEncoder(**TEXT | {"num_attention_heads": 3}), "`num_attention_heads` is 3: .* divide"),
        (lambda: GlideTextEncoder(**TEXT)(TOKENS[:, :5]), r"`input_ids` is .* shape \(2, 5\).*\(batch, 12\)"),
        (lambda: GlideTextEncoder(**TEXT)(TOKENS.float()), r"`input_ids` is torch\.float32"),
        (lambda: GlideTextEncoder(**TEXT)(TOKENS, TOKENS[:1]), r"`attention_mask` has shape \(1, 12\)"),
        (lambda: PITIEncoder(**PITI | {"sample_size": 40}), "`sample_size` is 40: .* multiple of 16"),
        (lambda: PITIEncoder(**PITI | {"sample_size": 16}), "`sample_size` is 16: .* at least 32"),
        (lambda: PITIEncoder(**PITI | {"hidden_size": 24}), "`hidden_size` is 24: .* multiple of 16"),
        (lambda: PITIEncoder(**PITI | {"num_attention_heads": 3}), "`num_attention_heads` is 3: .* divide"),
        (lambda: PITIEncoder(**PITI)(MAPS[..., :16]), r"`condition` is .* \(2, 1, 32, 16\).*\(batch, 1, 32, 32\)"),
        (lambda: PITIEncoder(**PITI)(MAPS.long()), r"`condition` is torch\.int64"),
    ],
)
def test_bad_input_is_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()
