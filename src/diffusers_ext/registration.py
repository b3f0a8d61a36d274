"""Makes diffusers' own loaders find this library's classes.

diffusers 0.42 has no plug-in mechanism and refuses to import a library only because a `model_index.json` names it, so
`import diffusers_ext` does the introduction. Everything here is guarded: a diffusers in which a table has moved leaves
class-based loading (`PaellaPipeline.from_pretrained(folder)`) untouched and says what no longer works.
"""

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import diffusers
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines import pipeline_loading_utils, pipeline_utils
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

logger = logging.get_logger(__name__)

OPT_OUT = "DIFFUSERS_EXT_NO_REGISTER"
LIBRARY = __name__.partition(".")[0]
AUTO_MODULE = "diffusers.pipelines.auto_pipeline"

# AutoPipeline table -> its key -> our pipeline. The same key in two tables links the variants for `from_pipe`, which
# share all components: those of latent diffusion share none of their networks, so each has a key of its own.
AUTO_PIPELINES = {
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": {
        "paella": "PaellaPipeline",
        "ldm": "LDMTextPipeline",
        "glide": "GlidePipeline",
        "versatile": "VersatilePipeline",
    },
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": {
        "paella": "PaellaImg2ImgPipeline",
        "paella-variation": "PaellaImageVariationPipeline",
        "ldm-upscale": "LDMUpscalePipeline",
        "cascaded-upscale": "CascadedUpscalePipeline",
        "versatile": "VersatilePipeline",
        "versatile-edit": "VersatileEditPipeline",
    },
    "AUTO_INPAINT_PIPELINES_MAPPING": {
        "paella": "PaellaInpaintPipeline",
        "ldm-inpaint": "LDMInpaintPipeline",
        "glide": "GlidePipeline",
    },
}


