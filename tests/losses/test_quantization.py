"""Bottleneck losses against hand-computed values, identities and laws."""

import pytest
import torch

from diffusers_ext.losses.quantization import (
    codebook_perplexity,
    gumbel_quantize,
    kmeans_codebook,
    vector_quantize,
)


def test_vector_quantize_by_hand():
    latents = torch.tensor([[[[0.2]], [[0.9]]]], requires_grad=True)  # one position, (0.2, 0.9)
    codebook = torch.tensor([[0.0, 1.0], [5.0, 5.0]], requires_grad=True)
    codes, loss = vector_quantize(latents, codebook, torch.zeros(1, 1, 1, dtype=torch.long), beta=0.5)
    assert codes.flatten().tolist() == pytest.approx([0.0, 1.0])
    assert loss.item() == pytest.approx(1.5 * (0.04 + 0.01) / 2)
    (codes.sum() * 3).backward(retain_graph=True)
    assert latents.grad.flatten().tolist() == [3.0, 3.0] and codebook.grad is None  # straight through
    latents.grad = None
    loss.backward()
    torch.testing.assert_close(codebook.grad[0], torch.tensor([-0.2, 0.1]))  # the full codebook term
    torch.testing.assert_close(latents.grad.flatten(), 0.5 * torch.tensor([0.2, -0.1]))  # beta times commitment
    assert codebook.grad[1].tolist() == [0.0, 0.0]


def test_gumbel_codes_are_hard_in_value_and_soft_in_gradient():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 3, 3, requires_grad=True)
    codebook = torch.randn(5, 4)
    codes, divergence = gumbel_quantize(logits, codebook, torch.rand(2, 5, 3, 3), temperature=0.5)
    distances = torch.cdist(codes.permute(0, 2, 3, 1).reshape(-1, 4), codebook)
    assert distances.min(1).values.max() < 1e-5
    codes.square().sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().max() > 0
    assert divergence.item() > 0
    _, uniform = gumbel_quantize(torch.zeros(1, 5, 1, 1), codebook, torch.rand(1, 5, 1, 1), temperature=1.0)
    assert uniform.item() == pytest.approx(0.0, abs=1e-6)


def test_gumbel_codes_are_not_rounded_under_autocast():
    logits, codebook, uniforms = torch.randn(2, 5, 3, 3), torch.randn(5, 4), torch.rand(2, 5, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        codes, _ = gumbel_quantize(logits, codebook, uniforms, temperature=0.5)
    torch.testing.assert_close(codes, gumbel_quantize(logits, codebook, uniforms, temperature=0.5)[0])


def test_gumbel_codes_follow_the_softmax_and_survive_extreme_draws():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 200, 200)
    codes, _ = gumbel_quantize(logits, torch.eye(3), torch.rand(1, 3, 200, 200), temperature=1.0)
    share = codes.mean((0, 2, 3))
    expected = torch.softmax(torch.tensor([1.0, 0.0, -1.0]), 0)
    assert (share - expected).abs().max() < 4 * (0.25 / 40_000) ** 0.5
    edges = torch.tensor([0.0, 1.0 - 2**-24, 0.5]).view(1, 3, 1, 1)
    codes, divergence = gumbel_quantize(logits[..., :1, :1], torch.eye(3), edges, temperature=0.1)
    assert codes.isfinite().all() and divergence.isfinite()


def test_kmeans_finds_separate_clusters_and_refuses_too_few_latents():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    latents = (centres[:, None] + 0.1 * torch.randn(3, 50, 2)).flatten(0, 1)
    codebook = kmeans_codebook(latents, 3, seed=0)
    assert torch.cdist(centres, codebook).min(1).values.max() < 0.1
    assert torch.equal(codebook, kmeans_codebook(latents, 3, seed=0)) and codebook.dtype == latents.dtype
    with pytest.raises(ValueError, match="codebook of 200 codes cannot start from 150 latents"):
        kmeans_codebook(latents, 200, seed=0)


def test_codebook_perplexity_counts_codes():
    assert codebook_perplexity(torch.tensor([3.0, 3.0, 3.0, 3.0])).item() == pytest.approx(4.0)
    assert codebook_perplexity(torch.tensor([7.0, 0.0, 0.0])).item() == pytest.approx(1.0)
    assert codebook_perplexity(torch.zeros(3)).item() == pytest.approx(1.0)  # no counts yet: no division by zero
