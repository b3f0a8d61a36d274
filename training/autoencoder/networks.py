"""The networks of train_autoencoder.py: a new or pretrained autoencoder, and its PatchGAN."""

from diffusers import AutoencoderKL, VQModel

from diffusers_ext.losses.adversarial import hinge_discriminator_loss, vanilla_discriminator_loss
from diffusers_ext.models.discriminator import PatchDiscriminator
from diffusers_ext.models.token_codec import Tokenizer, downsample_factor
from diffusers_ext.models.vq_gumbel import GumbelVQModel
from diffusers_ext.models.vq_paella import PaellaVQModel
from diffusers_ext.training.autoencoder.args import AutoencoderArgs
from diffusers_ext.training_utils.adversarial import Opponent
from diffusers_ext.training_utils.weights import load_whole

Autoencoder = Tokenizer | AutoencoderKL
KINDS: dict[str, type[VQModel] | type[PaellaVQModel] | type[AutoencoderKL]] = {
    "vq": VQModel, "paella_vq": PaellaVQModel, "gumbel_vq": GumbelVQModel, "kl": AutoencoderKL,
}  # fmt: skip
DISCRIMINATOR_LOSSES = {"hinge": hinge_discriminator_loss, "vanilla": vanilla_discriminator_loss}


def build_autoencoder(args: AutoencoderArgs, resolution: int = 256) -> Autoencoder:
    """A new (or the pretrained) autoencoder that takes pictures of `resolution` pixels a side.

    Raises:
        ValueError: the pretrained one is of another kind than `--model`, or the resolution does not fit the factor.
    """
    kind = KINDS[args.model]
    if args.pretrained_model_name_or_path:
        name_or_path = args.pretrained_model_name_or_path
        name = kind.load_config(name_or_path, subfolder=args.subfolder)["_class_name"]
        if name != kind.__name__:
            raise ValueError(
                f"{args.pretrained_model_name_or_path!r} holds a {name}, but --model={args.model} trains a "
                f"{kind.__name__}."
            )
        autoencoder = load_whole(kind, name_or_path, subfolder=args.subfolder)
    else:
        autoencoder = new_autoencoder(kind, args, resolution)
    factor = downsample_factor(autoencoder)
    if resolution % factor:
        nearest = max(factor, round(resolution / factor) * factor)
        raise ValueError(
            f"--resolution={resolution} is no multiple of the autoencoder's factor {factor}; the nearest is {nearest}."
        )
    return autoencoder


def new_autoencoder(
    kind: type[VQModel] | type[PaellaVQModel] | type[AutoencoderKL], args: AutoencoderArgs, resolution: int
) -> Autoencoder:
    """An autoencoder with fresh weights, and 1 for the scale of its latents."""
    if issubclass(kind, PaellaVQModel):
        return kind(
            levels=len(args.block_out_channels),
            bottleneck_blocks=args.bottleneck_blocks,
            embed_dim=args.block_out_channels[-1],
            latent_channels=args.latent_channels,
            num_vq_embeddings=args.num_vq_embeddings,
            scale_factor=1.0,
        )
    attends = [level in args.attention_levels for level in range(len(args.block_out_channels))]
    codebook = {"vq_embed_dim": args.vq_embed_dim, "num_vq_embeddings": args.num_vq_embeddings}
    return kind(
        down_block_types=tuple("AttnDownEncoderBlock2D" if attn else "DownEncoderBlock2D" for attn in attends),
        up_block_types=tuple("AttnUpDecoderBlock2D" if attn else "UpDecoderBlock2D" for attn in attends[::-1]),
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=args.layers_per_block,
        norm_num_groups=args.norm_num_groups,
        mid_block_add_attention=args.mid_block_add_attention,
        latent_channels=args.latent_channels,
        sample_size=resolution,
        scaling_factor=1.0,
        **({} if args.model == "kl" else codebook),
    )


def build_opponent(args: AutoencoderArgs) -> Opponent | None:
    """A new PatchGAN, if one is asked for."""
    if args.disc_start is None:
        return None
    return Opponent(
        PatchDiscriminator(base_channels=args.disc_channels, num_layers=args.disc_layers),
        start=args.disc_start,
        loss=DISCRIMINATOR_LOSSES[args.disc_loss],
        weight=args.disc_weight,
        learning_rate=args.disc_learning_rate,
        fresh_forward=args.disc_fresh_forward,
    )
