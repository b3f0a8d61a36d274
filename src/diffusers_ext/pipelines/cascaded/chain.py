"""Which stages of a cascade run, with what, and whether they fit together: settled before any network runs."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from ...schedulers.gaussian import scheduler_attribute
from ..checks import check_choice, check_generator, check_guidance_scale, check_integer, check_one_or_each
from .denoising import StageCondition
from .pipeline_cascaded_upscale import CascadedUpscalePipeline
from .sources import StageSource
from .stage import CascadedStage

STAGES = ("base", "upscale_1", "upscale_2", "upscale_3")
MODES = ("truncated", "non_truncated", "none")
HANDED_ON = (  # besides classes and texts, to a first stage of another kind
    "height", "width", "num_inference_steps", "num_images_per_prompt", "batch_size", "generator", "output_type",
)  # fmt: skip
_SAME_NOISE = 1e-3  # by which the noise of two schedules may differ: one of them may be float32


@dataclass(frozen=True)
class StagePlan:
    """What a stage is to do in a run.

    Args:
        name: Of the stage.
        batch_size: Number of images.
        size: Height and width of its images in pixels; None for a first stage of another kind that nobody asked.
        num_inference_steps: Number of sampling steps.
        guidance_scale: None: the stage's own.
        labels: Class numbers, one for each class, prompt or image that was given; None without classes.
        level: Steps of noise of the images that it takes.
        is_noisy: They come with that noise from the stage before.
        stop_level: Where it stops itself.
    """

    name: str
    batch_size: int
    size: tuple[int, int] | None
    num_inference_steps: int
    guidance_scale: float | None = None
    labels: list[int] | None = None
    level: float = 0
    is_noisy: bool = False
    stop_level: float = 0

    def encode(
        self, stage: Any, samples: Tensor | None, num_images_per_prompt: int, generator: Any, device: torch.device
    ) -> StageCondition:
        """The condition of the stage, from the samples (b, 3, h, w) of the one before."""
        if samples is None:
            return stage.encode_labels(self.labels, num_images_per_prompt, device=device)
        return stage.encode_low_res(
            samples,
            self.labels,
            num_images_per_prompt,
            level=self.level,
            is_noisy=self.is_noisy,
            generator=generator,
            device=device,
        )

    def hand_on(self, samples: Tensor, quantize: bool) -> Tensor:
        """What the next stage takes: noisy samples as they are, clean ones clamped and, if asked for, in 8 bits."""
        if self.stop_level > 0:
            return samples
        samples = samples.clamp(-1, 1)
        if quantize:
            samples = ((samples.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).float() / 127.5 - 1
        return samples


def plan_run(
    stages: Mapping[str, Any],
    *,
    class_labels: Any,
    prompt: Any,
    negative_prompt: Any,
    images: Tensor | None,
    num_inference_steps: Any,
    guidance_scale: Any,
    noise_level: Any,
    conditioning_mode: str | None,
    start_stage: str | None,
    stop_stage: str | None,
    num_images_per_prompt: int,
    eta: float,
    generator: Any,
    latents: Tensor | None,
) -> list[StagePlan]:
    """One plan for each stage that is to run, in order.

    Args:
        stages: All of them by name, pipelines or `StageSource`s.
        images: (n, 3, h, w) to start from.

    The others are those of `CascadedDiffusionPipeline.__call__`.

    Raises:
        TypeError, ValueError: Naming the stage, the argument, its value and what is allowed.
    """
    check_choice("conditioning_mode", conditioning_mode, MODES, or_none=True)
    kinds = {n: s.pipeline_class if isinstance(s, StageSource) else type(s) for n, s in stages.items()}
    for name, kind in kinds.items():
        check_stage_kind(name, kind)
    parts = {n: s.blueprint() if isinstance(s, StageSource) else s for n, s in stages.items()}
    names = _running(parts, images, start_stage, stop_stage)
    for name in names:
        if isinstance(parts[name], CascadedStage):
            try:
                parts[name].check_components()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    steps = _each("num_inference_steps", num_inference_steps, list(stages))
    scales = _each("guidance_scale", guidance_scale, list(stages))
    levels = _each("noise_level", noise_level, [name for name in stages if name != "base"])
    labels, count = _read_labels(parts, kinds, names, class_labels, prompt, negative_prompt, images)
    sizes = _sizes(parts, kinds, names, images, latents)
    batch_size = count * num_images_per_prompt
    check_generator(generator, batch_size, torch.device("cpu") if generator is None else _device_of(generator))
    plans: list[StagePlan] = []
    for place, name in enumerate(names):
        stage, level, is_noisy = parts[name], 0.0, False
        if isinstance(stage, CascadedUpscalePipeline):
            before = parts[names[place - 1]] if place else None
            hint = _or_each("noise_level", noise_level, list(levels))
            level, is_noisy = _noise(name, stage, before, levels[name], conditioning_mode, hint)
            if is_noisy:
                plans[-1] = _stopped(plans[-1], level)
        plan = StagePlan(name, batch_size, sizes[name], steps[name], scales[name], labels[name], level, is_noisy)
        plans.append(plan)
    last = parts[names[-1]]
    if isinstance(last, CascadedStage) and last.config.get("min_timestep", 0):
        plans[-1] = _stopped(plans[-1], last.config["min_timestep"])  # nothing takes its noise: it ends as alone
    hint = _or_each("guidance_scale", guidance_scale, list(stages))
    for plan in plans:
        _check(plan, parts[plan.name], plans, eta, generator, latents, hint)
    return plans


def check_stage_kind(name: str, kind: type) -> None:
    """A class of pipelines that can be this stage.

    Raises:
        TypeError: It cannot.
    """
    is_upscaler = issubclass(kind, CascadedUpscalePipeline)
    if not issubclass(kind, DiffusionPipeline) or is_upscaler == (name == "base"):
        wanted = "pipeline that draws images from nothing" if name == "base" else "CascadedUpscalePipeline"
        raise TypeError(f"`{name}` is a {kind.__name__}: it must be a {wanted}.")


def _device_of(generator: Any) -> torch.device:
    one = generator[0] if isinstance(generator, (list, tuple)) and generator else generator
    return getattr(one, "device", torch.device("cpu"))


def _running(
    parts: Mapping[str, Any], images: Tensor | None, start_stage: str | None, stop_stage: str | None
) -> list[str]:
    """Names of the stages that run: without a gap."""
    if not parts:
        raise ValueError("The cascade has no stages: pass `base=...` to the constructor, or use `from_stages`.")
    for argument, value in (("start_stage", start_stage), ("stop_stage", stop_stage)):
        if value in STAGES and value not in parts:
            raise ValueError(
                f"`{argument}` is {value!r}, but the cascade was built without {value}; it has {', '.join(parts)}."
                f" Name one of them, or pass `{value}=...` to `from_pretrained` or to the constructor."
            )
        check_choice(argument, value, list(parts), or_none=True)
    first = "base" if start_stage is None else start_stage
    if images is None and first != "base":
        raise ValueError(
            f"`start_stage` is {first!r}, but there is no `image` to start from: pass images of the size that the"
            " stage takes, or start with 'base'."
        )
    if images is not None:
        first = _start_of(parts, images, start_stage)
    last = list(parts)[-1] if stop_stage is None else stop_stage
    if STAGES.index(first) > STAGES.index(last):
        raise ValueError(f"`stop_stage` is {last!r}, which comes before {first!r}, where the run starts.")
    names: list[str] = [*STAGES[STAGES.index(first) : STAGES.index(last) + 1]]
    missing = [name for name in names if name not in parts]
    if missing:
        raise ValueError(
            f"The cascade was built without {', '.join(missing)}, but the run goes from {first!r} to {last!r}; it has"
            f" {', '.join(parts)}. Pass `{missing[0]}=...` to `from_pretrained` or to the constructor, or choose other"
            " stages with `start_stage` and `stop_stage`."
        )
    return names


def _start_of(parts: Mapping[str, Any], images: Tensor, start_stage: str | None) -> str:
    """The stage that takes images of this size, which is `start_stage` if that is given."""
    height, width = images.shape[2:]
    takes = {name: part.config["low_res_size"] for name, part in parts.items() if name != "base"}
    if start_stage == "base":
        raise ValueError("`start_stage` is 'base', which takes no `image`: leave one of them out.")
    fitting = [name for name, side in takes.items() if side is None or (side, side) == (height, width)]
    if start_stage is not None:
        fitting = [start_stage] if start_stage in fitting else []
    if not fitting:
        wanted = ", ".join(f"{name} takes {side}x{side}" for name, side in takes.items()) or "no stage takes any"
        where = "" if start_stage is None else f" for `start_stage`={start_stage!r}"
        raise ValueError(f"`image` is {width}x{height} pixels, the wrong size{where}: {wanted}. Resize it.")
    return fitting[0]


def _each(name: str, value: Any, stages: list[str]) -> dict[str, Any]:
    """An argument by stage: one for all, or one each."""
    value = as_list(value)
    if isinstance(value, (list, tuple)):
        if len(value) != len(stages):
            raise ValueError(
                f"`{name}` holds {len(value)}: pass one for all stages, or a list of {len(stages)}, one for each of"
                f" {', '.join(stages)}."
            )
        return dict(zip(stages, value, strict=True))
    return dict.fromkeys(stages, value)


def _or_each(name: str, value: Any, stages: list[str]) -> str:
    """What to do with a value for all stages that one of them refuses, for messages."""
    if isinstance(as_list(value), (list, tuple)) or len(stages) < 2:
        return ""
    return f" Or pass a list of `{name}`, one for each of {', '.join(stages)}."


def as_list(value: Any) -> Any:
    """An array or a tensor as a list, or as a number if it holds one; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _read_labels(
    parts: Mapping[str, Any],
    kinds: Mapping[str, Any],
    names: list[str],
    class_labels: Any,
    prompt: Any,
    negative_prompt: Any,
    images: Tensor | None,
) -> tuple[dict[str, list[int] | None], int]:
    """Class numbers by stage, and for how many classes, prompts or images the run draws."""
    taken: set[str] = set()
    labels: dict[str, list[int] | None] = dict.fromkeys(names)
    for name in names:
        part = parts[name]
        if not isinstance(part, CascadedStage):
            parameters = inspect.signature(kinds[name].__call__).parameters
            taken |= parameters.keys()
            _check_other_kind(name, kinds[name], parameters, {"prompt": prompt, "class_labels": class_labels})
        elif part.num_classes is not None:
            taken.add("class_labels")
            try:
                labels[name] = part.get_label_ids(class_labels)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
    given = {"class_labels": as_list(class_labels), "prompt": prompt}
    for argument, value in {**given, "negative_prompt": negative_prompt}.items():
        if value is not None and argument not in taken:
            raise ValueError(f"`{argument}` is {value!r}, but none of the stages {', '.join(names)} takes any.")
    counts = {name: max(len(value), 1) if isinstance(value, (list, tuple)) else 1 for name, value in given.items()}
    count = max(counts.values()) if images is None else len(images)
    what = "images" if images is not None else "prompts" if counts["prompt"] == count else "classes"
    for argument, number in counts.items():
        check_one_or_each(argument, number, count, what)
    _check_same_classes(parts, labels)
    for name, ids in labels.items():
        if ids is not None and len(ids) == 1:
            labels[name] = ids * count
    return labels, count


