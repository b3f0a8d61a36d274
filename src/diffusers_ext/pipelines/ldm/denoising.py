"""What the latent-diffusion pipelines share in a denoising step.

Rombach et al., arXiv 2112.10752; the original's sampler: CompVis/latent-diffusion@a506df5:ldm/models/diffusion/ddim.py
(DDIM, arXiv 2010.02502, eq. 12 and 16). The steps themselves are the scheduler's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ...guidance import classifier_free_guidance
from .tiling import TileGrid


def predict_noise(
    unet: UNet2DModel | UNet2DConditionModel,
    latents: Tensor,
    timestep: Tensor | int,
    *,
    context: Tensor | None = None,
    null_context: Tensor | None = None,
    concat: Sequence[Tensor] = (),
    null_concat: Sequence[Tensor] | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """The network's prediction for all of the conditions of section 3.3, guided if asked for.

    Args:
        unet: takes cross-attention exactly if `context` is given.
        latents: noisy latents (b, c, h, w), already scaled as the scheduler wants them.
        timestep: one for all, or (b,).
        context: sequences (b, l, d) for cross-attention.
        null_context: what stands for "no condition", (b, l, d) or (1, l, d).
        concat: maps (b, c', h, w), put behind the latents in this order.
        null_concat: what stands there for "no condition", of the same shapes; by default the same maps.
        guidance_scale: 1 means no guidance, and half the work; ignored without a null condition.

    Returns:
        (b, c, h, w).
    """
    sample = torch.cat([latents, *(maps.to(latents) for maps in concat)], dim=1)
    context = None if context is None else context.to(latents)
    if guidance_scale == 1.0 or (null_context is None and null_concat is None):
        return _call(unet, sample, timestep, context)
    null_maps = concat if null_concat is None else null_concat
    null_sample = torch.cat([latents, *(maps.to(latents) for maps in null_maps)], dim=1)
    if context is not None:
        null = context if null_context is None else null_context.to(latents).expand_as(context)
        context = torch.cat([null, context])
    if isinstance(timestep, Tensor) and timestep.ndim == 1 and len(timestep) == len(latents):
        timestep = timestep.repeat(2)
    uncond, cond = _call(unet, torch.cat([null_sample, sample]), timestep, context).chunk(2)
    return classifier_free_guidance(cond, uncond, guidance_scale)


def _call(unet: torch.nn.Module, sample: Tensor, timestep: Tensor | int, context: Tensor | None) -> Tensor:
    return unet(sample, timestep, *(() if context is None else (context,)), return_dict=False)[0]


@dataclass
class LDMCondition:
    """What the network is told besides the noisy latents, during a whole run. All of it may be missing.

    Args:
        context, null_context: sequences (b, l, d) for cross-attention; of a layout under tiles those of the whole.
        concat, null_concat: maps (b, c', h, w) behind the latents.
        tile_contexts: a context for each tile in place of `context`.
    """

    context: Tensor | None = None
    null_context: Tensor | None = None
    concat: Tensor | None = None
    null_concat: Tensor | None = None
    tile_contexts: Sequence[Tensor] | None = None

    @property
    def embeds(self) -> Tensor | None:
        """The condition as a callback sees it: context (b, l, d), of tiles (b, tiles, l, d), or maps (b, c', h, w)."""
        if self.tile_contexts is not None:
            return torch.stack(list(self.tile_contexts), dim=1)
        return self.concat if self.context is None else self.context

    @property
    def null_embeds(self) -> Tensor | None:
        """The null branch as a callback sees it, in the shape of `embeds`; None without guidance."""
        if self.null_context is None or self.embeds is None:
            return self.null_concat
        null = self.null_context if self.tile_contexts is None else self.null_context[:, None]
        return null.expand_as(self.embeds)

    def replace(self, embeds: Tensor | None, null_embeds: Tensor | None) -> None:
        """Takes what a callback returned, in the shapes of `embeds` and `null_embeds`; None changes nothing."""
        if embeds is not None and self.tile_contexts is not None:
            self.tile_contexts = embeds.unbind(1)
        elif embeds is not None and self.context is None:
            self.concat = embeds
        elif embeds is not None:
            self.context = embeds
        if null_embeds is not None and self.tile_contexts is not None:
            self.null_context = null_embeds[:, 0]  # that of all tiles
        elif null_embeds is not None and self.context is None:
            self.null_concat = null_embeds
        elif null_embeds is not None:
            self.null_context = null_embeds

    def predict(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        latents: Tensor,
        timestep: Tensor | int,
        *,
        guidance_scale: float = 1.0,
        grid: TileGrid | None = None,
    ) -> Tensor:
        """`predict_noise` under this condition, (b, c, h, w); tile by tile if there is a `grid` over the latents.

        Maps are cut like the latents.
        """
        maps = [] if self.concat is None else [self.concat]
        null_maps = [] if self.null_concat is None else [self.null_concat]

        def predict(latents: Tensor, context: Tensor | None, cut: Sequence[Tensor]) -> Tensor:
            return predict_noise(
                unet,
                latents,
                timestep,
                context=context,
                null_context=self.null_context,
                concat=cut[: len(maps)],
                null_concat=cut[len(maps) :] or None,
                guidance_scale=guidance_scale,
            )

        if grid is None:
            return predict(latents, self.context, [*maps, *null_maps])
        contexts = [self.context] * len(grid) if self.tile_contexts is None else self.tile_contexts
        tiles = zip(*(grid.cut(values) for values in (latents, *maps, *null_maps)), strict=True)
        return grid.blend(predict(tile[0], context, tile[1:]) for context, tile in zip(contexts, tiles, strict=True))


def keep_known_latents(
    latents: Tensor, known_latents: Tensor, mask: Tensor, noise: Tensor, scheduler: SchedulerMixin, timestep: Tensor
) -> Tensor:
    """Before a step, puts the known part back in at the noise level of the step: unconditional inpainting.

    Args:
        latents: (b, c, h, w), at `timestep`.
        known_latents: clean, (b, c, h, w).
        mask: (b, 1, h, w), 1 where to keep what is known.
        noise: (b, c, h, w), fresh for each step.
        scheduler: any with `add_noise`.
        timestep: of this step.
    """
    noisy = scheduler.add_noise(known_latents, noise, timestep.reshape(1))  # type: ignore[attr-defined]
    return noisy * mask + latents * (1 - mask)


@dataclass(frozen=True)
class KnownRegion:
    """The part of a picture that an unconditional run has to keep.

    Args:
        latents: scaled and clean, (1 or b, c, h, w).
        mask: (1 or b, 1, h, w), 1 where to keep them.
    """

    latents: Tensor
    mask: Tensor

    def put_back(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        scheduler: SchedulerMixin | None = None,
        timestep: Tensor | None = None,
    ) -> Tensor:
        """The known part in `latents` (b, c, h, w), at the noise level of a timestep; clean without one."""
        known, mask = self.latents.expand_as(latents), self.mask
        if noise is None or scheduler is None or timestep is None:
            return known * mask + latents * (1 - mask)
        return keep_known_latents(latents, known, mask, noise, scheduler, timestep)
