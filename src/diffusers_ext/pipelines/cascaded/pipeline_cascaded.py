"""A whole cascade: a stage draws small images, the others enlarge them, each with a network of its own.

Ho, Saharia, Chan, Fleet, Norouzi, Salimans, "Cascaded Diffusion Models for High Fidelity Image Generation", arXiv
2106.15282. Its authors released no code. A stage is a pipeline: `CascadedBasePipeline` or another that returns
images, then one to three `CascadedUpscalePipeline`s.
"""

import gc
import inspect
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from ...conditions.images import image_batch
from ...places import is_path
from ..base import LOOKUP_ARGUMENTS, Config, ConfigOf, HousePipeline, house_pipelines
from ..callbacks import Callback, callback_tensor_names
from ..checks import check_choice, check_integer, check_output_type
from ..recognition import check_folder
from ..saving import check_saveable
from .chain import STAGES, StagePlan, as_list, check_stage_kind, plan_run
from .pipeline_cascaded_upscale import CascadedUpscalePipeline
from .sources import StageSource
from .stage import CascadedStage, Generators

_UPLOAD = ("repo_id", "commit_message", "private", "create_pr", "token")
Each = float | Sequence[float | None] | None  # one for all stages, or one for each


@dataclass
class CascadedPipelineOutput(BaseOutput):
    """What a cascade drew.

    Args:
        images: Of the last stage that was run, in the form that was asked for.
        intermediates: With `return_intermediates`, the images of every stage that was run, by its name, each at its
            own size. Those at which a stage was stopped early carry noise.
    """

    images: Any
    intermediates: dict[str, Any] | None = None


