"""Trains (or fine-tunes) Optimus, the text autoencoder of Versatile Diffusion: BERT to one vector, GPT-2 back.

    accelerate launch training/train_optimus.py training/presets/optimus-scenes.yaml

Paper: arXiv 2004.04092, sections 3.1 and 3.2; code ChunyuanLI/Optimus@f3190fe. Cross-entropy of the sentence given a
sample of the posterior, plus beta times the KL divergence without the dimensions below a threshold (free bits); beta
goes through cycles (arXiv 1903.10145). It starts from BERT and GPT-2 like the paper, or small and from scratch with
tokenizers trained on the sentences.
"""

import json
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, GPT2Model, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from diffusers_ext.conversion.optimus import SPECIAL_TOKENS
from diffusers_ext.data.preprocessing import choose_text
from diffusers_ext.data.sentences import load_sentences
from diffusers_ext.losses.sentences import free_bits, gaussian_kl, sentence_nll
from diffusers_ext.models.autoencoder_optimus import AutoencoderOptimus
from diffusers_ext.pipelines.versatile.optimus_text import read_sentences, sentence_ids, target_ids
from diffusers_ext.training_utils import loop
from diffusers_ext.training_utils.annealing import CyclicalAnnealing
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.checkpoints import replace_file
from diffusers_ext.training_utils.record import learn_once
from diffusers_ext.training_utils.results import publish_result
from diffusers_ext.training_utils.weights import load_whole

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

SMALLEST_VOCABULARY = 259  # 256 bytes and three special tokens
ENCODER_TOKENS = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
ACTIVE_VARIANCE = 0.01  # of a latent's mean over the sentences: the original's measure of "in use"

Tokenizers = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]  # the encoder's, the decoder's


