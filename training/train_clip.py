"""Trains a small CLIP (contrastive image-text model) with a tokenizer of its own, from pictures with captions.

    accelerate launch training/train_clip.py training/presets/clip-scenes-64.yaml

Paper: arXiv 2103.00020 (symmetric cross-entropy over the batch); equal captions share the target, as in SupCon, arXiv
2004.11362; wrong captions as extra negatives: NegCLIP, arXiv 2210.01936; captions of the same picture drawn together:
the text contrast of SimCSE, arXiv 2104.08821, with paraphrases as pairs; a caption written from the picture beside the
contrast: CoCa, arXiv 2205.01917. It makes the text-conditional families trainable without any download and scores
their samples.
"""

import logging
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer

from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.training.clip.args import ONE_PICTURE, ClipArgs
from diffusers_ext.training.clip.data import check_captions, collate_samples, read_sample, text_columns
from diffusers_ext.training.clip.networks import build_clip, build_processor, load_clip
from diffusers_ext.training.clip.objective import ClipObjective
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.command import run_command
from diffusers_ext.training_utils.loop import fit
from diffusers_ext.training_utils.results import finish
from diffusers_ext.training_utils.run import start
from diffusers_ext.training_utils.tokenizers import learn_once, read_captions, train_clip_tokenizer
from diffusers_ext.training_utils.validation import first_rows, mean_losses

logger = logging.getLogger(__name__)

USAGE = """import diffusers_ext
from transformers import AutoTokenizer, CLIPModel

clip, tokenizer = CLIPModel.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")
vectors = clip.get_text_features(**tokenizer(["a red circle"], return_tensors="pt")).pooler_output
"""


def parse_args(argv: list[str] | None = None) -> tuple[ClipArgs, DataArgs, TrainArgs]:
    args, data, train = parse((ClipArgs, DataArgs, TrainArgs), argv)
    if data.resolution % args.patch_size:
        raise ValueError(
            f"--resolution={data.resolution} is no multiple of --patch_size={args.patch_size}: the rest would be cut "
            "off silently."
        )
    if train.train_batch_size == 1 and not args.has_other_losses:
        raise ValueError(
            f"--train_batch_size=1: {ONE_PICTURE} Raise --train_batch_size (accumulated micro-batches are not "
            "contrasted with each other), or pass --negative_caption_column or --caption_weight."
        )
    return args, data, train


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = start(train)
    columns = text_columns(args, data)
    train_set, validation_set = load_pictures(data, text_columns=tuple(columns))
    captions = read_captions(train_set, data.caption_column)
    check_captions(captions, args)
    if args.pretrained_model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.pretrained_model_name_or_path)
        clip = load_clip(args.pretrained_model_name_or_path, data.resolution)
    else:
        learn = partial(train_clip_tokenizer, captions, args.vocab_size, args.max_length)
        tokenizer = learn_once(train, "tokenizer", learn)
        clip = build_clip(args, tokenizer, data.resolution)
    if train.gradient_checkpointing:
        clip.gradient_checkpointing_enable({"use_reentrant": False})
    logger.info("%d parameters, %d tokens", sum(p.numel() for p in clip.parameters()), len(tokenizer))

    read = partial(read_sample, data=data, columns=columns)
    collate = partial(collate_samples, tokenizer=tokenizer)
    objective = ClipObjective(clip, bool(args.paraphrase_column), args.patch_weight, args.caption_weight)

    def validate(step: int) -> dict[str, float]:
        rows = first_rows(validation_set, 256, read, train.seed, collate=collate, device=accelerator.device)
        return mean_losses(objective, rows, step)

    finished = fit(
        accelerator, objective, train_set, train, transform=read, collate=collate,
        num_workers=data.dataloader_num_workers, on_validate=validate,
    )  # fmt: skip
    objective.bound_scale()  # the last step may have gone beyond

    def save(folder: Path) -> None:
        for part in (clip, tokenizer, build_processor(data.resolution)):
            part.save_pretrained(folder)

    finish(
        accelerator, train, finished, save, recipe="clip", argv=argv, summary="A CLIPModel with its tokenizer.",
        usage=lambda name: USAGE.format(folder=name),
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