def _check_same_classes(parts: Mapping[str, Any], labels: Mapping[str, list[int] | None]) -> None:
    """The classes that were asked for are called the same in all stages that know names."""
    meant = {
        name: [parts[name].class_names[label] for label in ids]
        for name, ids in labels.items()
        if ids is not None and parts[name].class_names and max(ids) < len(parts[name].class_names)
    }
    first = next(iter(meant), None)
    for name, classes in meant.items():
        pairs = zip(meant[first], classes, strict=True) if first is not None else ()
        for one, other in pairs:
            if one != other:
                raise ValueError(
                    f"`class_labels` names a class by a number that means {one!r} in {first} and {other!r} in {name}:"
                    " pass the name, or stages that were trained on the same classes."
                )


def _check_other_kind(
    name: str, kind: Any, parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]
) -> None:
    """A first stage that is any pipeline gets what its call asks for."""
    lacking = [argument for argument, value in given.items() if argument in parameters and value is None]
    if "prompt" in lacking and getattr(kind, "_needs_condition", True):  # a cascade may draw classes
        raise ValueError(f"`prompt` is missing: {kind.__name__}, the first stage, draws what a text says.")
    needed = [argument for argument in lacking if parameters[argument].default is inspect.Parameter.empty]
    if needed:
        raise ValueError(f"`{needed[0]}` is missing: {kind.__name__}, the first stage, needs it.")
    unknown = [
        argument
        for argument, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        and argument not in ("self", *given, *HANDED_ON)
    ]
    if unknown:
        raise ValueError(
            f"{name} is a {kind.__name__}, which needs `{unknown[0]}`: a cascade hands on classes and texts. Draw its"
            " images first, and start from them with `image=...`."
        )


