"""The conditioners of latent diffusion: shapes, definition, saving, what they refuse."""

import pytest
import torch
from torch.nn import functional as F

from diffusers_ext.models.encoders_ldm import (
    RESCALING_METHODS,
    LDMClassEmbedder,
    LDMLayoutEncoder,
    LDMSpatialRescaler,
)

LAYOUT = {"vocab_size": 50, "max_length": 12, "hidden_size": 16, "num_layers": 2, "attention_head_dim": 4}
INPUTS = {
    LDMClassEmbedder: ({"num_class_embeds": 11, "embed_dim": 6, "null_class": 10}, torch.tensor([0, 10])),
    LDMLayoutEncoder: (LAYOUT, torch.randint(0, 50, (2, 12))),
    LDMSpatialRescaler: ({"in_channels": 5}, torch.randint(0, 5, (2, 16, 8))),
}


@pytest.mark.parametrize("model_class", INPUTS, ids=lambda c: c.__name__)
def test_save_and_load(model_class, tmp_path):
    config, inputs = INPUTS[model_class]
    model = model_class(**config).eval()
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert dict(loaded.config).items() >= config.items()
    torch.testing.assert_close(loaded(inputs), model(inputs))


@pytest.mark.parametrize("model_class", INPUTS, ids=lambda c: c.__name__)
def test_half_precision(model_class):
    config, inputs = INPUTS[model_class]
    output = model_class(**config).to(torch.bfloat16)(inputs)
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def test_class_embedder_gives_one_token_a_class():
    embedder = LDMClassEmbedder(11, 6, null_class=10)
    tokens = embedder(torch.tensor([3, 10, 3]))
    assert tokens.shape == (3, 1, 6)
    assert torch.equal(tokens[0, 0], embedder.embedding.weight[3]) and torch.equal(tokens[0], tokens[2])


def test_layout_encoder_is_a_pre_norm_transformer_without_a_mask():
    """Against the definition, written out."""
    encoder = LDMLayoutEncoder(**LAYOUT).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(0, 50, (2, 9))

    x = encoder.token_embedding.weight[tokens] + encoder.position_embedding.weight[:9]
    for block in encoder.blocks:
        h = F.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias)
        q, k, v = (
            (h @ to.weight.T).view(2, 9, 8, 4).transpose(1, 2)
            for to in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        )
        attended = torch.softmax(q @ k.transpose(-1, -2) / 4**0.5, dim=-1) @ v
        x = x + block.attn1.to_out[0](attended.transpose(1, 2).reshape(2, 9, 32))
        h = F.layer_norm(x, (16,), block.norm3.weight, block.norm3.bias)
        up, down = block.ff.net[0].proj, block.ff.net[2]
        assert up.out_features == 64
        x = x + down(F.gelu(up(h)))
    expected = F.layer_norm(x, (16,), encoder.norm.weight, encoder.norm.bias)
    torch.testing.assert_close(encoder(tokens), expected, atol=1e-5, rtol=1e-5)
    assert encoder.null_token == 49


def test_an_untrained_layout_encoder_tells_tokens_apart():
    torch.manual_seed(0)
    encoder = LDMLayoutEncoder(**LAYOUT | {"hidden_size": 64}).eval()
    one, other = torch.full((1, 12), 49), torch.full((1, 12), 49)
    one[0, 0], other[0, 0] = 3, 7
    vectors = encoder(one)
    assert (vectors - encoder(other))[0, 0].std() > 0.5 * vectors.std()  # 0.13 from rows of std 0.02


def test_layout_encoder_is_trainable_with_gradient_checkpointing():
    encoder, tokens = LDMLayoutEncoder(**LAYOUT).train(), torch.randint(0, 50, (2, 12))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            encoder.enable_gradient_checkpointing()
        encoder.zero_grad()
        encoder(tokens).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(plain, checkpointed)


def test_layout_encoder_has_the_released_size():
    with torch.device("meta"):
        count = sum(p.numel() for p in LDMLayoutEncoder().parameters())
    head = 8192 * 513  # unused in the original, left out here
    assert count + head + 246.3e6 == pytest.approx(306e6, rel=5e-3)  # the paper counts U-Net and encoder


