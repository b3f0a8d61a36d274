"""Tiny real components of Paella, random weights from a seed, for the tests of everything that samples from it."""

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from diffusers_ext.models.unet_paella import PaellaUNet
from diffusers_ext.models.vq_gumbel import GumbelVQModel
from diffusers_ext.schedulers.scheduling_discrete_renoising import DiscreteRenoisingScheduler

NUM_CODES = 24
CONDITION_DIM = 12
WINDOW = 10  # tokens that the text encoder reads, first and last included
WORDS = (
    "a an and the red blue green orange yellow large small circle square triangle star ring cross"
    " on in at to of left right top bottom center"
).split()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; the end token is number 4, since 2 would select the old pooling of CLIP."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<spare>", "<bos>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=WINDOW,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def tiny_text_encoder(tokenizer: PreTrainedTokenizerFast | None = None) -> CLIPTextModelWithProjection:
    tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=CONDITION_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=WINDOW,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def tiny_image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=CONDITION_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


def tiny_vqvae(*, gumbel: bool = False) -> VQModel:
    """A tokenizer of factor 2: 16 x 16 pixels are 8 x 8 tokens."""
    cls = GumbelVQModel if gumbel else VQModel
    vqvae = cls(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=NUM_CODES,
        norm_num_groups=4,
    )
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)  # stock codes are tiny: all tokens would decode alike
    return vqvae.eval()


def tiny_unet() -> PaellaUNet:
    """Two levels, so token grids of even sides; the blocks count from the first step (layer gamma is not 1e-6)."""
    return PaellaUNet(
        num_vq_embeddings=NUM_CODES,
        block_out_channels=(8, 16),
        down_layers_per_block=(1, 1),
        up_layers_per_block=(1, 1),
        condition_dim=CONDITION_DIM,
        time_embed_dim=8,
        layer_scale_init=1.0,
    ).eval()


def tiny_paella_components(seed: int = 0, *, gumbel: bool = False, image_encoder: bool = False) -> dict[str, object]:
    """Everything that `PaellaPipeline(**components)` takes; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        return {
            "tokenizer": tokenizer,
            "text_encoder": tiny_text_encoder(tokenizer),
            "vqvae": tiny_vqvae(gumbel=gumbel),
            "unet": tiny_unet(),
            "scheduler": DiscreteRenoisingScheduler(num_vec_classes=NUM_CODES, typical_mass=0.6),
            "image_encoder": tiny_image_encoder() if image_encoder else None,
            "feature_extractor": CLIPImageProcessor(size=16, crop_size=16) if image_encoder else None,
            "default_sample_size": 8,
            "default_guidance_scale": 3.0,
        }


def quiet(pipe):
    """The pipeline, without progress bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tiny_picture(seed: int = 0, height: int = 16, width: int = 16) -> Image.Image:
    """Noise, so that neighbouring tokens differ."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def count_runs(pipe) -> list[str]:
    """A list that grows by a name whenever a component computes."""
    runs: list[str] = []
    watched = {
        "text_encoder": pipe.text_encoder,
        "image_encoder": pipe.image_encoder,
        "unet": pipe.unet.token_embedding,
        "encoder": pipe.vqvae.encoder,
        "decoder": pipe.vqvae.decoder,
    }
    for name, module in watched.items():
        if module is not None:
            module.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    return runs
