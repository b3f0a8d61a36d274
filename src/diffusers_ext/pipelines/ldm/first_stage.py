"""Images to the latents of latent diffusion and back, whatever the first stage, in one piece or in tiles.

Rombach et al., arXiv 2112.10752, sections 3.1 and D.1, appendix G; original: CompVis/latent-diffusion@a506df5
:ldm/models/diffusion/ddpm.py (`get_first_stage_encoding`, `decode_first_stage`, MIT). Training and sampling use the
same functions, so that a model meets the latents that it was trained on.

Autoencoders compute in their own dtype: `force_upcast` of their config is not heeded, since casting a component within
a call would change it for everybody who shares it. Where float16 overflows in one, load it with
`dtype={"vqvae": torch.float32, "default": torch.float16}`.
"""

from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor

from ...conditions.inpainting import latent_mask, masked_image
from ...models.blocks.wrappers import unwrap, with_forward_hooks
from ...models.token_codec import codebook, codebook_table
from ...models.vq_gumbel import GumbelVQModel
from .tiling import TileGrid

FirstStage = AutoencoderKL | VQModel
VQ_DEFAULT_SCALE = 0.18215  # of diffusers' VQModel: the text model's KL autoencoder has it, no released VQ model does


def bare_first_stage(vqvae: Any) -> FirstStage:
    """The autoencoder without what torch wraps around it: its class decides how it is called and scaled.

    Raises:
        TypeError: for anything else than an `AutoencoderKL` or a `VQModel`.
    """
    bare = unwrap(vqvae)
    if not isinstance(bare, (AutoencoderKL, VQModel)):
        raise TypeError(
            f"`vqvae` is a {type(bare).__name__}: a first stage is an AutoencoderKL or a VQModel. If it wraps one,"
            " pass that."
        )
    return bare


def first_stage_factor(vqvae: FirstStage) -> int:
    """How many pixels a side one latent stands for."""
    return 2 ** (len(bare_first_stage(vqvae).config["block_out_channels"]) - 1)


def first_stage_channels(vqvae: FirstStage) -> int:
    """Channels of the latents that diffusion works on."""
    config = bare_first_stage(vqvae).config
    embedded = config.get("vq_embed_dim")
    return config["latent_channels"] if embedded is None else embedded


def has_unset_scale(vqvae: Any) -> bool:
    """Whether the config holds a scale that nobody measured: the default of `VQModel`.

    A config file without the entry (all VQ repositories of CompVis) and one that was saved again afterwards look the
    same, so the value decides: latents of the released VQ models are not scaled, and a measured scale is another one.
    """
    vqvae = bare_first_stage(vqvae)
    return isinstance(vqvae, VQModel) and vqvae.config["scaling_factor"] == VQ_DEFAULT_SCALE


def latent_scale(vqvae: FirstStage) -> float:
    """By what latents are multiplied before diffusion, and divided afterwards: the config's `scaling_factor`.

    It is 1 for a `VQModel` whose config only holds the class's default (see `has_unset_scale`).
    """
    return 1.0 if has_unset_scale(vqvae) else float(bare_first_stage(vqvae).config["scaling_factor"])


def encode_first_stage(
    vqvae: FirstStage,
    images: Tensor,
    *,
    sample: bool = False,
    generator: Any = None,
    grid: TileGrid | None = None,
) -> Tensor:
    """Images (b, 3, H, W) in [-1, 1] to latents (b, c, h, w), not scaled; of a `VQModel` those before the codebook.

    Args:
        sample: draw from the posterior of an `AutoencoderKL`, as in training, instead of taking its mean.
        generator: for that draw, one for all images or one for each.
        grid: over the images, with `down` = the autoencoder's factor: encode tile by tile. Moments are blended
            before a draw.
    """
    vqvae = bare_first_stage(vqvae)
    images, encode = images.to(vqvae.dtype), partial(_encode, vqvae)
    encoded = encode(images) if grid is None else grid.apply(encode, images)
    if not isinstance(vqvae, AutoencoderKL):
        return encoded
    posterior = DiagonalGaussianDistribution(encoded)
    return posterior.sample(generator) if sample else posterior.mode()


def _encode(vqvae: FirstStage, images: Tensor) -> Tensor:
    """Moments (b, 2 c, h, w) of an `AutoencoderKL`, latents (b, c, h, w) of a `VQModel`."""
    if isinstance(vqvae, AutoencoderKL):
        return vqvae.encode(images, return_dict=False)[0].parameters
    return vqvae.encode(images).latents


def decode_first_stage(vqvae: FirstStage, latents: Tensor, *, grid: TileGrid | None = None) -> Tensor:
    """Latents (b, c, h, w), no longer scaled, to images (b, 3, H, W), nominally in [-1, 1].

    A `VQModel` takes the nearest codes first.

    Args:
        grid: over the latents, with `up` = the autoencoder's factor: decode tile by tile.
    """
    vqvae = bare_first_stage(vqvae)
    latents = latents.to(vqvae.dtype)
    if grid is not None:
        return grid.apply(partial(decode_first_stage, vqvae), latents)
    if isinstance(vqvae, VQModel) and not isinstance(vqvae, GumbelVQModel):
        return _decode_nearest(vqvae, latents)
    return vqvae.decode(latents, return_dict=False)[0]  # type: ignore[arg-type] # any tensor of floats


@with_forward_hooks  # brings an offloaded autoencoder back before its codebook is asked
def _decode_nearest(vqvae: VQModel, latents: Tensor) -> Tensor:
    """What `VQModel.decode` computes, to the bit, without reading the codebook behind the back of its module.

    diffusers' quantiser does, so that hooks on the codebook (offloading) do not see it. Its gradient goes straight
    through, for `guidance_fn`.
    """
    if vqvae.config["lookup_from_codebook"]:  # such a model decodes nothing but indices without its quantiser
        return vqvae.decode(latents, return_dict=False)[0]  # type: ignore[arg-type]
    latents = latents.permute(0, 2, 3, 1).contiguous()  # (b, h, w, d)
    nearest = torch.cdist(latents.flatten(0, 2), codebook_table(vqvae, latents.device)).argmin(dim=1)
    codes = codebook(vqvae)(nearest).view(latents.shape)
    codes = (latents + (codes - latents).detach()).permute(0, 3, 1, 2).contiguous()
    return vqvae.decode(codes, force_not_quantize=True, return_dict=False)[0]  # type: ignore[arg-type]


def encode_masked_image(vqvae: FirstStage, images: Tensor, mask: Tensor, *, grid: TileGrid | None = None) -> Tensor:
    """What an inpainting model is given beside its latents: (b, c + 1, h, w), image with a hole and mask.

    The encoding is neither scaled nor quantised, and of an `AutoencoderKL` the mean.

    Args:
        images: (b, 3, H, W) in [-1, 1].
        mask: (b, 1, H, W), 1 in the hole.
        grid: as in `encode_first_stage`.
    """
    encoded = encode_first_stage(vqvae, masked_image(images, mask), grid=grid)
    signed = latent_mask(mask, list(encoded.shape[-2:])).to(encoded)
    return torch.cat([encoded, signed], dim=1)
