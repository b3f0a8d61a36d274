"""Trains Versatile Diffusion: one network for several flows, each from a type of context to a type of data.

    accelerate launch training/train_versatile.py training/presets/versatile-scenes-single.yaml

Paper: arXiv 2211.08332, section 4 and Algorithm 1; the authors released no training code (the layer groups and their
learning rates are those of SHI-Labs/Versatile-Diffusion@cf0f4a2). Three stages, each going on from the last: image
variation alone, then text-to-image beside it, then all four flows. Every step takes all flows on the same samples and
adds their losses; the image autoencoder, Optimus and CLIP stay frozen.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import Dataset
from versatile_cache import CACHED, cache_pictures
from versatile_flows import FlowEncoders, Flows, flow_losses, learning_rate_groups, parts_of, sample_flow
from versatile_parts import load_parts, untrained_parts

from diffusers_ext.data.captions import clean_caption
from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.data.preprocessing import choose_text, prepare_image
from diffusers_ext.evaluation.image_quality import picture_grid
from diffusers_ext.models.unet_versatile import VersatileUNet
from diffusers_ext.pipelines.checks import check_guidance_scale, check_steps, check_timesteps
from diffusers_ext.pipelines.versatile.denoising import versatile_scheduler
from diffusers_ext.pipelines.versatile.optimus_text import MAX_SENTENCE_LENGTH, read_sentences
from diffusers_ext.pipelines.versatile.pipeline_versatile import VersatilePipeline
from diffusers_ext.training_utils import loop
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.checkpoints import replace_file
from diffusers_ext.training_utils.kernels import plain_attention
from diffusers_ext.training_utils.results import publish_result
from diffusers_ext.training_utils.weights import load_whole

logger = logging.getLogger(__name__)

FLOWS = ("image-to-image", "text-to-image", "image-to-text", "text-to-text")
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")  # what LoRA changes of a context layer


@dataclass
class VersatileArgs:
    """The network, its flows, and the frozen networks around it."""

    # On a resume, see TrainArgs.
    APPLIED: ClassVar[tuple[str, ...]] = ("lr_scales", "guidance_scale")
    BOOKKEEPING: ClassVar[tuple[str, ...]] = ("num_inference_steps", "validation_samples", "cache_dir")

    flows: list[str] = field(
        default_factory=lambda: list(FLOWS), metadata={"help": f"What is trained: some of {', '.join(FLOWS)}."}
    )
    flow_weights: list[str] = field(
        default_factory=list, metadata={"help": "Weights of flows in the loss: image-to-text=0.5 ...; 1 by default."}
    )
    lr_scales: list[str] = field(
        default_factory=list,
        metadata={"help": "Multiples of the learning rate: global=0.1 data.image=0.2 ...; 1 by default."},
    )
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Result of an earlier stage: the network to go on with, and all parts."}
    )
    pretrained_unet_name_or_path: str | None = field(
        default=None, metadata={"help": "VersatileUNet to start from, such as a converted Stable Diffusion."}
    )
    pretrained_vae_name_or_path: str | None = field(default=None, metadata={"help": "AutoencoderKL of the images."})
    pretrained_optimus_name_or_path: str | None = field(
        default=None, metadata={"help": "Text autoencoder with its tokenizers, a result of train_optimus.py."}
    )
    pretrained_clip_name_or_path: str | None = field(default=None, metadata={"help": "CLIP of both contexts."})
    untrained_parts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "To try the recipe out: vae, optimus or both, tiny and untrained where no option names one."
        },
    )
    contexts_like: str | None = field(
        default=None, metadata={"help": "New context layers start as a copy of those of this type: image or text."}
    )
    block_out_channels: list[int] = field(
        default_factory=lambda: [320, 640, 1280, 1280], metadata={"help": "Width of each level, finest first."}
    )
    layers_per_block: int = field(default=2, metadata={"help": "Residual blocks of each level on the way down."})
    attention_levels: list[int] = field(
        default_factory=list,
        metadata={"help": "Levels (0: finest) with contexts besides the middle; all but the last if unset."},
    )
    num_attention_heads: int = field(default=8, metadata={"help": "Heads of every attention."})
    norm_num_groups: int = field(default=32, metadata={"help": "Groups of every normalisation."})
    text_positions: int = field(default=4, metadata={"help": "Tokens that a text latent is treated as."})
    dropout: float = field(default=0.0, metadata={"help": "In residual blocks and transformers."})
    cond_dropout_prob: float = field(default=0.1, metadata={"help": "Samples of a flow trained without context."})
    clean_captions: bool = field(
        default=True, metadata={"help": "Remove addresses, HTML, brackets and symbols from what the text flows see."}
    )
    paraphrase_column: str | None = field(
        default=None, metadata={"help": "Column with another caption: the context of text-to-text; else the same one."}
    )
    rank: int | None = field(
        default=None,
        metadata={"help": "Train LoRA matrices of this rank beside the contexts' attentions instead of all weights."},
    )
    guidance_scale: float = field(default=7.5, metadata={"help": "For the validation samples."})
    num_inference_steps: int = field(default=25, metadata={"help": "For the validation samples."})
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the pictures' latents and context tokens: computed once, then trained from. Excludes "
            "augmentation."
        },
    )
    validation_samples: int = field(default=64, metadata={"help": "Held-out samples whose loss is reported."})

    def __post_init__(self):
        unknown = [flow for flow in self.flows if flow not in FLOWS]
        if unknown or not self.flows or len(set(self.flows)) != len(self.flows):
            raise ValueError(f"--flows is {self.flows}: name some of {', '.join(FLOWS)}, each once.")
        if strangers := [name for name in self.untrained_parts if name not in ("vae", "optimus")]:
            raise ValueError(f"--untrained_parts names {', '.join(strangers)}; it can be vae, optimus or both.")
        if not 0 <= self.cond_dropout_prob <= 1:
            raise ValueError(f"--cond_dropout_prob must lie in [0, 1], got {self.cond_dropout_prob}.")
        weights = read_factors("flow_weights", self.flow_weights)
        if strangers := [flow for flow in weights if flow not in self.flows]:
            raise ValueError(f"--flow_weights names {', '.join(strangers)}, but --flows is {' '.join(self.flows)}.")
        read_factors("lr_scales", self.lr_scales)
        if self.cache_dir and self.flows == ["text-to-text"]:
            raise ValueError("--cache_dir is for pictures, which text-to-text does not read: leave it out.")
        last = len(self.block_out_channels) - 1
        if not set(self.attention_levels) <= set(range(last + 1)):
            raise ValueError(
                f"--attention_levels is {self.attention_levels}: --block_out_channels gives the levels 0 to {last}."
            )
        for name in ("rank", "num_inference_steps", "validation_samples", "text_positions"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be > 0, got {getattr(self, name)}.")
        check_guidance_scale(self.guidance_scale)
        scheduler = versatile_scheduler()
        check_steps(scheduler, self.num_inference_steps)
        scheduler.set_timesteps(self.num_inference_steps)
        check_timesteps(scheduler, self.num_inference_steps)
        if self.rank and not (self.pretrained_model_name_or_path or self.pretrained_unet_name_or_path):
            raise ValueError(
                f"--rank {self.rank} trains matrices beside an existing network: name it with "
                "--pretrained_model_name_or_path or --pretrained_unet_name_or_path, or leave out --rank."
            )
        if self.pretrained_model_name_or_path and self.pretrained_unet_name_or_path:
            raise ValueError(
                "--pretrained_model_name_or_path already holds the network to go on with: leave out "
                "--pretrained_unet_name_or_path."
            )


def parse_args(argv: list[str] | None = None) -> tuple[VersatileArgs, DataArgs, TrainArgs]:
    args, data, train = parse((VersatileArgs, DataArgs, TrainArgs), argv)
    if args.cache_dir and (data.random_flip or not data.center_crop):
        raise ValueError(
            "--cache_dir keeps one set of latents a picture, which excludes augmentation: pass --center_crop and "
            "leave out --random_flip, or leave out --cache_dir."
        )
    return args, data, train


def read_factors(name: str, words: Sequence[str]) -> dict[str, float]:
    """`["a=0.5", "b=2"]` as a mapping.

    Raises:
        ValueError: a word has another form, a factor is negative, or a name occurs twice.
    """
    factors: dict[str, float] = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            factor = float(value)
        except ValueError:
            factor = -1.0
        if not key or factor < 0 or key in factors:
            raise ValueError(f"--{name} got {word!r}: write name=factor with a factor >= 0, each name once.")
        factors[key] = factor
    return factors


def build_unet(
    args: VersatileArgs, *, image_channels: int = 4, text_channels: int = 768, context_dim: int = 768
) -> VersatileUNet:
    """A new network of the flows that are trained; the defaults are the paper's autoencoders and CLIP."""
    attends = [level in args.attention_levels for level in range(len(args.block_out_channels))]
    return VersatileUNet(
        data_types={
            "image": {"kind": "map", "channels": image_channels},
            "text": {"kind": "vector", "channels": text_channels, "positions": args.text_positions},
        },
        context_types={"image": context_dim, "text": context_dim},
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=args.layers_per_block,
        attention_levels=tuple(attends) if args.attention_levels else None,
        num_attention_heads=args.num_attention_heads,
        norm_num_groups=args.norm_num_groups,
        dropout=args.dropout,
        flows=args.flows,
    )


