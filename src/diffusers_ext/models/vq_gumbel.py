"""The f8 tokenizer of Paella v1: a `VQModel` whose codes are chosen by a learned projection.

It is the Gumbel-VQGAN of ruDALL-E, ai-forever/ru-dalle@0255cec (Apache-2.0, weights Apache-2.0), after
taming-transformers (Esser, Rombach, Ommer, arXiv 2012.09841). Encoder and decoder are those of diffusers' `VQModel`.
One 1x1 convolution to logits over the codebook chooses the code.

Difference from the original: indices are the most probable ones by default. Paella's own helper always draws them
(`sample=True`).

Letters in shape comments: b images, (h, w) the token grid, d latent channels, k codes.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Generator, Tensor, nn

from .blocks.codebook import check_image, decode_vq_indices, latent_rows
from .blocks.wrappers import with_forward_hooks


class _CodeLogits(nn.Conv2d):
    """The 1x1 convolution to logits over the codebook."""

    def forward(self, input: Tensor, choose: Callable[..., Tensor] | None = None) -> Tensor:
        """Logits (b, k, h, w) of latents (b, d, h, w); or what `choose(latents, self)` makes of both.

        The weights are read in here, where whatever was offloaded or cast for storage has come back.
        """
        return super().forward(input) if choose is None else choose(input, self)


class GumbelVQModel(VQModel):
    """A `VQModel` whose codes are chosen by a learned projection instead of by distance.

    The arguments are those of `diffusers.VQModel`. The released f8 tokenizer has `block_out_channels=(128, 128, 256,
    512)`, attention on the last level (`AttnDownEncoderBlock2D`, `AttnUpDecoderBlock2D`), `layers_per_block=2`,
    `latent_channels=256`, `num_vq_embeddings=8192`. As in `VQModel`, `force_upcast` is recorded and changes nothing:
    the network computes in its own dtype.
    """

    _supports_group_offloading = True  # unlike the parent, which reads its codebook behind the back of the module

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            sample_size=sample_size,
            num_vq_embeddings=num_vq_embeddings,
            norm_num_groups=norm_num_groups,
            vq_embed_dim=vq_embed_dim,
            scaling_factor=scaling_factor,
            norm_type=norm_type,
            mid_block_add_attention=mid_block_add_attention,
            lookup_from_codebook=lookup_from_codebook,
            force_upcast=force_upcast,
        )
        self.quantize_proj = _CodeLogits(self.quantize.vq_embed_dim, num_vq_embeddings, 1)

    def encode_indices(
        self,
        image: Tensor,
        *,
        sample: bool = False,
        gumbel_noise: Tensor | None = None,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> Tensor:
        """Indices (b, h, w) of images; arguments and errors are those of `token_codec.encode_indices`."""
        check_image(image, self.config["in_channels"], 2 ** (len(self.config["block_out_channels"]) - 1))
        with torch.no_grad():
            latents = self.encode(image.to(self.dtype), return_dict=False)[0]
            choose = most_probable_codes
            if sample or gumbel_noise is not None:
                choose = partial(_draw_codes, gumbel_noise=gumbel_noise, generator=generator)
            return self._choose(latents, choose)

    @with_forward_hooks
    def decode_indices(self, indices: Tensor) -> Tensor:
        """Images of indices (b, h, w); results and errors are those of `token_codec.decode_indices`."""
        return decode_vq_indices(self, indices)

    @with_forward_hooks
    def _choose(self, latents: Tensor, choose: Callable[..., Tensor]) -> Tensor:
        """What `choose` makes of latents (b, d, h, w) and the projection to logits: indices (b, h, w)."""
        return self.quantize_proj(latents, choose)

    encode = with_forward_hooks(VQModel.encode)

    @with_forward_hooks
    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
    ) -> DecoderOutput | Tensor:
        """Decodes latents (batch, d, h, w) to pictures as `VQModel.decode`, but with the projection's codes."""
        if force_not_quantize:
            return super().decode(h, force_not_quantize=True, return_dict=return_dict, shape=shape)
        sample = self.decode_indices(self._choose(h, most_probable_codes))
        commit_loss = sample.new_zeros(h.shape[0])  # nothing to commit to
        if not return_dict:
            return sample, commit_loss  # type: ignore[return-value] # as the parent, whose annotation is wrong
        return DecoderOutput(sample=sample, commit_loss=commit_loss)  # type: ignore[arg-type]


@torch.no_grad()
def most_probable_codes(latents: Tensor, proj: nn.Conv2d) -> Tensor:
    """Index of the greatest logit of the 1x1 convolution `proj` for each of (batch, d, h, w), in float32."""
    weight, bias = _affine(proj)
    with torch.autocast(latents.device.type, enabled=False):
        chunks = [torch.addmm(bias, rows, weight.T).argmax(dim=1) for rows in latent_rows(latents)]
    return torch.cat(chunks).view(latents.shape[0], *latents.shape[2:])


@torch.no_grad()
def _draw_codes(
    latents: Tensor,
    proj: nn.Conv2d,
    gumbel_noise: Tensor | None = None,
    generator: Generator | Sequence[Generator] | None = None,
) -> Tensor:
    """argmax(logits + Gumbel noise) is distributed as softmax(logits); image by image, so memory stays bounded."""
    batch, _, height, width = latents.shape
    shape = (proj.out_channels, height, width)
    if gumbel_noise is not None and gumbel_noise.shape != (batch, *shape):
        raise ValueError(f"`gumbel_noise` has shape {tuple(gumbel_noise.shape)}, expected {(batch, *shape)}.")
    generators = [generator] * batch if generator is None or isinstance(generator, Generator) else list(generator)
    if len(generators) != batch:
        raise ValueError(f"`generator` is a list of {len(generators)} for {batch} images: give one for each image.")
    weight, bias = _affine(proj)
    indices = []
    for image, image_generator in enumerate(generators):
        if gumbel_noise is None:
            device = latents.device if image_generator is None else image_generator.device
            exponentials = torch.empty(shape, device=device).exponential_(generator=image_generator)
            noise = -exponentials.to(latents.device).log()
        else:
            noise = gumbel_noise[image].to(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            rows = latents[image].float().flatten(1).T  # (h*w, d)
            logits = torch.addmm(bias, rows, weight.T)  # (h*w, k)
        indices.append((logits + noise.flatten(1).T).argmax(dim=1))
    return torch.stack(indices).view(batch, height, width)


def _affine(proj: nn.Conv2d) -> tuple[Tensor, Tensor]:
    if proj.bias is None:
        raise ValueError("`proj` has no bias: expected the 1x1 convolution of a GumbelVQModel.")
    return proj.weight.float().flatten(1), proj.bias.float()
