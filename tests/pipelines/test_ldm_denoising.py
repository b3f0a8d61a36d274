"""The pieces of a denoising step."""

from functools import partial

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel, UNet2DModel

from diffusers_ext.guidance import both_branches, guide
from diffusers_ext.pipelines.ldm.denoising import (
    KnownRegion,
    LDMCondition,
    call_unet_in_tiles,
    keep_known_latents,
    predict_noise,
)
from diffusers_ext.pipelines.ldm.tiling import TileGrid
from diffusers_ext.schedulers.gaussian import ldm_scheduler, set_original_timesteps

BLOCKS = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8}


def test_scheduler_has_the_originals_numbers():
    scheduler = ldm_scheduler(0.00085, 0.012)
    exact = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, atol=0, rtol=2e-5)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]
    other = DPMSolverMultistepScheduler.from_config(scheduler.config)
    torch.testing.assert_close(other.alphas_cumprod, scheduler.alphas_cumprod)


def test_original_timesteps():
    scheduler = ldm_scheduler()
    for steps in (1, 4, 50, 250):
        set_original_timesteps(scheduler, steps)
        ours = scheduler.timesteps.tolist()
        scheduler.set_timesteps(steps)
        assert ours == scheduler.timesteps.tolist()
    set_original_timesteps(scheduler, 7)
    assert scheduler.timesteps.tolist() == [995, 853, 711, 569, 427, 285, 143, 1]
    set_original_timesteps(scheduler, 30)
    assert len(scheduler.timesteps) == 31


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (3, r"`num_inference_steps` is 3: with steps of 333 the original reaches timestep 1000, the last one is 999"),
        (501, r"with steps of 1 the original reaches timestep 1000"),
        (0, r"`num_inference_steps` is 0: it must lie between 1 and 1000"),
        (1001, r"`num_inference_steps` is 1001"),
    ],
)
def test_steps_that_the_original_cannot_run(steps, message):
    with pytest.raises(ValueError, match=message):
        set_original_timesteps(ldm_scheduler(), steps)


def test_how_many_step_counts_the_original_cannot_run():
    """599 of 1000, as counted on the original."""
    refused, scheduler = 0, ldm_scheduler()
    for steps in range(1, 1001):
        try:
            set_original_timesteps(scheduler, steps)
        except ValueError:
            refused += 1
    assert refused == 599


