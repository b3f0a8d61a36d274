"""Normalised guidance, as a function and as a guider of diffusers. Recorded numbers: tests/parity."""

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import rescale_noise_cfg

from diffusers_ext import NormalizedClassifierFreeGuidance, classifier_free_guidance, normalized_guidance

GENERATOR = torch.Generator().manual_seed(0)
COND = torch.randn(2, 3, 8, 8, generator=GENERATOR) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1) + 0.2
UNCOND = torch.randn(2, 3, 8, 8, generator=GENERATOR)


@pytest.mark.parametrize("per_channel", [False, True])
def test_statistics_are_the_conditional_ones(per_channel):
    axes = (2, 3) if per_channel else (1, 2, 3)
    mixed = normalized_guidance(COND, UNCOND, 6.0, per_channel=per_channel)
    torch.testing.assert_close(mixed.std(axes), COND.std(axes))
    torch.testing.assert_close(mixed.mean(axes), COND.mean(axes))
    assert (classifier_free_guidance(COND, UNCOND, 6.0).std(axes) > 2 * COND.std(axes)).all()


def test_blend_scale_of_one_and_scales_a_sample():
    plain, full = classifier_free_guidance(COND, UNCOND, 3.0), normalized_guidance(COND, UNCOND, 3.0)
    torch.testing.assert_close(
        normalized_guidance(COND, UNCOND, 3.0, guidance_rescale=0.25), 0.75 * plain + 0.25 * full
    )
    assert torch.equal(normalized_guidance(COND, UNCOND, 3.0, guidance_rescale=0.0), plain)
    torch.testing.assert_close(normalized_guidance(COND, UNCOND, 1.0), COND)
    for statistics in ("measured", "formula"):
        each = normalized_guidance(COND, UNCOND, torch.tensor([1.5, 4.0]), statistics=statistics)
        for index, scale in enumerate((1.5, 4.0)):
            one = normalized_guidance(COND[[index]], UNCOND[[index]], scale, statistics=statistics)
            torch.testing.assert_close(each[[index]], one)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_diffusers_rescale_is_the_same_but_for_the_mean(share):
    """arXiv 2305.08891 scales the guided prediction about zero, arXiv 2205.12952 about its mean."""
    centred, other = (one - one.mean((1, 2, 3), keepdim=True) for one in (COND, UNCOND))
    guided = classifier_free_guidance(centred, other, 4.0)
    theirs = rescale_noise_cfg(guided, centred, share)
    torch.testing.assert_close(normalized_guidance(centred, other, 4.0, guidance_rescale=share), theirs)
    guided = classifier_free_guidance(COND, UNCOND, 4.0)
    ours = normalized_guidance(COND, UNCOND, 4.0, guidance_rescale=share)
    shift = ours - rescale_noise_cfg(guided, COND, share)
    mean, std = COND.mean((1, 2, 3)), COND.std((1, 2, 3))
    expected = share * (mean - guided.mean((1, 2, 3)) * std / guided.std((1, 2, 3)))
    torch.testing.assert_close(shift, expected[:, None, None, None].expand_as(shift), atol=1e-5, rtol=1e-4)


def test_a_constant_prediction_and_half_precision_stay_finite():
    flat = torch.full_like(COND, 0.3)
    torch.testing.assert_close(normalized_guidance(flat, flat, 5.0), flat)
    mixed = normalized_guidance(COND.half(), UNCOND.half(), 5.0)
    assert mixed.dtype == torch.float16 and mixed.isfinite().all()


def test_rejects():
    with pytest.raises(ValueError, match="`guidance_rescale` is 1.5.*between 0"):
        normalized_guidance(COND, UNCOND, 2.0, guidance_rescale=1.5)
    with pytest.raises(ValueError, match="`statistics` is 'guess'.*'measured' or 'formula'"):
        normalized_guidance(COND, UNCOND, 2.0, statistics="guess")
    with pytest.raises(ValueError, match="same shape"):
        normalized_guidance(COND, UNCOND[:1], 2.0)


def run(guider, steps: int = 4) -> list[torch.Tensor]:
    """What a pipeline of diffusers does with a guider (pipelines/hunyuan_image)."""
    results = []
    for index in range(steps):
        guider.set_state(step=index, num_inference_steps=steps, timestep=torch.tensor(index))
        batches = guider.prepare_inputs({"prediction": (COND, UNCOND)})
        for batch in batches:
            batch.noise_pred = batch.prediction
        results.append(guider(batches).pred)
    return results


def test_guider_does_what_the_function_does():
    expected = normalized_guidance(COND, UNCOND, 4.0)
    assert all(torch.equal(found, expected) for found in run(NormalizedClassifierFreeGuidance(4.0)))
    original = NormalizedClassifierFreeGuidance(3.0, use_original_formulation=True)
    assert torch.equal(run(original)[0], expected)
    per_channel = NormalizedClassifierFreeGuidance(4.0, per_channel=True)
    assert torch.equal(run(per_channel)[0], normalized_guidance(COND, UNCOND, 4.0, per_channel=True))
    torch.testing.assert_close(
        run(NormalizedClassifierFreeGuidance(4.0, guidance_rescale=0.0))[0], run(ClassifierFreeGuidance(4.0))[0]
    )


def test_guider_is_off_where_diffusers_own_is():
    late = run(NormalizedClassifierFreeGuidance(4.0, start=0.5))
    assert torch.equal(late[0], COND) and not torch.equal(late[-1], COND)
    assert torch.equal(run(NormalizedClassifierFreeGuidance(4.0, enabled=False))[0], COND)
    assert torch.equal(run(NormalizedClassifierFreeGuidance(1.0))[0], COND)


def test_guider_saves_and_is_known_to_diffusers(tmp_path):
    guider = NormalizedClassifierFreeGuidance(2.5, guidance_rescale=0.7, per_channel=True)
    guider.save_pretrained(tmp_path)
    loaded = NormalizedClassifierFreeGuidance.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(guider.config)
    assert torch.equal(run(loaded)[0], run(guider)[0])
    assert diffusers.NormalizedClassifierFreeGuidance is NormalizedClassifierFreeGuidance
