from collections.abc import Callable

import pytest
import torch

from diffusers_ext.guidance import both_branches, classifier_free_guidance, guide


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


# --- both branches

WIDE = torch.ones(2, 6)


def recording(calls: list) -> Callable[..., torch.Tensor]:
    """A network whose answer depends on the sample and on every condition, and that notes its batch sizes."""

    def run(sample, *conditions):
        calls.append(len(sample))
        flat = [c for group in conditions for c in (group if isinstance(group, list) else [group]) if c is not None]
        return sample + sum(c.flatten(1).mean(1).reshape(-1, *[1] * (sample.ndim - 1)) for c in flat)

    return run


@pytest.mark.parametrize(
    ("cond", "uncond"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4, 5)), (torch.ones(2, 3), torch.zeros(2, 4, 5))),
        ((torch.ones(2, 3), [torch.ones(2, 4), WIDE]), (torch.ones(2, 3), [torch.zeros(2, 4), WIDE])),
        ((torch.ones(2, 3), None), (torch.zeros(2, 3), None)),
    ],
)
def test_branches_of_one_shape_run_in_one_doubled_batch(cond, uncond):
    calls: list[int] = []
    yes, no = both_branches(recording(calls), cond, uncond, 3.0)
    assert calls == [4]
    torch.testing.assert_close(yes, recording([])(*cond))
    torch.testing.assert_close(no, recording([])(*uncond))


def test_branches_of_other_lengths_run_one_after_the_other():
    calls: list[int] = []
    cond, uncond = (torch.ones(2, 3), torch.ones(2, 4)), (torch.ones(2, 3), torch.zeros(2, 7))
    yes, no = both_branches(recording(calls), cond, uncond, 3.0)
    assert calls == [2, 2] and not torch.equal(yes, no)


@pytest.mark.parametrize(("scale", "runs"), [(1, "cond"), (1.0, "cond"), (0.0, "uncond")])
def test_the_branch_that_cancels_does_not_run(scale, runs):
    calls: list[int] = []
    cond, uncond = (torch.ones(2, 3), torch.ones(2, 4)), (torch.ones(2, 3), torch.zeros(2, 4))
    yes, no = both_branches(recording(calls), cond, uncond, scale)
    assert calls == [2] and (no is None) == (runs == "cond") and (yes is None) == (runs == "uncond")
    assert torch.equal(guide(yes, no, scale), recording([])(*(cond if runs == "cond" else uncond)))


def test_a_tensor_of_scales_needs_both_branches():
    cond, uncond = (torch.ones(2, 3), torch.ones(2, 4)), (torch.ones(2, 3), torch.zeros(2, 4))
    yes, no = both_branches(recording([]), cond, uncond, torch.tensor([1.0, 1.0]))
    assert yes is not None and no is not None


def test_without_a_null_condition_nothing_is_guided():
    yes, no = both_branches(recording([]), (torch.ones(2, 3), torch.ones(2, 4)), None, 5.0)
    assert no is None and torch.equal(guide(yes, no, 5.0), yes)


def test_only_the_first_channels_are_mixed():
    cond, uncond = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)
    guided = guide(cond, uncond, 4.0, channels=3)
    torch.testing.assert_close(guided[:, :3], uncond[:, :3] + 4 * (cond[:, :3] - uncond[:, :3]))
    assert torch.equal(guided[:, 3:], cond[:, 3:])


def test_the_mix_can_be_another_one():
    cond, uncond = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(guide(cond, uncond, 2.0, mix=lambda c, u, s: c - s * u), cond - 2.0 * uncond)
