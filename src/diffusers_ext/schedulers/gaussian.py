"""What a sampler of Gaussian noise asks of a scheduler of diffusers, also through an adapter that holds another one.

An adapter has the scheduler that it works with as `.scheduler`, and that one's config as `config["scheduler"]`.
"""

import inspect
import math
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ..guidance import Mix, guide

LEAVES_VARIANCE_OUT = {"DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"}
WAY_OUT = (
    "Use a scheduler of diffusers that denoises with betas (DDIM, DDPM, PNDM, Euler, DPM-Solver++, UniPC ...) and the"
    " checkpoint's config, for instance `EulerDiscreteScheduler.from_pretrained(<checkpoint>, subfolder='scheduler')`."
)


def scheduler_chain(scheduler: Any) -> list[Any]:
    """The scheduler, then the one that it holds, and so on to the innermost."""
    chain = [scheduler]
    # of a config that a scheduler took over from an adapter, a ConfigMixin would show the value as an attribute
    while "scheduler" in getattr(chain[-1], "__dict__", ()) or hasattr(type(chain[-1]), "scheduler"):
        inner = chain[-1].scheduler
        if not hasattr(inner, "step") or any(inner is one for one in chain):
            break
        chain.append(inner)
    return chain


def scheduler_attribute(scheduler: Any, name: str, default: Any = None) -> Any:
    """The outermost attribute of that name along the chain."""
    found = (getattr(one, name) for one in scheduler_chain(scheduler) if hasattr(one, name))
    return next(found, default)


def scheduler_setting(scheduler: Any, name: str, default: Any = None) -> Any:
    """The value of that name in the outermost config along the chain that has one."""
    for one in scheduler_chain(scheduler):
        config: Any = one.config
        while isinstance(config, dict) or hasattr(config, "keys"):
            if name in config:
                return config[name]
            config = config.get("scheduler")
    return default


def step_arguments(scheduler: Any, **wanted: Any) -> dict[str, Any]:
    """Those of `wanted` (such as `eta` and `generator`) that the scheduler's step takes.

    An adapter hands what its `**kwargs` catch to the scheduler that it holds, so that one's step counts as well. A
    step with `**kwargs` and nothing behind it takes everything.
    """
    names, takes_others = _step_parameters(scheduler)
    return wanted if takes_others else {name: value for name, value in wanted.items() if name in names}


def set_steps(scheduler: Any, num_inference_steps: Any, device: Any, **options: Any) -> None:
    """`set_timesteps`, so that a run begins with the first of them.

    Schedulers of diffusers look for their place by the first timestep and take the second of two equal ones. Cosine
    betas have such with other spacings of the noise (Karras, exponential, beta): the run would end beyond the last.
    """
    scheduler.set_timesteps(num_inference_steps, device=device, **options)
    timesteps: Tensor = scheduler.timesteps
    begin = scheduler_attribute(scheduler, "set_begin_index")
    if begin is not None and int((timesteps == timesteps[0]).sum()) > 1:
        begin(0)


def takes_learned_variance(scheduler: Any) -> bool:
    """Whether the scheduler's step reads a variance from the second half of the prediction's channels.

    Asked of its constructor: a config keeps the value that another scheduler was made with. Some solvers only leave
    that half out: of a noise prediction alone, or they draw noise in the shape of the whole.
    """
    if any(kind.__name__ in LEAVES_VARIANCE_OUT for kind in type(scheduler_chain(scheduler)[-1]).__mro__):
        return False
    return str(_own_setting(scheduler, "variance_type")).startswith("learned")


def takes_respacing(scheduler: Any) -> bool:
    """Whether `set_timesteps` reads a respacing such as "10,10,3,2,2", and None as the configured one."""
    return "timestep_respacing" in _own_arguments(scheduler)


def _own_setting(scheduler: Any, name: str) -> Any:
    """The innermost scheduler's value of an argument of its constructor; None if it has no such argument."""
    inner = scheduler_chain(scheduler)[-1]
    return scheduler_setting(inner, name) if name in _own_arguments(inner) else None


def _own_arguments(scheduler: Any) -> set[str]:
    """What the innermost scheduler's constructor takes."""
    inner = scheduler_chain(scheduler)[-1]
    return set(inspect.signature(type(inner).__init__).parameters)


