"""ADM's sampler: a training schedule in float64, sampled on any subset of its steps, also with a learned variance.

Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672, section 3 and 4, as in
openai/guided-diffusion@22e0df8:guided_diffusion/{gaussian_diffusion,respace}.py and
openai/glide-text2im@69b5307:glide_text2im/respace.py (MIT); DDIM: Song, Meng, Ermon, arXiv 2010.02502. Cascaded
Diffusion, GLIDE and PITI sample with it.

Why not diffusers' own: their tables are float32, where 1 - abar loses digits at small timesteps (2.5e-4 in a single
step at T = 4000); `DDIMScheduler` steps by T / N whatever its list of timesteps says; neither reads respacing strings.

Differences from the original: the whole subset is a list of timesteps, and the network is always told timesteps of the
training schedule. Noise that is multiplied by 0 is drawn in the last ancestral step, as there; DDIM with eta 0 draws
none.
"""

import math
import numbers
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SAMPLERS = ("ancestral", "ddim")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
FAST27 = "10,10,3,2,2"


def adm_scheduler(
    beta_schedule: Literal["linear", "cosine"] = "cosine", *, num_train_timesteps: int = 1000, **options: Any
) -> "RespacedScheduler":
    """A scheduler with ADM's betas.

    Args:
        beta_schedule: "linear" (from 0.1 / T to 20 / T) or "cosine".
        num_train_timesteps: T.
        options: Further arguments of `RespacedScheduler`.

    Raises:
        ValueError: For another schedule.
    """
    if beta_schedule not in ("linear", "cosine"):
        raise ValueError(f"`beta_schedule` is {beta_schedule!r}: ADM has linear and cosine.")
    return RespacedScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_schedule="squaredcos_cap_v2" if beta_schedule == "cosine" else "linear",
        beta_start=0.1 / num_train_timesteps,
        beta_end=20 / num_train_timesteps,
        **options,
    )


