"""What a sampler of Gaussian noise asks of a scheduler of diffusers, also through an adapter that holds another one.

An adapter has the scheduler that it works with as `.scheduler`, and that one's config as `config["scheduler"]`.
"""

import inspect
from typing import Any

from torch import Tensor

WAY_OUT = (
    "Use a scheduler of diffusers that denoises with betas (DDIM, DDPM, PNDM, Euler, DPM-Solver++, UniPC ...) and the"
    " checkpoint's config, for instance `EulerDiscreteScheduler.from_pretrained(<checkpoint>, subfolder='scheduler')`."
)


def scheduler_chain(scheduler: Any) -> list[Any]:
    """The scheduler, then the one that it holds, and so on to the innermost."""
    chain = [scheduler]
    while hasattr(inner := getattr(chain[-1], "scheduler", None), "step"):
        if any(inner is one for one in chain):
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
        config = one.config
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
    known: set[str] = set()
    for one in scheduler_chain(scheduler):
        parameters = inspect.signature(one.step).parameters
        known |= parameters.keys()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return {name: value for name, value in wanted.items() if name in known}
    return wanted


def check_gaussian_scheduler(scheduler: Any, pipeline_name: str) -> None:
    """A scheduler that denoises what a network with betas predicts; before a run.

    Raises:
        ValueError: For schedulers of tokens, of flow matching, of other noise levels (EDM, IPNDM, consistency models),
            and for those whose step needs more than a prediction.
    """
    name = f"`scheduler` is a {type(scheduler).__name__}"
    if scheduler_setting(scheduler, "num_vec_classes") is not None or scheduler_attribute(scheduler, "step") is None:
        raise ValueError(f"{name}, which draws tokens; {pipeline_name} denoises Gaussian noise. {WAY_OUT}")
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


def check_falling(scheduler: Any) -> None:
    """After `set_timesteps`: the steps lead from noise to a picture."""
    timesteps: Tensor = scheduler.timesteps
    if len(timesteps) > 1 and float(timesteps[0]) < float(timesteps[-1]):
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}, which goes from timestep {float(timesteps[0]):g} up to"
            f" {float(timesteps[-1]):g}: it makes noise of a picture. {WAY_OUT}"
        )
