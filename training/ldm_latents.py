"""The latents that train_ldm.py learns: how pictures become them, their scale, and a cache of them."""

import logging
from collections.abc import Callable

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from ldm_args import LDMArgs
from ldm_data import NamedRows, condition_columns
from torch import Generator, Tensor

from diffusers_ext.pipelines.ldm.base import LDMBasePipeline
from diffusers_ext.pipelines.ldm.first_stage import FirstStage
from diffusers_ext.training_utils import loop
from diffusers_ext.training_utils.args import DataArgs
from diffusers_ext.training_utils.cache import digest_network, digest_rows, open_cache
from diffusers_ext.training_utils.caching import CachedRows

logger = logging.getLogger(__name__)

SCALE_SAMPLES = 64  # pictures whose latents are measured


@torch.no_grad()
def encode_moments(vqvae: FirstStage, images: Tensor) -> Tensor:
    """What a first stage makes of pictures (b, 3, H, W): latents of a VQModel, else moments (b, 2c, h, w); float32."""
    with torch.autocast(images.device.type, enabled=False):
        encoded = vqvae.encode(images)
    return encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latents


def draw_latents(moments: Tensor, channels: int, generators: list[Generator]) -> Tensor:
    """Latents (b, c, h, w): a draw from the posterior where `moments` are more than latents."""
    if moments.shape[1] == channels:
        return moments
    return DiagonalGaussianDistribution(moments).sample(generators)  # type: ignore[arg-type]  # randn_tensor takes a list


@torch.no_grad()
def measure_std(pipe: LDMBasePipeline, rows: NamedRows, read: Callable, seed: int, device: torch.device) -> float:
    """Standard deviation of the first training pictures' latents, posterior samples; equal on every process."""
    found = []
    for start in range(0, min(SCALE_SAMPLES, len(rows)), 16):
        keys = range(start, min(start + 16, SCALE_SAMPLES, len(rows)))
        images = torch.stack([read(rows[i], loop.keyed_generator(seed, i))["image"] for i in keys]).to(device)
        draws = [loop.keyed_generator(seed, i, loop.LOSS_STREAM) for i in keys]
        found.append(draw_latents(encode_moments(pipe.vqvae, images), pipe.unet.config["out_channels"], draws))
    return float(torch.cat(found).cpu().double().std())


def set_scale(pipe: LDMBasePipeline, std: float, args: LDMArgs) -> None:
    """Takes over the measured scale if it is asked for; says so if the latents are far from unit variance."""
    if args.scale_by_std:
        pipe.register_to_config(latent_scale=1.0 / std)
    scaled = std * pipe.latent_scale
    logger.info("The latents have a standard deviation of %.3g after scaling by %.6g.", scaled, pipe.latent_scale)
    if not 0.5 <= scaled <= 2.0:
        logger.warning(
            "The scaled latents have a standard deviation of %.3g, but the noise levels are made for about 1: pass "
            "--scale_by_std, or --latent_scale %.4g.",
            scaled,
            1.0 / std,
        )


def cache_moments(
    pipe: LDMBasePipeline, rows: NamedRows, read: Callable, accelerator: Accelerator, args: LDMArgs, data: DataArgs,
    batch_size: int,
) -> CachedRows:  # fmt: skip
    """The rows with the cache in `--cache_dir` in place of their pictures; it is written if it is not there.

    Raises:
        CacheError: it belongs to other data or another first stage; the message tells which.
    """

    def encode(samples: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        images = torch.stack([sample["image"] for sample in samples]).to(accelerator.device)
        moments = encode_moments(pipe.vqvae, images)
        return [{"moments": one, "size": sample["size"]} for one, sample in zip(moments, samples, strict=True)]

    key = {
        "data": digest_rows(rows.dataset, (data.image_column,)),
        "resolution": data.resolution,
        "vqvae": digest_network(pipe.vqvae),
    }
    cache = open_cache(
        args.cache_dir or "", key, rows, read=read, encode=encode, accelerator=accelerator, batch_size=batch_size,
        num_workers=data.dataloader_num_workers,
    )  # fmt: skip
    return CachedRows(cache, rows, condition_columns(args, data))
