import math

import pytest
import torch
import torch.nn.functional as F

from diffusers_ext.losses.discrete import loss_weight, token_cross_entropy, weighted_mean


def test_cross_entropy_by_hand():
    # one position, three classes with p = (1/2, 1/4, 1/4), target 0
    logits = torch.tensor([0.5, 0.25, 0.25]).log().reshape(1, 3, 1, 1) + 7  # a constant changes nothing
    tokens = torch.zeros(1, 1, 1, dtype=torch.long)
    plain = token_cross_entropy(logits, tokens, label_smoothing=0.0)
    assert plain.item() == pytest.approx(math.log(2), abs=1e-6)
    # smoothing e: (1 - e) * -log p_0 + e * mean(-log p)
    mean = (math.log(2) + 2 * math.log(4)) / 3
    smooth = token_cross_entropy(logits, tokens)
    assert smooth.item() == pytest.approx(0.9 * math.log(2) + 0.1 * mean, abs=1e-6)


def test_reductions_agree_and_cover_all_positions():
    logits, tokens = torch.randn(3, 7, 4, 5), torch.randint(7, (3, 4, 5))
    losses = token_cross_entropy(logits, tokens, reduction="none")
    assert losses.shape == (3, 4, 5)
    torch.testing.assert_close(losses, F.cross_entropy(logits, tokens, label_smoothing=0.1, reduction="none"))
    torch.testing.assert_close(token_cross_entropy(logits, tokens), losses.mean())
    torch.testing.assert_close(token_cross_entropy(logits, tokens, reduction="sum"), losses.sum())
    torch.testing.assert_close(token_cross_entropy(logits, tokens, reduction="sample"), losses.mean(dim=(1, 2)))


def test_cross_entropy_is_float32_and_has_gradients():
    logits = torch.randn(2, 7, 2, 2).bfloat16().requires_grad_()
    loss = token_cross_entropy(logits, torch.randint(7, (2, 2, 2)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_loss_weight_by_hand():
    mask = torch.tensor([[[1, 0]], [[1, 0]], [[1, 0]]])
    weight = loss_weight(mask, torch.tensor([0.0, 0.5, 1.0]))
    # 1 where replaced, 0.3 + 0.7 t elsewhere
    torch.testing.assert_close(weight, torch.tensor([[[1.0, 0.3]], [[1.0, 0.65]], [[1.0, 1.0]]]))
    torch.testing.assert_close(loss_weight(mask.bool(), torch.tensor([0.0, 0.5, 1.0])), weight)
    assert torch.equal(loss_weight(mask, torch.zeros(3), min_weight=1.0), torch.ones(3, 1, 2))
    assert torch.equal(loss_weight(mask, torch.zeros(3), min_weight=0.0), mask.float())


def test_weighted_mean_counts_each_image_once():
    losses = torch.tensor([[[1.0, 3.0]], [[10.0, 20.0]]])
    weight = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    assert weighted_mean(losses, weight).item() == pytest.approx((1 + 15) / 2)
    torch.testing.assert_close(weighted_mean(losses, torch.full_like(losses, 0.3)), losses.mean())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, t: token_cross_entropy(x, t, reduction="avg"), "`reduction` must be one of .* got 'avg'"),
        (
            lambda x, t: token_cross_entropy(x, t[:1]),
            r"`logits` must have shape .* got \(2, 5, 3, 3\) and \(1, 3, 3\)",
        ),
        (
            lambda x, t: token_cross_entropy(x, t, label_smoothing=1.5),
            r"`label_smoothing` must lie in \[0, 1\], got 1.5",
        ),
        (lambda x, t: loss_weight(t > 0, torch.rand(3)), "`timesteps` must hold one level per image"),
        (
            lambda x, t: loss_weight(t > 0, torch.rand(2), min_weight=-0.1),
            r"`min_weight` must lie in \[0, 1\], got -0.1",
        ),
        (lambda x, t: weighted_mean(t.float(), t[:1].float()), "`losses` and `weight` differ in shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 5, 3, 3), torch.randint(5, (2, 3, 3)))
