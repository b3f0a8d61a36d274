"""Trains (or fine-tunes) Paella v1: a convolutional network that predicts all tokens of a picture from noised ones.

    accelerate launch training/train_paella.py training/presets/paella-scenes-64.yaml

Paper: arXiv 2211.07292 (first version), section 3; code dome272/Paella@b1f88ef. Label-smoothed cross-entropy at all
positions; time r uniform on [0, 1); the noise comes from the scheduler that samples. The condition is dropped to the
zero vector per sample (the original drops it once per step for the whole local batch).
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import VQModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from diffusers_ext.data.annotations import check_labels
from diffusers_ext.data.labels import count_map_labels, find_classes
from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.data.preprocessing import choose_text, prepare_image, prepare_map
from diffusers_ext.data.scenes import CLASS_NAMES
from diffusers_ext.evaluation.image_quality import picture_grid
from diffusers_ext.losses.discrete import token_cross_entropy
from diffusers_ext.models.token_codec import Tokenizer, downsample_factor, encode_indices
from diffusers_ext.models.unet_paella import PaellaUNet
from diffusers_ext.models.vq_gumbel import GumbelVQModel
from diffusers_ext.models.vq_paella import PaellaVQModel
from diffusers_ext.pipelines.checks import check_guidance_scale
from diffusers_ext.pipelines.clip_vectors import image_vectors, text_window
from diffusers_ext.pipelines.listed_options import record_option
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.pipelines.paella.pipeline_paella_image_variation import PaellaImageVariationPipeline
from diffusers_ext.pipelines.tokenization import tokenize_texts
from diffusers_ext.schedulers.scheduling_discrete_renoising import DiscreteRenoisingScheduler
from diffusers_ext.training_utils import loop
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.cache import (
    SampleCache,
    digest_network,
    digest_rows,
    digest_saved,
    in_batches,
    open_cache,
)
from diffusers_ext.training_utils.checkpoints import replace_file
from diffusers_ext.training_utils.conditions import keep_condition
from diffusers_ext.training_utils.results import publish_result
from diffusers_ext.training_utils.weights import load_whole, load_whole_pipeline

logger = logging.getLogger(__name__)


@dataclass
class PaellaArgs:
    """The token predictor, what it is conditioned on, and the frozen networks around it."""

    # On a resume, see TrainArgs.
    APPLIED: ClassVar[tuple[str, ...]] = ("text_encoder_lr", "guidance_scale", "typical_mass")
    BOOKKEEPING: ClassVar[tuple[str, ...]] = ("num_inference_steps", "validation_prompts", "cache_dir")

    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Paella pipeline to fine-tune; its networks replace those named below."}
    )
    pretrained_vqvae_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer (VQ autoencoder)."})
    pretrained_clip_name_or_path: str | None = field(default=None, metadata={"help": "CLIP, for text and image."})
    condition: Literal["text", "image", "class", "semantic"] = field(
        default="text", metadata={"help": "CLIP text vector, CLIP image vector, one-hot class, or one-hot label map."}
    )
    num_labels: int | None = field(
        default=None, metadata={"help": "Classes, for --condition class and semantic; counted in the data when unset."}
    )
    semantic_column: str = field(default="semantic", metadata={"help": "Column with the label map (integer picture)."})
    train_text_encoder: bool = field(
        default=False,
        metadata={"help": "Train CLIP's text tower as well; the paper keeps it frozen."},
    )
    text_encoder_lr: float | None = field(
        default=None, metadata={"help": "The text tower's; learning_rate when unset."}
    )
    cond_dropout_prob: float = field(default=0.1, metadata={"help": "Samples trained with the zero vector."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [320, 640, 1280], metadata={"help": "Width of each level, finest first."}
    )
    down_layers_per_block: list[int] = field(
        default_factory=lambda: [4, 8, 16], metadata={"help": "Residual blocks of each level on the way down."}
    )
    up_layers_per_block: list[int] = field(
        default_factory=lambda: [16, 8, 4],
        metadata={"help": "Residual blocks of each level on the way up, deepest first."},
    )
    time_embed_dim: int = field(default=64, metadata={"help": "Width of the sinusoidal embedding of the noise level."})
    kernel_size: int = field(default=3, metadata={"help": "Side of the depthwise kernels."})
    layer_scale_init: float = field(default=1e-6, metadata={"help": "First value of the residual branches' scales."})
    label_smoothing: float = field(default=0.1, metadata={"help": "Of the cross-entropy."})
    rank: int | None = field(
        default=None, metadata={"help": "Train LoRA matrices of this rank instead of all weights."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for each picture's tokens and condition: computed once, then trained from. Excludes "
            "augmentation; refused with other data or encoders."
        },
    )
    guidance_scale: float = field(default=5.0, metadata={"help": "For the validation pictures."})
    typical_mass: float = field(default=0.2, metadata={"help": "Saved as the scheduler's default."})
    num_inference_steps: int = field(default=12, metadata={"help": "For the validation pictures."})
    validation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts of the validation pictures; captions of the data when unset."}
    )

    def __post_init__(self):
        if not 0 <= self.cond_dropout_prob <= 1:
            raise ValueError(f"--cond_dropout_prob must lie in [0, 1], got {self.cond_dropout_prob}.")
        for name in ("rank", "num_inference_steps", "num_labels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be > 0, got {getattr(self, name)}.")
        check_guidance_scale(self.guidance_scale)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label_smoothing must lie in [0, 1), got {self.label_smoothing}.")
        if self.validation_prompts and self.condition != "text":
            raise ValueError(f"--validation_prompts go with --condition text, got --condition {self.condition}.")
        if self.train_text_encoder and (self.condition != "text" or self.rank):
            raise ValueError("--train_text_encoder goes with --condition text and without --rank.")


def parse_args(argv: list[str] | None = None) -> tuple[PaellaArgs, DataArgs, TrainArgs]:
    args, data, train = parse((PaellaArgs, DataArgs, TrainArgs), argv)
    if args.cache_dir and (data.random_flip or not data.center_crop):
        raise ValueError(
            "--cache_dir keeps one set of tokens a picture, which excludes augmentation: pass --center_crop and leave "
            "out --random_flip, or leave out --cache_dir."
        )
    return args, data, train


def build_unet(args: PaellaArgs, *, num_vq_embeddings: int = 8192, condition_dim: int = 1024) -> PaellaUNet:
    """A new token predictor; the defaults are the paper's f8 tokenizer and CLIP ViT-g-14 vectors."""
    return PaellaUNet(
        num_vq_embeddings=num_vq_embeddings,
        block_out_channels=tuple(args.block_out_channels),
        down_layers_per_block=tuple(args.down_layers_per_block),
        up_layers_per_block=tuple(args.up_layers_per_block),
        condition_dim=condition_dim,
        time_embed_dim=args.time_embed_dim,
        kernel_size=args.kernel_size,
        layer_scale_init=args.layer_scale_init,
    )