def respaced_timesteps(num_train_timesteps: int, respacing: str | int | Sequence[int]) -> list[int]:
    """The steps of the training schedule that a respacing keeps, in sampling order (falling).

    Args:
        num_train_timesteps: T.
        respacing: "n1,n2,..." (or the numbers themselves): the schedule in as many parts of equal length, of the
            finest noise first, and how many evenly spaced steps are kept of each. "250" is one part. "ddimN": every
            k-th step from 0 on, for the smallest k that gives exactly N. "fast27": GLIDE's "10,10,3,2,2" with the
            third last step in place of the last one.

    Raises:
        ValueError: For words that are none of these, and counts that the schedule cannot give.
    """
    if isinstance(respacing, (str, int, numbers.Integral)):  # the last one for numpy's integers
        text = str(respacing)
    else:
        text = ",".join(map(str, respacing))
    name = f"`timestep_respacing` is {text!r}"
    if text == "fast27":
        steps = respaced_timesteps(num_train_timesteps, FAST27)
        return [num_train_timesteps - 3, *steps[1:]]
    words = text.removeprefix("ddim").split(",")
    if not all(word.strip().isdecimal() for word in words) or (text.startswith("ddim") and len(words) > 1):
        raise ValueError(f"{name}: expected counts such as '250' or '10,10,3,2,2', 'ddim' and a count, or 'fast27'.")
    counts = [int(word) for word in words]
    if text.startswith("ddim"):
        wanted = (range(0, num_train_timesteps, k) for k in range(1, num_train_timesteps + 1))
        found = next((steps for steps in wanted if len(steps) == counts[0]), None)
        if found is None:
            nearest = sorted({len(range(0, num_train_timesteps, k)) for k in range(1, num_train_timesteps + 1)})
            close = sorted(nearest, key=lambda count: abs(count - counts[0]))[:4]
            raise ValueError(
                f"{name}: no whole stride through {num_train_timesteps} steps takes {counts[0]} of them; near it are "
                f"{', '.join(map(str, sorted(close)))}. Without 'ddim' any number goes."
            )
        return list(found)[::-1]
    size, longer = divmod(num_train_timesteps, len(counts))
    kept, start = [], 0
    for part, count in enumerate(counts):
        length = size + (part < longer)
        if count > length:
            raise ValueError(
                f"{name}: part {part + 1} has {length} of {num_train_timesteps} steps, of which {count} cannot be "
                "kept. Ask for fewer."
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # added up, not multiplied: rounding decides between neighbours
        kept += [start + round(place) for place in accumulate([stride] * (count - 1), initial=0.0)] if count else []
        start += length
    if not kept:
        raise ValueError(f"{name}: it keeps no step. Ask for at least one.")
    return kept[::-1]


class ReverseStep(NamedTuple):
    """N(mean, exp(log_variance)) of the sample one step earlier, and the clean image behind it; all float32."""

    mean: Tensor
    log_variance: Tensor
    pred_original_sample: Tensor


class RespacedScheduler(SchedulerMixin, ConfigMixin):
    """Ancestral and DDIM sampling on any subset of the training steps.

    Args:
        num_train_timesteps: T, steps of the training schedule.
        beta_start: First beta, for the linear schedules. ADM scales it with 1000 / T: see `adm_scheduler`.
        beta_end: Last beta, for the linear schedules.
        beta_schedule: "linear", "scaled_linear" (squares of evenly spaced numbers) or "squaredcos_cap_v2" (cosine).
        trained_betas: Betas themselves (T,), in place of a schedule. T is their number then.
        timestep_respacing: What `set_timesteps` runs unless it is told otherwise: see `respaced_timesteps`. None: all
            steps.
        sampler: "ancestral" draws from the network's Gaussian, "ddim" steps by arXiv 2010.02502, eq. 12.
        variance_type: Of an ancestral step: "fixed_small" (beta~), "fixed_large" (beta), or from as many further
            channels of the model output as the sample has: "learned" (its logarithm) or "learned_range" (where it lies
            between the first two). DDIM leaves those channels unread.
        prediction_type: What the network predicts: "epsilon" (the noise), "sample" (the clean image) or
            "v_prediction".
        clip_sample: Whether the predicted clean image is clamped. The noise of a DDIM step is derived from it after
            that.
        clip_sample_range: To plus and minus this.

    Raises:
        ValueError: For an unknown word or respacing, or betas that do not lie between 0 and 1.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        timestep_respacing: str | None = None,
        sampler: str = "ancestral",
        variance_type: str = "fixed_small",
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
    ):
        for name, value, allowed in [
            ("beta_schedule", beta_schedule, BETA_SCHEDULES),
            ("sampler", sampler, SAMPLERS),
            ("variance_type", variance_type, VARIANCE_TYPES),
            ("prediction_type", prediction_type, PREDICTION_TYPES),
        ]:
            if value not in allowed:
                raise ValueError(f"`{name}` is {value!r}: it must be one of {', '.join(allowed)}.")
        if not clip_sample_range > 0:
            raise ValueError(f"`clip_sample_range` is {clip_sample_range}: it must be above 0.")
        if trained_betas is not None:
            num_train_timesteps = len(trained_betas)
            self.register_to_config(num_train_timesteps=num_train_timesteps)
        self.betas = _betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)  # float64
        self.alphas_cumprod = (1 - self.betas).cumprod(0)  # float64
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._use_timesteps(list(range(num_train_timesteps))[::-1])
        if timestep_respacing is not None:
            respaced_timesteps(num_train_timesteps, timestep_respacing)

    def set_timesteps(
        self,
        num_inference_steps: int | str | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Chooses the steps to run.

        Args:
            num_inference_steps: How many, evenly spaced from the last step to the first; or a respacing string. None:
                the configured respacing, or all steps.
            device: Where `timesteps` will lie.
            timesteps: The steps themselves, falling, in place of a number.

        Raises:
            ValueError: For both arguments, a respacing or a number that the schedule cannot give, or steps that do not
                fall or are not of the schedule.
        """
        last = self.config["num_train_timesteps"]
        if timesteps is not None:
            if num_inference_steps is not None:
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps} and `timesteps` is given: pass one of the two."
                )
            chosen = [float(t) for t in timesteps]
            whole = all(t.is_integer() and 0 <= t < last for t in chosen)
            if not chosen or not whole or any(a <= b for a, b in zip(chosen, chosen[1:], strict=False)):
                raise ValueError(f"`timesteps` is {chosen}: pass whole numbers from {last - 1} to 0, falling.")
            steps = [int(t) for t in chosen]
        else:
            respacing = num_inference_steps
            respacing = self.config["timestep_respacing"] if respacing is None else respacing
            if isinstance(respacing, float):
                raise TypeError(f"`num_inference_steps` must be an integer or a respacing, received {respacing!r}.")
            steps = respaced_timesteps(last, last if respacing is None else respacing)
        self._use_timesteps(steps, device)
        self.num_inference_steps = len(steps)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """The sample itself: it needs no scaling."""
        return sample

    def reverse_step(self, model_output: Tensor, timestep: Tensor | float | int, sample: Tensor) -> ReverseStep:
        """The Gaussian of the next sample, from which an ancestral step draws.

        Arguments and errors are those of `step`.
        """
        return self._reverse(model_output, self._row(timestep, sample), sample)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float | int,
        sample: Tensor,
        eta: float = 0.0,
        generator: Generator | list[Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """From the sample at a timestep to that at the next one of `timesteps`; after the last it is clean.

        Args:
            model_output: What the network predicts (b, c, ...), or (b, 2 c, ...) with a learned variance.
            timestep: One of `timesteps`.
            sample: Noisy (b, c, ...).
            eta: Noise of a DDIM step, from 0 (none) to 1. An ancestral step has no use for it.
            generator: Of the noise, or one a sample.
            variance_noise: The noise itself, in the shape of `sample`, in place of a draw.
            return_dict: Whether to return a `DDPMSchedulerOutput` instead of a tuple.

        Returns:
            `prev_sample` in the dtype of `sample`, and `pred_original_sample`, the predicted clean image.

        Raises:
            ValueError: For a timestep that is not run (checked on a CPU only), another `eta`, and outputs or noise of
                another shape.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` is {eta}: it must lie between 0 and 1.")
        if variance_noise is not None and variance_noise.shape != sample.shape:
            raise ValueError(
                f"`variance_noise` has shape {tuple(variance_noise.shape)}: it must be that of the sample, "
                f"{tuple(sample.shape)}."
            )
        is_ancestral = self.config["sampler"] == "ancestral"
        row = self._row(timestep, sample)
        noise: Tensor | float = 0.0
        if is_ancestral or eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            noise = row["is_noisy"] * variance_noise.float()
        if is_ancestral:
            reverse = self._reverse(model_output, row, sample)
            clean = reverse.pred_original_sample
            previous = reverse.mean + (0.5 * reverse.log_variance).exp() * noise
        else:
            clean = self._clean(self._split(model_output, sample)[0], row, sample.float())
            epsilon = (row["clean_from_sample"] * sample.float() - clean) / row["clean_from_noise"]
            deviation = eta * row["ddim_deviation"]
            direction = (row["previous_noise"].square() - deviation.square()).clamp(min=0).sqrt()
            previous = row["previous_signal"] * clean + direction * epsilon + deviation * noise
        previous, clean = previous.to(sample.dtype), clean.to(sample.dtype)
        if not return_dict:
            return previous, clean
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=clean)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps on the training schedule.

        Args:
            original_samples: Clean (b, c, ...).
            noise: In the same shape.
            timesteps: Integers from 0 to T - 1, (b,) or one for all; timestep 0 is one step of noise.
        """
        timesteps = timesteps.to(original_samples.device).reshape(-1)
        tables = (self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt())
        signal, level = (
            table.float().to(original_samples.device)[timesteps].view(-1, *[1] * (original_samples.ndim - 1))
            for table in tables
        )
        return (signal * original_samples.float() + level * noise.float()).to(original_samples.dtype)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def _use_timesteps(self, steps: list[int], device: str | torch.device | None = None) -> None:
        """Tables of the chosen steps, one row each in sampling order."""
        abar = self.alphas_cumprod[torch.tensor(steps)]  # float64 (n,)
        before = torch.cat([abar[1:], abar.new_ones(1)])  # abar of the sample after the step
        betas = 1 - abar / before
        variance = betas * (1 - before) / (1 - abar)
        # the last step leads to the clean image, where beta~ is 0: it takes the value of the step before it
        small = torch.cat([variance[:-1], variance[-2:-1] if len(steps) > 1 else betas])
        large = torch.cat([betas[:-1], small[-1:]])
        columns = {
            "signal": abar.sqrt(),
            "noise": (1 - abar).sqrt(),
            "clean_from_sample": abar.rsqrt(),
            "clean_from_noise": (1 / abar - 1).sqrt(),
            "mean_from_clean": betas * before.sqrt() / (1 - abar),
            "mean_from_sample": (1 - before) * (1 - betas).sqrt() / (1 - abar),
            "log_beta": betas.log(),
            "log_fixed_small": small.log(),
            "log_fixed_large": large.log(),
            "previous_signal": before.sqrt(),
            "previous_noise": (1 - before).sqrt(),
            "ddim_deviation": variance.sqrt(),
            "is_noisy": torch.tensor([*[1.0] * (len(steps) - 1), 0.0]),
        }
        self.respaced_betas = betas  # float64 (n,), in sampling order: those of a schedule of these steps alone
        self.timesteps = torch.tensor(steps, dtype=torch.int64, device=device)
        self._places = {t: place for place, t in enumerate(steps)}
        self._columns = list(columns)
        self._table = torch.stack([column.float() for column in columns.values()], dim=1).to(device)  # (n, columns)

    def _row(self, timestep: Tensor | float | int, sample: Tensor) -> dict[str, Tensor]:
        """The numbers of a step, each in a shape that spreads over `sample`. Nothing waits for a device."""
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            found = (self.timesteps.to(timestep.device) == timestep.reshape(-1)[:1]).int().argmax(0, keepdim=True)
            row = self._table.to(sample.device).index_select(0, found.to(sample.device))[0]
        else:
            wanted = timestep.reshape(-1)[0].item() if isinstance(timestep, Tensor) else timestep
            place = self._places.get(wanted)  # type: ignore[arg-type] # 3.0 is 3
            if place is None:
                raise ValueError(
                    f"`timestep` is {wanted}, which is not one of the {len(self._places)} steps that `set_timesteps` "
                    f"chose: {_short(list(self._places))}."
                )
            row = self._table[place].to(sample.device)
        return {name: row[k].view([1] * sample.ndim) for k, name in enumerate(self._columns)}

    def _reverse(self, model_output: Tensor, row: dict[str, Tensor], sample: Tensor) -> ReverseStep:
        prediction, variance = self._split(model_output, sample)
        clean = self._clean(prediction, row, sample.float())
        mean = row["mean_from_clean"] * clean + row["mean_from_sample"] * sample.float()
        kind = self.config["variance_type"]
        if kind == "learned":
            assert variance is not None
            log_variance = variance
        elif kind == "learned_range":
            assert variance is not None
            fraction = (variance + 1) / 2
            log_variance = fraction * row["log_beta"] + (1 - fraction) * row["log_fixed_small"]
        else:
            log_variance = row[f"log_{kind}"].expand_as(mean)
        return ReverseStep(mean, log_variance, clean)

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prediction and variance of the output, float32."""
        kind, channels = self.config["variance_type"], sample.shape[1]
        learned = kind.startswith("learned")
        wanted = (2 if learned else 1) * channels
        if model_output.shape[1] != wanted or model_output.shape[2:] != sample.shape[2:]:
            raise ValueError(
                f"`model_output` has shape {tuple(model_output.shape)} for samples {tuple(sample.shape)}: with "
                f"`variance_type` {kind!r} it has {wanted} channels. A network with twice the channels has a learned "
                "variance ('learned_range' in ADM and GLIDE), any other a fixed one."
            )
        if not learned:
            return model_output.float(), None
        prediction, variance = model_output.float().split(channels, dim=1)
        return prediction, variance

    def _clean(self, prediction: Tensor, row: dict[str, Tensor], sample: Tensor) -> Tensor:
        """The predicted clean image."""
        kind = self.config["prediction_type"]
        if kind == "epsilon":
            clean = row["clean_from_sample"] * sample - row["clean_from_noise"] * prediction
        elif kind == "sample":
            clean = prediction
        else:
            clean = row["signal"] * sample - row["noise"] * prediction
        limit = self.config["clip_sample_range"]
        return clean.clamp(-limit, limit) if self.config["clip_sample"] else clean


def _betas(count: int, start: float, end: float, schedule: str, trained_betas: Sequence[float] | None) -> Tensor:
    """Betas of the training schedule, float64 (T,)."""
    if count < 1:
        raise ValueError(f"`num_train_timesteps` is {count}: it must be at least 1.")
    if trained_betas is not None:
        betas = torch.tensor([float(beta) for beta in trained_betas], dtype=torch.float64)
    elif schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
    else:
        levels = [math.cos((k / count + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(count + 1)]
        ratios = [1 - after / before for before, after in zip(levels, levels[1:], strict=False)]
        betas = torch.tensor([min(ratio, 0.999) for ratio in ratios], dtype=torch.float64)
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(
            f"The betas go from {betas.min().item():g} to {betas.max().item():g}, all must lie between 0 and 1: mend "
            "`beta_start` and `beta_end`, or `trained_betas`."
        )
    return betas


def _short(steps: list[int]) -> str:
    """The first and the last of many steps."""
    return ", ".join(map(str, steps if len(steps) <= 12 else [*steps[:6], "...", *steps[-6:]]))
