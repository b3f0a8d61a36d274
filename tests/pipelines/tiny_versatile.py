"""Tiny real components of Versatile Diffusion, random weights from a seed, for the tests of what samples from it."""

import torch
from diffusers import AutoencoderKL
from pipelines.tiny_paella import CONDITION_DIM, WORDS, tiny_image_encoder, tiny_text_encoder, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from diffusers_ext.models.autoencoder_optimus import AutoencoderOptimus
from diffusers_ext.models.unet_versatile import VersatileUNet
from diffusers_ext.pipelines.versatile.denoising import versatile_scheduler

TEXT_DIM = 6


def tiny_clip():
    """Tokenizer, text encoder, picture encoder, feature extractor; contexts of 10 and 5 tokens, 12 wide."""
    tokenizer = tiny_tokenizer()
    feature_extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    return tokenizer, tiny_text_encoder(tokenizer), tiny_image_encoder(), feature_extractor


def tiny_vae() -> AutoencoderKL:
    """Factor 2: 8 x 8 pixels are 4 x 4 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def tiny_versatile_unet() -> VersatileUNet:
    """Two levels; no weight is zero, so that conditions show from the first step."""
    unet = VersatileUNet(
        data_types={
            "image": {"kind": "map", "channels": 4},
            "text": {"kind": "vector", "channels": TEXT_DIM, "positions": 2},
        },
        context_types={"image": CONDITION_DIM, "text": CONDITION_DIM},
        block_out_channels=(8, 16),
        layers_per_block=1,
        num_attention_heads=2,
        norm_num_groups=4,
    ).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return unet


def tiny_words(special: tuple[str, ...], template: str) -> PreTrainedTokenizerFast:
    """One token a word, after the special ones."""
    vocabulary = {word: i for i, word in enumerate([*special, "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(name, vocabulary[name]) for name in special[1:]]
        )
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)


def tiny_optimus():
    """Text autoencoder and both tokenizers."""
    encoder = tiny_words(("[PAD]", "[CLS]", "[SEP]"), "[CLS] $A [SEP]")
    decoder = tiny_words(("<PAD>", "<BOS>", "<EOS>"), "")
    sizes = {"hidden_size": 8, "num_layers": 1, "num_attention_heads": 2}
    optimus = AutoencoderOptimus(
        latent_dim=TEXT_DIM,
        encoder_vocab_size=len(encoder),
        decoder_vocab_size=len(decoder),
        encoder_intermediate_size=16,
        encoder_max_length=32,
        decoder_max_length=32,
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in sizes.items()},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
    ).eval()
    return optimus, encoder, decoder


def tiny_versatile_components(seed: int = 0) -> dict[str, object]:
    """Everything that `VersatilePipeline(**components)` takes; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, text_encoder, image_encoder, feature_extractor = tiny_clip()
        optimus, encoder_tokenizer, decoder_tokenizer = tiny_optimus()
        return {
            "unet": tiny_versatile_unet(),
            "scheduler": versatile_scheduler(),
            "vae": tiny_vae(),
            "tokenizer": tokenizer,
            "text_encoder": text_encoder,
            "image_encoder": image_encoder,
            "feature_extractor": feature_extractor,
            "optimus": optimus,
            "encoder_tokenizer": encoder_tokenizer,
            "decoder_tokenizer": decoder_tokenizer,
            "default_sample_size": 8,
            "default_guidance_scale": 3.0,
        }