def _sizes(
    parts: Mapping[str, Any],
    kinds: Mapping[str, Any],
    names: list[str],
    images: Tensor | None,
    latents: Tensor | None,
) -> dict[str, tuple[int, int] | None]:
    """Height and width by stage; each one takes what the one before makes."""
    sizes: dict[str, tuple[int, int] | None] = {}
    before: tuple[int, int] | None = None if images is None else tuple(images.shape[2:])  # type: ignore[assignment]
    for place, name in enumerate(names):
        part = parts[name]
        if not isinstance(part, CascadedStage):  # any pipeline: it makes what the next one takes, if it can be told
            following = parts[names[place + 1]] if place + 1 < len(names) else None
            side = None if following is None else following.config["low_res_size"]
            sizes[name] = before = None if side is None else (side, side)
            continue
        if isinstance(part, CascadedUpscalePipeline):
            side = part.config["low_res_size"]
            if before is not None and side is not None and before != (side, side):
                raise ValueError(
                    f"The stages do not chain: {name} takes images of {side}x{side} pixels (its `low_res_size`), but"
                    f" {names[place - 1]} makes {before[1]}x{before[0]}. Exchange one of the two."
                )
            low = before if before is not None else ((side, side) if side is not None else (1, 1))
            sizes[name] = before = part.upscaled_size(*low)
        else:
            sizes[name] = before = part.resolve_size(None, None, latents)
    return sizes