def load_unet(args: VersatileArgs, parts: Mapping[str, Any]) -> VersatileUNet:
    """The network with the layers of all flows that are trained; what it has already goes on from where it was.

    Raises:
        ValueError: its latents or contexts are not those of the frozen networks, or it lacks flows that LoRA alone
            could not train.
    """
    sizes = {
        "image_channels": parts["vae"].config.latent_channels,
        "text_channels": parts["optimus"].config.latent_dim,
        "context_dim": parts["text_encoder"].config.projection_dim,
    }
    if args.pretrained_model_name_or_path:
        unet = load_whole(VersatileUNet, args.pretrained_model_name_or_path, subfolder="unet")
    elif args.pretrained_unet_name_or_path:
        unet = load_whole(VersatileUNet, args.pretrained_unet_name_or_path)
    else:
        return build_unet(args, **sizes)
    config = unet.config
    found = {
        "image_channels": config["data_types"]["image"]["channels"],
        "text_channels": config["data_types"]["text"]["channels"],
        "context_dim": config["context_types"]["text"],
    }
    if found != sizes:
        raise ValueError(f"The network was made for {found}, but the autoencoders and CLIP give {sizes}.")
    missing = [flow for flow in args.flows if flow not in unet.flows]
    if missing and args.rank:
        raise ValueError(
            f"--flows is {' '.join(args.flows)}, but the network has no layers for {', '.join(missing)}, and --rank "
            f"{args.rank} trains none: its flows are {', '.join(unet.flows)}. Train the others without --rank first."
        )
    if missing:
        unet.add_flows(missing, contexts_like=args.contexts_like)
    return unet