class CascadedDiffusionPipeline(HousePipeline):
    """Draws images stage by stage.

    Example:

        pipe = CascadedDiffusionPipeline.from_pretrained("folder")
        pipe = CascadedDiffusionPipeline.from_stages(["user/base-32", "folder/of/upscale-64"], stage_by_stage=True)
        pipe("red circle", num_inference_steps=[250, 27], noise_level=251)

    A stage is an attribute, `pipe.base`, `pipe.upscale_1` ..., with network, scheduler and adapters of its own:
    `pipe.upscale_1.scheduler = ...`, `pipe.base.load_lora_weights(...)`.

    Args:
        base: The first stage: a `CascadedBasePipeline`, or any pipeline that returns images.
        upscale_1: A `CascadedUpscalePipeline`.
        upscale_2: The next one.
        upscale_3: The next one.
        hub_stages: Names on the Hub, or folders, of stages that are not given: each is read when its turn comes, and
            freed after it.
    """

    _pipeline_tag = "unconditional-image-generation"
    _card_tags = ("cascaded-diffusion",)
    _needs_condition = False  # a network without classes draws anything
    _optional_components = list(STAGES)
    _callback_tensor_inputs = CascadedStage._callback_tensor_inputs

    base: Any
    upscale_1: Any
    upscale_2: Any
    upscale_3: Any

    def __init__(
        self,
        base: DiffusionPipeline | None = None,
        upscale_1: CascadedUpscalePipeline | None = None,
        upscale_2: CascadedUpscalePipeline | None = None,
        upscale_3: CascadedUpscalePipeline | None = None,
        hub_stages: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self.stage: str | None = None  # the one that is running, for callbacks
        self._sources: dict[str, StageSource] = {}
        self._asked: list[tuple[str, tuple, dict[str, Any]]] = []  # of all stages, also of those that are read later
        stages = dict(zip(STAGES, (base, upscale_1, upscale_2, upscale_3), strict=True))
        for name, stage in stages.items():
            if stage is not None:
                check_stage_kind(name, type(stage))
        self.register_modules(**stages)
        for name, source in (hub_stages or {}).items():
            self._sources[_stage_name("hub_stages", name)] = StageSource(str(source))

    # --- stages

    @classmethod
    def idle_arguments(cls, index: Config, config_of: ConfigOf) -> set[str]:
        """What none of the stages takes, judged by those that lie in the folder."""
        kinds = [index.get(name) for name in STAGES]
        if any(isinstance(kind, str) for kind in kinds):
            return set()  # a stage elsewhere
        classes = {
            name: getattr(diffusers, str(kind[-1]), None) for name, kind in zip(STAGES, kinds, strict=True) if kind
        }
        stages = {name: found for name, found in classes.items() if isinstance(found, type)}
        idle = set()
        if all(issubclass(stage, CascadedStage) for stage in stages.values()):
            idle |= {"prompt", "negative_prompt"}
            if all(config_of(f"{name}/unet").get("num_class_embeds") is None for name in stages):
                idle.add("class_labels")
        return idle

    @property
    def stage_names(self) -> list[str]:
        """The stages that there are, in order, in memory or not."""
        return [name for name in STAGES if getattr(self, name) is not None or name in self._sources]

    @classmethod
    def from_stages(
        cls,
        stages: Sequence[Any],
        *,
        stage_by_stage: bool = False,
        dtype: Any = torch.float32,
        **options: Any,
    ) -> "CascadedDiffusionPipeline":
        """A cascade of stages that were made apart.

        Args:
            stages: In order, one to four: pipelines, folders, or names on the Hub.
            stage_by_stage: Whether folders and names are read when their turn comes, and freed after it, so that no
                more than one stage is in memory.
            dtype: Of the weights that are read.
            options: Further ones of `from_pretrained` for what is read, `token` and the like.
        """
        if isinstance(stages, (str, Path, DiffusionPipeline)) or not 1 <= len(stages) <= len(STAGES):
            count = 1 if isinstance(stages, (str, Path, DiffusionPipeline)) else len(stages)
            raise ValueError(
                f"`stages` must be a list of 1 to {len(STAGES)} pipelines, folders or names on the Hub, in order;"
                f" received {type(stages).__name__} of {count}."
            )
        dtype = options.pop("torch_dtype", None) or dtype
        given = dict(zip(STAGES, stages, strict=False))
        pipe = cls(**{name: stage for name, stage in given.items() if not isinstance(stage, (str, Path))})
        for name, stage in given.items():
            if isinstance(stage, (str, Path)):
                pipe._sources[name] = StageSource(str(stage), dtype, options)
        if not stage_by_stage:
            pipe.load_stages()
        return pipe

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, stage_by_stage: bool = False, **kwargs: Any
    ) -> "CascadedDiffusionPipeline":
        """diffusers' `from_pretrained`, with the stages read at once or, with `stage_by_stage`, in their turn.

        Args:
            pretrained_model_name_or_path: Folder, or name on the Hub.
            stage_by_stage: Whether a stage is read when its turn comes, and freed after it.
            kwargs: `dtype` and the like; stages in place of those of the folder, `upscale_1=...`, which are pipelines,
                folders, or names on the Hub.
        """
        name = str(pretrained_model_name_or_path)
        if kwargs.get("custom_pipeline") is not None:
            return super().from_pretrained(name, **kwargs)
        lookup = {key: value for key, value in kwargs.items() if key in LOOKUP_ARGUMENTS}
        index: Any = cls.load_config(name, **lookup)
        check_folder(cls, name, index, kwargs, house_pipelines())
        given = {stage: kwargs.pop(stage) for stage in STAGES if stage in kwargs}
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or torch.float32
        folder = Path(name) if Path(name).is_dir() else Path(DiffusionPipeline.download(name, **kwargs))
        inner = {key: value for key, value in kwargs.items() if key != "revision"}  # that of this repository
        places = {stage: given.pop(stage) for stage in STAGES if isinstance(given.get(stage), (str, Path))}
        pipe = cls(**given)
        for stage in STAGES:
            recorded = index.get(stage)
            if stage in places:
                pipe._sources[stage] = StageSource(str(places[stage]), _dtype_of(stage, dtype), inner)
            elif stage not in given and recorded and recorded != [None, None]:
                source = recorded if isinstance(recorded, str) else str(folder / stage)
                if not isinstance(recorded, str) and not (folder / stage / "model_index.json").is_file():
                    raise ValueError(
                        f"{name!r} names a stage {stage}, but has no pipeline in a folder {stage}: copy it there, or"
                        f" pass `{stage}=...`."
                    )
                pipe._sources[stage] = StageSource(source, _dtype_of(stage, dtype), inner)
        pipe.register_to_config(_name_or_path=name)
        if not stage_by_stage:
            pipe.load_stages()
        return pipe

    @classmethod
    def extract_init_dict(cls, config_dict: Any, **kwargs: Any) -> tuple[dict, dict, dict]:
        """diffusers takes a stage's entry for `[library, class]`: names on the Hub, plain words, go another way."""
        named = {name: config_dict[name] for name in STAGES if isinstance(config_dict.get(name), str)}
        rest = {name: value for name, value in config_dict.items() if name not in named}
        arguments, unused, hidden = super().extract_init_dict(rest, **kwargs)
        return (arguments | {"hub_stages": named} if named else arguments), unused, hidden

    def load_stages(self, *names: str) -> None:
        """Reads stages that are not in memory, all or those of these names. They stay."""
        for name in names or list(self._sources):
            if _stage_name("names", name) in self._sources:
                setattr(self, name, self._load(name))

    def _load(self, name: str) -> Any:
        stage = self._sources[name].load()
        stage.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        for call in self._asked:
            _tell(name, stage, *call)
        return stage

    @contextmanager
    def _in_memory(self, name: str) -> Iterator[Any]:
        """The stage with its weights, which leave the memory with the block if they were not there before."""
        resident = getattr(self, name)
        stage = self._load(name) if resident is None else resident
        self.stage = name
        try:
            yield stage
        finally:
            self.stage = None
            stage.maybe_free_model_hooks()  # of an offloaded stage: the next one has the device to itself
            if resident is None:
                del stage
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("unet", "scheduler"):
            raise ValueError(
                f"A cascade has a {name} a stage ({', '.join(self.stage_names)}): set that of a stage, for instance"
                f" `pipe.base.{name} = ...`."
            )
        if name in STAGES:
            if value is not None:
                check_stage_kind(name, type(value))
                library_class = _fetch_class_library_tuple(value)
                self.register_to_config(**{name: library_class})  # diffusers' forgets what was None
            self._sources.pop(name, None)  # also of a stage that is taken out
        super().__setattr__(name, value)

    def save_pretrained(self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Writes each stage as a folder that is a pipeline of its own; what was named on the Hub stays a name.

        The arguments are those of diffusers. Folders of stages that were never read are copied as they are.
        """
        folder = Path(save_directory)
        for stage in self._residents():
            check_saveable(stage.components)  # before anything is written
        kinds = {
            name: source.pipeline_class  # a folder that is gone is an error here
            for name, source in self._sources.items()
            if source.is_folder or is_path(source.name)
        }
        for name, kind in kinds.items():
            self._sources[name].check_files(kind)
        upload = {key: kwargs.pop(key) for key in _UPLOAD if key in kwargs}
        index: dict[str, Any] = {}
        for name, source in self._sources.items():
            index[name] = source.name
            if name in kinds:
                if (folder / name).resolve() != Path(source.name).resolve():
                    shutil.copytree(source.name, folder / name, dirs_exist_ok=True, ignore=_not_a_stage)
                index[name] = list(_fetch_class_library_tuple(kinds[name].__new__(kinds[name])))
        super().save_pretrained(folder, *args, **kwargs)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8")) | index
        index.pop("hub_stages", None)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if push_to_hub:
            options: dict[str, Any] = {"repo_id": folder.name} | upload
            self._push(folder, **options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """As in diffusers; stages that are not in memory are shared by where they lie."""
        pipe: Any = super().from_pipe(pipeline, **kwargs)
        if isinstance(pipeline, CascadedDiffusionPipeline):
            pipe._sources = {name: source for name, source in pipeline._sources.items() if getattr(pipe, name) is None}
            pipe._asked = list(pipeline._asked)
        return pipe

    # --- what diffusers' pipelines do for networks, done for the stages in memory

    def _residents(self) -> list[Any]:
        return [stage for name in STAGES if (stage := getattr(self, name)) is not None]

    def to(self, *args: Any, **kwargs: Any) -> "CascadedDiffusionPipeline":
        """As in diffusers: moves and casts all stages, also those that are read later."""
        if not isinstance(kwargs.get("dtype"), (torch.dtype, type(None))):
            return self  # of `from_pipe`: all stay as they are
        self._ask("to", *args, **kwargs)
        return self

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Calls a method of all stages: now of those in memory, and of the others when they are read."""
        call = (method, args, kwargs)
        for name in STAGES:
            if (stage := getattr(self, name)) is not None:
                _tell(name, stage, *call)
        self._asked = [one for one in self._asked if one != call] + [call]

    @property
    def device(self) -> torch.device:
        return next((stage.device for stage in self._residents()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next((stage.dtype for stage in self._residents()), torch.float32)

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        self._ask("enable_model_cpu_offload", *args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        self._ask("enable_sequential_cpu_offload", *args, **kwargs)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        self._ask("enable_group_offload", *args, **kwargs)

    def remove_all_hooks(self) -> None:
        self._asked = [call for call in self._asked if call[0] == "to"]
        for stage in self._residents():
            stage.remove_all_hooks()

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        super().set_progress_bar_config(**kwargs)
        for stage in self._residents():  # a first stage of another kind shows its own
            stage.set_progress_bar_config(**kwargs)

    def maybe_free_model_hooks(self) -> None:
        for stage in self._residents():
            stage.maybe_free_model_hooks()

    @property
    def _network(self) -> Any:
        raise ValueError(
            f"A cascade has a network a stage ({', '.join(self.stage_names)}): call the method of a stage, for"
            " instance `pipe.base.load_lora_weights(...)`."
        )

    @classmethod
    def example_lines(cls, config: Mapping[str, Any], prompt: str | None = None) -> str:
        return "image = pipe(0).images[0]  # of a class; without classes: pipe()"

    # --- a run

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        prompt: str | list[str] | None = None,
        image: Any = None,
        num_inference_steps: int | Sequence[int] = 100,
        guidance_scale: Each = None,
        noise_level: Each = None,
        conditioning_mode: str | None = None,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        start_stage: str | None = None,
        stop_stage: str | None = None,
        return_intermediates: bool = False,
        quantize_between_stages: bool = False,
        negative_prompt: str | list[str] | None = None,
    ) -> CascadedPipelineOutput | tuple:
        """Draws images.

        Arguments that may differ from stage to stage are one value for all, or a list with one for each stage of the
        pipeline, run or not; None in it means the stage's own default.

        Args:
            class_labels: One class or several, by number or by name, for the stages that know classes.
            prompt: What to draw, for a first stage that takes a text.
            image: Images to start from in the middle, of the size that a stage takes.
            num_inference_steps: Number of sampling steps.
            guidance_scale: See `CascadedBasePipeline`. The default is each stage's own.
            noise_level: Steps of noise of the images that go into each upscaling stage, s of the paper, or a list with
                one for each of them. The default is each stage's own.
            conditioning_mode: How they get that noise. "truncated": the stage before stops at s. "non_truncated": it
                runs to its end, and its images are noised to s. "none": they get none. By default the first where the
                stage before has a `TruncatedConditioningScheduler`, else the second. `image` is noised in either.
            eta: Noise of DDIM's steps in [0, 1]; 0 adds none. Schedulers without it ignore it.
            num_images_per_prompt: Number of images for each class, prompt or image. Those of the first come first.
            generator: One generator for the batch, or a list with one for each image. With a list, image k depends on
                generator k alone.
            latents: Standard normal noise of the first stage that is run, in place of a draw.
            output_type: "pil"; "np" (b, H, W, 3) or "pt" (b, 3, H, W), both in [0, 1]; or "latent" for the samples
                (b, 3, H, W), nominally in [-1, 1], neither clamped nor rounded.
            return_dict: Whether to return a `CascadedPipelineOutput` instead of a tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`, called after each step of each
                stage; `pipe.stage` is the name of the stage. Tensors that it returns replace those of the loop.
                `pipe._interrupt = True` skips the remaining steps of this stage and all further stages.
                `pipe._guidance_scale` may be set, for this stage; 1 turns guidance off, and so does 0.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets, by default `["latents"]`.
            start_stage: The first stage to run. The default is "base", or with `image` the one that takes its size.
            stop_stage: The last stage to run. The default is the last that there is.
            return_intermediates: Whether to return the images of every stage that is run too.
            quantize_between_stages: Whether clean images are cut to 8 bits between the stages, each value to the next
                darker one, as in ADM's files.
            negative_prompt: What to move away from, for a first stage that takes a text.

        Returns:
            `CascadedPipelineOutput`, or a tuple of the images and, if asked for, the intermediates.

        Order of the draws of each generator, stage by stage: the initial noise, that of the low-resolution image in
        the non-truncated form, then those of `scheduler.step` in each step.
        """
        # 1. Everything that can be refused is refused here: no model has run yet
        check_output_type(output_type)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        pictures = None if image is None else image_batch(image)
        plans = plan_run(
            {name: getattr(self, name) or self._sources[name] for name in self.stage_names},
            class_labels=class_labels,
            prompt=prompt,
            negative_prompt=negative_prompt,
            images=pictures,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            noise_level=noise_level,
            conditioning_mode=conditioning_mode,
            start_stage=start_stage,
            stop_stage=stop_stage,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
        )
        if plans[-1].name != "base":  # a first stage of another kind may have further tensors
            self.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        run: dict[str, Any] = {
            "eta": eta,
            "generator": generator,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }
        # 2. Stage by stage
        samples: Any = None  # what the next stage takes, (b, 3, h, w) in [-1, 1]
        if pictures is not None:
            samples = (2 * pictures - 1).repeat_interleave(num_images_per_prompt, dim=0)
        shown: dict[str, Any] = {}
        for plan in plans:
            with self._in_memory(plan.name) as stage:
                if not isinstance(stage, CascadedStage):
                    texts = {"prompt": prompt, "negative_prompt": negative_prompt, "class_labels": class_labels}
                    samples = self._draw(stage, plan, num_images_per_prompt, run | texts | {"latents": latents})
                else:
                    encode = partial(plan.encode, stage, samples, num_images_per_prompt, generator)
                    assert plan.size is not None  # only a first stage of another kind has no size
                    samples = stage.run(
                        plan.batch_size,
                        plan.size,
                        encode,
                        num_inference_steps=plan.num_inference_steps,
                        guidance_scale=plan.guidance_scale,
                        stop_level=plan.stop_level,
                        latents=latents if plan is plans[0] else None,
                        owner=self,
                        **run,
                    )
                if return_intermediates:
                    shown[plan.name] = self._show(samples, output_type)
                if plan is plans[-1] or self._interrupt:
                    images = self._show(samples, output_type)
            if self._interrupt:
                break
            samples = plan.hand_on(samples, quantize_between_stages)

        # 3. As the caller wants it
        intermediates = shown if return_intermediates else None
        if not return_dict:
            return (images, intermediates) if return_intermediates else (images,)
        return CascadedPipelineOutput(images=images, intermediates=intermediates)

    def _show(self, samples: Any, output_type: str) -> Any:
        return self.finish(samples, output_type, True, lambda images: images).images  # type: ignore[union-attr]

    def _draw(self, stage: Any, plan: StagePlan, num_images_per_prompt: int, options: dict[str, Any]) -> Tensor:
        """Images in [-1, 1] of a first stage that is any pipeline, which gets those options that it takes."""
        taken = inspect.signature(stage.__call__).parameters
        options = {key: value for key, value in options.items() if value is not None}
        count = plan.batch_size // num_images_per_prompt
        for key in ("prompt", "class_labels"):  # one for all
            value = as_list(options.get(key))
            if value is not None and count > 1 and (not isinstance(value, (list, tuple)) or len(value) == 1):
                options[key] = [*value] * count if isinstance(value, (list, tuple)) else [value] * count
        options |= {"num_inference_steps": plan.num_inference_steps, "output_type": "pt"}
        options |= {} if plan.guidance_scale is None else {"guidance_scale": plan.guidance_scale}
        options |= {} if plan.size is None else {"height": plan.size[0], "width": plan.size[1]}
        several = "num_images_per_prompt" if "num_images_per_prompt" in taken else "batch_size"
        options[several] = num_images_per_prompt if several == "num_images_per_prompt" else plan.batch_size
        callback = options.get("callback_on_step_end")
        if callback is not None:
            names = callback_tensor_names(stage, callback, options.get("callback_on_step_end_tensor_inputs"))
            options |= {
                "callback_on_step_end": partial(self._pass_on, callback),
                "callback_on_step_end_tensor_inputs": names,
            }
        self._interrupt = False
        images = image_batch(stage(**{key: value for key, value in options.items() if key in taken}).images)
        if len(images) != plan.batch_size or (plan.size is not None and tuple(images.shape[2:]) != plan.size):
            height, width = images.shape[2:]
            wanted = "" if plan.size is None else f" of {plan.size[1]}x{plan.size[0]} pixels"
            raise ValueError(
                f"The stages do not chain: base, a {type(stage).__name__}, made {len(images)} images of"
                f" {width}x{height} pixels; the next stage takes {plan.batch_size}{wanted}."
            )
        return 2 * images - 1

    def _pass_on(self, callback: Any, stage: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        """A callback of a first stage that is any pipeline: it gets the cascade, and what it sets there holds."""
        scale = getattr(stage, "_guidance_scale", 1.0)
        self._guidance_scale, self._num_timesteps = scale, getattr(stage, "_num_timesteps", 0)
        returned = callback(self, step, timestep, tensors)
        if self._guidance_scale is not scale:
            stage._guidance_scale = self._guidance_scale
        stage._interrupt = self._interrupt
        return returned


def _stage_name(argument: str, name: str) -> str:
    check_choice(argument, name, STAGES)
    return name


def _tell(name: str, stage: Any, method: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Calls a method of a stage. Files are named after the places in a network, which the stages have in common."""
    folder = kwargs.get("offload_to_disk_path")
    own = {} if folder is None else {"offload_to_disk_path": str(Path(folder) / name)}
    getattr(stage, method)(*args, **kwargs | own)


def _dtype_of(stage: str, dtype: Any) -> Any:
    """The dtype of a stage: its own in a dict by stages, else all that the dict says about components."""
    if not isinstance(dtype, dict):
        return dtype
    parts = {name: value for name, value in dtype.items() if name not in STAGES}
    return dtype.get(stage, parts or torch.float32)


def _not_a_stage(folder: str, names: list[str]) -> list[str]:
    """What a training leaves beside its result."""
    return [name for name in names if name.startswith("checkpoint-") or name in ("logs", "run.lock")]
