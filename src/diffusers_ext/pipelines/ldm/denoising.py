"""What the latent-diffusion pipelines tell the network in a denoising step, and what it predicts.

Rombach et al., arXiv 2112.10752; the original's sampler: CompVis/latent-diffusion@a506df5:ldm/models/diffusion/ddim.py
(DDIM, arXiv 2010.02502, eq. 12 and 16). The steps themselves are the scheduler's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ...guidance import Inputs, both_branches, guide
from .tiling import TileGrid


@dataclass(frozen=True)
class LDMCondition:
    """What the network is told besides the noisy latents. All of it may be missing.

    Args:
        context: sequences (b, l, d) for cross-attention. In tiles it may be a list with one for each tile.
        null_context: what stands for "no condition", (b, l, d) or (1, l, d). It is the same for all tiles.
        concat: maps (b, c', h, w) behind the latents.
        null_concat: what stands there for "no condition", of the same shape.
    """

    context: Tensor | list[Tensor] | None = None
    null_context: Tensor | None = None
    concat: Tensor | None = None
    null_concat: Tensor | None = None

    def branches(self, latents: Tensor) -> tuple[Inputs, Inputs | None]:
        """The inputs (latents, maps, context) of the conditional and of the null branch, for `both_branches`."""
        maps = None if self.concat is None else self.concat.to(latents)
        context: Tensor | list[Tensor] | None = None
        if isinstance(self.context, list):
            context = [tile.to(latents) for tile in self.context]
        elif self.context is not None:
            context = self.context.to(latents)
        if self.null_context is None and self.null_concat is None:
            return (latents, maps, context), None
        null_maps = maps if self.null_concat is None else self.null_concat.to(latents)
        null_context = context
        if self.null_context is not None and context is not None:
            null = self.null_context.to(latents)
            in_tiles = isinstance(context, list)
            null_context = [null.expand_as(tile) for tile in context] if in_tiles else null.expand_as(context)
        return (latents, maps, context), (latents, null_maps, null_context)

    @property
    def embeds(self) -> Tensor | None:
        """The condition as callbacks see it: context (b, l, d), of tiles (b, tiles, l, d), or maps (b, c', h, w)."""
        if isinstance(self.context, list):
            return torch.stack(self.context, dim=1)
        return self.concat if self.context is None else self.context

    @property
    def null_embeds(self) -> Tensor | None:
        """The null branch as callbacks see it, in the shape of `embeds`. It is None without guidance."""
        if self.null_context is None or self.embeds is None:
            return self.null_concat
        null = self.null_context[:, None] if isinstance(self.context, list) else self.null_context
        return null.expand_as(self.embeds)

    def replace_embeds(self, embeds: Tensor | None, null_embeds: Tensor | None) -> "LDMCondition":
        """The condition with what a callback returned, in the shapes of `embeds` and `null_embeds`.

        None changes nothing.
        """
        changes: dict[str, Tensor | list[Tensor]] = {}
        if embeds is not None:
            in_tiles = isinstance(self.context, list)
            changes["concat" if self.context is None else "context"] = list(embeds.unbind(1)) if in_tiles else embeds
        if null_embeds is not None:
            null = null_embeds[:, 0] if isinstance(self.context, list) else null_embeds  # that of all tiles
            changes["null_concat" if self.context is None else "null_context"] = null
        return replace(self, **changes)  # type: ignore[arg-type] # one type a field


def call_unet(
    unet: UNet2DModel | UNet2DConditionModel,
    timestep: Tensor | int,
    latents: Tensor,
    maps: Tensor | None = None,
    context: Tensor | None = None,
) -> Tensor:
    """The prediction (b, c, h, w) of a network for latents (b, c, h, w), already scaled as the scheduler wants them.

    Args:
        unet: takes cross-attention exactly if `context` is given.
        timestep: one for all, or (b,). Where `latents` hold both branches, those of one branch are enough.
        maps: (b, c', h, w), put behind the latents.
        context: sequences (b, l, d) for cross-attention.
    """
    if isinstance(timestep, Tensor) and timestep.ndim == 1 and len(latents) == 2 * len(timestep):
        timestep = timestep.repeat(2)
    sample = latents if maps is None else torch.cat([latents, maps], dim=1)
    return unet(sample, timestep, *(() if context is None else (context,)), return_dict=False)[0]


def call_unet_in_tiles(
    unet: UNet2DModel | UNet2DConditionModel,
    grid: TileGrid,
    timestep: Tensor | int,
    latents: Tensor,
    maps: Tensor | None = None,
    context: Tensor | list[Tensor] | None = None,
) -> Tensor:
    """As `call_unet`, tile by tile. Maps are cut like the latents; `context` may be a list with one for each tile."""
    contexts = context if isinstance(context, list) else [context] * len(grid)
    cuts = [None] * len(grid) if maps is None else grid.cut(maps)
    tiles = zip(grid.cut(latents), cuts, contexts, strict=True)
    return grid.blend(call_unet(unet, timestep, *tile) for tile in tiles)


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
    maps = torch.cat([one.to(latents) for one in concat], dim=1) if concat else None
    null_maps = torch.cat([one.to(latents) for one in null_concat], dim=1) if null_concat else None
    condition = LDMCondition(context, null_context, maps, null_maps)
    cond, uncond = both_branches(partial(call_unet, unet, timestep), *condition.branches(latents), guidance_scale)
    return guide(cond, uncond, guidance_scale)


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
    """The part of an image that an unconditional run has to keep.

    Args:
        latents: scaled and clean, (1 or b, c, h, w).
        mask: (1 or b, 1, h, w), 1 where to keep them.
    """

    latents: Tensor
    mask: Tensor

    def put_back(self, latents: Tensor) -> Tensor:
        """`latents` (b, c, h, w) with the known part in its place, clean: the end of a run."""
        return self.latents.expand_as(latents) * self.mask + latents * (1 - self.mask)

    def put_back_noisy(self, latents: Tensor, noise: Tensor, scheduler: SchedulerMixin, timestep: Tensor) -> Tensor:
        """`latents` with the known part in its place at the noise level of a timestep, see `keep_known_latents`."""
        return keep_known_latents(latents, self.latents.expand_as(latents), self.mask, noise, scheduler, timestep)