def vae_factor(parts: Mapping[str, Any]) -> int:
    """Pixels a side that one latent stands for."""
    return 2 ** (len(parts["vae"].config.block_out_channels) - 1)


def check_resolution(resolution: int, flows: Sequence[str], unet: VersatileUNet, parts: Mapping[str, Any]) -> None:
    """Pictures that are made must have latents that the network can halve at each of its levels.

    Raises:
        ValueError: they do not; names the sizes next to it that do.
    """
    multiple = vae_factor(parts) * unet.downsample_factor
    if resolution % multiple == 0 or all(parts_of(flow)[1] != "image" for flow in flows):
        return
    below = resolution // multiple * multiple
    nearest = " or ".join(str(size) for size in (below, below + multiple) if size)
    raise ValueError(
        f"--resolution is {resolution}; flows that make images need a multiple of {multiple} ({vae_factor(parts)} of "
        f"the autoencoder times {unet.downsample_factor} of the U-Net): pass {nearest}."
    )


def freeze_unused(unet: VersatileUNet, flows: Sequence[str]) -> None:
    """Layer groups that no trained flow uses keep their weights."""
    used = {"global"}
    for flow in flows:
        context_type, data_type = parts_of(flow)
        used |= {f"data.{data_type}", f"context.{context_type}"}
    for name, layers in unet.layer_groups().items():
        layers.requires_grad_(name in used)


def add_lora(unet: VersatileUNet, flows: Sequence[str], rank: int) -> None:
    """Freezes the network and puts matrices of this rank beside the attention projections of the flows' contexts."""
    contexts = tuple({f"context_layers.{parts_of(flow)[0]}." for flow in flows})
    targets = [name for name, _ in unet.named_modules() if name.startswith(contexts) and name.endswith(ATTENTION)]
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def read_sample(example: dict, generator: torch.Generator, args: VersatileArgs, data: DataArgs) -> dict[str, Any]:
    """A picture, or what the cache holds of it, and its captions.

    At module level, so that loader processes can be started with it on any platform.
    """
    picture = {name: example[name] for name in CACHED if name in example}
    if not picture:
        picture["image"] = prepare_image(
            example[data.image_column], data.resolution, generator=generator,
            center_crop=data.center_crop, random_flip=data.random_flip,
        )  # fmt: skip
    prompt = choose_text(example[data.caption_column], generator)
    source = choose_text(example[args.paraphrase_column], generator) if args.paraphrase_column else prompt
    return {**picture, "prompt": prompt, "sentence": cleaned(prompt, args), "source": cleaned(source, args)}


