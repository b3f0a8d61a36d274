"""Discrete renoising: the sampler and the corruption process of Paella, on vector-quantized tokens.

Paper: Rampas, Pernias, Zhong, Aubreville, "Fast Text-Conditional Discrete Denoising on Vector-Quantized Latent
Spaces", arXiv 2211.07292 (its November 2022 text is "v1" here, its 2023 text "v3"). Locally typical sampling: Meister
et al., arXiv 2202.00666. Confidence-ordered positions: MaskGIT, arXiv 2202.04200. Original code (MIT, weights MIT):
dome272/Paella@b1f88ef (v1) and @e1ab72b (v3).

Differences from the original: probabilities are clamped to [0, 1]; the filter is safe for every mass in (0, 1];
positions may also be chosen by confidence; every draw takes a generator and can be injected; masks exist for v3 too.

Letters in shape comments: b images, v token classes, (h, w) the token grid, n = b*h*w rows of logits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from torch import Generator, Tensor

from .token_sampling import (
    check_choice,
    check_integer,
    check_levels,
    check_logits,
    check_mask,
    check_temperature,
    check_tokens,
    check_typical,
    discrete_renoising_step,
    replaced_positions,
    typical_filter,  # noqa: F401 (public here)
    unfit_positions,
)

Generators = Generator | Sequence[Generator] | None
_CHOICES = {
    "noise_schedule": ("cosine", "linear"),
    "time_convention": ("v1", "v3"),
    "sampling": ("gumbel", "multinomial", "argmax"),
    "renoise_mode": ("start", "prev", "rand"),
    "renoise_positions": ("random", "confidence"),
}


@dataclass
class DiscreteRenoisingSchedulerOutput(BaseOutput):
    """What one step returns.

    Attributes:
        prev_sample: LongTensor (b, h, w), the tokens that the model receives next (partly renoised).
        pred_original_sample: LongTensor (b, h, w), the tokens drawn for the clean image, kept positions restored.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


@dataclass(frozen=True)
class RenoisingDraws:
    """Random numbers of one step that are passed in, for a replay. What is None is drawn.

    Attributes:
        gumbel_uniforms: (b*h*w, v) in [0, 1), for `sampling="gumbel"`.
        exponentials: (b*h*w, v) of Exp(1), for `sampling="multinomial"`.
        cdf_uniforms: (b*h*w, 2) in [0, 1), for `sampling="multinomial"`.
        renoise_uniforms: (b, h, w) in [0, 1), which choose the positions.
        renoise_mask: (b, h, w), 1 where a token is renoised. `renoise_uniforms` are then not drawn.
        renoise_tokens: LongTensor (b, h, w), random tokens for `renoise_mode="rand"`.
    """

    gumbel_uniforms: Tensor | None = None
    exponentials: Tensor | None = None
    cdf_uniforms: Tensor | None = None
    renoise_uniforms: Tensor | None = None
    renoise_mask: Tensor | None = None
    renoise_tokens: Tensor | None = None

    def of_tokens(self, sampling: str, logits: Tensor, generator: Generators = None) -> tuple[str, Tensor | None]:
        """How `sample_tokens` is to draw from logits (b, v, h, w), and its draws as rows (b*h*w, ...)."""
        b, v, h, w = logits.shape
        forms = {  # name of the draw -> how it is used, its width
            "gumbel": {"gumbel_uniforms": ("gumbel", v)},
            "multinomial": {"exponentials": ("race", v), "cdf_uniforms": ("inverse_cdf", 2)},
            "argmax": {},
        }[sampling]
        names = ("gumbel_uniforms", "exponentials", "cdf_uniforms")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(given) > 1 or not given.keys() <= forms.keys():
            raise ValueError(
                f"the injected draws {', '.join(f'`{name}`' for name in given)} do not fit sampling={sampling!r},"
                f" which takes {' or '.join(f'`{name}`' for name in forms) or 'none'}."
            )
        if not forms:
            return "argmax", None
        name = next(iter(given), list(forms)[-1])
        how, width = forms[name]
        if given:
            return how, fitting_draw(name, given[name], (b * h * w, width), logits.device)
        return how, draw(torch.rand, (b, h * w, width), generator, logits.device).flatten(0, 1)


