"""The data of train_ldm.py: the rows, the spread of their latents, and a cache of them."""

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Generator, Tensor

from diffusers_ext.data.annotations import ROW, NamedRows
from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.evaluation.reconstruction import warn_of_first_stage
from diffusers_ext.pipelines.ldm.base import LDMBasePipeline
from diffusers_ext.pipelines.ldm.first_stage import decode_first_stage, encode_first_stage
from diffusers_ext.training.ldm.objective import encode_moments
from diffusers_ext.training.ldm.tasks.base import Task
from diffusers_ext.training_utils.cache import CachedRows, digest_network, digest_rows, open_cache
from diffusers_ext.training_utils.objective import draw_posterior
from diffusers_ext.training_utils.validation import first_rows
from diffusers_ext.training_utils.weights import warn_of_size

SCALE_SAMPLES = 64  # pictures whose latents are measured
SHOWN_SAMPLES = 8  # pictures that the first stage is tried on


def load_rows(task: Task) -> tuple[NamedRows, NamedRows]:
    """Training and validation set of pictures with what the task needs; rows also tell what an error calls them."""
    sets = task.prepare(load_pictures(task.data, columns=task.columns()))
    train_set, validation_set = (NamedRows(dataset, task.data.image_column) for dataset in sets)
    return train_set, validation_set


def read_picture(row: dict[str, Any], generator: Generator | None = None, *, task: Task) -> dict[str, Tensor]:
    """The picture of `task.sample` alone, with its draws, and the (width, height) that it had in its file."""
    picture = row[task.data.image_column]
    try:
        image = task.crop(picture.size, generator or Generator()).image(picture, task.data.resolution, task.resampling)
    except ValueError as error:
        raise ValueError(f"{row[ROW]}: {error}") from error
    return {"image": image, "size": torch.tensor(picture.size)}


@torch.no_grad()
def measure_std(pipe: LDMBasePipeline, rows: NamedRows, task: Task, seed: int, device: torch.device) -> float:
    """Standard deviation of the first training pictures' latents, posterior samples; equal on every process."""
    found, read = [], partial(read_picture, task=task)
    for batch, generators in first_rows(rows, SCALE_SAMPLES, read, seed, batch_size=16, device=device):
        moments = encode_moments(pipe.vqvae, batch["image"])
        has_posterior = moments.shape[1] != pipe.unet.config["out_channels"]
        found.append(draw_posterior(moments, generators) if has_posterior else moments)
    return float(torch.cat(found).cpu().double().std())


def check_first_stage(pipe: LDMBasePipeline, rows: NamedRows, task: Task, seed: int, device: torch.device) -> None:
    """Warns where the first stage does not show the pictures, or the pipeline draws another size than they have."""
    args = task.args
    read = partial(read_picture, task=task)
    batches = first_rows(rows, SHOWN_SAMPLES, read, seed, batch_size=1, device=device)
    place = args.pretrained_vqvae_name_or_path
    if args.pretrained_model_name_or_path:
        place = f"of {args.pretrained_model_name_or_path}"
        warn_of_size(pipe, args.pretrained_model_name_or_path, task.data.resolution)
    warn_of_first_stage(
        (batch["image"] for batch, _ in batches),
        lambda images: decode_first_stage(pipe.vqvae, encode_first_stage(pipe.vqvae, images)),
        name=str(place),
        way_out="Train one on them with training/train_autoencoder.py --model kl (or vq), and then a new network on "
        "it: --pretrained_vqvae_name_or_path.",
    )


def cache_moments(
    pipe: LDMBasePipeline, rows: NamedRows, task: Task, accelerator: Accelerator, batch_size: int
) -> CachedRows:
    """The rows with the cache in `--cache_dir` in place of their pictures; it is written if it is not there.

    Raises:
        CacheError: it belongs to other data or another first stage; the message tells which.
    """
    data = task.data

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
        task.args.cache_dir or "", key, rows, read=partial(read_picture, task=task), encode=encode,
        accelerator=accelerator, batch_size=batch_size, num_workers=data.dataloader_num_workers,
    )  # fmt: skip
    return CachedRows(cache, rows, task.columns())
