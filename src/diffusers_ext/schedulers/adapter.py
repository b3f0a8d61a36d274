"""A scheduler that holds another one: guidance or truncation for any solver, not for one.

The file of an adapter holds its own arguments and, under "scheduler", the config of the held scheduler with its class.
To swap the solver, assign a scheduler to `.scheduler`. As always in diffusers, a scheduler can also be made of the
config, `DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`, or of the file, with `from_pretrained` and
`subfolder="scheduler"`; it is then without the adapter. For those who do so, the file shows the held one's values
beside the own ones, too. An adapter reads them under "scheduler" alone.
"""

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from torch import Tensor

LIBRARY = __name__.partition(".")[0]
INNER = "scheduler"  # name of the held scheduler, as an argument, as an attribute and in the config


class _Bound(functools.partial):
    """A method and its adapter; the signature has the held method's parameters in place of `**inner`."""

    @property
    def __signature__(self) -> inspect.Signature:
        adapter, name = self.args[0], self.func.__name__
        kinds = inspect.Parameter
        own = [one for one in list(inspect.signature(self.func).parameters.values())[1:] if one.name != "inner"]
        held = inspect.signature(getattr(adapter.scheduler, name)).parameters
        others = [
            one if one.kind is kinds.VAR_KEYWORD else one.replace(kind=kinds.KEYWORD_ONLY)
            for one in held.values()
            if one.name not in {mine.name for mine in own} and one.kind is not kinds.VAR_POSITIONAL
        ]
        return inspect.Signature([*own, *others])


class handed_on:
    """Decorates a method whose `**inner` go to the method of this name of the held scheduler.

    Pipelines of diffusers read in a method's signature whether it takes `eta`, `generator` or `timesteps`, and leave
    out what they do not find there.
    """

    def __init__(self, method: Callable):
        self.method = method
        self.__doc__ = method.__doc__

    def __get__(self, adapter: Any, owner: type | None = None) -> Any:
        return self.method if adapter is None else _Bound(self.method, adapter)