CLIP_COMPONENTS = {
    "tokenizer": AutoTokenizer,
    "text_encoder": CLIPTextModelWithProjection,
    "image_encoder": CLIPVisionModelWithProjection,
    "feature_extractor": CLIPImageProcessor,
}


def load_clip(name_or_path: str) -> dict[str, Any]:
    """The pipeline components of a CLIP: from a folder or Hub id of a CLIP model, or from the folder of a pipeline."""
    is_pipeline = (Path(name_or_path) / "model_index.json").is_file()
    return {
        name: load_whole(kind, Path(name_or_path, name) if is_pipeline else name_or_path)
        for name, kind in CLIP_COMPONENTS.items()
    }


def build_pipeline(args: PaellaArgs, resolution: int) -> PaellaPipeline:
    """The pipeline that is trained: the pretrained one, or a new network around a tokenizer and a CLIP.

    Raises:
        ValueError: an option that names a part is missing, or the pretrained pipeline does not take `--condition`.
    """
    if args.pretrained_model_name_or_path:
        pipe = load_whole_pipeline(PaellaPipeline, args.pretrained_model_name_or_path)
        needed = {"text": pipe.text_encoder, "image": pipe.image_encoder}
        width = pipe.unet.config.condition_dim
        if args.condition in needed and needed[args.condition] is None:
            raise ValueError(
                f"{args.pretrained_model_name_or_path!r} has no {args.condition}_encoder, which --condition "
                f"{args.condition} needs."
            )
        if args.condition not in needed and args.num_labels is None:
            args.num_labels = width
        if args.condition not in needed and args.num_labels != width:
            raise ValueError(
                f"{args.pretrained_model_name_or_path!r} takes conditions of width {width}, but "
                f"--num_labels={args.num_labels}."
            )
        return pipe
    if args.pretrained_vqvae_name_or_path is None:
        raise ValueError("--pretrained_vqvae_name_or_path is needed: train one with training/train_autoencoder.py.")
    vqvae = load_tokenizer(args.pretrained_vqvae_name_or_path)
    components = dict.fromkeys(CLIP_COMPONENTS)
    condition_dim = args.num_labels
    if args.condition in ("text", "image"):
        clip = args.pretrained_clip_name_or_path
        if clip is None:
            raise ValueError(
                f"--condition {args.condition} needs --pretrained_clip_name_or_path: train one with "
                "training/train_clip.py, or name one on the Hub."
            )
        components = load_clip(clip)
        condition_dim = components["text_encoder"].config.projection_dim
    codes, side = vqvae.config.num_vq_embeddings, resolution // downsample_factor(vqvae)
    unet = build_unet(args, num_vq_embeddings=codes, condition_dim=condition_dim)
    unet.register_to_config(sample_size=side)
    return PaellaPipeline(
        vqvae=vqvae,
        unet=unet,
        scheduler=DiscreteRenoisingScheduler(num_vec_classes=codes, typical_mass=args.typical_mass),
        default_sample_size=side,
        default_guidance_scale=args.guidance_scale,
        **components,
    )


