"""The text autoencoder that is trained, and its two tokenizers."""

from functools import partial

from transformers import AutoTokenizer, BertModel, GPT2Model

from diffusers_ext.conversion.optimus import SPECIAL_TOKENS
from diffusers_ext.models.autoencoder_optimus import AutoencoderOptimus
from diffusers_ext.pipelines.versatile.optimus_text import vocabulary_options
from diffusers_ext.training.optimus.args import OptimusArgs
from diffusers_ext.training.optimus.data import Tokenizers
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.tokenizers import BERT_TOKENS, learn_once, train_bpe
from diffusers_ext.training_utils.weights import load_whole

PARTS = ("encoder", "decoder")


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
        learn_once(train, f"{part}_tokenizer", partial(train_bpe, sentences, args.vocab_size, special))
        for part, special in zip(PARTS, (BERT_TOKENS, SPECIAL_TOKENS), strict=True)
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
        **vocabulary_options(encoder, decoder),
    )
    return model, (encoder, decoder)


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
        **vocabulary_options(encoder, decoder),
    )
    table = model.decoder.wte.weight.detach().clone()
    table[: len(gpt2.wte.weight)] = gpt2.wte.weight.detach()
    model.encoder.load_state_dict(bert.state_dict())
    model.decoder.load_state_dict({**gpt2.state_dict(), "wte.weight": table})
    return model, (encoder, decoder)
