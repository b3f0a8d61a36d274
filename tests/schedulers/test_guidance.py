import pytest
import torch

from diffusers_ext.guidance import classifier_free_guidance


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.3, 0.5, 1.0, 5.0, 8.0])
def test_guidance_is_a_line_through_both_predictions(scale):
    cond, uncond = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mixed = classifier_free_guidance(cond, uncond, scale)
    torch.testing.assert_close(mixed, uncond + scale * (cond - uncond), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed, cond * scale + uncond * (1 - scale), atol=1e-5, rtol=1e-5)


def test_scale_one_and_zero_are_exact():
    cond, uncond = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(classifier_free_guidance(cond, uncond, 1.0), cond)
    assert torch.equal(classifier_free_guidance(cond, uncond, 0.0), uncond)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_scale_per_sample(dtype):
    cond, uncond = torch.randn(3, 5, 2, 2).to(dtype), torch.randn(3, 5, 2, 2).to(dtype)
    scales = torch.tensor([0.0, 1.0, 4.0])
    mixed = classifier_free_guidance(cond, uncond, scales)
    assert mixed.dtype == dtype
    for k, scale in enumerate(scales.tolist()):
        assert torch.equal(mixed[k], classifier_free_guidance(cond[k], uncond[k], scale))


def test_a_map_of_scales_broadcasts():
    cond, uncond = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    scales = torch.zeros(2, 1, 4, 4)
    scales[..., 2:] = 1.0
    mixed = classifier_free_guidance(cond, uncond, scales)
    assert torch.equal(mixed[..., :2], uncond[..., :2]) and torch.equal(mixed[..., 2:], cond[..., 2:])


def test_errors():
    with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) and \(1, 3\)"):
        classifier_free_guidance(torch.zeros(2, 3), torch.zeros(1, 3), 2.0)
    with pytest.raises(ValueError, match="`guidance_scale` holds 3 scales for a batch of 2"):
        classifier_free_guidance(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3))