@torch.no_grad()
def test_guidance_mixes_the_two_predictions():
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        in_channels=4,
        out_channels=3,
        **BLOCKS,
    )
    latents, maps, timestep = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([5, 900])
    context, null = torch.randn(2, 3, 8), torch.randn(1, 3, 8)
    cond, uncond = (
        predict_noise(unet, latents, timestep, context=c, concat=[maps]) for c in (context, null.expand(2, 3, 8))
    )
    call = {"context": context, "null_context": null, "concat": [maps]}
    guided = predict_noise(unet, latents, timestep, **call, guidance_scale=3.0)
    torch.testing.assert_close(guided, uncond + 3 * (cond - uncond), atol=1e-5, rtol=1e-5)
    assert torch.equal(predict_noise(unet, latents, timestep, **call), cond)  # a scale of 1 is no guidance
    one = predict_noise(unet, latents, 5, **call, guidance_scale=3.0)
    torch.testing.assert_close(one[0], guided[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_concatenation_without_context():
    unet = UNet2DModel(
        in_channels=6,
        out_channels=3,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        attention_head_dim=8,
        **BLOCKS,
    )
    latents, condition = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    expected = unet(torch.cat([latents, condition], dim=1), 7).sample
    assert torch.equal(predict_noise(unet, latents, 7, concat=[condition]), expected)


def concat_unet(in_channels):
    return UNet2DModel(
        in_channels=in_channels,
        out_channels=3,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        attention_head_dim=8,
        **BLOCKS,
    ).eval()


@torch.no_grad()
def test_guidance_away_from_null_maps():
    unet, latents = concat_unet(6), torch.randn(2, 3, 8, 8)
    maps, null = torch.randn(2, 2, 3, 8, 8)
    cond, uncond = (predict_noise(unet, latents, 7, concat=[values]) for values in (maps, null))
    guided = predict_noise(unet, latents, 7, concat=[maps], null_concat=[null], guidance_scale=3.0)
    torch.testing.assert_close(guided, uncond + 3 * (cond - uncond), atol=1e-5, rtol=1e-5)
    assert torch.equal(predict_noise(unet, latents, 7, concat=[maps], null_concat=[null]), cond)


def predict_in_tiles(condition, unet, latents, grid):
    run = partial(call_unet_in_tiles, unet, grid, 7)
    return guide(*both_branches(run, *condition.branches(latents), 2.0), 2.0)


@torch.no_grad()
def test_a_condition_under_tiles_is_cut_like_the_latents():
    unet, latents = concat_unet(6), torch.randn(1, 3, 12, 8)
    maps, null = torch.randn(2, 1, 3, 12, 8)
    grid = TileGrid((12, 8), (8, 8), (4, 4))
    tiled = predict_in_tiles(LDMCondition(concat=maps, null_concat=null), unet, latents, grid)
    parts = [
        predict_noise(
            unet,
            latents[..., rows, :],
            7,
            concat=[maps[..., rows, :]],
            null_concat=[null[..., rows, :]],
            guidance_scale=2.0,
        )
        for rows in (slice(0, 8), slice(4, 12))
    ]
    torch.testing.assert_close(tiled, grid.blend(iter(parts)))
    torch.testing.assert_close(tiled[..., :4, :], parts[0][..., :4, :])


@torch.no_grad()
def test_each_tile_has_a_context_of_its_own():
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        in_channels=3,
        out_channels=3,
        **BLOCKS,
    ).eval()
    latents, contexts, null = torch.randn(1, 3, 12, 8), torch.randn(2, 1, 3, 8), torch.randn(1, 3, 8)
    grid = TileGrid((12, 8), (8, 8), (4, 4))
    tiled = predict_in_tiles(LDMCondition(list(contexts), null), unet, latents, grid)
    last = predict_noise(unet, latents[..., 4:, :], 7, context=contexts[1], null_context=null, guidance_scale=2.0)
    torch.testing.assert_close(tiled[..., 8:, :], last[..., 4:, :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["context", "tiles", "maps"])
def test_what_a_callback_returns_makes_another_condition(kind):
    context, null, maps = torch.randn(2, 3, 8), torch.randn(1, 3, 8), torch.randn(2, 3, 4, 4)
    condition = {
        "context": LDMCondition(context, null),
        "tiles": LDMCondition([context, context + 1], null),
        "maps": LDMCondition(concat=maps, null_concat=maps - 1),
    }[kind]
    embeds, null_embeds = condition.embeds, condition.null_embeds
    assert null_embeds.shape == embeds.shape
    other = condition.replace_embeds(2 * embeds, 3 * null_embeds)
    assert torch.equal(condition.embeds, embeds) and torch.equal(condition.null_embeds, null_embeds)
    assert torch.equal(other.embeds, 2 * embeds) and torch.equal(other.null_embeds, 3 * null_embeds)
    same = condition.replace_embeds(None, None)
    assert same.embeds is not None and torch.equal(same.embeds, embeds)


def test_after_the_run_the_known_region_is_clean():
    latents, known = torch.randn(2, 2, 3, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    result = KnownRegion(known[:1], mask).put_back(latents)
    assert torch.equal(result[..., :2], known[:1, ..., :2].expand(2, -1, -1, -1))
    assert torch.equal(result[..., 2:], latents[..., 2:])


def test_known_latents_are_put_back_at_the_steps_noise_level():
    scheduler = ldm_scheduler()
    latents, known, noise = torch.randn(3, 2, 4, 8, 8)
    mask = (torch.rand(2, 1, 8, 8) > 0.5).float()
    mixed = keep_known_latents(latents, known, mask, noise, scheduler, torch.tensor(500))
    abar = scheduler.alphas_cumprod[500]
    keep = mask.bool().expand_as(latents)
    torch.testing.assert_close(mixed[keep], (abar.sqrt() * known + (1 - abar).sqrt() * noise)[keep])
    assert torch.equal(mixed[~keep], latents[~keep])
