"""Samples of every trained flow, for a look."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from diffusers_ext.evaluation.image_quality import picture_grid
from diffusers_ext.models.unet_versatile import VersatileUNet
from diffusers_ext.pipelines.versatile.denoising import FlowContext, predict_flow_noise, versatile_scheduler
from diffusers_ext.pipelines.versatile.optimus_text import MAX_SENTENCE_LENGTH, read_sentences
from diffusers_ext.training.versatile.args import VersatileArgs, parts_of
from diffusers_ext.training.versatile.objective import FlowEncoders
from diffusers_ext.training_utils.checkpoints import replace_file


def draw_validation(
    unet: VersatileUNet,
    encoders: FlowEncoders,
    decoder: Any,
    batch: Mapping[str, Any],
    args: VersatileArgs,
    path: Path,
) -> None:
    """Samples of every trained flow for the samples of a batch: a picture grid, and sentences, a file each."""
    for flow in args.flows:
        context, nothing = encoders.context(flow, batch), encoders.nothing(flow)
        latents = sample_flow(
            unet, versatile_scheduler(), flow, context, nothing.expand_as(context),
            shape=encoders.latents(parts_of(flow)[1], batch, [torch.Generator() for _ in context]).shape[1:],
            num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
            generators=[torch.Generator().manual_seed(i) for i in range(len(context))],
        )  # fmt: skip
        if parts_of(flow)[1] == "image":
            images = encoders.vae.decode(latents / encoders.vae.config.scaling_factor).sample
            replace_file(Path(f"{path}-{flow}.png"), picture_grid(images.clamp(-1, 1), columns=8).save)
            continue
        longest = min(MAX_SENTENCE_LENGTH, encoders.optimus.longest_sentence)
        found = read_sentences(decoder, encoders.optimus.decode(latents, do_sample=False, max_length=longest))
        pairs = zip(batch["prompt"], found, strict=True)
        lines = [json.dumps({"caption": caption, "generated": sentence}) + "\n" for caption, sentence in pairs]
        text = "".join(lines)
        replace_file(Path(f"{path}-{flow}.jsonl"), lambda file, text=text: file.write_text(text, encoding="utf-8"))


@torch.no_grad()
def sample_flow(
    unet: VersatileUNet,
    scheduler: Any,
    flow: str,
    context: Tensor,
    nothing: Tensor,
    *,
    shape: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    generators: Sequence[Generator],
) -> Tensor:
    """Clean latents (b, *shape) of a flow from contexts (b, l, d), guided away from `nothing`, its like."""
    context_type, data_type = parts_of(flow)
    contexts = [FlowContext(context_type, context, nothing)]
    latents = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(context)
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    for t in scheduler.timesteps:
        noise = predict_flow_noise(unet, latents, t, contexts, data_type=data_type, guidance_scale=guidance_scale)
        latents = scheduler.step(noise, t, latents).prev_sample
    return latents
