"""The networks around a tiny Versatile Diffusion, and a tiny one, untrained."""

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from diffusers_ext.conversion.optimus import SPECIAL_TOKENS
from diffusers_ext.models.autoencoder_optimus import AutoencoderOptimus
from diffusers_ext.models.unet_versatile import VersatileUNet
from diffusers_ext.pipelines.versatile.optimus_text import vocabulary_options
from diffusers_ext.training.versatile.objective import FlowEncoders
from diffusers_ext.training_utils.tokenizers import BERT_TOKENS, train_bpe

WORDS = ["<s>", "</s>", "<pad>", "a", "red", "blue", "ring", "star"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=6)


def sentence_tokenizers() -> list[PreTrainedTokenizerFast]:
    """Of Optimus' encoder and decoder."""
    sentences = ["a red ring", "a blue star", "red ring"]
    return [train_bpe(sentences, 300, tokens) for tokens in (BERT_TOKENS, SPECIAL_TOKENS)]


def tiny_encoders() -> FlowEncoders:
    sizes = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "projection_dim": 8,
    }  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=8, max_position_embeddings=6, bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes
    )
    side = {"height": 16, "width": 16}
    readers = sentence_tokenizers()
    optimus = AutoencoderOptimus(
        latent_dim=6, encoder_hidden_size=8, encoder_intermediate_size=16, encoder_num_layers=1,
        encoder_num_attention_heads=2, encoder_max_length=32, decoder_hidden_size=8, decoder_num_layers=1,
        decoder_num_attention_heads=2, decoder_max_length=32, **vocabulary_options(*readers),
    ).eval()  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=2, scaling_factor=0.5).eval()
    return FlowEncoders(
        vae=vae,
        optimus=optimus,
        encoder_tokenizer=readers[0],
        text_encoder=CLIPTextModelWithProjection(text).eval(),
        tokenizer=word_tokenizer(),
        image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=16, patch_size=8, **sizes)).eval(),
        feature_extractor=CLIPImageProcessor(
            size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False
        ),
    )


def tiny_unet(**options) -> VersatileUNet:
    unet = VersatileUNet(
        data_types={
            "image": {"kind": "map", "channels": 2},
            "text": {"kind": "vector", "channels": 6, "positions": 2},
        },
        context_types={"image": 8, "text": 8}, block_out_channels=(8,), layers_per_block=1, num_attention_heads=2,
        attention_levels=(True,), norm_num_groups=4, **options,
    )  # fmt: skip
    for parameter in unet.parameters():  # new networks predict 0
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return unet
