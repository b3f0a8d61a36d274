"""What the Paella pipelines that edit an image share: the image to edit and its tokens. No pipeline by itself.

Shapes: b samples, h x w the token grid, H x W pixels.
"""

from typing import Any

import torch
from torch import Tensor

from ...conditions.images import image_batch
from ...models.token_codec import bare_tokenizer, encode_indices
from ...models.vq_gumbel import GumbelVQModel
from ..checks import check_fraction
from .base import Generators, PaellaBasePipeline

SAMPLE_MODES = ("argmax", "sample")


class PaellaEditBasePipeline(PaellaBasePipeline):
    """Reads an image to edit, turns it into tokens and noises them; the loop is that of `PaellaBasePipeline`."""

    def check_edit(self, strength: Any, sample_mode: Any) -> None:
        """The components are there, and they can start from an image in this way."""
        self.check_components()
        check_fraction("strength", strength, "0 returns the picture, 1 draws from noise alone")
        if sample_mode not in SAMPLE_MODES:
            raise ValueError(f"`sample_mode` must be one of {', '.join(SAMPLE_MODES)}; received {sample_mode!r}.")
        vqvae = bare_tokenizer(self.vqvae)
        if sample_mode == "sample" and not isinstance(vqvae, GumbelVQModel):
            raise ValueError(
                f"`sample_mode='sample'` needs a GumbelVQModel: a {type(vqvae).__name__} takes the nearest code and"
                " has no probabilities. Use 'argmax'."
            )

    def check_count(self, name: str, count: int, num_prompts: int) -> None:
        """One image for all prompts, or one a prompt."""
        if count not in (1, num_prompts):
            raise ValueError(
                f"`{name}` holds {count} pictures for {num_prompts} prompts; pass one for all of them or one a prompt."
            )

    def _read_source(self, image: Any) -> Tensor:
        """The image to edit: tokens (b, h, w) as `output_type="latent"` gives them, else float (b, 3, H, W)."""
        if isinstance(image, Tensor) and image.dtype == torch.long:
            if image.ndim != 3 or image.numel() == 0:
                raise ValueError(
                    f"`image` holds int64 tokens, so it must have shape (b, h, w), received {tuple(image.shape)}."
                )
            self.check_latents(image, (image.shape[0], image.shape[1], image.shape[2]), name="image")
            return image
        return image_batch(image)

    def _source_size(self, source: Tensor) -> tuple[int, int]:
        """Height and width in pixels."""
        factor = 1 if source.is_floating_point() else self.vae_scale_factor
        return source.shape[-2] * factor, source.shape[-1] * factor

    def _source_tokens(
        self, source: Tensor, batch_size: int, sample_mode: str = "argmax", generator: Generators = None
    ) -> Tensor:
        """The tokens `(b, h, w)` of the image to edit, one for each sample."""
        source = source.to(self._execution_device)
        repeats = batch_size // source.shape[0]  # all samples of the first image come first
        if not source.is_floating_point():
            return source.repeat_interleave(repeats, dim=0)
        source = 2 * source - 1
        if sample_mode == "sample":  # each sample draws its own tokens
            source = source.repeat_interleave(repeats, dim=0)
            return encode_indices(self.vqvae, source, sample=True, generator=generator)
        return encode_indices(self.vqvae, source).repeat_interleave(repeats, dim=0)

    def _noise_source(self, tokens: Tensor, timesteps: Tensor, generator: Generators, noise: Tensor | None) -> Tensor:
        """The tokens of an image, noised to the level of the first step; at all noise just random tokens."""
        if len(timesteps) == 0:
            return tokens
        if len(timesteps) == self.scheduler.num_inference_steps:
            height, width = (side * self.vae_scale_factor for side in tokens.shape[1:])
            return self.prepare_latents(tokens.shape[0], height, width, generator=generator, latents=noise)
        noised = self.scheduler.add_noise(tokens, noise=noise, timesteps=timesteps[0], generator=generator)
        assert isinstance(noised, Tensor)  # a tuple only with `return_mask`
        return noised
