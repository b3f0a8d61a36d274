"""The options of the text autoencoder's recipe."""

from dataclasses import dataclass, field

from diffusers_ext.training_utils.args import TrainArgs, between, positive
from diffusers_ext.training_utils.schedules import CyclicalAnnealing
from diffusers_ext.training_utils.tokenizers import SMALLEST_VOCABULARY


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
        between(self, 1, None, "latent_dim", "max_word_pieces")
        between(self, 3, None, "max_length")
        between(self, 0, None, "free_bits", "beta")
        positive(self, "initializer_range")


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