def load_tokenizer(folder: str) -> Tokenizer:
    """The first stage in `folder` (or on the Hub), of whichever class was saved there."""
    kinds = {kind.__name__: kind for kind in (VQModel, GumbelVQModel, PaellaVQModel)}
    name = VQModel.load_config(folder)["_class_name"]
    if name not in kinds:
        raise ValueError(
            f"--pretrained_vqvae_name_or_path={folder} holds a {name}, which has no codes. Known are "
            f"{', '.join(kinds)}: train one with training/train_autoencoder.py."
        )
    return load_whole(kinds[name], folder)


def condition_column(args: PaellaArgs, data: DataArgs) -> str:
    """The column of the data set that the condition is read from."""
    columns = {"text": data.caption_column, "class": data.label_column, "semantic": args.semantic_column}
    return columns.get(args.condition, data.image_column)


def count_labels(sets: tuple[Any, Any], args: PaellaArgs, data: DataArgs) -> int | None:
    """`--num_labels`, or where it is unset what the data tell; `None` where a pipeline to fine-tune tells."""
    if args.num_labels is not None or args.pretrained_model_name_or_path:
        return args.num_labels
    if args.condition == "class":
        return find_classes(sets, data)[0]
    return count_map_labels(sets, args.semantic_column, data) if args.condition == "semantic" else None


def read_sample(
    example: dict, generator: torch.Generator, args: PaellaArgs, data: DataArgs
) -> dict[str, Tensor | str]:
    """Picture and raw condition of one sample, cropped alike.

    At module level and without the networks, so that loader processes can be started with it on every platform.
    """
    options = {"center_crop": data.center_crop, "random_flip": data.random_flip}
    state = generator.get_state()
    sample = {"image": prepare_image(example[data.image_column], data.resolution, generator=generator, **options)}
    if args.condition == "text":
        sample["text"] = choose_text(example[data.caption_column], generator)
    elif args.condition == "class":
        sample["label"] = torch.tensor(int(example[data.label_column]))
    elif args.condition == "semantic":
        generator.set_state(state)  # the same crop and flip as the picture
        sample["map"] = prepare_map(example[args.semantic_column], data.resolution, generator=generator, **options)
    return sample


def class_names(dataset: Any, args: PaellaArgs, data: DataArgs) -> list[str] | None:
    """Names of the classes 0, 1, ... where the data know them, and as many as there are."""
    if args.condition != "class":
        return None
    if data.dataset_name == "scenes":
        names = list(CLASS_NAMES)
    else:
        names = getattr(dataset.features[data.label_column], "names", None)  # of a ClassLabel
    return names if names is not None and len(names) == args.num_labels else None