@dataclass
class OptimusArgs:
    """Both networks, where they start, and the loss."""

    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "AutoencoderOptimus to fine-tune, a folder with its tokenizers in subfolders."}
    )
    pretrained_encoder_name_or_path: str | None = field(
        default=None, metadata={"help": "BERT to start from, with its tokenizer; goes with the decoder's."}
    )
    pretrained_decoder_name_or_path: str | None = field(
        default=None, metadata={"help": "GPT-2 to start from, with its tokenizer; goes with the encoder's."}
    )
    latent_dim: int = field(default=768, metadata={"help": "Width of the vector that a sentence becomes."})
    vocab_size: int = field(default=1024, metadata={"help": "Largest size of each new tokenizer (byte-level BPE)."})
    encoder_hidden_size: int = field(default=128, metadata={"help": "Width of a new encoder."})
    encoder_num_layers: int = field(default=3, metadata={"help": "Layers of a new encoder."})
    decoder_hidden_size: int = field(default=128, metadata={"help": "Width of a new decoder."})
    decoder_num_layers: int = field(default=3, metadata={"help": "Layers of a new decoder."})
    num_attention_heads: int = field(default=4, metadata={"help": "Heads of both new networks."})
    initializer_range: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of new networks' weights; 1 / sqrt(encoder_hidden_size) when unset."},
    )
    max_word_pieces: int = field(default=77, metadata={"help": "Longer sentences are cut for the encoder."})
    max_length: int = field(
        default=30, metadata={"help": "Tokens of the decoder, start and end included; longer sentences are cut."}
    )
    lower_case: bool = field(default=True, metadata={"help": "As Versatile Diffusion encodes sentences."})
    dropout: float = field(default=0.1, metadata={"help": "Of both networks."})
    beta: float = field(default=1.0, metadata={"help": "Peak weight of the KL divergence; 0: an autoencoder."})
    beta_cycles: int = field(default=10, metadata={"help": "How often the weight goes from 0 to its peak."})
    beta_zero_fraction: float = field(default=0.5, metadata={"help": "Share of a cycle in which the weight is 0."})
    beta_rise_fraction: float = field(default=0.25, metadata={"help": "Share of a cycle in which it rises."})
    free_bits: float = field(
        default=0.5, metadata={"help": "Latent dimensions whose KL is not above this (in nats) do not count."}
    )
    length_weighted_loss: bool = field(
        default=True, metadata={"help": "Divide a sentence's cross-entropy by its number of tokens."}
    )

    def __post_init__(self):
        if (self.pretrained_encoder_name_or_path is None) != (self.pretrained_decoder_name_or_path is None):
            raise ValueError(
                "--pretrained_encoder_name_or_path and --pretrained_decoder_name_or_path go together, got "
                f"{self.pretrained_encoder_name_or_path!r} and {self.pretrained_decoder_name_or_path!r}."
            )
        if self.pretrained_model_name_or_path and self.pretrained_encoder_name_or_path:
            raise ValueError("--pretrained_model_name_or_path holds an encoder and a decoder: do not name others.")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"--vocab_size must be >= {SMALLEST_VOCABULARY} (256 bytes, padding, start, end), got "
                f"{self.vocab_size}."
            )
        for name, least in (("latent_dim", 1), ("max_word_pieces", 1), ("max_length", 3)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be >= {least}, got {getattr(self, name)}.")
        if self.initializer_range is not None and self.initializer_range <= 0:
            raise ValueError(f"--initializer_range must be > 0, got {self.initializer_range}.")
        if self.free_bits < 0 or self.beta < 0:
            raise ValueError(f"--free_bits and --beta must be >= 0, got {self.free_bits} and {self.beta}.")


def parse_args(argv: list[str] | None = None) -> tuple[OptimusArgs, DataArgs, TrainArgs]:
    args, data, train = parse((OptimusArgs, DataArgs, TrainArgs), argv)
    if train.gradient_checkpointing:
        raise ValueError("--gradient_checkpointing: AutoencoderOptimus has none, leave it out.")
    make_annealing(args, train)  # so that a wrong cycle is an error before anything is loaded
    return args, data, train


def make_annealing(args: OptimusArgs, train: TrainArgs) -> CyclicalAnnealing:
    try:
        return CyclicalAnnealing(
            train.max_train_steps,
            peak=args.beta,
            num_cycles=args.beta_cycles,
            zero_fraction=args.beta_zero_fraction,
            rise_fraction=args.beta_rise_fraction,
        )
    except ValueError as error:
        raise ValueError(f"--beta_cycles, --beta_zero_fraction or --beta_rise_fraction: {error}") from error


def train_tokenizer(sentences: list[str], vocab_size: int, special: dict[str, str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that no sentence has unknown words; `special` get the first ids, the padding 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    _, first, last = special.values()
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{first} $A {last}", special_tokens=[(first, 1), (last, 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def build_model(
    args: OptimusArgs, sentences: list[str], train: TrainArgs | None = None
) -> tuple[AutoencoderOptimus, Tokenizers]:
    """The network that is trained with its tokenizers: a trained one, one of BERT and GPT-2, or a new small one.

    Args:
        train: Says whether a run is resumed, whose tokenizers were learnt already.
    """
    if args.pretrained_model_name_or_path:
        folder = args.pretrained_model_name_or_path
        model = load_whole(AutoencoderOptimus, folder, dropout=args.dropout)
        encoder, decoder = (AutoTokenizer.from_pretrained(folder, subfolder=f"{part}_tokenizer") for part in PARTS)
        return model, (encoder, decoder)
    if args.pretrained_encoder_name_or_path:
        return join_pretrained(args)
    train = TrainArgs() if train is None else train
    encoder, decoder = (
        learn_once(train, f"{part}_tokenizer", partial(train_tokenizer, sentences, args.vocab_size, special))
        for part, special in zip(PARTS, (ENCODER_TOKENS, SPECIAL_TOKENS), strict=True)
    )
    model = AutoencoderOptimus(
        latent_dim=args.latent_dim,
        encoder_hidden_size=args.encoder_hidden_size,
        encoder_intermediate_size=4 * args.encoder_hidden_size,
        encoder_num_layers=args.encoder_num_layers,
        encoder_num_attention_heads=args.num_attention_heads,
        encoder_max_length=args.max_word_pieces + 2,
        decoder_hidden_size=args.decoder_hidden_size,
        decoder_num_layers=args.decoder_num_layers,
        decoder_num_attention_heads=args.num_attention_heads,
        decoder_max_length=args.max_length + 1,  # the memory takes one position
        dropout=args.dropout,
        initializer_range=args.initializer_range or args.encoder_hidden_size**-0.5,
        **vocabulary(encoder, decoder),
    )
    return model, (encoder, decoder)


PARTS = ("encoder", "decoder")


def vocabulary(encoder: PreTrainedTokenizerBase, decoder: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the network has to know of its tokenizers."""
    return {
        "encoder_vocab_size": len(encoder),
        "encoder_pad_token_id": encoder.pad_token_id,
        "decoder_vocab_size": len(decoder),
        "pad_token_id": decoder.pad_token_id,
        "bos_token_id": decoder.bos_token_id,
        "eos_token_id": decoder.eos_token_id,
    }


def join_pretrained(args: OptimusArgs) -> tuple[AutoencoderOptimus, Tokenizers]:
    """BERT and GPT-2 with new projections between them, and three more words for GPT-2."""
    assert args.pretrained_encoder_name_or_path and args.pretrained_decoder_name_or_path
    bert = load_whole(BertModel, args.pretrained_encoder_name_or_path)
    gpt2 = load_whole(GPT2Model, args.pretrained_decoder_name_or_path)
    encoder = AutoTokenizer.from_pretrained(args.pretrained_encoder_name_or_path)
    decoder = AutoTokenizer.from_pretrained(args.pretrained_decoder_name_or_path)
    decoder.add_special_tokens(SPECIAL_TOKENS)
    model = AutoencoderOptimus(
        latent_dim=args.latent_dim,
        encoder_hidden_size=bert.config.hidden_size,
        encoder_intermediate_size=bert.config.intermediate_size,
        encoder_num_layers=bert.config.num_hidden_layers,
        encoder_num_attention_heads=bert.config.num_attention_heads,
        encoder_max_length=bert.config.max_position_embeddings,
        decoder_hidden_size=gpt2.config.n_embd,
        decoder_num_layers=gpt2.config.n_layer,
        decoder_num_attention_heads=gpt2.config.n_head,
        decoder_max_length=gpt2.config.n_positions,
        dropout=args.dropout,
        **vocabulary(encoder, decoder),
    )
    table = model.decoder.wte.weight.detach().clone()
    table[: len(gpt2.wte.weight)] = gpt2.wte.weight.detach()
    model.encoder.load_state_dict(bert.state_dict())
    model.decoder.load_state_dict({**gpt2.state_dict(), "wte.weight": table})
    return model, (encoder, decoder)


# At module level, so that loader processes can be started with them on every platform.


def read_sample(example: dict, generator: torch.Generator, column: str, lower_case: bool) -> dict[str, str]:
    """One of the sentences of a row."""
    sentence = choose_text(example[column], generator)
    return {"sentence": sentence.lower() if lower_case else sentence}


def collate_samples(samples: list[dict[str, str]], tokenizers: Tokenizers, args: OptimusArgs) -> dict[str, Tensor]:
    """The tokens of both networks, (b, l) each."""
    encoder, decoder = tokenizers
    sentences = [sample["sentence"] for sample in samples]
    return {
        "input_ids": sentence_ids(
            encoder, sentences, max_word_pieces=args.max_word_pieces, lower_case=args.lower_case
        ),
        "token_ids": target_ids(decoder, sentences, max_length=args.max_length),
    }


def sentence_losses(
    model: nn.Module, batch: dict[str, Tensor], noise: Tensor, beta: float, args: OptimusArgs, pad_token_id: int
) -> dict[str, Tensor]:
    """One training step's losses; `noise` (b, d) draws from the posterior. All but `loss` are for the log."""
    token_ids = batch["token_ids"]
    logits, mean, logvar = model(**batch, noise=noise, return_dict=False)
    nll = sentence_nll(logits, token_ids, pad_token_id=pad_token_id)  # (b,)
    divergence = gaussian_kl(mean, logvar)  # (b, d)
    is_token = token_ids != pad_token_id
    weighted = nll / is_token.sum(dim=1) if args.length_weighted_loss else nll
    right = (logits[:, :-1].argmax(dim=-1) == token_ids[:, 1:]) & is_token[:, 1:]
    return {
        "loss": (weighted + beta * free_bits(divergence, args.free_bits)).mean(),
        "nll": nll.mean(),
        "kl": divergence.sum(dim=1).mean(),
        "beta": torch.tensor(beta, device=nll.device),
        "accuracy": (right.sum(dim=1) / is_token[:, 1:].sum(dim=1)).mean(),
    }


@torch.no_grad()
def reconstruct(
    model: AutoencoderOptimus, batch: dict[str, Tensor], tokenizers: Tokenizers, args: OptimusArgs
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """How sentences come back, most probable token by token, from the means that they are encoded to.

    Returns:
        Figures to log, `exact` among them (the share of sentences that come back token by token), and what came back
        of each.
    """
    decoder, targets = tokenizers[1], batch["token_ids"]
    mean, logvar = model.encode(batch["input_ids"], return_dict=False)
    decoded = model.decode(mean, do_sample=False, max_length=args.max_length)
    wanted, found = read_sentences(decoder, targets), read_sentences(decoder, decoded)
    same = [
        [i for i in one if i != decoder.pad_token_id] == [i for i in other if i != decoder.pad_token_id]
        for one, other in zip(targets.tolist(), decoded.tolist(), strict=True)
    ]
    figures = {
        "exact": sum(same) / len(same),
        "kl": float(gaussian_kl(mean, logvar).sum(dim=1).mean()),
        "latent_std": float(mean.std()),
        "active_latents": float((mean.var(dim=0) > ACTIVE_VARIANCE).sum()),
    }
    return figures, [{"sentence": a, "reconstruction": b} for a, b in zip(wanted, found, strict=True)]


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = loop.start(train)
    train_set, validation_set = load_sentences(data)
    transform = partial(read_sample, column=data.caption_column, lower_case=args.lower_case)
    first = (transform(train_set[i], loop.keyed_generator(i)) for i in range(min(len(train_set), 20_000)))
    model, tokenizers = build_model(args, [sample["sentence"] for sample in first], train)
    logger.info("%d sentences, %d parameters", len(train_set), sum(p.numel() for p in model.parameters()))
    collate = partial(collate_samples, tokenizers=tokenizers, args=args)
    annealing, pad_token_id = make_annealing(args, train), model.config["pad_token_id"]
    figures: dict[str, float] = {}
    beta = 0.0

    def before_step(step: int) -> None:
        nonlocal beta
        beta = annealing(step)

    def compute_loss(prepared, batch, generators):
        noise = torch.stack([torch.randn(model.config["latent_dim"], generator=g) for g in generators])
        return sentence_losses(prepared, batch, noise.to(accelerator.device), beta, args, pad_token_id)

    def validate(step: int) -> dict[str, float]:
        rows = range(min(256, len(validation_set)))
        batch = collate([transform(validation_set[i], loop.keyed_generator(train.seed, i)) for i in rows])
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        found, pairs = reconstruct(model, batch, tokenizers, args)
        figures.update(found)
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        sheet = Path(train.output_dir) / f"validation-{step}.jsonl"
        replace_file(sheet, lambda path: path.write_text(lines, encoding="utf-8"))
        return {f"validation_{name}": value for name, value in found.items()}

    finished = loop.fit(
        accelerator, model, compute_loss, train_set, train, transform=transform, collate=collate,
        num_workers=data.dataloader_num_workers, on_validate=validate, before_step=before_step,
    )  # fmt: skip

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        for part, tokenizer in zip(PARTS, tokenizers, strict=True):
            tokenizer.save_pretrained(folder / f"{part}_tokenizer")

    if finished and accelerator.is_main_process:
        summary = "An AutoencoderOptimus with its two tokenizers."
        if figures:
            summary += f" {figures['exact']:.1%} of held-out sentences come back exactly (validation_exact)."
        publish_result(
            train, save, recipe="optimus", argv=argv, summary=summary,
            usage=lambda name: USAGE.format(folder=name, max_length=args.max_length),
        )  # fmt: skip
    accelerator.end_training()


if __name__ == "__main__":
    main()
