"""Truncated and non-truncated conditioning augmentation around any sound sampler.

Ho, Saharia, Chan, Fleet, Norouzi, Salimans, "Cascaded Diffusion Models for High Fidelity Image Generation", arXiv
2106.15282, section 3. Its authors released no code. A super-resolution stage is trained on low-resolution images that
carry noise, z_s ~ q(z_s | z_0). To sample it,
- truncated: the low-resolution stage stops at s, which gives z_s;
- non-truncated: it runs to its end, and z_0 is noised to s again.

Levels are the paper's: s counts steps of noise, from 0 (clean) over 1 (the noise of timestep 0) to T. A sample at s is
what a network sees at timestep s - 1. Between whole numbers the ratio of noise and signal is interpolated.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .adapter import SchedulerAdapter, handed_on
from .gaussian import scheduler_attribute, scheduler_chain, scheduler_setting

# Measured with the exact prediction for Gaussian data (tests/schedulers/test_truncated_conditioning.py): after each of
# their steps the sample has the noise of the next timestep. LCM's has too little.
ON_THE_GRID = {
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "RespacedScheduler", "SASolverScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
}  # fmt: skip
# These run any list of timesteps, so they stop at any whole level.
ANYWHERE = {
    "DDPMScheduler", "DDPMParallelScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
    "RespacedScheduler",
}  # fmt: skip
# These step down by T // n, whatever their list says; with "linspace" the two differ.
STRIDES = {"DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"}
# With these set, samplers take no list.
OWN_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_NEAR = 6e-3  # by which a level may miss a timestep of the grid, which need not be whole


class TruncatedConditioningScheduler(SchedulerAdapter):
    """Stops a sampler at a level of noise, and noises finished samples to any level.

    Example:

        scheduler = TruncatedConditioningScheduler(DDPMScheduler.from_config(config))
        scheduler.set_timesteps(100, stop_level=251)       # the last of `scheduler.timesteps` leads to z_251
        scheduler.set_timesteps(100, stop_level=[251, 0])  # to the end; `scheduler.captured[251]` is z_251
        z_251 = scheduler.corrupt(z_0, 251, generator=generator)

    Args:
        scheduler: The sampler, see `SchedulerAdapter`.
        stop_level: Where to stop when `set_timesteps` does not say. 0 is the clean end.
    """

    def __init__(self, scheduler: Any = None, stop_level: float = 0):
        super().__init__(scheduler, stop_level=stop_level)
        check_level("stop_level", stop_level, self.num_levels)
        self.stop_level = stop_level
        self.captured: dict[float, Tensor] = {}
        self._visible: int | None = None  # how many of the held scheduler's timesteps are run; None: all
        self._stops: dict[int, float] = {}  # how many steps have been made when a level is reached -> the level
        self._made = 0

    @property
    def num_levels(self) -> int:
        """T: the level of (nearly) nothing but noise."""
        return int(scheduler_setting(self, "num_train_timesteps"))

    @property
    def timesteps(self) -> Tensor:
        """The timesteps that are run. That of the level where it stops is not among them."""
        return self.scheduler.timesteps[: self._visible]

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self.scheduler.timesteps, self._visible = timesteps, None

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        timesteps: Any = None,
        stop_level: float | Sequence[float] | None = None,
    ) -> None:
        """Chooses the steps, and where they stop.

        Args:
            num_inference_steps: Number of steps from pure noise to the clean end, of which the last are left out.
            device: Where `timesteps` will be.
            timesteps: A list in place of `num_inference_steps`, for samplers that take one.
            stop_level: The level s of the result. Or several: the run ends at the lowest, and the samples at all of
                them are in `captured`. By default the one of the config.

        Raises:
            ValueError: For a level that the sampler does not reach with these steps (lists those that it does), a
                sampler for which stopping is unsound, and what the sampler itself refuses.
        """
        stops: list[Any] = list(stop_level) if isinstance(stop_level, (list, tuple)) else [stop_level]
        stops = [self.config["stop_level"] if level is None else level for level in stops]
        if not stops:
            raise ValueError("`stop_level` is an empty list: pass a level, 0 for the clean end.")
        for level in stops:
            check_level("stop_level", level, self.num_levels)
        stops = sorted(set(stops), reverse=True)
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(device=device, timesteps=timesteps)
        self.captured, self._made, self._visible = {}, 0, None
        self.stop_level = stops[-1]
        noisy = [level for level in stops if level > 0]
        if noisy:
            self._check_sound()
        places = {level: self._place(level) for level in noisy}
        if None in places.values():
            places = self._insert(noisy, stops[-1], num_inference_steps, device)
        self._stops = {place: level for level, place in places.items() if place is not None}
        if stops[-1] > 0:
            self._visible = places[stops[-1]]
        else:
            self._stops[len(self.scheduler.timesteps)] = stops[-1]

    @handed_on
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **inner: Any) -> SchedulerOutput | tuple:
        """A step of the sampler. What reaches one of the levels is kept in `captured`, as `to_vp` gives it."""
        result = self.scheduler.step(model_output, timestep, sample, **inner)
        self._made += 1
        if self._made in self._stops and len(self._stops) > 1:
            level = self._stops[self._made]
            self.captured[level] = self.to_vp(result[0], level)
        return result

    def corrupt(
        self,
        sample: Tensor,
        level: float | Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Noises clean samples to a level: sqrt(abar) * sample + sqrt(1 - abar) * noise.

        Args:
            sample: Clean samples (b, ...).
            level: s in [0, T], whole or not, one for all or a tensor (b,). At 0 a sample stays as it is, and the
                number 0 draws nothing.
            noise: Standard normal noise of the sample's shape, in place of a draw.
            generator: One for the batch, or a list with one a sample.
        """
        check_level("level", level, self.num_levels, batch=len(sample))
        if not isinstance(level, Tensor) and level == 0:
            return sample
        if noise is None:
            generator = list(generator) if isinstance(generator, tuple) else generator
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        if tuple(noise.shape) != tuple(sample.shape):
            raise ValueError(f"`noise` has shape {tuple(noise.shape)}; that of `sample` is {tuple(sample.shape)}.")
        signal = self._signal(level)
        shape = (-1, *[1] * (sample.ndim - 1))
        parts = (signal, (1 - signal.square()).clamp(min=0).sqrt())
        signal, noise_level = (part.float().to(sample.device).reshape(shape) for part in parts)
        return (signal * sample.float() + noise_level * noise.to(sample.device).float()).to(sample.dtype)

    def to_vp(self, sample: Tensor, level: float | None = None) -> Tensor:
        """A sample of the held scheduler as sqrt(abar) * clean + sqrt(1 - abar) * noise.

        Euler, Heun, LMS and the like keep clean + sigma * noise. All others keep it in this form already.

        Args:
            sample: As the scheduler's steps left it.
            level: Its noise, by default the level where the run stops.
        """
        if float(self.init_noise_sigma) == 1.0:
            return sample
        return sample * float(self._signal(self.stop_level if level is None else level))

    def alphas_cumprod_at(self, level: float | Tensor) -> Tensor:
        """abar at a level, float64 on the CPU in the shape of `level`: 1 at level 0."""
        return self._signal(level).square().reshape(level.shape if isinstance(level, Tensor) else ())

    def valid_stop_levels(self) -> list[float]:
        """The levels at which a run of the steps that are set can stop, from the noisiest to 0.

        Samplers in `ANYWHERE` stop at all whole levels below the first of their timesteps as well.
        """
        grid = [float(timestep) for timestep in self.scheduler.timesteps.tolist()]
        levels = {place: timestep + 1 for place, timestep in enumerate(grid) if self._reaches(place, grid)}
        return [int(level) if level.is_integer() else round(level, 2) for level in dict.fromkeys(levels.values())] + [
            0
        ]

    def _signal(self, level: float | Tensor) -> Tensor:
        """sqrt(abar) at levels, float64 on the CPU: (1,) or (b,)."""
        abar = scheduler_attribute(self, "alphas_cumprod")
        if abar is None:
            name = type(scheduler_chain(self)[-1]).__name__
            raise ValueError(
                f"{name} has no `alphas_cumprod`, the noise levels of a training with betas: use another."
            )
        abar = abar.cpu().double()
        ratios = torch.cat([abar.new_zeros(1), ((1 - abar) / abar).sqrt()])  # of noise and signal at 0, 1 ... T
        levels = torch.as_tensor(level).detach().cpu().double().reshape(-1)
        low = levels.long()
        share, high = levels - low, (low + 1).clamp(max=len(abar))
        ratio = torch.where(share > 0, torch.lerp(ratios[low], ratios[high], share), ratios[low])
        return (1 + ratio.square()).rsqrt()

    def _is_one_of(self, names: set[str]) -> bool:
        return any(kind.__name__ in names for kind in type(scheduler_chain(self)[-1]).__mro__)

    def _check_sound(self) -> None:
        if not self._is_one_of(ON_THE_GRID):
            name = type(scheduler_chain(self)[-1]).__name__
            raise ValueError(
                f"{name} cannot stop at a level of noise: its samples do not carry the noise of its next timestep."
                f" Use one of {', '.join(sorted(ON_THE_GRID))}, or `stop_level=0` and `corrupt`."
            )

    def _reaches(self, place: int, grid: list[float]) -> bool:
        """Whether a sample that has made `place` steps carries the noise of the grid's timestep at that place."""
        if place == 0 or place % self.order:  # no step, or half of one
            return False
        before, here = grid[place - 1 : place + 1]
        if self.order == 1 and grid[place + 1 : place + 2] == [here]:  # PNDM makes its second step twice
            return False
        stride = self.num_levels // max(int(self.scheduler.num_inference_steps or 1), 1)
        return not self._is_one_of(STRIDES) or before == here or before - stride == here

    def _place(self, level: float) -> int | None:
        """The number of steps after which the sample is at a level, or None if it is at none."""
        grid = [float(timestep) for timestep in self.scheduler.timesteps.tolist()]
        places = [place for place, timestep in enumerate(grid) if abs(timestep + 1 - level) < _NEAR]
        return next((place for place in places if self._reaches(place, grid)), None)

    def _insert(
        self, levels: list[float], last: float, num_inference_steps: Any, device: Any
    ) -> dict[float, int | None]:
        """Puts the timesteps of levels into the list of a sampler that runs any list, up to the last level.

        Returns:
            Their places in it.
        """
        grid = [float(timestep) for timestep in self.scheduler.timesteps.tolist()]
        whole = all(float(level).is_integer() for level in levels)
        if not whole or not self._is_one_of(ANYWHERE) or max(levels) - 1 >= max(grid):
            raise ValueError(self._unreached(levels))
        stops = {int(level) - 1 for level in levels}
        kept = sorted({int(timestep) for timestep in grid if timestep > last - 1} | stops, reverse=True)
        try:
            self.scheduler.set_timesteps(device=device, timesteps=kept)
        except ValueError as error:  # spacings of their own, such as Karras'
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            raise ValueError(f"{self._unreached(levels)} ({error})") from error
        return {level: kept.index(int(level) - 1) for level in levels}

    def _unreached(self, levels: list[float]) -> str:
        missed = [level for level in levels if self._place(level) is None]
        anywhere = ""
        if self._is_one_of(ANYWHERE) and not any(scheduler_setting(self, spacing, False) for spacing in OWN_SPACINGS):
            first = int(self.scheduler.timesteps.max())
            missed = [level for level in missed if level > first or not float(level).is_integer()] or missed
            anywhere = f", and at any whole level up to {first}"
        valid = self.valid_stop_levels()
        shown = ", ".join(map(str, valid)) if len(valid) <= 60 else f"{', '.join(map(str, valid[:60]))} ..."
        name = type(scheduler_chain(self)[-1]).__name__
        return (
            f"`stop_level` is {', '.join(map(str, missed))}, where {name} does not stop with these steps. It stops"
            f" at {shown}{anywhere}. Other steps stop elsewhere; `corrupt` noises a finished sample to any level."
        )


def check_level(name: str, level: Any, last: float, batch: int | None = None) -> None:
    """A number from 0 to T, or a tensor with one a sample.

    Raises:
        TypeError, ValueError: Naming the argument, its value and what is allowed.
    """
    if isinstance(level, Tensor) and level.ndim > 0 and batch is not None:
        if tuple(level.shape) not in ((1,), (batch,)):
            raise ValueError(f"`{name}` has shape {tuple(level.shape)}: pass one number, or one a sample ({batch},).")
        values = level.detach().cpu().double()
        if bool(((values < 0) | (values > last) | values.isnan()).any()):
            raise ValueError(f"`{name}` is {values.tolist()}: levels lie between 0 (clean) and {last}.")
        return
    if isinstance(level, Tensor) and level.ndim == 0:
        level = level.item()
    if isinstance(level, bool) or not isinstance(level, numbers.Real):
        raise TypeError(f"`{name}` must be a number of steps of noise, received {level!r}.")
    if not 0 <= float(level) <= last:
        raise ValueError(f"`{name}` is {level}: it must lie between 0 (clean) and {last}.")
