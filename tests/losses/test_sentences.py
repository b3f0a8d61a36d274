"""The text autoencoder's terms, by hand."""

import math

import pytest
import torch

from diffusers_ext.losses.sentences import free_bits, gaussian_kl, sentence_nll


def test_a_sentence_costs_the_sum_of_its_tokens_without_padding():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    logits = torch.stack([probabilities, probabilities]).log()
    ids = torch.tensor([[0, 1, 2], [0, 2, 1]])  # 1 stands for padding as well
    assert sentence_nll(logits, ids, pad_token_id=9).tolist() == pytest.approx([-math.log(0.25 * 0.1), -math.log(0.2)])
    assert sentence_nll(logits, ids, pad_token_id=1).tolist() == pytest.approx([-math.log(0.1), -math.log(0.25)])
    assert sentence_nll(logits.bfloat16(), ids, pad_token_id=9).dtype == torch.float32


def test_divergence_by_hand_and_against_torch():
    mean, logvar = torch.randn(3, 4), torch.randn(3, 4)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_kl(mean, logvar), expected)
    assert gaussian_kl(torch.tensor([[2.0]]), torch.tensor([[0.0]])).item() == 2.0


def test_free_dimensions_cost_nothing_and_are_not_pulled():
    divergence = torch.tensor([[0.1, 0.5, 0.7], [0.6, 0.2, 2.0]], requires_grad=True)
    cost = free_bits(divergence, 0.5)
    assert cost.tolist() == pytest.approx([0.7, 2.6])
    cost.sum().backward()
    assert divergence.grad.tolist() == [[0, 0, 1], [1, 0, 1]]
    assert free_bits(divergence, 0.0).tolist() == pytest.approx(divergence.sum(1).tolist())


@pytest.mark.parametrize(("logits", "ids"), [((2, 3, 5), (2, 4)), ((2, 3, 5), (2, 3, 1)), ((3, 5), (3,))])
def test_shapes_that_do_not_fit(logits, ids):
    with pytest.raises(ValueError, match=r"`logits` must have shape \(b, l, v\) and `token_ids` \(b, l\), got"):
        sentence_nll(torch.zeros(logits), torch.zeros(ids).long(), pad_token_id=0)