def register() -> bool:
    """Registers the public classes with diffusers; repeating it changes nothing. Runs on `import diffusers_ext`.

    Afterwards `model_index.json` records `["diffusers_ext", "PaellaUNet"]` whatever file the class lives in,
    `DiffusionPipeline.from_pretrained` finds our pipelines on disk and on the Hub, and AutoPipeline knows them.
    A name that diffusers already has is never replaced.

    Returns:
        False when the environment variable `DIFFUSERS_EXT_NO_REGISTER=1` asks to leave diffusers alone.
    """
    if os.environ.get(OPT_OUT, "0") not in ("", "0"):
        return False
    if hasattr(pipeline_loading_utils, "LOADABLE_CLASSES"):
        # The value stays empty: base classes are matched through diffusers' and transformers' own entries.
        pipeline_loading_utils.LOADABLE_CLASSES.setdefault(LIBRARY, {})
    else:
        logger.warning(
            f"diffusers {diffusers.__version__} has no table of loadable libraries: {LIBRARY} loads from "
            "local folders only. From the Hub: PaellaPipeline.from_pretrained(huggingface_hub.snapshot_download(id))."
        )
    _load_parts()
    package = sys.modules[LIBRARY]
    bases = (DiffusionPipeline, ModelMixin, SchedulerMixin, BaseGuidance)
    for name in package.__all__:
        public = getattr(package, name)
        if isinstance(public, type) and issubclass(public, bases) and not hasattr(diffusers, name):
            setattr(diffusers, name, public)
        if isinstance(public, type) and issubclass(public, ModelMixin):
            _guard_parents(public)
            _guard_itself(public)
    if AUTO_MODULE in sys.modules:
        _add_auto_pipelines(sys.modules[AUTO_MODULE])
    elif not any(isinstance(finder, _AutoPipelineWatch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoPipelineWatch())
    return True


def _load_parts() -> None:
    """Lets `DiffusionPipeline.from_pretrained` do to the parts of a pipeline what its class does.

    It hands dtype and variant to networks alone, not to the pipelines within a pipeline, a cascade's, and stumbles
    over their folders where it looks for variants. And it asks no class what is missing in a folder (`check_part`).
    """
    module: Any = pipeline_utils
    load: Any = getattr(module, "load_sub_model", None)
    if load is None or load.__module__ == __name__:
        return

    def load_sub_model(*args: Any, **options: Any) -> Any:
        check_part = getattr(options.get("pipeline_class"), "check_part", None)
        if check_part is not None:
            check_part(options["cached_folder"], options["name"])
        part = Path(options["cached_folder"], options["name"])
        if not _is_pipeline(part):
            return load(*args, **options)
        variant = options.get("model_variants", {}).get(options["name"])
        handed_on = {key: options[key] for key in ("dtype", "use_safetensors", "low_cpu_mem_usage") if key in options}
        return DiffusionPipeline.from_pretrained(part, variant=variant, **handed_on)

    module.load_sub_model = load_sub_model
    find: Any = getattr(module, "_identify_model_variants", None)
    if find is None:
        return

    def _identify_model_variants(folder: str, variant: str, config: dict) -> dict:
        if variant is None:
            return {}
        nested = {name for name in config if _is_pipeline(Path(folder, name))}
        found = find(folder=folder, variant=variant, config={k: v for k, v in config.items() if k not in nested})
        for name in nested:
            inner: Any = DiffusionPipeline.load_config(Path(folder, name))
            if find(folder=str(Path(folder, name)), variant=variant, config=inner):
                found[name] = variant
        return found

    module._identify_model_variants = _identify_model_variants


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _guard_parents(model: Any) -> None:
    """Lets the stock class that `model` derives from refuse what `model` saved.

    It would drop the settings that it does not know without a word (since it knows the name of the class that has
    them), take the weights, and compute something else.
    """
    for parent in model.__bases__:
        stock = (
            issubclass(parent, ModelMixin) and parent is not ModelMixin and parent.__module__.startswith("diffusers.")
        )
        if not stock or "extract_init_dict" in vars(parent) or not hasattr(parent, "extract_init_dict"):
            continue
        guarded: Any = parent
        original = guarded.extract_init_dict.__func__

        def extract_init_dict(cls, config_dict, *args, parent=parent, original=original, **kwargs):
            if cls is parent and config_dict.get("_class_name") == model.__name__:
                raise ValueError(
                    f"This is the config of a {model.__name__}, with which a {cls.__name__} computes something else: "
                    f"load it with `{LIBRARY}.{model.__name__}.from_pretrained`."
                )
            return original(cls, config_dict, *args, **kwargs)

        guarded.extract_init_dict = classmethod(extract_init_dict)


def _guard_itself(model: Any) -> None:
    """Lets `model` refuse the config of another network, of which it would take what happens to fit."""
    if "extract_init_dict" in vars(model):
        return
    original = model.extract_init_dict.__func__

    def extract_init_dict(cls, config_dict, *args, **kwargs):
        name = str(config_dict.get("_class_name", cls.__name__))
        saved_as: Any = cls if name == cls.__name__ else getattr(diffusers, name, None)
        is_network = isinstance(saved_as, type) and issubclass(saved_as, ModelMixin)
        if is_network and not (issubclass(saved_as, cls) or issubclass(cls, saved_as)):
            raise ValueError(
                f"This is the config of a {name}, which is another network than a {cls.__name__}: load it with"
                f" `{name}.from_pretrained`."
            )
        return original(cls, config_dict, *args, **kwargs)

    model.extract_init_dict = classmethod(extract_init_dict)


def _add_auto_pipelines(auto_pipeline) -> None:
    package = sys.modules[LIBRARY]
    for table_name, pipelines in AUTO_PIPELINES.items():
        table = getattr(auto_pipeline, table_name, None)
        if table is None:
            logger.warning(
                f"diffusers {diffusers.__version__} has no {table_name}: its AutoPipeline ignores {LIBRARY}."
            )
            continue
        for key, name in pipelines.items():
            table.setdefault(key, getattr(package, name))


class _AutoPipelineWatch(MetaPathFinder):
    """Fills the AutoPipeline tables right after somebody imports them. Their module imports all pipelines of
    diffusers, which takes twenty times as long as the rest of `import diffusers_ext`."""

    def find_spec(self, fullname, path, target=None):
        if fullname != AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_fill(module) -> None:
                execute(module)
                _add_auto_pipelines(module)

            spec.loader.exec_module = execute_and_fill
        return spec