def test_rescaler_takes_labels_and_one_hot_maps_alike():
    rescaler = LDMSpatialRescaler(5, 3, num_stages=2)
    labels = torch.randint(0, 5, (2, 16, 24))
    one_hot = F.one_hot(labels, 5).permute(0, 3, 1, 2).float()
    assert torch.equal(rescaler(labels), rescaler(one_hot))
    assert rescaler(labels).shape == (2, 3, 4, 6)
    shares = LDMSpatialRescaler(5, None, num_stages=2)(labels)
    assert shares.shape == (2, 5, 4, 6)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 4, 6))  # halving twice keeps averages
    torch.testing.assert_close(F.conv2d(shares, rescaler.channel_mapper.weight), rescaler(labels))


@pytest.mark.parametrize("method", RESCALING_METHODS)
@torch.no_grad()
def test_rescaler_maps_before_it_resizes_to_the_same_effect(method):
    """Both are linear: the order of the paper, one-hot maps resized and then mapped, differs by rounding only."""
    rescaler = LDMSpatialRescaler(5, 3, method=method, bias=True)
    labels = torch.randint(0, 5, (2, 16, 24))
    maps = F.one_hot(labels, 5).permute(0, 3, 1, 2).float()
    for _ in range(2):
        maps = F.interpolate(maps, scale_factor=0.5, mode=method)
    expected = F.conv2d(maps, rescaler.channel_mapper.weight, rescaler.channel_mapper.bias)
    torch.testing.assert_close(rescaler(labels), expected, atol=1e-6, rtol=1e-6)
    assert rescaler.half()(labels).dtype == torch.float16


def test_rescaler_options():
    labels = torch.randint(0, 5, (1, 8, 8))
    assert LDMSpatialRescaler(5, 2, num_stages=0, bias=True)(labels).shape == (1, 2, 8, 8)
    assert LDMSpatialRescaler(5, 2, num_stages=1, multiplier=0.25, method="area")(labels).shape == (1, 2, 2, 2)
    assert LDMSpatialRescaler(5, 2).channel_mapper.bias is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LDMClassEmbedder(10, 4, null_class=10), r"`null_class` is 10.*rows 0 to 9"),
        (lambda: LDMClassEmbedder(10, 4)(torch.zeros(2)), r"`class_labels` is torch\.float32 of shape \(2,\)"),
        (lambda: LDMClassEmbedder(10, 4)(torch.zeros(2, 1).long()), r"shape \(2, 1\).*integers of shape \(batch,\)"),
        (lambda: LDMClassEmbedder(10, 4)(torch.tensor([3, 10])), r"`class_labels` goes from 3 to 10, the table"),
        (lambda: LDMLayoutEncoder(**LAYOUT)(torch.zeros(12).long()), r"`input_ids` is torch\.int64 of shape \(12,\)"),
        (lambda: LDMLayoutEncoder(**LAYOUT)(torch.zeros(1, 13).long()), r"13 tokens a layout.*at most 12.*fewer obj"),
        (lambda: LDMLayoutEncoder(**LAYOUT)(torch.tensor([[0, 50]])), r"`input_ids` goes from 0 to 50, the vocab"),
        (lambda: LDMSpatialRescaler(num_stages=-1), r"`num_stages` is -1"),
        (lambda: LDMSpatialRescaler(method="lanczos"), r"'lanczos'.*nearest, bilinear"),
        (lambda: LDMSpatialRescaler(5)(torch.full((1, 8, 8), 5)), r"labels from 5 to 5, this model knows 0 to 4"),
        (lambda: LDMSpatialRescaler(5)(torch.zeros(1, 4, 8, 8)), r"shape \(1, 4, 8, 8\).*maps \(batch, 5, height"),
        (lambda: LDMSpatialRescaler(5)(torch.zeros(1, 5, 8, 8).long()), r"`label_map` is torch\.int64"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