def _noise(
    name: str, stage: CascadedUpscalePipeline, before: Any, noise_level: float | None, mode: str | None, hint: str
) -> tuple[float, bool]:
    """How much noise a stage takes, and whether the stage before brings it: the truncated form."""
    try:
        level = stage.resolve_noise_level(0 if mode == "none" and noise_level is None else noise_level)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}{'' if noise_level is None else hint}") from error
    if mode == "none" and level > 0:
        raise ValueError(f'`noise_level` of {name} is {level}, but `conditioning_mode` is "none": use another one.')
    stops = isinstance(before, CascadedStage) and scheduler_attribute(before.scheduler, "corrupt") is not None
    if level == 0 or mode == "non_truncated" or (mode is None and not stops):
        return level, False
    if before is None:  # the run starts from an image
        return level, False
    if not isinstance(before, CascadedStage):
        raise ValueError(
            f'`conditioning_mode` is "truncated", but the stage before {name} is a {type(before).__name__}, which runs'
            ' to its end: use "non_truncated".'
        )
    tables = [scheduler_attribute(one, "alphas_cumprod") for one in (before.scheduler, stage.conditioning_scheduler)]
    noise = [(1 - table.cpu().double()).clamp(min=0).sqrt() for table in tables]
    if len(noise[0]) != len(noise[1]) or bool(((noise[0] - noise[1]).abs() > _SAME_NOISE).any()):
        raise ValueError(
            f"{name} was trained with images whose noise followed another schedule than that of the stage before: its"
            f" `conditioning_scheduler` has {len(noise[1])} levels, with noise {float(noise[1][-1]):.4g} at the last"
            f" and {float(noise[1][len(noise[1]) // 2]):.4g} in the middle, `scheduler` of the stage before"
            f" {len(noise[0])}, {float(noise[0][-1]):.4g} and {float(noise[0][len(noise[0]) // 2]):.4g}. The truncated"
            ' form needs the same one: use `conditioning_mode="non_truncated"`.'
        )
    return level, True


def _stopped(plan: StagePlan, level: float) -> StagePlan:
    return StagePlan(**{**vars(plan), "stop_level": level})


def _check(
    plan: StagePlan, stage: Any, plans: list[StagePlan], eta: float, generator: Any, latents: Tensor | None, hint: str
) -> None:
    """What a stage refuses by itself, with its name before the message."""
    if not isinstance(stage, CascadedStage):
        check_integer("num_inference_steps", plan.num_inference_steps, 1)
        if plan.guidance_scale is not None:
            check_guidance_scale(plan.guidance_scale)
        return
    assert plan.size is not None
    try:
        stage.check_inputs(
            plan.batch_size,
            *plan.size,
            num_inference_steps=plan.num_inference_steps,
            guidance_scale=stage.resolve_scale(plan.guidance_scale),
            eta=eta,
            latents=latents if plan is plans[0] else None,
        )
    except (TypeError, ValueError) as error:
        about_guidance = "`guidance_scale`" in str(error)
        raise type(error)(f"{plan.name}: {error}{hint if about_guidance else ''}") from error
    try:
        stage.set_timesteps(plan.num_inference_steps, plan.stop_level, device="cpu")
    except (TypeError, ValueError) as error:
        is_stopped = plan.stop_level > 0 and plan is not plans[-1]
        way_out = ' Or use `conditioning_mode="non_truncated"`.' if is_stopped else ""
        raise type(error)(f"{plan.name}: {error}{way_out}") from error
