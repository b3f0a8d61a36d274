"""What all pipelines of the house have in common: a run, its defaults and its end; loading, sharing and saving."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from huggingface_hub import ModelCard, create_repo
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from torch import Tensor, nn

from ..guidance import Mix, normalized_guidance
from ..models.blocks.wrappers import unwrap
from ..places import did_you_mean
from ..schedulers.gaussian import guides_itself
from .adapters import AdapterMixin
from .callbacks import Callback, callback_tensor_names
from .cards import CardMixin, pipeline_card
from .checks import check_callback_tensors, check_decoded, check_fraction, sample_sides
from .recognition import check_component, check_folder
from .saving import check_saveable

LOOKUP_ARGUMENTS = (  # of `from_pretrained`, which finding a file on the Hub takes too
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "token",
)  # fmt: skip
Config = Mapping[str, Any]
ConfigOf = Callable[[str], Config]  # (component) -> its config
_KEEP_DTYPE = object()  # what `from_pipe` hands to `to` in place of diffusers' silent float32


class HousePipeline(AdapterMixin, CardMixin, DiffusionPipeline):
    """The state of a run, once for all families. `from_pipe` leaves the shared components as they are.

    It saves only what loads back equal, takes LoRA matrices, and pushes a card that says how to load it.

    A component may be compiled (`pipe.unet = torch.compile(pipe.unet)`). Of one in `DistributedDataParallel` or
    `DataParallel`, which hide its config and methods, the pipeline keeps the network: sampling has nothing to
    synchronise. Other wrappers are refused.
    """

    vae_scale_factor: int
    image_processor: Any
    scheduler: Any

    has_null_condition: Any = True  # whether the network can be guided: it was also trained without its condition
    _needs_condition = True  # whether a call has to say what to draw, in any of its arguments
    _usual_guidance_scale: float = 1.0  # the authors', where neither the call nor the checkpoint names one
    _guidance_scale: float = 1.0
    _guidance_rescale: float = 0.0
    _num_timesteps: int = 0
    _interrupt: bool = False

    @classmethod
    def idle_arguments(cls, index: Config, config_of: ConfigOf) -> set[str]:
        """Arguments of `__call__` that the networks of a checkpoint can do nothing with, such as classes.

        Args:
            index: The checkpoint's model_index.json.
            config_of: `(component) -> its config`.
        """
        return set()

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def guidance_mix(self) -> Mix | None:
        """The rule for `guidance.guide`: None is plain guidance, any `guidance_rescale` a share of the normalised."""
        if self._guidance_rescale == 0:
            return None
        return partial(normalized_guidance, guidance_rescale=self._guidance_rescale)

    @property
    def do_classifier_free_guidance(self) -> bool:
        # u + s * (c - u): the null branch cancels exactly at s = 1 and only there
        return self._guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def resolve_scale(self, guidance_scale: Any) -> Any:
        """The guidance scale of the call, else the checkpoint's, else the authors', or 1 where nothing can guide.

        Checks nothing.
        """
        if guidance_scale is not None:
            return guidance_scale
        usual = self._usual_guidance_scale if self.has_null_condition else 1.0
        default = self.config.get("default_guidance_scale")
        return usual if default is None else default

    def resolve_size(self, height: Any, width: Any, latents: Any = None) -> tuple[Any, Any]:
        """Height and width in pixels. What the call left out is the size of `latents`, else the checkpoint's.

        Raises:
            ValueError: if nothing says what size the network was trained on.
        """
        if height is not None and width is not None:
            return height, width
        sides = self.config.get("default_sample_size")
        if isinstance(latents, Tensor) and latents.ndim >= 3:  # (b, h, w) tokens or (b, c, h, w)
            sides = tuple(latents.shape[-2:])
        elif sides is None:
            sides = getattr(getattr(self, "unet", None), "config", {}).get("sample_size")
        if sides is None:
            raise ValueError(
                "`height` and `width` are needed: neither the pipeline's `default_sample_size` nor"
                " unet.config.sample_size says what size the network was trained on."
            )
        rows, columns = sample_sides("default_sample_size", sides)
        factor = self.vae_scale_factor
        return rows * factor if height is None else height, columns * factor if width is None else width

    def callback_names(self, callback: Callback | None, names: Sequence[str] | None) -> list[str]:
        """The names of the tensors that a callback gets, see `callback_tensor_names`. They are checked without one."""
        if callback is not None:
            return callback_tensor_names(self, callback, names)
        if names is None:
            return []
        check_callback_tensors(names, self._callback_tensor_inputs)
        return list(names)

    def check_rescale(self, guidance_rescale: Any) -> None:
        """A share of normalised guidance, which a scheduler that guides by itself would not see."""
        check_fraction("guidance_rescale", guidance_rescale, "0 is plain guidance, 1 is normalised guidance")
        if guidance_rescale != 0 and guides_itself(self.scheduler):
            raise ValueError(
                f"`guidance_rescale` is {guidance_rescale}, but `scheduler` is a {type(self.scheduler).__name__},"
                " which guides by itself: leave it at 0, and give the scheduler its own."
            )

    def start_run(self, timesteps: Tensor, guidance_scale: float, guidance_rescale: float = 0.0) -> None:
        """Resets the state for a run of these timesteps."""
        self._guidance_rescale = float(guidance_rescale)
        self._guidance_scale = float(guidance_scale) + 0.0  # a new object: any other was set by a callback
        self._num_timesteps = len(timesteps)
        self._interrupt = False

    def steps(self, timesteps: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Index and timestep of each step, under a progress bar; a callback's `pipe._interrupt = True` ends them."""
        with self.progress_bar(total=len(timesteps)) as progress_bar:  # pyright: ignore[reportAttributeAccessIssue]
            for index, timestep in enumerate(timesteps):
                if not self._interrupt:
                    yield index, timestep
                    progress_bar.update()

    def finish(
        self, samples: Any, output_type: str, return_dict: bool, decode: Callable[[Any], Tensor]
    ) -> ImagePipelineOutput | tuple:
        """What the run drew, as the caller wants it, and offloaded components go back.

        Args:
            decode: from `samples` to images (b, 3, H, W), nominally in [-1, 1]. Not called for "latent".
        """
        images: Any = samples
        if output_type != "latent":
            pixels = decode(samples).float()
            check_decoded(pixels, "pictures", self)
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in diffusers; what would not load back as it is (adapters, fp8 storage ...) is refused."""
        check_saveable(self.components)
        hub: dict[str, Any] = {
            key: kwargs.pop(key)
            for key in ("repo_id", "commit_message", "private", "create_pr", "token")
            if key in kwargs
        }
        # named one by one: diffusers hands a pipeline within a pipeline those that its signature names
        super().save_pretrained(
            save_directory,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **kwargs,
        )
        if push_to_hub:
            hub.setdefault("repo_id", Path(save_directory).name)
            self._push(Path(save_directory), **hub)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Uploads the pipeline and, if the repository has no card, one that says how to install, load and draw.

        The arguments and the result are those of diffusers.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return self._push(
                Path(folder),
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
                subfolder=subfolder,
            )

    def _push(
        self,
        folder: Path,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> str:
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if subfolder is None:
            try:
                card = ModelCard.load(repo_id, token=token)
            except EntryNotFoundError:
                card = pipeline_card(type(self), repo_id, self.config)
            card.save(folder / "README.md")
        return self._upload_folder(
            str(folder),
            repo_id,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
            subfolder=subfolder,
        )

    def register_modules(self, **kwargs: Any) -> None:
        fitting = {
            name: self._fitting_network(name, part) if isinstance(part, nn.Module) else part
            for name, part in kwargs.items()
        }
        super().register_modules(**fitting)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._fitting_network(name, value) if isinstance(value, nn.Module) else value)

    def _fitting_network(self, name: str, network: nn.Module) -> nn.Module:
        network = _visible_component(name, network)
        check_component(type(self), name, network, house_pipelines())
        return network

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers; the error for a name that is not found names the folders that are near to it."""
        try:
            return super().load_config(pretrained_model_name_or_path, **kwargs)
        except (OSError, HFValidationError) as error:
            place = str(pretrained_model_name_or_path)
            if Path(place).exists() or not (hint := did_you_mean(place)):
                raise
            raise OSError(f"{error}{hint}") from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """diffusers' `from_pretrained`, except that a folder of another pipeline is refused before it is read.

        Without `dtype` all parts are float32, whatever the files hold; with one, as in diffusers: a dtype, or a dict
        of one each.

        Raises:
            ValueError: for a folder of another pipeline; names its class.
        """
        lookup = {name: value for name, value in kwargs.items() if name in LOOKUP_ARGUMENTS}
        index: Any = cls.load_config(pretrained_model_name_or_path, **lookup)
        if kwargs.get("custom_pipeline") is None:
            check_folder(cls, str(pretrained_model_name_or_path), index, kwargs, house_pipelines())
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32  # parts of transformers would keep the file's
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if kwargs.get("custom_pipeline") is None and not isinstance(loaded, cls):
            return cls.from_pipe(loaded)  # a folder of `export-hub --no-import` names the class that diffusers builds
        return loaded

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """diffusers' `from_pipe`, except that shared components keep their dtypes unless `dtype` is given."""
        names_dtype = kwargs.get("dtype") is not None or kwargs.get("torch_dtype") is not None
        if not names_dtype and kwargs.get("custom_pipeline") is None:
            kwargs["dtype"] = _KEEP_DTYPE
        return super().from_pipe(pipeline, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> "HousePipeline":
        """As in diffusers: moves and casts all components."""
        if kwargs.get("dtype") is _KEEP_DTYPE:
            return self
        return super().to(*args, **kwargs)


def house_pipelines(base: type = HousePipeline) -> Iterator[type]:
    """All pipeline classes of the house that have been imported, without those that are no pipelines by themselves."""
    for child in base.__subclasses__():
        if any("__call__" in vars(parent) for parent in child.__mro__):
            yield child
        yield from house_pipelines(child)


def _visible_component(name: str, component: nn.Module) -> nn.Module:
    """The component in a form whose config and methods can be reached.

    Raises:
        TypeError: for an unknown wrapper, which would hide what the pipeline has to know.
    """
    bare = unwrap(component)
    if not hasattr(bare, "config"):
        raise TypeError(
            f"`{name}` is a {type(bare).__name__}, which has no `config`: the pipeline sees through torch.compile,"
            " DistributedDataParallel and DataParallel, and through no other wrapper. Assign the network that it"
            " holds, or change that in place, as `unet.compile()` does."
        )
    return component if hasattr(component, "config") else bare