def check_predicted_channels(unet: Any, scheduler: Any, channels: int, prefix: str = "") -> None:
    """A network predicts the noise of so many channels, and a variance behind it if its scheduler reads one.

    Args:
        channels: Of the samples.
        prefix: Before "unet" and "scheduler" in messages, for pipelines that have several.

    Raises:
        ValueError: Naming the components that do not fit.
    """
    predicted = unet.config["out_channels"]
    if predicted not in (channels, 2 * channels):
        raise ValueError(
            f"`{prefix}unet` predicts {predicted} channels for images of {channels}: expected are {channels} for the"
            f" noise, or {2 * channels} with a learned variance."
        )
    if predicted == channels and takes_learned_variance(scheduler):
        raise ValueError(
            f"`{prefix}scheduler` reads a learned variance (`variance_type`), but `{prefix}unet` predicts none: build"
            " the scheduler with variance_type='fixed_small'."
        )


def guided_step(
    scheduler: Any,
    cond: Tensor | None,
    uncond: Tensor | None,
    guidance_scale: float | Tensor,
    timestep: Tensor,
    sample: Tensor,
    *,
    mix: Mix | None = None,
    channels: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """One step of a scheduler, from the predictions that `guidance.both_branches` returned.

    A scheduler that guides by itself gets both predictions, and the scale if its step has a parameter
    `guidance_scale`. Any other gets the guided prediction.

    Args:
        cond, uncond, guidance_scale, mix, channels: as for `guidance.guide`.
        timestep: of the step.
        sample: noisy (b, c, ...), as the scheduler left it.
        arguments: further ones of the step, see `step_arguments`.

    Returns:
        The next sample and the guided prediction. Where the scheduler guides, the latter is mixed by its `mix`, if it
        has one.
    """
    own_mix = getattr(scheduler, "mix", mix) if guides_itself(scheduler) else mix
    guided = guide(cond, uncond, guidance_scale, mix=own_mix, channels=channels)
    prediction = guided
    if cond is not None and uncond is not None and guides_itself(scheduler):
        prediction = cond
        arguments["model_output_uncond"] = uncond
        if "guidance_scale" in _step_parameters(scheduler)[0]:
            arguments["guidance_scale"] = guidance_scale
    return scheduler.step(prediction, timestep, sample, **arguments, return_dict=False)[0], guided


def guides_itself(scheduler: Any) -> bool:
    """Whether the scheduler's step takes both predictions, the second one as `model_output_uncond`."""
    return "model_output_uncond" in _step_parameters(scheduler)[0]


def _step_parameters(scheduler: Any) -> tuple[set[str], bool]:
    """Names that the scheduler's step knows, also behind an adapter's `**kwargs`; whether it takes any other name."""
    names: set[str] = set()
    for one in scheduler_chain(scheduler):
        parameters = inspect.signature(one.step).parameters
        names |= parameters.keys()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return names, False
    return names, True


def check_gaussian_scheduler(scheduler: Any, pipeline_name: str) -> None:
    """A scheduler that denoises what a network with betas predicts; before a run.

    Raises:
        ValueError: For schedulers of tokens, of flow matching, of other noise levels (EDM, IPNDM, consistency models),
            and for those whose step needs more than a prediction.
    """
    name = f"`scheduler` is a {type(scheduler).__name__}"
    if scheduler_setting(scheduler, "num_vec_classes") is not None:
        raise ValueError(f"{name}, which draws tokens; {pipeline_name} denoises Gaussian noise. {WAY_OUT}")
    if scheduler_attribute(scheduler, "step") is None:
        raise ValueError(f"{name}, which has no `step`. {WAY_OUT}")
    flow = scheduler_setting(scheduler, "use_flow_sigmas") or (
        scheduler_setting(scheduler, "prediction_type") in ("flow_prediction", "flow")
    )
    has_levels = scheduler_attribute(scheduler, "alphas_cumprod") is not None
    if flow or not has_levels or scheduler_setting(scheduler, "num_train_timesteps") is None:
        because = "flow matching" if flow else "`alphas_cumprod`, the noise levels of a training with betas"
        verb = "is set to" if flow else "has no"
        raise ValueError(
            f"{name}, which {verb} {because}: the network of {pipeline_name} was trained with such betas, and would"
            f" give noise. {WAY_OUT}"
        )
    # asked of its constructor: a config keeps the betas that another scheduler was made with
    own_levels = not {"beta_start", "trained_betas"} & _own_arguments(scheduler)
    if own_levels or scheduler_setting(scheduler, "snr_shift_scale") not in (None, 1):
        because = "takes no betas from a config" if own_levels else "shifts the noise levels (`snr_shift_scale`)"
        raise ValueError(
            f"{name}, which {because}: the network of {pipeline_name} was trained with those of the checkpoint, and"
            f" would give noise. {WAY_OUT}"
        )
    given = ("model_output", "timestep", "sample")
    needed = [
        parameter.name
        for parameter in inspect.signature(scheduler.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and parameter.name not in given
    ]
    if needed:
        raise ValueError(f"{name}, whose step needs {', '.join(needed)}, which {pipeline_name} has not. {WAY_OUT}")


def ldm_scheduler(
    beta_start: float = 0.0015, beta_end: float = 0.0195, *, num_train_timesteps: int = 1000
) -> DDIMScheduler:
    """A scheduler with the original's numbers: betas are squares of evenly spaced numbers, nothing is clipped.

    Any other diffusers scheduler can be made of its config. The last step goes to timestep 0, not beyond it.
    """
    return DDIMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )


def set_original_timesteps(
    scheduler: DDIMScheduler, num_inference_steps: int, device: str | torch.device | None = None
) -> None:
    """The original's timesteps, 1, 1 + c, 1 + 2c ... below T with c = T // num_inference_steps, in sampling order.

    Where the number of steps does not divide T these are more steps than asked for, from a higher noise level:
    diffusers' own `set_timesteps` runs exactly as many, from a lower one. Results differ; this is for reproduction.

    Raises:
        ValueError: if the original cannot run that number of steps: it asks for timestep T, which does not exist.
    """
    last = int(scheduler_setting(scheduler, "num_train_timesteps"))
    if not 1 <= num_inference_steps <= last:
        raise ValueError(f"`num_inference_steps` is {num_inference_steps}: it must lie between 1 and {last}.")
    stride = last // num_inference_steps
    timesteps = [start + 1 for start in range(0, last, stride)]
    if timesteps[-1] >= last:
        raise ValueError(
            f"`num_inference_steps` is {num_inference_steps}: with steps of {stride} the original reaches timestep "
            f"{last}, the last one is {last - 1}. Use a divisor of {last}, or the scheduler's own `set_timesteps`."
        )
    scheduler.set_timesteps(num_inference_steps, device=device)  # type: ignore[arg-type] # takes None
    scheduler.timesteps = torch.tensor(timesteps[::-1], device=device)


def start_level(timesteps: Tensor, strength: float, order: int = 1) -> tuple[Tensor | None, Tensor]:
    """Where to start from a picture: the timestep to which it is noised, and those that are run, in this order.

    As in the original, the first of these lies one step below the level of the noise.

    Args:
        timesteps: of the whole schedule, in sampling order (n,).
        strength: share of them that is run, below 1. With too few there is nothing to run, and no level.
        order: of the scheduler: how many timesteps make a step. The last one may have fewer.
    """
    steps = math.ceil(len(timesteps) / order)
    count = min(int(steps * strength + 1e-6), steps - 1)  # 50 * 0.58 is 28.999... in binary numbers
    if count == 0:
        return None, timesteps[:0]
    first = (steps - count) * order
    return timesteps[first - order], timesteps[first:]


def signal_and_noise(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """sqrt(abar) and sqrt(1 - abar) at a timestep, which need not be a whole number.

    Between timesteps the ratio of the two is interpolated, as schedulers that work with it do.
    """
    abar = scheduler_attribute(scheduler, "alphas_cumprod").cpu().double()
    ratios = ((1 - abar) / abar).sqrt()
    position = min(max(float(timestep), 0.0), len(abar) - 1.0)
    low = int(position)
    ratio = float(torch.lerp(ratios[low], ratios[min(low + 1, len(abar) - 1)], position - low))
    signal = (1 + ratio**2) ** -0.5
    return signal, ratio * signal


def split_prediction(scheduler: Any, prediction: Tensor, scaled: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise (float32) that a network's prediction for `scaled` latents amounts to."""
    signal, noise_level = signal_and_noise(scheduler, timestep)
    prediction, scaled = prediction.float(), scaled.float()
    kind = scheduler_setting(scheduler, "prediction_type", "epsilon")
    if kind == "v_prediction":
        return signal * scaled - noise_level * prediction, noise_level * scaled + signal * prediction
    if kind == "sample":
        return prediction, (scaled - signal * prediction) / noise_level
    return (scaled - noise_level * prediction) / signal, prediction


def join_prediction(scheduler: Any, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """What a network predicts where latents are this clean part and this noise: the inverse of `split_prediction`."""
    kind = scheduler_setting(scheduler, "prediction_type", "epsilon")
    if kind == "v_prediction":
        signal, noise_level = signal_and_noise(scheduler, timestep)
        return signal * noise - noise_level * clean
    return clean if kind == "sample" else noise