def cleaned(caption: str, args: VersatileArgs) -> str:
    """The caption, or what is left of it after cleaning; where nothing is left, the caption."""
    return clean_caption(caption) or caption if args.clean_captions else caption


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


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = loop.start(train)
    parts = load_parts(args)
    unet = load_unet(args, parts).float()  # weights to train, whatever the files hold
    check_resolution(data.resolution, args.flows, unet, parts)
    freeze_unused(unet, args.flows)
    if args.rank:
        add_lora(unet, args.flows, args.rank)
    groups = learning_rate_groups(unet, train.learning_rate, read_factors("lr_scales", args.lr_scales))
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.float().requires_grad_(False).eval().to(accelerator.device)
    if train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if accelerator.device.type == "cpu":
        plain_attention(unet)
    scheduler, decoder = versatile_scheduler(), parts["decoder_tokenizer"]
    encoders = FlowEncoders(**{name: part for name, part in parts.items() if part is not decoder})
    captions = (data.caption_column, *([args.paraphrase_column] if args.paraphrase_column else []))
    train_set, validation_set = load_pictures(data, text_columns=captions)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    logger.info("%d pictures, %d parameters of %s", len(train_set), trained, ", ".join(args.flows))
    transform = partial(read_sample, args=args, data=data)
    samples: Dataset = train_set
    if args.cache_dir:
        samples = cache_pictures(args.cache_dir, encoders, train_set, captions, accelerator, args.flows, data, train)
    weights = {flow: 1.0 for flow in args.flows} | read_factors("flow_weights", args.flow_weights)
    options = {"flow_weights": weights, "cond_dropout_prob": args.cond_dropout_prob}

    def compute_loss(model, batch, generators):
        return flow_losses(model, batch, generators, encoders, scheduler, **options)

    def validate(step: int) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        count = min(args.validation_samples, len(validation_set))
        for start in range(0, count, 16):
            rows = range(start, min(start + 16, count))
            samples = [transform(validation_set[i], loop.keyed_generator(train.seed, i)) for i in rows]
            batch = loop.send_to_device(torch.utils.data.default_collate(samples), accelerator.device)
            draws = [loop.keyed_generator(train.seed, i, loop.LOSS_STREAM) for i in rows]
            for name, value in compute_loss(flows, batch, draws).items():
                sums[name] = sums.get(name, 0) + value * len(rows) / count
            if start == 0:
                path = Path(train.output_dir) / f"validation-{step}"
                draw_validation(unet, encoders, decoder, batch, args, path)
        return {f"validation_{name}": float(value) for name, value in sums.items()}

    flows = Flows(unet)
    finished = loop.fit(
        accelerator, flows, compute_loss, samples, train, transform=transform,
        num_workers=data.dataloader_num_workers, on_validate=validate, parameter_groups=groups,
    )  # fmt: skip

    def save(folder: Path) -> None:
        if args.rank:
            unet.save_lora_adapter(folder)
            unet.fuse_lora()
            unet.unload_lora()
        side = data.resolution // vae_factor(parts)
        unet.register_to_config(sample_size=side)
        pipe = VersatilePipeline(
            unet=unet, scheduler=scheduler, **parts, default_guidance_scale=args.guidance_scale,
            default_sample_size=side,
        )  # fmt: skip
        pipe.save_pretrained(folder)

    if finished and accelerator.is_main_process:
        summary = f"A VersatilePipeline with the flows {', '.join(unet.flows)}."
        if new := untrained_parts(args):
            verb = "was" if len(new) == 1 else "were"
            summary += f" Its {' and '.join(new)} {verb} never trained: it shows that the recipe runs, nothing else."
        contexts, results = zip(*(parts_of(flow) for flow in unet.flows), strict=True)
        lacking = {"text_encoder": "text" not in contexts, "vae": "image" not in results}
        publish_result(
            train, save, recipe="versatile", argv=argv, summary=summary, header=VersatilePipeline.card_tags(),
            usage=partial(VersatilePipeline.usage, config={name: [None] for name, lacks in lacking.items() if lacks}),
        )  # fmt: skip
    accelerator.end_training()


if __name__ == "__main__":
    main()
