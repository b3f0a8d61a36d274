"""Trains (or fine-tunes) Optimus, the text autoencoder of Versatile Diffusion: BERT to one vector, GPT-2 back.

    accelerate launch training/train_optimus.py training/presets/optimus-scenes.yaml

Paper: arXiv 2004.04092, sections 3.1 and 3.2; code ChunyuanLI/Optimus@f3190fe. Cross-entropy of the sentence given a
sample of the posterior, plus beta times the KL divergence without the dimensions below a threshold (free bits); beta
goes through cycles (arXiv 1903.10145). It starts from BERT and GPT-2 like the paper, or small and from scratch with
tokenizers trained on the sentences.
"""

import logging
from functools import partial
from pathlib import Path

from diffusers_ext.data.sentences import load_sentences
from diffusers_ext.training.optimus.args import OptimusArgs, make_annealing
from diffusers_ext.training.optimus.data import collate_samples, read_sample
from diffusers_ext.training.optimus.networks import PARTS, build_model
from diffusers_ext.training.optimus.objective import SentenceObjective
from diffusers_ext.training.optimus.validation import reconstruct, write_pairs
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.command import run_command
from diffusers_ext.training_utils.loop import fit
from diffusers_ext.training_utils.plan import keyed_generator
from diffusers_ext.training_utils.results import finish
from diffusers_ext.training_utils.run import start
from diffusers_ext.training_utils.validation import first_rows

logger = logging.getLogger(__name__)

USAGE = """from transformers import AutoTokenizer

import diffusers_ext
from diffusers_ext.pipelines.versatile.optimus_text import read_sentences, sentence_ids

model = diffusers_ext.AutoencoderOptimus.from_pretrained("{folder}")
encoder = AutoTokenizer.from_pretrained("{folder}", subfolder="encoder_tokenizer")
decoder = AutoTokenizer.from_pretrained("{folder}", subfolder="decoder_tokenizer")
latents = model.encode(sentence_ids(encoder, ["a small blue star on the left"])).mean
print(read_sentences(decoder, model.decode(latents, do_sample=False, max_length={max_length})))
"""


def parse_args(argv: list[str] | None = None) -> tuple[OptimusArgs, DataArgs, TrainArgs]:
    args, data, train = parse((OptimusArgs, DataArgs, TrainArgs), argv)
    if train.gradient_checkpointing:
        raise ValueError("--gradient_checkpointing: AutoencoderOptimus has none, leave it out.")
    make_annealing(args, train)  # so that a wrong cycle is an error before anything is loaded
    return args, data, train


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = start(train)
    train_set, validation_set = load_sentences(data)
    transform = partial(read_sample, column=data.caption_column, lower_case=args.lower_case)
    first = (transform(train_set[i], keyed_generator(i)) for i in range(min(len(train_set), 20_000)))
    model, tokenizers = build_model(args, [sample["sentence"] for sample in first], train)
    logger.info("%d sentences, %d parameters", len(train_set), sum(p.numel() for p in model.parameters()))
    collate = partial(collate_samples, tokenizers=tokenizers, args=args)
    figures: dict[str, float] = {}

    def validate(step: int) -> dict[str, float]:
        rows = first_rows(
            validation_set, 256, transform, train.seed, collate=collate, device=accelerator.device
        )  # fmt: skip
        found, pairs = reconstruct(model, next(rows)[0], tokenizers, args)
        figures.update(found)
        write_pairs(pairs, Path(train.output_dir, f"validation-{step}.jsonl"))
        return {f"validation_{name}": value for name, value in found.items()}

    finished = fit(
        accelerator, SentenceObjective(model, args, make_annealing(args, train)), train_set, train,
        transform=transform, collate=collate, num_workers=data.dataloader_num_workers, on_validate=validate,
    )  # fmt: skip

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        for part, tokenizer in zip(PARTS, tokenizers, strict=True):
            tokenizer.save_pretrained(folder / f"{part}_tokenizer")

    summary = "An AutoencoderOptimus with its two tokenizers."
    if figures:
        summary += f" {figures['exact']:.1%} of held-out sentences come back exactly (validation_exact)."
    finish(
        accelerator, train, finished, save, recipe="optimus", argv=argv, summary=summary,
        usage=lambda name: USAGE.format(folder=name, max_length=args.max_length),
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
