"""What train_autoencoder.py learns: for each `--model` all of it that the loop does not know: loss, draws, what it
keeps between steps, what it reports.

| `--model` | bottleneck | paper |
|---|---|---|
| `vq` | nearest code; starts as a plain autoencoder, k-means start, unused codes get a new place | 1711.00937 |
| `paella_vq` | the same, with the autoencoder of Paella's own f4 tokenizer | 2211.07292 |
| `gumbel_vq` | Gumbel-softmax codes | 2102.12092 |
| `kl` | Gaussian posterior, one draw of it | 2112.10752 |
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from diffusers_ext.losses.kl import kl_divergence, latent_scale, reconstruction_nll
from diffusers_ext.losses.quantization import (
    codebook_perplexity,
    gumbel_quantize,
    kmeans_codebook,
    vector_quantize,
)
from diffusers_ext.models.blocks.codebook import nearest_codes
from diffusers_ext.models.token_codec import (
    Tokenizer,
    codebook_weight,
    decode_indices,
    decode_latents,
    encode_indices,
    encode_latents,
)
from diffusers_ext.models.vq_gumbel import GumbelVQModel
from diffusers_ext.models.vq_paella import PaellaVQModel
from diffusers_ext.training.autoencoder.args import AutoencoderArgs
from diffusers_ext.training.autoencoder.networks import Autoencoder
from diffusers_ext.training_utils.adversarial import AdversarialObjective
from diffusers_ext.training_utils.objective import draw_posterior
from diffusers_ext.training_utils.plan import keyed_generator
from diffusers_ext.training_utils.run import evaluating

Batches = Iterator[tuple[Tensor, list[Generator]]]  # pictures (b, 3, h, w), and for each its source of draws
Trained = tuple[Tensor, dict[str, Tensor], Tensor]


class FirstStage(AdversarialObjective):
    """A picture in, and back again: what all four share.

    Args:
        autoencoder: What is trained.
        args: Of the recipe.
        num_steps: Of the whole run.
        seed: Of the run.
        perceptual: A frozen network that compares pictures; none when unset.
        pictures: `(n) -> the first n pictures of the data set`, equal on every process.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        args: AutoencoderArgs,
        num_steps: int,
        *,
        seed: int = 0,
        perceptual: nn.Module | None = None,
        pictures: Callable[[int], Batches] | None = None,
    ):
        super().__init__()
        self.autoencoder, self.args, self.num_steps, self.seed = autoencoder, args, num_steps, seed
        self.pictures = pictures
        self.frozen = {"perceptual": perceptual}  # in a dictionary it is no part of a checkpoint

    @property
    def last_weight(self) -> Tensor:
        """The decoder's last weight."""
        return self.autoencoder.decoder.conv_out.weight

    def losses(self, batch: Tensor, generators: list[Generator], step: int) -> dict[str, Tensor]:
        """The weighted errors of pictures (b, 3, h, w) and the bottleneck's loss; `seen` is what `observe` wants."""
        args, perceptual = self.args, self.frozen["perceptual"]
        picture, terms, seen = self.reconstruction(batch, generators, step)
        picture = picture.float()
        error = picture - batch
        losses = {"l1": error.abs().mean(), "l2": error.square().mean(), **terms}
        total = args.l1_weight * losses["l1"] + args.l2_weight * losses["l2"]
        if perceptual is not None:
            perceptual.train(args.lpips_dropout)
            losses[perceptual.name] = perceptual(picture, batch).mean()
            total = total + args.perceptual_weight * losses[perceptual.name]
        losses["reconstruction"] = self.reconstruction_loss(total, batch[0].numel())
        losses["loss"] = losses["reconstruction"] + terms["bottleneck"]
        return {**losses, "real": batch, "fake": picture, "seen": seen}

    def fake(self, batch: Tensor, generators: list[Generator], step: int) -> Tensor:
        with running_statistics_kept(self):
            return self.reconstruction(batch, generators, step)[0]

    def reconstruction(self, image: Tensor, generators: list[Generator], step: int) -> Trained:
        """Returns the reconstruction (b, 3, h, w); scalars to log, of which `bottleneck` belongs to the loss; and what
        `observe` wants to see."""
        raise NotImplementedError

    @classmethod
    def starts_with_kmeans(cls, args: AutoencoderArgs) -> bool:
        """Whether the first codes are means of the pictures' latents."""
        return False

    def reconstruction_loss(self, error: Tensor, num_elements: int) -> Tensor:
        """The term of the loss that `error`, the mean error of an element, stands for (`--reduction`)."""
        return reconstruction_nll(error, num_elements, reduction=self.args.resolved_reduction)

    def latents(self, image: Tensor, generators: Sequence[Generator]) -> Tensor:
        """What a latent diffusion model learns, before scaling: float32 (b, d, h', w')."""
        raise NotImplementedError

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures as the finished autoencoder gives them back, and what `figures` wants to see; no draws."""
        raise NotImplementedError

    def figures(self, seen: Tensor) -> dict[str, float]:
        """Figures of the bottleneck over all validation pictures."""
        return {}


class CodebookObjective(FirstStage):
    """What the two kinds of codes share: the counts of codes."""

    autoencoder: Tokenizer
    usage: Tensor  # (k,), counts since the last restart

    def __init__(self, autoencoder: Tokenizer, args: AutoencoderArgs, num_steps: int, **more: Any):
        super().__init__(autoencoder, args, num_steps, **more)
        self.register_buffer("usage", torch.zeros(autoencoder.config.num_vq_embeddings))

    def latents(self, image: Tensor, generators: Sequence[Generator]) -> Tensor:
        return encode_latents(self.autoencoder, image).float()  # before the codes, as in Latent Diffusion

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        indices = encode_indices(self.autoencoder, image)
        return decode_indices(self.autoencoder, indices), indices

    def figures(self, seen: Tensor) -> dict[str, float]:
        counts = torch.bincount(seen.flatten(), minlength=len(self.usage))
        return {"codes_used": float((counts > 0).sum()), "codebook_perplexity": float(codebook_perplexity(counts))}

    def observe(self, found: Mapping[str, Tensor], weight: float, accelerator: Accelerator) -> None:
        if weight == 0:  # a process without samples of its own took another's
            counts = torch.zeros_like(self.usage)
        else:
            counts = torch.bincount(found["seen"].flatten(), minlength=len(self.usage)).float()
        self.usage += accelerator.reduce(counts, "sum")  # equal on all processes, as DDP wants buffers

    def logged(self) -> dict[str, float]:
        return {"usage_perplexity": float(codebook_perplexity(self.usage))}


class Quantized(CodebookObjective):
    """Nearest codes."""

    def __init__(self, autoencoder: Tokenizer, args: AutoencoderArgs, num_steps: int, **more: Any):
        super().__init__(autoencoder, args, num_steps, **more)
        self.first_step = 0 if args.pretrained_model_name_or_path else round(args.plain_fraction * num_steps)
        self.last_restart = round(args.restart_fraction * num_steps)

    @classmethod
    def starts_with_kmeans(cls, args: AutoencoderArgs) -> bool:
        return args.kmeans_samples > 0 and not args.pretrained_model_name_or_path

    @property
    def last_weight(self) -> Tensor:
        if isinstance(self.autoencoder, PaellaVQModel):
            return self.autoencoder.out_block[0].weight
        return super().last_weight

    def reconstruction(self, image: Tensor, generators: list[Generator], step: int) -> Trained:
        latents = encode_latents(self.autoencoder, image).float()
        codebook = codebook_weight(self.autoencoder)
        if step < self.first_step:  # still a plain autoencoder; the zero keeps the codebook in DDP's graph
            indices = torch.zeros(latents[:, 0].shape, dtype=torch.long, device=latents.device)
            picture = decode_latents(self.autoencoder, latents)
            return picture, {"bottleneck": 0.0 * codebook.sum()}, indices
        indices = nearest_codes(latents.detach(), codebook)
        codes, loss = vector_quantize(latents, codebook, indices, beta=self.args.commitment_beta)
        picture = decode_latents(self.autoencoder, codes)
        return picture, {"bottleneck": self.args.codebook_weight * loss}, indices

    @torch.no_grad()
    def before_step(self, batch: Tensor, own: int, step: int, accelerator: Accelerator) -> None:
        """Starts the codebook, and gives unused codes the place of a random latent of the batch."""
        weight = codebook_weight(self.autoencoder)
        if step == self.first_step and self.starts_with_kmeans(self.args):
            if accelerator.is_main_process:
                with running_statistics_kept(self.autoencoder):
                    latents = torch.cat([self.latents(*batch) for batch in self.pictures(self.args.kmeans_samples)])
                weight.copy_(kmeans_codebook(as_rows(latents), weight.shape[0], self.seed))
            # k-means enlarges what rounding makes different, and nothing later makes the processes equal again
            weight.copy_(broadcast(weight.clone()))
            self.usage.zero_()
        elif self.first_step < step <= self.last_restart and (step - self.first_step) % self.args.restart_steps == 0:
            dead = self.usage == 0
            with running_statistics_kept(self.autoencoder):
                latents = encode_latents(self.autoencoder, batch.to(weight.device)).float()
            counts = accelerator.gather(torch.tensor([own], device=latents.device)).tolist()
            parts = accelerator.gather(accelerator.pad_across_processes(latents))
            parts = parts.split(len(parts) // len(counts))
            latents = as_rows(torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]))
            rows = torch.randint(len(latents), (int(dead.sum()),), generator=keyed_generator(self.seed, step))
            weight[dead] = latents[rows.to(latents.device)]
            self.usage.zero_()


@contextmanager
def running_statistics_kept(network: nn.Module) -> Iterator[None]:
    """Batch norms use a batch's own statistics, as in training, but do not add them to what they keep for later."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def as_rows(latents: Tensor) -> Tensor:
    """(b, d, h, w) to (b*h*w, d)."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


class GumbelQuantized(CodebookObjective):
    """Gumbel-softmax codes, which need neither a start nor restarts."""

    autoencoder: GumbelVQModel

    def reconstruction(self, image: Tensor, generators: list[Generator], step: int) -> Trained:
        """Draws (k, h', w') uniforms a sample."""
        first, last = self.args.gumbel_temperature
        temperature = last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.num_steps)))
        logits = self.autoencoder.quantize_proj(self.autoencoder.encode(image).latents)
        uniforms = torch.stack([torch.rand(logits.shape[1:], generator=g) for g in generators]).to(logits.device)
        codes, divergence = gumbel_quantize(
            logits, self.autoencoder.quantize.embedding.weight, uniforms, temperature=temperature
        )
        picture = self.autoencoder.decode(codes, force_not_quantize=True).sample
        return picture, {"bottleneck": self.args.gumbel_kl_weight * divergence}, logits.argmax(1)


class Gaussian(FirstStage):
    """A Gaussian posterior held near N(0, 1), and one log-variance for all output elements."""

    autoencoder: AutoencoderKL

    def __init__(self, autoencoder: AutoencoderKL, args: AutoencoderArgs, num_steps: int, **more: Any):
        super().__init__(autoencoder, args, num_steps, **more)
        # The original's parameter is in no optimiser, so that it stays what it was at the start.
        self.logvar = nn.Parameter(torch.tensor(float(args.logvar_init)), requires_grad=args.learn_logvar)

    def moments(self, image: Tensor) -> Tensor:
        """(b, 2 d, h', w'), float32."""
        return self.autoencoder.encode(image).latent_dist.parameters.float()

    def reconstruction(self, image: Tensor, generators: list[Generator], step: int) -> Trained:
        """Draws (d, h', w') Gaussian values a sample."""
        moments = self.moments(image)
        divergence = kl_divergence(moments).mean()
        picture = self.autoencoder.decode(draw_posterior(moments, generators)).sample
        terms = {"bottleneck": self.args.kl_weight * divergence, "kl": divergence, "logvar": self.logvar.detach()}
        return picture, terms, moments.detach()

    def reconstruction_loss(self, error: Tensor, num_elements: int) -> Tensor:
        reduction = self.args.resolved_reduction
        return reconstruction_nll(error, num_elements, logvar=self.logvar, reduction=reduction)

    def latents(self, image: Tensor, generators: Sequence[Generator]) -> Tensor:
        moments = self.moments(image)
        return draw_posterior(moments, generators)

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.autoencoder.encode(image).latent_dist
        return self.autoencoder.decode(posterior.mode()).sample, posterior.parameters

    def figures(self, seen: Tensor) -> dict[str, float]:
        return {"validation_kl": float(kl_divergence(seen).mean())}


OBJECTIVES = {"vq": Quantized, "paella_vq": Quantized, "gumbel_vq": GumbelQuantized, "kl": Gaussian}


def check_sizes(
    args: AutoencoderArgs, resolution: int, factor: int, num_pictures: int, num_validation: int = 2
) -> None:
    """Refuses now what would otherwise stop the run in its middle: the discriminator's start, the k-means, the report.

    Raises:
        ValueError: the pictures are too small for the discriminator, or too few for a first codebook or a covariance.
    """
    if args.feature_model and num_validation < 2:
        raise ValueError(
            f"--feature_model needs at least 2 validation pictures, got {num_validation}: raise --validation_samples, "
            "or use more pictures (a tenth of them is held out)."
        )
    smallest = 3 * 2**args.disc_layers
    if args.disc_start is not None and resolution < smallest:
        raise ValueError(
            f"--resolution={resolution} is too small for --disc_layers={args.disc_layers}, which needs {smallest} "
            "pixels a side."
        )
    num_latents = min(args.kmeans_samples, num_pictures) * (resolution // factor) ** 2
    if OBJECTIVES[args.model].starts_with_kmeans(args) and num_latents < args.num_vq_embeddings:
        raise ValueError(
            f"--num_vq_embeddings={args.num_vq_embeddings} codes cannot start from the {num_latents} latents of "
            f"{min(args.kmeans_samples, num_pictures)} pictures: raise --kmeans_samples, use more pictures, or fewer "
            "codes."
        )


def store_scale(objective: FirstStage, pictures: Batches) -> None:
    """Writes 1 / std of the pictures' latents into the autoencoder's config, where diffusers' pipelines look."""
    with evaluating(objective):
        latents = torch.cat([objective.latents(*batch) for batch in pictures])
    objective.autoencoder.register_to_config(scaling_factor=latent_scale(latents))
