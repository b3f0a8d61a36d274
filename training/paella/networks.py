"""The pipeline that is trained: a pretrained one, or a new U-Net among pretrained networks."""

import torch
from diffusers import VQModel

from diffusers_ext.conversion.open_clip import load_open_clip
from diffusers_ext.models.token_codec import Tokenizer, downsample_factor
from diffusers_ext.models.unet_paella import PaellaUNet
from diffusers_ext.models.vq_gumbel import GumbelVQModel
from diffusers_ext.models.vq_paella import PaellaVQModel
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.schedulers.scheduling_discrete_renoising import DiscreteRenoisingScheduler
from diffusers_ext.training.paella.args import PaellaArgs
from diffusers_ext.training_utils.clip import CLIP_COMPONENTS, load_clip
from diffusers_ext.training_utils.weights import load_whole, load_whole_pipeline


def build_unet(args: PaellaArgs, *, num_vq_embeddings: int = 8192, condition_dim: int = 1024) -> PaellaUNet:
    """A new token predictor; the defaults are the paper's f8 tokenizer and CLIP ViT-g-14 vectors."""
    return PaellaUNet(
        num_vq_embeddings=num_vq_embeddings,
        block_out_channels=tuple(args.block_out_channels),
        down_layers_per_block=tuple(args.down_layers_per_block),
        up_layers_per_block=tuple(args.up_layers_per_block),
        condition_dim=condition_dim,
        time_embed_dim=args.time_embed_dim,
        kernel_size=args.kernel_size,
        layer_scale_init=args.layer_scale_init,
    )


def build_pipeline(args: PaellaArgs, resolution: int) -> PaellaPipeline:
    """The pipeline that is trained, in float32: the pretrained one, or a new network around a tokenizer and a CLIP.

    Raises:
        ValueError: an option that names a part is missing, or the pretrained pipeline does not take `--condition`.
    """
    pipe = load_pipeline(args) if args.pretrained_model_name_or_path else new_pipeline(args, resolution)
    pipe.to(torch.float32)  # weights to train, whatever the files hold
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(args: PaellaArgs) -> PaellaPipeline:
    """The pipeline to fine-tune."""
    assert args.pretrained_model_name_or_path is not None
    pipe = load_whole_pipeline(PaellaPipeline, args.pretrained_model_name_or_path)
    needed = {"text": pipe.text_encoder, "image": pipe.image_encoder}
    width = pipe.unet.config.condition_dim
    if args.condition in needed and needed[args.condition] is None:
        raise ValueError(
            f"{args.pretrained_model_name_or_path!r} has no {args.condition}_encoder, which --condition "
            f"{args.condition} needs."
        )
    if args.condition not in needed and args.num_labels is None:
        args.num_labels = width
    if args.condition not in needed and args.num_labels != width:
        raise ValueError(
            f"{args.pretrained_model_name_or_path!r} takes conditions of width {width}, but "
            f"--num_labels={args.num_labels}."
        )
    return pipe


def new_pipeline(args: PaellaArgs, resolution: int) -> PaellaPipeline:
    """A new network around a tokenizer and, for captions and images, a CLIP."""
    if args.pretrained_vqvae_name_or_path is None:
        raise ValueError("--pretrained_vqvae_name_or_path is needed: train one with training/train_autoencoder.py.")
    vqvae = load_tokenizer(args.pretrained_vqvae_name_or_path)
    components = dict.fromkeys(CLIP_COMPONENTS)
    condition_dim = args.num_labels
    if args.condition in ("text", "image"):
        clip = args.pretrained_clip_name_or_path
        if clip is None:
            raise ValueError(
                f"--condition {args.condition} needs --pretrained_clip_name_or_path: train one with "
                "training/train_clip.py, or name one on the Hub."
            )
        components = load_clip(clip, load_open_clip)
        condition_dim = components["text_encoder"].config.projection_dim
    codes, side = vqvae.config.num_vq_embeddings, resolution // downsample_factor(vqvae)
    unet = build_unet(args, num_vq_embeddings=codes, condition_dim=condition_dim)
    unet.register_to_config(sample_size=side)
    return PaellaPipeline(
        vqvae=vqvae,
        unet=unet,
        scheduler=DiscreteRenoisingScheduler(num_vec_classes=codes, typical_mass=args.typical_mass),
        default_sample_size=side,
        default_guidance_scale=args.guidance_scale,
        **components,
    )


def load_tokenizer(folder: str) -> Tokenizer:
    """The first stage in `folder` (or on the Hub), of whichever class was saved there."""
    kinds = {kind.__name__: kind for kind in (VQModel, GumbelVQModel, PaellaVQModel)}
    name = VQModel.load_config(folder)["_class_name"]
    if name not in kinds:
        raise ValueError(
            f"--pretrained_vqvae_name_or_path={folder} holds a {name}, which has no codes. Known are "
            f"{', '.join(kinds)}: train one with training/train_autoencoder.py."
        )
    return load_whole(kinds[name], folder)