def read_whole(example: dict, args: PaellaArgs, data: DataArgs) -> dict[str, Any]:
    """What a cache is made of: as `read_sample` without augmentation, but with all captions of the sample."""
    sample: dict[str, Any] = read_sample(example, torch.Generator(), args, data)
    if args.condition == "text":
        captions = example[data.caption_column]
        sample["text"] = [captions] if isinstance(captions, str) else list(captions)
    return sample


def read_cached(example: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor | str]:
    """One sample from the cache, with the draws of `read_sample`."""
    torch.rand(3, generator=generator)  # the place of the crop and the flip, which come first
    sample: dict[str, Tensor | str] = dict(example)
    if "text" in example:
        sample["text"] = choose_text(json.loads(bytes(example["text"].tolist())), generator)
    if "vectors" in example:
        vectors = example["vectors"]  # (n, d), one for each caption
        sample["vectors"] = vectors[int(torch.randint(len(vectors), (), generator=generator))]
    return sample


class Conditioner:
    """From a sample's picture and raw condition to what the network receives; the encoders are frozen.

    They run in float32 whatever the training's precision, as when the pipeline samples. Vectors are computed one by
    one on a CPU, and in batches of one size on a GPU, so that the cache holds what a training without it computes.
    """

    def __init__(self, pipe: PaellaPipeline, args: PaellaArgs, resolution: int, batch_size: int | None = None):
        self.pipe, self.args = pipe, args
        self.batch_size = batch_size  # vectors that a GPU computes at a time
        self.token_side = resolution // downsample_factor(pipe.vqvae)

    def __call__(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Tokens (b, h, w) and condition of a batch, or the captions' ids where the text tower is trained."""
        tokens = batch["tokens"] if "tokens" in batch else self.tokens(batch["image"])
        if self.args.train_text_encoder:
            return tokens, self.token_ids(batch["text"])
        return tokens, batch["vectors"] if "vectors" in batch else self.embed(batch)

    def tokens(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return encode_indices(self.pipe.vqvae, images)

    def embed(self, batch: dict) -> Tensor:
        """The condition (b, d), or (b, d, h, w) on the token grid for label maps."""
        if self.args.condition == "text":
            return self.text_vectors(batch["text"])
        if self.args.condition == "image":
            return self._vectors(self.image_vectors, batch["image"])
        labels = batch["label"] if self.args.condition == "class" else batch["map"]
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.args.num_labels:
            raise ValueError(
                f"The data holds labels {low} to {high}, but --num_labels={self.args.num_labels} allows 0 to "
                f"{self.args.num_labels - 1}."
            )
        one_hot = F.one_hot(labels, self.args.num_labels).float()
        if self.args.condition == "class":
            return one_hot
        return F.adaptive_avg_pool2d(one_hot.permute(0, 3, 1, 2), self.token_side)  # share of each label per token

    def text_vectors(self, texts: list[str]) -> Tensor:
        """The captions' vectors (b, d), padded to the window as the pipeline does it."""
        ids = self.token_ids(texts, pad_to_window=True)
        return self._vectors(lambda ids: self.pipe.text_encoder(ids).text_embeds, ids)

    def image_vectors(self, images: Tensor) -> Tensor:
        """The pictures' vectors (b, d), prepared as `PaellaImageVariationPipeline` does it."""
        pipe = self.pipe
        return image_vectors(pipe.feature_extractor, pipe.image_encoder, list((images + 1) / 2), images.device)

    def token_ids(self, texts: list[str], *, pad_to_window: bool = False) -> Tensor:
        """The captions as the text tower reads them (b, l)."""
        window = text_window(self.pipe.tokenizer, self.pipe.text_encoder)
        ids, _ = tokenize_texts(self.pipe.tokenizer, texts, window, pad_to_window=pad_to_window)
        return ids.to(self.pipe.text_encoder.device)

    def cached(self, samples: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """What the cache keeps of samples from `read_whole`: all but the picture, encoded as far as it is frozen."""
        images = torch.stack([sample["image"] for sample in samples]).to(self.pipe.vqvae.device)
        kept: dict[str, Any] = {"tokens": self.tokens(images)}
        if self.args.condition == "image":
            kept["vectors"] = self.embed({"image": images}).unsqueeze(1)  # (b, 1, d)
        elif self.args.condition != "text":
            name = "label" if self.args.condition == "class" else "map"
            kept[name] = [sample[name] for sample in samples]
        elif self.args.train_text_encoder:
            kept["text"] = [torch.tensor(list(json.dumps(sample["text"]).encode())) for sample in samples]
        else:
            vectors = self.text_vectors([caption for sample in samples for caption in sample["text"]])
            kept["vectors"] = vectors.split([len(sample["text"]) for sample in samples])
        return [dict(zip(kept, values, strict=True)) for values in zip(*kept.values(), strict=True)]

    @torch.no_grad()
    def _vectors(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return in_batches(function, inputs, 1 if inputs.device.type == "cpu" else self.batch_size or len(inputs))


def cache_samples(conditioner: Conditioner, dataset: Any, accelerator: Any, data: DataArgs) -> SampleCache:
    """The cache in `--cache_dir`, written if it is not there.

    Raises:
        CacheError: it belongs to other data, encoders or options; the message tells which.
    """
    args, pipe = conditioner.args, conditioner.pipe
    column = condition_column(args, data)
    key = {
        "data": digest_rows(dataset, (data.image_column, column)),
        "resolution": data.resolution,
        "vqvae": digest_network(pipe.vqvae),
        "condition": args.condition,
        "column": column,
        "train_text_encoder": args.train_text_encoder,
    }
    if args.condition == "text" and not args.train_text_encoder:
        key |= {"text_encoder": digest_network(pipe.text_encoder), "tokenizer": digest_saved(pipe.tokenizer)}
    elif args.condition == "image":
        key |= {
            "image_encoder": digest_network(pipe.image_encoder),
            "feature_extractor": digest_saved(pipe.feature_extractor),
        }
    return open_cache(
        args.cache_dir, key, dataset, read=partial(read_whole, args=args, data=data), encode=conditioner.cached,
        accelerator=accelerator, batch_size=conditioner.batch_size, ragged=("vectors", "text"),
        num_workers=data.dataloader_num_workers,
    )  # fmt: skip


class Predictor(nn.Module):
    """What is trained: the token predictor, and with `--train_text_encoder` the tower before it."""

    def __init__(self, unet: PaellaUNet, text_encoder: CLIPTextModelWithProjection | None):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, tokens: Tensor, r: Tensor, condition: Tensor, keep: Tensor) -> Tensor:
        """Logits (b, v, h, w) from noised tokens, times, condition (or captions' token ids) and kept samples (b,)."""
        if self.text_encoder is not None:
            condition = self.text_encoder(condition).text_embeds
        condition = condition * keep.to(condition).view(-1, *[1] * (condition.ndim - 1))
        return self.unet(tokens, r, condition, return_dict=False)[0]


def token_losses(
    model: nn.Module,
    tokens: Tensor,
    condition: Tensor,
    scheduler: DiscreteRenoisingScheduler,
    generators: list[torch.Generator],
    args: PaellaArgs,
) -> dict[str, Tensor]:
    """One training step's losses. Draws per sample, in this order: drop, time, then those of `scheduler.add_noise`."""
    keep = keep_condition(generators, args.cond_dropout_prob)
    r = torch.stack([torch.rand((), generator=g) for g in generators]).to(tokens.device)
    noised = scheduler.add_noise(tokens, None, r, generator=generators)
    logits = model(noised, r, condition, keep.to(tokens.device)).float()  # (b, v, h, w)
    loss = token_cross_entropy(logits, tokens, label_smoothing=args.label_smoothing)
    return {"loss": loss, "accuracy": (logits.argmax(1) == tokens).float().mean()}


CONDITIONS = {
    "text": "captions", "image": "their CLIP vectors", "class": "class labels", "semantic": "label maps",
}  # fmt: skip


def usage(args: PaellaArgs, pipe: PaellaPipeline, name: str) -> str:
    """Python lines for the card: load the result from `name` and draw under its condition."""
    if args.condition == "image":
        return PaellaImageVariationPipeline.usage(name)
    if args.condition == "text":
        return PaellaPipeline.usage(name, prompt=args.validation_prompts[0] if args.validation_prompts else None)
    lines = PaellaPipeline.usage(name).rstrip().splitlines()[:-1]  # as they are, without the drawing
    if args.condition == "class":
        lines.append("image = pipe(class_labels=0).images[0]")
    else:
        side, width = pipe.config["default_sample_size"], pipe.unet.config["condition_dim"]
        lines += [
            f"labels = torch.zeros(1, {side}, {side}, dtype=torch.long)  # one label a token",
            f"maps = torch.nn.functional.one_hot(labels, {width}).permute(0, 3, 1, 2).float()",
            "image = pipe(prompt_embeds=maps).images[0]",
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = loop.start(train)
    train_set, validation_set = load_pictures(data, columns=(condition_column(args, data),))
    args.num_labels = count_labels((train_set, validation_set), args, data)
    pipe = build_pipeline(args, data.resolution).to(torch.float32)  # weights to train, whatever the files hold
    pipe.set_progress_bar_config(disable=True)
    if args.condition == "class" and data.dataset_name != "scenes":
        for rows in (train_set, validation_set):
            check_labels(rows, data.label_column, data.image_column, args.num_labels or 0)
    unet, scheduler = pipe.unet, pipe.scheduler
    frozen = [pipe.vqvae, pipe.text_encoder, pipe.image_encoder]
    for network in filter(None, frozen):
        network.requires_grad_(False).eval().to(accelerator.device)
    if args.rank:
        unet.requires_grad_(False)
        targets = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)]
        unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets))
    predictor = Predictor(unet, pipe.text_encoder.requires_grad_(True) if args.train_text_encoder else None)
    groups = [{"params": [p for p in unet.parameters() if p.requires_grad]}]
    if args.train_text_encoder:
        groups.append(
            {"params": list(pipe.text_encoder.parameters()), "lr": args.text_encoder_lr or train.learning_rate}
        )
    if train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    num_trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    logger.info("%d pictures, %d parameters", len(train_set), num_trained)
    conditioner = Conditioner(pipe, args, data.resolution, train.train_batch_size)
    transform = partial(read_sample, args=args, data=data)
    if (names := class_names(train_set, args, data)) is not None:
        pipe.register_to_config(id2label=record_option("id2label", names))
    if args.cache_dir:
        train_set = cache_samples(conditioner, train_set, accelerator, data)

    def compute_loss(model, batch, generators):
        tokens, condition = conditioner(batch)
        return token_losses(model, tokens, condition, scheduler, generators, args)

    def validate(step: int) -> dict[str, float]:
        pipe.to(accelerator.device)
        if args.condition == "text" and args.validation_prompts:
            condition = {"prompt": args.validation_prompts}
        else:
            samples = [
                transform(validation_set[i], loop.keyed_generator(train.seed, i))
                for i in range(min(16, len(validation_set)))
            ]
            batch = torch.utils.data.default_collate(samples)
            condition = {"prompt_embeds": conditioner.embed(loop.send_to_device(batch, accelerator.device))}
        count = len(next(iter(condition.values())))
        pictures = pipe(
            **condition, height=data.resolution, width=data.resolution, guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps, output_type="pt",
            generator=[torch.Generator().manual_seed(i) for i in range(count)],
        ).images  # fmt: skip
        sheet = picture_grid(pictures * 2 - 1, columns=8)
        replace_file(Path(train.output_dir) / f"validation-{step}.png", sheet.save)
        return {}

    finished = loop.fit(
        accelerator, predictor, compute_loss, train_set, train,
        transform=read_cached if args.cache_dir else transform, num_workers=data.dataloader_num_workers,
        on_validate=validate, parameter_groups=groups,
    )  # fmt: skip

    kind = PaellaImageVariationPipeline if args.condition == "image" else type(pipe)

    def save(folder: Path) -> None:
        if args.rank:
            unet.save_lora_adapter(folder)
            unet.fuse_lora()
            unet.unload_lora()
        (kind.from_pipe(pipe) if kind is not type(pipe) else pipe).save_pretrained(folder)

    if finished and accelerator.is_main_process:
        publish_result(
            train, save, recipe="paella", argv=argv, header=kind.card_tags(),
            summary=f"A {kind.__name__}, trained on pictures and {CONDITIONS[args.condition]}.",
            usage=partial(usage, args, pipe),
        )  # fmt: skip
    accelerator.end_training()


if __name__ == "__main__":
    main()
