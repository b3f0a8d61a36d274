"""The options of the text autoencoder's recipe."""

from dataclasses import dataclass

from diffusers_ext.training_utils.args import TrainArgs, below, between, option, positive
from diffusers_ext.training_utils.schedules import CyclicalAnnealing
from diffusers_ext.training_utils.tokenizers import SMALLEST_VOCABULARY


@dataclass
class OptimusArgs:
    """Both networks, where they start, and the loss."""

    pretrained_model_name_or_path: str | None = option(
        None, "AutoencoderOptimus to fine-tune, a folder with its tokenizers in subfolders."
    )
    pretrained_encoder_name_or_path: str | None = option(
        None, "BERT to start from, with its tokenizer; goes with the decoder's."
    )
    pretrained_decoder_name_or_path: str | None = option(
        None, "GPT-2 to start from, with its tokenizer; goes with the encoder's."
    )
    latent_dim: int = option(768, "Width of the vector that a sentence becomes.")
    vocab_size: int = option(1024, "Largest size of each new tokenizer (byte-level BPE).")
    encoder_hidden_size: int = option(128, "Width of a new encoder.")
    encoder_num_layers: int = option(3, "Layers of a new encoder.")
    decoder_hidden_size: int = option(128, "Width of a new decoder.")
    decoder_num_layers: int = option(3, "Layers of a new decoder.")
    num_attention_heads: int = option(4, "Heads of both new networks.")
    initializer_range: float | None = option(
        None, "Standard deviation of new networks' weights; 1 / sqrt(encoder_hidden_size) when unset."
    )
    max_word_pieces: int = option(77, "Longer sentences are cut for the encoder.")
    max_length: int = option(30, "Tokens of the decoder, start and end included; longer sentences are cut.")
    lower_case: bool = option(True, "As Versatile Diffusion encodes sentences.")
    dropout: float = option(0.1, "Of both networks.")
    beta: float = option(1.0, "Peak weight of the KL divergence; 0: an autoencoder.")
    beta_cycles: int = option(10, "How often the weight goes from 0 to its peak.")
    beta_zero_fraction: float = option(0.5, "Share of a cycle in which the weight is 0.")
    beta_rise_fraction: float = option(0.25, "Share of a cycle in which it rises.")
    free_bits: float = option(0.5, "Latent dimensions whose KL is not above this (in nats) do not count.")
    length_weighted_loss: bool = option(True, "Divide a sentence's cross-entropy by its number of tokens.")

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
        between(self, 1, None, "latent_dim", "max_word_pieces")
        positive(
            self, "encoder_hidden_size", "encoder_num_layers", "decoder_hidden_size", "decoder_num_layers",
            "num_attention_heads",
        )  # fmt: skip
        between(self, 3, None, "max_length")
        between(self, 0, None, "free_bits", "beta")
        positive(self, "initializer_range")
        below(self, 0, 1, "dropout")


def make_annealing(args: OptimusArgs, train: TrainArgs) -> CyclicalAnnealing:
    """The weight of the divergence, step by step.

    Raises:
        ValueError: the shares of a cycle do not fit.
    """
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