class SchedulerAdapter(SchedulerMixin, ConfigMixin):
    """Hands everything to the scheduler that it holds. Subclasses change what they have to.

    Args:
        scheduler: Any scheduler, its config with `_class_name`, or None for a `DDPMScheduler` with its defaults.

    Raises:
        TypeError, ValueError: If it is neither, or its class is no scheduler of diffusers or of this package.
    """

    # the config shows the held scheduler's values too, so that these can be made of it
    _compatibles = [
        *(kind.name for kind in KarrasDiffusionSchedulers),
        "NormalizedCFGScheduler",
        "RespacedScheduler",
        "TruncatedConditioningScheduler",
    ]

    def __init__(self, scheduler: Any = None, **own: Any):
        self.register_to_config(**own)
        self.scheduler = DDPMScheduler() if scheduler is None else scheduler

    @property
    def scheduler(self) -> Any:
        """The scheduler that it holds."""
        return self.__dict__["_held"]

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        held = _as_scheduler(scheduler)
        if held is self:
            raise ValueError(f"`scheduler` is this {type(self).__name__} itself: it must hold another one.")
        self.__dict__["_held"] = held
        self.register_to_config(scheduler=describe_scheduler(held))

    @property
    def config(self) -> FrozenDict:
        """The held scheduler's values, for those who ask for betas or make another scheduler of them, then the own."""
        values = {**self.scheduler.config, **self._internal_dict}
        shown = {key: value for key, value in values.items() if not key.startswith("_")}
        return FrozenDict({**shown, "_class_name": type(self).__name__})

    def to_json_string(self) -> str:
        """What the file holds: the values of `config`."""
        own = json.loads(super().to_json_string())
        held = {key: _plain(value) for key, value in self.config.items()}
        return json.dumps({**held, **own}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The adapter of its config; around the scheduler that a config describes if that is one of another class.

        Raises:
            ValueError: If the config names no scheduler: there is nothing to hold.
        """
        if not isinstance(config, Mapping):
            raise ValueError(
                f"`config` is a {type(config).__name__}: {cls.__name__} is made of the config of a scheduler, or as "
                f"`{cls.__name__}(scheduler)`."
            )
        known = cls._get_init_keys(cls) - {"self"}
        if config.get("_class_name", cls.__name__) != cls.__name__:
            arguments: dict[str, Any] = {INNER: dict(config)}
        else:
            arguments = {key: value for key, value in config.items() if key in known}
        if arguments.get(INNER) is None and kwargs.get(INNER) is None:
            raise ValueError(
                f"`config` names no scheduler that {cls.__name__} could hold: it has neither an entry {INNER!r} nor "
                f"the `_class_name` of a scheduler. Call `{cls.__name__}(scheduler)`."
            )
        arguments |= {key: kwargs.pop(key) for key in list(kwargs) if key in known}
        made = cls(**arguments)
        return (made, kwargs) if return_unused_kwargs else made

    def __getattr__(self, name: str) -> Any:
        # neither `_internal_dict` nor anything else of the held one's own: `copy` and `pickle` ask for such names too
        if not name.startswith("_") and name in self.__dict__.get("_internal_dict", ()):
            return super().__getattr__(name)  # warns: a value of the config is no attribute
        if not name.startswith("_") and hasattr(held := self.__dict__.get("_held"), name):
            return getattr(held, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def timesteps(self) -> Tensor:
        """Those that a sampling loop runs, in its order."""
        return self.scheduler.timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self.scheduler.timesteps = timesteps

    @property
    def init_noise_sigma(self) -> Any:
        return self.scheduler.init_noise_sigma

    @property
    def order(self) -> int:
        return getattr(self.scheduler, "order", 1)

    @handed_on
    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **inner: Any) -> None:
        """As the held scheduler does."""
        self.scheduler.set_timesteps(num_inference_steps, device=device, **inner)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return self.scheduler.scale_model_input(sample, timestep)

    @handed_on
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **inner: Any) -> SchedulerOutput | tuple:
        """A step of the held scheduler, with all of its arguments."""
        return self.scheduler.step(model_output, timestep, sample, **inner)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(original_samples, noise, timesteps)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])


def describe_scheduler(scheduler: Any) -> dict[str, Any]:
    """A scheduler as a config holds it: its class and its arguments, all of which JSON knows."""
    config = scheduler._internal_dict if isinstance(scheduler, SchedulerAdapter) else scheduler.config
    shown = {key: _plain(value) for key, value in config.items() if not key.startswith("_")}
    return {"_class_name": type(scheduler).__name__, **shown}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _as_scheduler(scheduler: Any) -> Any:
    """A scheduler as it is, or the one that a config describes."""
    if isinstance(scheduler, Mapping):
        return _scheduler_class(scheduler.get("_class_name")).from_config(dict(scheduler))
    if isinstance(scheduler, type) or not hasattr(scheduler, "step") or not hasattr(scheduler, "config"):
        raise TypeError(
            f"`scheduler` is a {type(scheduler).__name__}: pass a scheduler, or the config of one with its "
            "`_class_name`."
        )
    return scheduler


def _scheduler_class(name: Any) -> Any:
    """The class of that name, if it is a scheduler of diffusers or of this package.

    A config comes from whoever wrote the checkpoint, so nothing else is looked up.
    """
    package = importlib.import_module(LIBRARY)
    if isinstance(name, str) and name.isidentifier() and not name.startswith("_"):
        places = (package,) if name in package.__all__ else (diffusers,)
        for found in (getattr(place, name, None) for place in places):
            if isinstance(found, type) and issubclass(found, SchedulerMixin) and hasattr(found, "step"):
                return found
    raise ValueError(
        f"`scheduler` names the class {name!r}: it must be a scheduler of diffusers or of {LIBRARY}, such as "
        "'DDPMScheduler'."
    )
