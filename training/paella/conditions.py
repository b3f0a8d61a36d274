"""What Paella is conditioned on, one class a kind: CLIP's vector of a caption or of the image, a class, a label map.

A sample passes three methods. `read` (which asks the kind for what is `given`) and `collate` work in the loader's
processes, to which the object is sent, so it holds no networks: they leave to the GPU what only the GPU can do.
`tensor` makes of a batch what the U-Net is given, with the frozen `Encoders`. A cache keeps what these make of a
sample: a training from it reads with `recall` in place of `read`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from diffusers_ext.data.crops import Crop, choose_text, draw_square
from diffusers_ext.models.token_codec import downsample_factor, encode_indices
from diffusers_ext.pipelines.clip_vectors import prepare_pictures
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.pipelines.tokenization import text_window, tokenize_texts
from diffusers_ext.training.paella.args import PaellaArgs
from diffusers_ext.training_utils.args import DataArgs
from diffusers_ext.training_utils.cache import digest_network, digest_saved

Sample = dict[str, Any]


@dataclass
class Encoders:
    """The frozen networks. They run in float32 whatever the training's precision, as when the pipeline samples.

    Args:
        batch_size: How many vectors a GPU computes at a time. A CPU computes them one by one, so that a cache holds
            what a training without it computes.
    """

    vqvae: Any
    text_encoder: Any
    image_encoder: Any
    batch_size: int

    @property
    def device(self) -> torch.device:
        return self.vqvae.device

    def tokens(self, images: Tensor) -> Tensor:
        """Tokens (b, h, w) of images (b, 3, H, W) in [-1, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return encode_indices(self.vqvae, images)

    @torch.no_grad()
    def vectors(self, tower: Any, inputs: Tensor) -> Tensor:
        """Vectors (b, d) that a tower of CLIP makes of token ids or of pixels."""
        with torch.autocast(inputs.device.type, enabled=False):
            size = 1 if inputs.device.type == "cpu" else self.batch_size
            return in_batches(lambda rows: tower(rows)[0], inputs, size)


def in_batches(function: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int) -> Tensor:
    """`function(inputs)`, computed on exactly `batch_size` rows at a time (the last ones are repeated to fill up).

    The last bits of a result depend on the sizes of a call, for which a library picks its kernels, and on a CPU even
    on a sample's place among the others (the rest of a vectorised loop rounds otherwise). One row at a time gives a
    sample the same bits in any company; on a GPU, where this is slow, calls of one size come close to it.
    """
    results = []
    for rows in inputs.split(batch_size):
        filled = torch.cat([rows, rows[-1:].expand(batch_size - len(rows), *rows.shape[1:])])
        results.append(function(filled)[: len(rows)])
    return torch.cat(results)


def freeze(pipe: PaellaPipeline, device: torch.device, batch_size: int) -> Encoders:
    """The networks of the pipeline that are not trained, on the device. (The text tower may be thawed afterwards.)"""
    for network in filter(None, (pipe.vqvae, pipe.text_encoder, pipe.image_encoder)):
        network.requires_grad_(False).eval().to(device)
    return Encoders(pipe.vqvae, pipe.text_encoder, pipe.image_encoder, batch_size)


@dataclass
class Condition:
    """What all kinds share: the image, and its tokens.

    Args:
        data: How images are cropped, and their column.
        column: That of the condition.
    """

    data: DataArgs
    column: str

    def read(self, row: Sample, generator: Generator) -> Sample:
        """A sample: the cropped `image` (3, h, w) in [-1, 1], and what belongs to the condition."""
        data, picture = self.data, row[self.data.image_column]
        crop = draw_square(
            picture.size, data.resolution, generator, center_crop=data.center_crop, random_flip=data.random_flip
        )
        image = crop.image(picture, data.resolution)
        return {"image": image, **self.given(row, image, crop, generator)}

    def given(self, row: Sample, image: Tensor, crop: Crop, generator: Generator) -> Sample:
        """What belongs to the condition of a row whose cropped image is `image`."""
        raise NotImplementedError

    def read_all(self, row: Sample) -> Sample:
        """What a cache is made of: nothing is chosen at random."""
        return self.read(row, Generator())

    def recall(self, kept: Sample, generator: Generator) -> Sample:
        """A sample from the cache, with the draws of `read`."""
        torch.rand(3, generator=generator)  # the place of the crop and the flip, which come first
        return dict(kept)

    def collate(self, samples: list[Sample]) -> Sample:
        return default_collate(samples)

    def tensor(self, batch: Sample, encoders: Encoders) -> Tensor:
        """What the networks that are trained are given for a batch.

        Vectors (b, d), or shares (b, d, h, w) on the token grid, for the U-Net; or token ids (b, l), where the text
        tower before it is trained.
        """
        raise NotImplementedError

    def store(self, encoders: Encoders, samples: list[Sample]) -> dict[str, Any]:
        """What the cache keeps of samples from `read_all`, each a sequence over the samples."""
        return {"tokens": encoders.tokens(torch.stack([sample["image"] for sample in samples]).to(encoders.device))}

    def digests(self, encoders: Encoders) -> dict[str, str]:
        """What the cached condition depends on, besides data and options."""
        return {}

    def when_sampling(self) -> "Condition":
        """The kind that gives a pipeline's `prompt_embeds`."""
        return self


@dataclass
class Captions(Condition):
    """The vector of a caption from CLIP's frozen text tower."""

    tokenizer: Any
    window: int
    pad_to_window = True  # as the pipeline does it

    def given(self, row: Sample, image: Tensor, crop: Crop, generator: Generator) -> Sample:
        return {"text": choose_text(row[self.column], generator)}

    def read_all(self, row: Sample) -> Sample:
        captions = row[self.column]
        return {**super().read_all(row), "text": [captions] if isinstance(captions, str) else list(captions)}

    def recall(self, kept: Sample, generator: Generator) -> Sample:
        sample = super().recall(kept, generator)
        vectors = sample["vectors"]  # (n, d), one for each caption
        return {**sample, "vectors": vectors[int(torch.randint(len(vectors), (), generator=generator))]}

    def collate(self, samples: list[Sample]) -> Sample:
        """With the captions' token ids (b, l) in place of the captions, if there are any."""
        batch = default_collate(samples)
        if "text" in batch:
            texts = batch.pop("text")
            batch["ids"], _ = tokenize_texts(self.tokenizer, texts, self.window, pad_to_window=self.pad_to_window)
        return batch

    def tensor(self, batch: Sample, encoders: Encoders) -> Tensor:
        return batch["vectors"] if "vectors" in batch else encoders.vectors(encoders.text_encoder, batch["ids"])

    def store(self, encoders: Encoders, samples: list[Sample]) -> dict[str, Any]:
        ids, _ = tokenize_texts(self.tokenizer, [text for sample in samples for text in sample["text"]], self.window)
        vectors = encoders.vectors(encoders.text_encoder, ids.to(encoders.device))
        return {**super().store(encoders, samples), "vectors": vectors.split([len(s["text"]) for s in samples])}

    def digests(self, encoders: Encoders) -> dict[str, str]:
        return {"text_encoder": digest_network(encoders.text_encoder), "tokenizer": digest_saved(self.tokenizer)}


@dataclass
class TrainedCaptions(Captions):
    """The token ids of a caption: the text tower is trained with the U-Net, so that no vector of it can be kept."""

    pad_to_window = False  # the tower looks back only, so what stands behind a caption changes nothing

    def recall(self, kept: Sample, generator: Generator) -> Sample:
        kept = Condition.recall(self, kept, generator)
        return {**kept, "text": choose_text(json.loads(bytes(kept["text"].tolist())), generator)}

    def tensor(self, batch: Sample, encoders: Encoders) -> Tensor:
        return batch["ids"]

    def store(self, encoders: Encoders, samples: list[Sample]) -> dict[str, Any]:
        texts = [torch.tensor(list(json.dumps(sample["text"]).encode())) for sample in samples]
        return {**Condition.store(self, encoders, samples), "text": texts}

    def digests(self, encoders: Encoders) -> dict[str, str]:
        return {}

    def when_sampling(self) -> Condition:
        return Captions(self.data, self.column, self.tokenizer, self.window)


@dataclass
class Images(Condition):
    """The image's own vector from CLIP's frozen image tower, prepared as `PaellaImageVariationPipeline` does."""

    feature_extractor: Any

    def given(self, row: Sample, image: Tensor, crop: Crop, generator: Generator) -> Sample:
        return {"pixels": prepare_pictures(self.feature_extractor, [(image + 1) / 2])[0]}

    def recall(self, kept: Sample, generator: Generator) -> Sample:
        return {**super().recall(kept, generator), "vectors": kept["vectors"][0]}

    def tensor(self, batch: Sample, encoders: Encoders) -> Tensor:
        return batch["vectors"] if "vectors" in batch else encoders.vectors(encoders.image_encoder, batch["pixels"])

    def store(self, encoders: Encoders, samples: list[Sample]) -> dict[str, Any]:
        pixels = torch.stack([sample["pixels"] for sample in samples]).to(encoders.device)
        vectors = encoders.vectors(encoders.image_encoder, pixels).unsqueeze(1)  # (b, 1, d)
        return {**super().store(encoders, samples), "vectors": vectors}

    def digests(self, encoders: Encoders) -> dict[str, str]:
        return {
            "image_encoder": digest_network(encoders.image_encoder),
            "feature_extractor": digest_saved(self.feature_extractor),
        }


@dataclass
class Classes(Condition):
    """A class as a one-hot vector."""

    num_labels: int

    def given(self, row: Sample, image: Tensor, crop: Crop, generator: Generator) -> Sample:
        return {"label": self.known(torch.tensor(int(row[self.column])))}

    def recall(self, kept: Sample, generator: Generator) -> Sample:
        self.known(kept["label"])  # a cache serves networks of any size
        return super().recall(kept, generator)

    def known(self, labels: Tensor) -> Tensor:
        """The labels, all of which the network knows.

        Raises:
            ValueError: it does not.
        """
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_labels:
            raise ValueError(
                f"The data holds labels {low} to {high}, but --num_labels={self.num_labels} allows 0 to "
                f"{self.num_labels - 1}."
            )
        return labels

    def tensor(self, batch: Sample, encoders: Encoders) -> Tensor:
        return F.one_hot(batch["label"], self.num_labels).float()

    def store(self, encoders: Encoders, samples: list[Sample]) -> dict[str, Any]:
        return {**super().store(encoders, samples), "label": [sample["label"] for sample in samples]}


@dataclass
class LabelMaps(Classes):
    """A label map as the share that each label has of the pixels of a token."""

    token_side: int

    def given(self, row: Sample, image: Tensor, crop: Crop, generator: Generator) -> Sample:
        return {"map": self.known(crop.labels(row[self.column], self.data.resolution))}

    def recall(self, kept: Sample, generator: Generator) -> Sample:
        self.known(kept["map"])
        return Condition.recall(self, kept, generator)

    def tensor(self, batch: Sample, encoders: Encoders) -> Tensor:
        one_hot = F.one_hot(batch["map"], self.num_labels).float().permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(one_hot, self.token_side)

    def store(self, encoders: Encoders, samples: list[Sample]) -> dict[str, Any]:
        return {**Condition.store(self, encoders, samples), "map": [sample["map"] for sample in samples]}


def make_condition(args: PaellaArgs, data: DataArgs, pipe: PaellaPipeline, column: str) -> Condition:
    """The one place that asks for `--condition` and `--train_text_encoder`."""
    if args.condition == "text":
        kind = TrainedCaptions if args.train_text_encoder else Captions
        return kind(data, column, pipe.tokenizer, text_window(pipe.tokenizer, pipe.text_encoder))
    if args.condition == "image":
        return Images(data, column, pipe.feature_extractor)
    assert args.num_labels is not None
    if args.condition == "class":
        return Classes(data, column, args.num_labels)
    return LabelMaps(data, column, args.num_labels, data.resolution // downsample_factor(pipe.vqvae))
