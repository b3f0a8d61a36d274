"""Tiny GLIDE and PITI: real networks of a few thousand weights, 8x8 pixels, then 16x16."""

from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from pipelines.tiny_paella import quiet, tiny_tokenizer

from diffusers_ext import GlidePipeline, GlideTextEncoder, PITIEncoder, PITIPipeline

WIDTH, WINDOW, SIDE = 16, 10, 32  # of the tokens, texts and conditions
LABELS = 4
PALETTE = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]


def _seeded(build: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        for parameter in model.parameters():
            if not parameter.any():  # layers that start at zero would hide what is behind them
                torch.nn.init.normal_(parameter, std=0.1)
        return model


def tiny_decoder(
    in_channels: int = 3, sample_size: int | None = 8, seed: int = 1, out_channels: int = 6
) -> UNet2DConditionModel:
    return _seeded(
        lambda: UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            cross_attention_dim=WIDTH,
            attention_head_dim=16,
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=WIDTH,
        ),
        seed,
    )


def tiny_scheduler(**config: Any) -> Any:
    return diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", steps_offset=1, **config
    )


def tiny_text_tower(seed: int = 2) -> GlideTextEncoder:
    size = len(tiny_tokenizer())
    return _seeded(lambda: GlideTextEncoder(size, WINDOW, WIDTH, num_layers=1, num_attention_heads=2), seed)


def tiny_piti_encoder(channels: int = 3, seed: int = 3) -> PITIEncoder:
    return _seeded(lambda: PITIEncoder(channels, SIDE, WIDTH, num_layers=1, num_attention_heads=2), seed)


def tiny_glide(inpaint: bool = False, upscale: bool = True) -> GlidePipeline:
    more = 4 if inpaint else 0
    return quiet(
        GlidePipeline(
            text_encoder=tiny_text_tower(),
            tokenizer=tiny_tokenizer(),
            unet=tiny_decoder(3 + more),
            scheduler=tiny_scheduler(),
            upscale_text_encoder=tiny_text_tower(12) if upscale else None,
            upscale_unet=tiny_decoder(6 + more, 16, 11) if upscale else None,
            upscale_scheduler=tiny_scheduler() if upscale else None,
        )
    )


def tiny_piti(condition_type: str = "label_map", upscale: bool = True) -> PITIPipeline:
    channels = {"label_map": 3, "sketch": 1, "geometry": 6}[condition_type]
    return quiet(
        PITIPipeline(
            encoder=tiny_piti_encoder(channels),
            unet=tiny_decoder(),
            scheduler=tiny_scheduler(),
            upscale_encoder=tiny_piti_encoder(channels, 13) if upscale else None,
            upscale_unet=tiny_decoder(6, 16, 11) if upscale else None,
            upscale_scheduler=tiny_scheduler() if upscale else None,
            condition_type=condition_type,
            label_palette=PALETTE if condition_type == "label_map" else None,
        )
    )


def tiny_condition(condition_type: str = "label_map") -> dict[str, Any]:
    """A condition of each type, one of 32x32 pixels."""
    generator = torch.Generator().manual_seed(5)
    if condition_type == "label_map":
        return {"label_map": torch.randint(0, LABELS, (SIDE, SIDE), generator=generator)}
    if condition_type == "sketch":
        lines = torch.zeros(SIDE, SIDE)
        lines[4, 3:20], lines[4:25, 9] = 1, 1
        return {"sketch": lines}
    normals = torch.nn.functional.normalize(torch.randn(3, SIDE, SIDE, generator=generator), dim=0)
    return {"normals": normals, "depth": torch.rand(SIDE, SIDE, generator=generator) * 9 + 1}