class DiscreteRenoisingScheduler(SchedulerMixin, ConfigMixin):
    """Scheduler of Paella: replace tokens by random ones (training), predict and partly renoise (sampling).

    Time is continuous. A level of noise is a number in [0, 1], `r` in the v1 convention (0 = all noise, 1 = clean),
    `t` in the v3 convention (1 = all noise, 0 = clean); the share of replaced tokens there is `noise_ratio(level)`.
    A step (arXiv 2211.07292, section 3) draws every token from the model's prediction and then replaces the share of
    the *next* level: by the tokens the run started from (`start`), by those the step started from (`prev`), or by
    fresh random ones (`rand`). The scheduler holds the grid of one run and nothing else, so a step depends only on
    its arguments.

    Settings of the releases: v1 as the defaults here; v3 is `noise_schedule="linear", time_convention="v3",
    sampling="multinomial", typical_filtering=False, temperature=(0.7, 0.3)`.

    Order of draws in `step` (with a list of generators: in this order from each image's own): the tokens (`gumbel`:
    uniforms (h*w, v); `multinomial`: uniforms (h*w, 2); `argmax`: none), then, if the step renoises, uniforms (h, w)
    for the positions, then, for `rand`, random tokens (h, w). In `add_noise`: uniforms (h, w), then random tokens
    (h, w). An injected draw replaces its own and consumes nothing. Draws happen on the generator's device.

    Args:
        num_vec_classes: number of tokens v in the codebook.
        noise_schedule: share of replaced tokens over the run, from 1 to 0: `cosine` or `linear`.
        time_convention: `v1` or `v3`, see above; also how ties between uniform and share fall (`<` and `<=`).
        sampling: how tokens are drawn, `gumbel`, `multinomial` (equal in law) or `argmax`.
        typical_filtering: filter the logits by `typical_filter` first.
        typical_mass: probability that the filter keeps, in (0, 1].
        typical_min_tokens: number of tokens that the filter keeps at least.
        renoise_mode: what renoised positions receive: `start`, `prev` or `rand`.
        renoise_positions: `random` (the original), or `confidence`: of every image the least probable drawn tokens.
        temperature: first and last step's temperature, linear in between; divides the filtered logits.
    """

    order = 1
    init_noise_sigma = 1.0  # the initial tokens are uniform over the codebook, nothing to scale
    _compatibles: list[str] = []

    @register_to_config
    def __init__(
        self,
        num_vec_classes: int = 8192,
        noise_schedule: str = "cosine",
        time_convention: str = "v1",
        sampling: str = "gumbel",
        typical_filtering: bool = True,
        typical_mass: float = 0.2,
        typical_min_tokens: int = 1,
        renoise_mode: str = "start",
        renoise_positions: str = "random",
        temperature: tuple[float, float] = (1.0, 1.0),
    ):
        if isinstance(num_vec_classes, bool) or not isinstance(num_vec_classes, int) or num_vec_classes < 2:
            raise ValueError(f"`num_vec_classes` must be an integer >= 2, got {num_vec_classes!r}.")
        check_choice("noise_schedule", noise_schedule, _CHOICES["noise_schedule"])
        check_choice("time_convention", time_convention, _CHOICES["time_convention"])
        check_choice("sampling", sampling, _CHOICES["sampling"])
        check_choice("renoise_mode", renoise_mode, _CHOICES["renoise_mode"])
        check_choice("renoise_positions", renoise_positions, _CHOICES["renoise_positions"])
        check_typical(typical_mass, typical_min_tokens)
        # a list, as it comes back from a file: a loaded scheduler has the same config
        self.register_to_config(temperature=list(check_temperature(temperature)))
        self.set_timesteps(12)  # the original's default, so that `timesteps` and `len` are never empty
        self.num_inference_steps = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        # diffusers looks names up on its own module only, where this class need not be registered
        return [cls, *(c for c in super()._get_compatibles() if c is not cls)]

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Tokens need no scaling: returns `sample`."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        timesteps: Sequence[float] | Tensor | None = None,
        temperature: tuple[float, float] | None = None,
        start_index: int = 0,
        renoise_steps: int | None = None,
        renoise_mode: str | None = None,
        t_start: float | None = None,
        t_end: float | None = None,
    ) -> None:
        """Lay out one run; everything of an earlier run is forgotten.

        Sets `timesteps` (float32, what the model receives), `renoise_levels` (the level after each step) and
        `temperatures`, all without the first `start_index` steps, and `num_inference_steps` (with them).

        Args:
            num_inference_steps: steps T of the whole grid, >= 1. v1: r_i = i / T; v3: T + 1 points from `t_start` to
                `t_end`, of which the last is only renoised to.
            device: where the tables live.
            timesteps: custom levels instead, in descending noise; after the last one comes the clean level.
            temperature: first and last temperature of the whole grid, >= 0. Default: the config's.
            start_index: first step that is run, 0..T-1, as for editing from tokens noised to `timesteps[0]`.
            renoise_steps: renoise after steps of index below this (counted from the grid's start, not from
                `start_index`), 0..T. Default: T - 1, that is after all but the last.
            renoise_mode: overrides the config's for this run.
            t_start: v3 only, first level. Default 1.
            t_end: v3 only, level after the last step. Default 0.

        Raises:
            ValueError: for a value outside the ranges above.
        """
        clean = 1.0 if self.config["time_convention"] == "v1" else 0.0
        if timesteps is not None:
            if num_inference_steps is not None or t_start is not None or t_end is not None:
                raise ValueError(
                    "`timesteps` is the whole grid: pass either it, or `num_inference_steps` (and `t_start`, `t_end`)."
                )
            grid = torch.as_tensor(timesteps, dtype=torch.float32, device="cpu").flatten()
            grid = torch.cat([grid, torch.tensor([clean])])
            check_levels(grid, self.config["time_convention"])
        elif isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int):
            raise ValueError(f"`num_inference_steps` must be an integer >= 1, got {num_inference_steps!r}.")
        elif num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be >= 1, got {num_inference_steps}.")
        elif self.config["time_convention"] == "v1":
            if t_start is not None or t_end is not None:
                raise ValueError(
                    f"`t_start` and `t_end` belong to the v3 time convention, got {t_start} and {t_end}: in v1 choose "
                    "`start_index`, or pass `timesteps`."
                )
            grid = torch.linspace(0.0, 1.0, num_inference_steps + 1)
        else:
            t_start, t_end = 1.0 if t_start is None else float(t_start), 0.0 if t_end is None else float(t_end)
            if not 0.0 <= t_end < t_start <= 1.0:
                raise ValueError(f"0 <= `t_end` < `t_start` <= 1 is needed, got t_start={t_start} and t_end={t_end}.")
            grid = torch.linspace(t_start, t_end, num_inference_steps + 1)

        steps = len(grid) - 1
        temperature = check_temperature(self.config["temperature"] if temperature is None else temperature)
        start_index = check_integer("start_index", start_index, 0, steps - 1)
        renoise_steps = check_integer("renoise_steps", steps - 1 if renoise_steps is None else renoise_steps, 0, steps)
        if renoise_mode is not None:
            check_choice("renoise_mode", renoise_mode, _CHOICES["renoise_mode"])

        levels = grid[1:].clone()
        levels[renoise_steps:] = clean
        temperatures = torch.linspace(temperature[0], temperature[1], steps)
        self.num_inference_steps = steps
        self.timesteps = grid[:-1][start_index:].to(device)
        self.renoise_levels = levels[start_index:].to(device)
        self.temperatures = temperatures[start_index:].to(device)
        self.renoise_mode = self.config["renoise_mode"] if renoise_mode is None else renoise_mode
        self._renoises = [i < renoise_steps for i in range(start_index, steps)]
        self._timestep_values = grid[:-1][start_index:].tolist()  # host copy, for the look-up of a step

    def noise_ratio(self, timesteps: float | Tensor) -> Tensor:
        """Share of tokens that are replaced at a level, in [0, 1], float32, of the shape of `timesteps`.

        v1 cosine: cos(pi r / 2); v3 linear: t; the other two combinations use r = 1 - t.
        """
        level = torch.as_tensor(timesteps, dtype=torch.float32)
        if level.device.type == "cpu" and not bool(((level >= 0) & (level <= 1)).all()):
            raise ValueError(f"`timesteps` are levels of noise in [0, 1], got {level.flatten().tolist()}.")
        if self.config["noise_schedule"] == "linear":
            ratio = 1 - level if self.config["time_convention"] == "v1" else level
        elif self.config["time_convention"] == "v1":
            ratio = torch.cos(level * math.pi * 0.5)
        else:
            ratio = torch.sin(level * math.pi * 0.5)
        return ratio.clamp(0.0, 1.0)  # float32 puts cos(pi / 2) below 0

    def random_tokens(
        self, shape: Sequence[int], device: str | torch.device | None = None, *, generator: Generators = None
    ) -> Tensor:
        """Tokens uniform over the codebook: the start of a run (its first draw), or what replaces others.

        Args:
            shape: (b, h, w).
            device: where the result lies; drawn on the generator's device.
            generator: a generator, or one per image.

        Returns:
            LongTensor of that shape.
        """
        uniform = partial(torch.randint, self.config["num_vec_classes"])
        return draw(uniform, shape, generator, torch.device(device or "cpu"))

    def add_noise(
        self,
        original_samples: Tensor,
        noise: Tensor | None = None,
        timesteps: float | Tensor | None = None,
        *,
        generator: Generators = None,
        mask: Tensor | None = None,
        uniforms: Tensor | None = None,
        return_mask: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Corrupt clean tokens to a level: each position is replaced with probability `noise_ratio(timesteps)`.

        Replacement may draw the original token again. With a list of generators, image k depends on generator k alone.

        Args:
            original_samples: LongTensor (b, h, w).
            noise: LongTensor (b, h, w), what replaced positions receive. Default: uniform random tokens.
            timesteps: level of each image, in [0, 1], shape (b,) or a scalar.
            generator: a generator, or one per image.
            mask: (b, h, w), replace exactly where it is 1, instead of drawing.
            uniforms: (b, h, w) uniforms in [0, 1), injected in place of the draw.
            return_mask: also return which positions were replaced.

        Returns:
            LongTensor (b, h, w); with `return_mask`, and the boolean mask (b, h, w).
        """
        check_tokens("original_samples", original_samples)
        shape, device = original_samples.shape, original_samples.device
        if mask is not None:
            mask = check_mask("mask", mask, shape, device)
        elif timesteps is None:
            raise ValueError("`timesteps` is needed: one level of noise in [0, 1] per image (or a `mask`).")
        else:
            ratio = self.noise_ratio(timesteps).to(device)
            if ratio.ndim > 1 or ratio.numel() not in (1, shape[0]):
                raise ValueError(
                    f"`timesteps` has shape {tuple(ratio.shape)} for a batch of {shape[0]}: pass one level, or one "
                    "per image."
                )
            ratio = ratio.reshape(-1, *[1] * (len(shape) - 1))  # (b, 1, 1)
            if uniforms is None:
                uniforms = draw(torch.rand, shape, generator, device)
            uniforms = fitting_draw("uniforms", uniforms, shape, device)
            mask = replaced_positions(uniforms, ratio, inclusive=self.config["time_convention"] == "v3")
            mask = mask.expand(shape)
        if noise is None:
            noise = self.random_tokens(shape, device, generator=generator)
        else:
            check_tokens("noise", noise, shape)
        noisy = torch.where(mask, noise.to(device), original_samples)
        return (noisy, mask) if return_mask else noisy

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        initial_noise: Tensor | None = None,
        mask: Tensor | None = None,
        generator: Generators = None,
        draws: RenoisingDraws | None = None,
        step_index: int | None = None,
        unchecked: list[tuple[int, Tensor]] | None = None,
        return_dict: bool = True,
    ) -> DiscreteRenoisingSchedulerOutput | tuple[Tensor, Tensor]:
        """One step: tokens drawn from the logits, then renoised to the level of the next step.

        Args:
            model_output: logits (b, v, h, w), guidance already applied; any real dtype, the maths is float32.
            timestep: one of `timesteps`.
            sample: LongTensor (b, h, w), the tokens that the model received.
            initial_noise: LongTensor (b, h, w), the tokens of the run's start; where `mask` is 0 it holds the tokens
                to keep. Needed with a `mask`, and by a renoising step of mode `start`.
            mask: (b, h, w) or broadcastable, 1 = generate, 0 = keep. Kept positions never change in
                `pred_original_sample`. In `prev_sample` they do not change either under `start` and `prev`; under
                `rand` with random positions they are corrupted as all others, as in the original, so that the model
                sees the level of noise it was told, and the next step restores them. With positions by confidence
                only generated ones are renoised.
            generator: a generator, or one per image.
            draws: random numbers that are passed in instead of drawn, for a replay.
            step_index: which of `timesteps` this is; a loop that passes it spares an accelerator the question what
                number `timestep` is.
            unchecked: a list for `check_sampled`, to which the step adds whether the logits could be sampled, instead
                of waiting for the answer.
            return_dict: return a plain tuple if False.

        Returns:
            `DiscreteRenoisingSchedulerOutput`, or the tuple `(prev_sample, pred_original_sample)`.

        Raises:
            ValueError: no `set_timesteps` yet, an unknown timestep, wrong shapes, a missing `initial_noise`, or logits
                with NaN, +inf, or nothing but -inf at a position.
        """
        index = self._index_for_timestep(timestep, step_index)
        check_logits(model_output, sample, self.config["num_vec_classes"])
        if unchecked is None:
            self._check_finite(model_output, index)
        else:
            unchecked.append((index, unfit_positions(model_output)))
        shape, device = sample.shape, model_output.device
        renoises = self._renoises[index]
        if initial_noise is None and (mask is not None or (renoises and self.renoise_mode == "start")):
            raise ValueError(
                "`initial_noise` is needed by a step with a `mask` or of renoise mode 'start': pass the tokens that "
                "the run started from (with a mask: holding the tokens to keep where the mask is 0)."
            )
        if initial_noise is not None:
            check_tokens("initial_noise", initial_noise, shape)
            initial_noise = initial_noise.to(device)
        if mask is not None:
            mask = check_mask("mask", mask, shape, device)

        draws = RenoisingDraws() if draws is None else draws
        sampling, token_draws = draws.of_tokens(self.config["sampling"], model_output, generator)
        replacement = renoise_mask = renoise_uniforms = None
        if renoises:
            if draws.renoise_mask is not None:
                renoise_mask = check_mask("renoise_mask", draws.renoise_mask, shape, device)
            elif draws.renoise_uniforms is not None:
                renoise_uniforms = fitting_draw("renoise_uniforms", draws.renoise_uniforms, shape, device)
            else:
                renoise_uniforms = draw(torch.rand, shape, generator, device)
            if self.renoise_mode == "start":
                replacement = initial_noise
            elif self.renoise_mode == "prev":
                replacement = sample.to(device)
            elif draws.renoise_tokens is not None:
                check_tokens("renoise_tokens", draws.renoise_tokens, shape)
                replacement = draws.renoise_tokens.to(device)
            else:
                replacement = self.random_tokens(shape, device, generator=generator)

        prev_sample, pred_original_sample = discrete_renoising_step(
            model_output,
            token_draws,
            self.temperatures[index],
            sampling=sampling,
            typical_mass=self.config["typical_mass"] if self.config["typical_filtering"] else None,
            typical_min_tokens=self.config["typical_min_tokens"],
            mask=mask,
            known=initial_noise,
            replacement=replacement,
            renoise_mask=renoise_mask,
            renoise_uniforms=renoise_uniforms,
            noise_ratio=self.noise_ratio(self.renoise_levels[index]).to(device),
            renoise_positions=self.config["renoise_positions"],
            inclusive=self.config["time_convention"] == "v3",
        )
        if not return_dict:
            return prev_sample, pred_original_sample
        return DiscreteRenoisingSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def check_sampled(self, unchecked: Sequence[tuple[int, Tensor]]) -> None:
        """After a loop, reads back what its steps left `unchecked`, all at once.

        Raises:
            ValueError: for the first step whose logits could not be sampled; what was drawn since then is worthless.
        """
        counts = torch.stack([found for _, found in unchecked]).tolist() if unchecked else []
        for (index, _), (nan, inf, empty) in zip(unchecked, counts, strict=True):
            if nan + inf + empty:
                self._refuse(
                    index,
                    f"{nan + inf} positions hold logits that are non-finite ({nan} NaN, {inf} +inf), {empty} "
                    "positions hold nothing but -inf. The tokens drawn since then are worthless",
                )

    def _check_finite(self, logits: Tensor, index: int) -> None:
        if not any(unfit_positions(logits).tolist()):  # one read-back
            return
        nan, inf = int(logits.isnan().sum()), int((logits == torch.inf).sum())
        empty = int((logits == -torch.inf).all(dim=1).sum())
        self._refuse(
            index,
            f"{nan + inf} of {logits.numel()} logits are non-finite ({nan} NaN, {inf} +inf), {empty} positions hold "
            "nothing but -inf. No token was drawn",
        )

    def _refuse(self, index: int, found: str) -> None:
        raise ValueError(
            f"`model_output` cannot be sampled at step index {index} (timestep {self._timestep_values[index]:.6g}): "
            f"{found}; check the model's dtype (float16 may overflow: try bfloat16 or float32) and the guidance scale."
        )

    def _index_for_timestep(self, timestep: float | Tensor, step_index: int | None) -> int:
        if self.num_inference_steps is None:
            raise ValueError("`num_inference_steps` is None: call `set_timesteps` before `step`.")
        if step_index is not None:
            return check_integer("step_index", step_index, 0, len(self.timesteps) - 1)
        values = torch.as_tensor(timestep).flatten().tolist()
        index = (
            min(range(len(self.timesteps)), key=lambda i: abs(self._timestep_values[i] - values[0])) if values else 0
        )
        if not values or any(abs(self._timestep_values[index] - value) > 1e-4 for value in values):
            raise ValueError(
                f"`timestep` must be one of `timesteps` (the same for the whole batch), got {values}; this run has "
                f"{[round(value, 6) for value in self._timestep_values]}."
            )
        return index


def draw(
    distribution: Callable[..., Tensor], shape: Sequence[int], generator: Generators, device: torch.device
) -> Tensor:
    """Random numbers of a shape (b, ...), drawn on the generator's device; each image from its own of a list.

    Raises:
        ValueError: for a list of another length than b, or of anything but generators.
    """
    if generator is None:
        return distribution(tuple(shape), device=device)
    if isinstance(generator, Generator):
        return distribution(tuple(shape), generator=generator, device=generator.device).to(device)
    if len(generator) != shape[0] or not all(isinstance(one, Generator) for one in generator):
        raise ValueError(
            f"`generator` must be one torch.Generator, or one per image: got {len(generator)} entries for a batch of "
            f"{shape[0]}."
        )
    images = [distribution(tuple(shape[1:]), generator=one, device=one.device).to(device) for one in generator]
    return torch.stack(images)


def fitting_draw(name: str, given: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """A draw that is passed in, as float32 where it is needed.

    Raises:
        ValueError: for another shape.
    """
    if given.shape != tuple(shape):
        raise ValueError(f"the injected `{name}` has shape {tuple(given.shape)}, expected {tuple(shape)}.")
    return given.to(device=device, dtype=torch.float32)
