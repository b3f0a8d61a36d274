"""The rows that the flows are trained on, made ready for the networks in the loader's processes.

Pictures become what the image encoder takes and captions become tokens here, so that the process that feeds the GPU
runs networks only; a cache keeps what the frozen networks make of the pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Generator, Tensor
from torch.utils.data import default_collate

from diffusers_ext.data.captions import clean_caption
from diffusers_ext.data.crops import choose_text, prepare_image
from diffusers_ext.evaluation.reconstruction import warn_of_first_stage
from diffusers_ext.pipelines.tokenization import text_ids
from diffusers_ext.pipelines.versatile.conditions import prepare_pictures
from diffusers_ext.pipelines.versatile.optimus_text import sentence_ids, word_piece_window
from diffusers_ext.training.versatile.args import VersatileArgs, parts_of
from diffusers_ext.training.versatile.objective import FlowEncoders
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.cache import CachedRows, digest_network, digest_rows, digest_saved, open_cache
from diffusers_ext.training_utils.validation import first_rows

# What takes the place of a picture in a cached row: the posterior's parameters (2c, h, w), and the tokens (l, d).
CACHED = ("moments", "image_tokens")
SHOWN_SAMPLES = 8  # pictures that the image autoencoder is tried on


@dataclass
class FlowRows:
    """Rows to samples and samples to the batches of `FlowEncoders`: no more than the flows read.

    A plain object of module level without weights, so that loader processes can be started with it on any platform.
    """

    args: VersatileArgs
    data: DataArgs
    feature_extractor: Any
    tokenizer: Any
    encoder_tokenizer: Any
    text_reader: Any  # has the text encoder's `config`, which says what it reads
    sentence_window: int

    @classmethod
    def of(cls, encoders: FlowEncoders, args: VersatileArgs, data: DataArgs) -> "FlowRows":
        return cls(
            args=args,
            data=data,
            feature_extractor=encoders.feature_extractor,
            tokenizer=encoders.tokenizer,
            encoder_tokenizer=encoders.encoder_tokenizer,
            text_reader=SimpleNamespace(config=encoders.text_encoder.config),
            sentence_window=word_piece_window(encoders.encoder_tokenizer, encoders.optimus),
        )

    @property
    def captions(self) -> list[str]:
        """The columns that captions are read from."""
        return [self.data.caption_column, *([self.args.paraphrase_column] if self.args.paraphrase_column else [])]

    def read(self, row: dict[str, Any], generator: Generator) -> dict[str, Any]:
        """A picture, or what the cache holds of it, and its captions; draws the crop, the flip and the captions."""
        picture = {name: row[name] for name in CACHED if name in row}
        if not picture:
            picture = self.prepared(
                prepare_image(
                    row[self.data.image_column],
                    self.data.resolution,
                    generator=generator,
                    center_crop=self.data.center_crop,
                    random_flip=self.data.random_flip,
                )
            )
        prompt, paraphrases = choose_text(row[self.data.caption_column], generator), self.args.paraphrase_column
        source = choose_text(row[paraphrases], generator) if paraphrases else prompt
        return {**picture, "prompt": prompt, "sentence": self.cleaned(prompt), "source": self.cleaned(source)}

    def read_picture(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """A picture as a cache takes it."""
        return self.prepared(prepare_image(row[self.data.image_column], self.data.resolution, center_crop=True))

    def prepared(self, image: Tensor) -> dict[str, Tensor]:
        """Of a picture (3, h, w) in [-1, 1] what the image autoencoder and the image encoder take, where asked for.

        CLIP's is made as the pipeline does it: over an 8-bit picture.
        """
        contexts, made = types_of(self.args.flows)
        sample = {"image": image} if "image" in made else {}
        if "image" in contexts:
            side = image.shape[-1]
            sample["clip_pixels"] = prepare_pictures(self.feature_extractor, [(image + 1) / 2], side)[0]
        return sample

    def cleaned(self, caption: str) -> str:
        """The caption, or what is left of it after cleaning; where nothing is left, the caption."""
        return clean_caption(caption) or caption if self.args.clean_captions else caption

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch: captions become the tokens that the flows read. `prompt` stays, for the validation sheets."""
        batch = default_collate(samples)
        sentences, sources = batch.pop("sentence"), batch.pop("source")
        flows, (_, made) = self.args.flows, types_of(self.args.flows)
        if "text-to-image" in flows:
            batch["prompt_ids"] = text_ids(self.tokenizer, self.text_reader, batch["prompt"])
        if "text-to-text" in flows:
            batch["source_ids"] = text_ids(self.tokenizer, self.text_reader, sources)
        if "text" in made:
            batch["sentence_ids"] = sentence_ids(
                self.encoder_tokenizer, sentences, max_word_pieces=self.sentence_window
            )
        return batch


def check_autoencoder(encoders: FlowEncoders, rows: Any, reader: FlowRows, seed: int) -> None:
    """Warns where the image autoencoder does not show the pictures, unless it is new or no flow makes images."""
    args = reader.args
    vae, stage = args.pretrained_vae_name_or_path, args.pretrained_model_name_or_path
    if "image" not in types_of(args.flows)[1] or (vae is None and stage is None):
        return
    batches = first_rows(rows, SHOWN_SAMPLES, reader.read, seed, batch_size=1, device=encoders.vae.device)
    warn_of_first_stage(
        (batch["image"] for batch, _ in batches),
        lambda images: encoders.vae.decode(encoders.vae.encode(images).latent_dist.mode()).sample,
        name=vae or f"of {stage}",
        way_out="Train one on them with training/train_autoencoder.py --model kl, and then a new network on it, stage "
        "by stage: --pretrained_vae_name_or_path.",
    )


def types_of(flows: Sequence[str]) -> tuple[set[str], set[str]]:
    """The types of all contexts of the flows, and of all that they make."""
    contexts, made = zip(*map(parts_of, flows), strict=True)
    return set(contexts), set(made)


def cache_pictures(
    folder: str, encoders: FlowEncoders, rows: Any, reader: FlowRows, accelerator: Accelerator, train: TrainArgs
) -> CachedRows:
    """The rows with the cache in `folder` in place of their pictures; it is written if it is not there.

    It holds what the flows read: moments if any makes images, tokens if any has images as context.

    Raises:
        CacheError: it belongs to other data, other networks or other flows; the message tells which.
    """
    contexts, made = types_of(reader.args.flows)
    makers = {"moments": ("image", encoders.moments)} if "image" in made else {}
    if "image" in contexts:
        makers["image_tokens"] = ("clip_pixels", encoders.image_tokens)

    @torch.no_grad()
    def encode(samples: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        batch = {name: values.to(accelerator.device) for name, values in default_collate(samples).items()}
        made = {name: make(batch[source]) for name, (source, make) in makers.items()}
        return [{name: values[i] for name, values in made.items()} for i in range(len(samples))]

    key: dict[str, Any] = {
        "data": digest_rows(rows, (reader.data.image_column,)),
        "resolution": reader.data.resolution,
        "holds": list(makers),
    }
    if "moments" in makers:
        key["vae"] = digest_network(encoders.vae)
    if "image_tokens" in makers:
        key |= {
            "image_encoder": digest_network(encoders.image_encoder),
            "feature_extractor": digest_saved(encoders.feature_extractor),
        }
    cache = open_cache(
        folder, key, rows, read=reader.read_picture, encode=encode, accelerator=accelerator,
        batch_size=train.train_batch_size, num_workers=reader.data.dataloader_num_workers,
    )  # fmt: skip
    return CachedRows(cache, rows, reader.captions)
