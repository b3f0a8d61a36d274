"""What Versatile Diffusion's frozen networks make of the pictures, kept on disk: their latents and context tokens."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset
from versatile_flows import FlowEncoders, parts_of

from diffusers_ext.data.preprocessing import prepare_image
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.cache import digest_network, digest_rows, digest_saved, open_cache

# What takes the place of a picture in a sample: the posterior's parameters (2c, h, w), and the tokens (l, d).
CACHED = ("moments", "image_tokens")


class CachedPictures(Dataset):
    """Rows whose pictures are replaced by what a cache holds of them; the captions are read as before."""

    def __init__(self, cache: Dataset, rows: Any, captions: Sequence[str]):
        self.cache, self.captions = cache, rows.select_columns(list(dict.fromkeys(captions)))

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.captions[index], **self.cache[index]}


def read_picture(example: dict[str, Any], data: DataArgs) -> Tensor:
    return prepare_image(example[data.image_column], data.resolution, center_crop=True)


def cache_pictures(
    folder: str, encoders: FlowEncoders, rows: Any, captions: Sequence[str], accelerator: Accelerator,
    flows: Sequence[str], data: DataArgs, train: TrainArgs,
) -> CachedPictures:  # fmt: skip
    """The rows with the cache in `folder` in place of their pictures; it is written if it is not there.

    It holds what the flows read: moments if any makes images, tokens if any has images as context.

    Raises:
        CacheError: it belongs to other data, other networks or other flows; the message tells which.
    """
    contexts, made = ({parts_of(flow)[i] for flow in flows} for i in (0, 1))
    makers = {"moments": encoders.moments} if "image" in made else {}
    if "image" in contexts:
        makers["image_tokens"] = encoders.image_tokens

    @torch.no_grad()
    def encode(pictures: list[Tensor]) -> list[dict[str, Tensor]]:
        images = torch.stack(pictures).to(accelerator.device)
        made = {name: make(images) for name, make in makers.items()}
        return [{name: values[i] for name, values in made.items()} for i in range(len(images))]

    key: dict[str, Any] = {
        "data": digest_rows(rows, (data.image_column,)), "resolution": data.resolution, "holds": list(makers)
    }  # fmt: skip
    if "moments" in makers:
        key["vae"] = digest_network(encoders.vae)
    if "image_tokens" in makers:
        key |= {
            "image_encoder": digest_network(encoders.image_encoder),
            "feature_extractor": digest_saved(encoders.feature_extractor),
        }
    cache = open_cache(
        folder, key, rows, read=partial(read_picture, data=data), encode=encode, accelerator=accelerator,
        batch_size=train.train_batch_size, num_workers=data.dataloader_num_workers,
    )  # fmt: skip
    return CachedPictures(cache, rows, captions)
