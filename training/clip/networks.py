"""The two towers of a small CLIP, the decoder that helps to train them, and the image preparation."""

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from diffusers_ext.training.clip.args import ClipArgs
from diffusers_ext.training_utils.weights import load_whole

IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)  # pixels in [-1, 1], as for the other networks


def build_clip(args: ClipArgs, tokenizer: PreTrainedTokenizerFast, resolution: int) -> CLIPModel:
    """A new CLIP whose towers share `num_attention_heads` and `projection_dim`."""
    shared = {"num_attention_heads": args.num_attention_heads, "projection_dim": args.projection_dim}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.text_width,
        intermediate_size=4 * args.text_width,
        num_hidden_layers=args.text_layers,
        max_position_embeddings=args.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # 1: an id of 2 would select transformers' legacy pooling
        pad_token_id=tokenizer.pad_token_id,
        **shared,
    )
    vision = CLIPVisionConfig(
        hidden_size=args.vision_width,
        intermediate_size=4 * args.vision_width,
        num_hidden_layers=args.vision_layers,
        image_size=resolution,
        patch_size=args.patch_size,
        **shared,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=args.projection_dim))


def load_clip(name_or_path: str, resolution: int) -> CLIPModel:
    """A CLIP to go on with, in float32.

    Raises:
        ValueError: it sees pictures of another size.
    """
    clip = load_whole(CLIPModel, name_or_path, dtype=torch.float32)
    if (size := clip.config.vision_config.image_size) != resolution:
        raise ValueError(f"--resolution={resolution}, but the CLIP in {name_or_path} sees {size} pixels: pass those.")
    return clip


def build_captioner(clip: CLIPModel) -> GPT2LMHeadModel:
    """A decoder of one layer over CLIP's vocabulary that reads vectors of its shared width."""
    text = clip.config.text_config
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=text.vocab_size,
            n_positions=text.max_position_embeddings,
            n_embd=clip.config.projection_dim,
            n_layer=1,
            n_head=text.num_attention_heads,
            add_cross_attention=True,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            tie_word_embeddings=False,  # a checkpoint of the objective cannot hold one tensor under two names
        )
    )


def build_processor(resolution: int) -> CLIPImageProcessor:
    """The image preparation of a trained CLIP: the whole image in the size of its tower."""
    side = {"height": resolution, "width": resolution}
    return CLIPImageProcessor(
        size=side, crop_size=side, image_mean=IMAGE_MEAN, image_std=IMAGE_STD, do_center_crop=False
    )
