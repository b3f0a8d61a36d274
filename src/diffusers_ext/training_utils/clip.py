"""CLIP as the components that a pipeline holds, from wherever `--pretrained_clip_name_or_path` finds it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPImageProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from .weights import load_whole

OPEN_CLIP = "open_clip:"
CLIP_COMPONENTS = {
    "tokenizer": AutoTokenizer,
    "text_encoder": CLIPTextModelWithProjection,
    "image_encoder": CLIPVisionModelWithProjection,
    "feature_extractor": CLIPImageProcessor,
}


def load_clip(name_or_path: str, load_open_clip: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Both towers of a CLIP, the tokenizer and the image preparation, under their names in a pipeline.

    Args:
        name_or_path: The folder or Hub name of a CLIP, the folder of a pipeline, or `open_clip:<model>/<tag or file>`.
        load_open_clip: `(<model>/<tag or file>) -> components`, that of conversion/open_clip.py.
    """
    if name_or_path.startswith(OPEN_CLIP):
        return load_open_clip(name_or_path.removeprefix(OPEN_CLIP))
    is_pipeline = (Path(name_or_path) / "model_index.json").is_file()
    return {
        name: load_whole(kind, Path(name_or_path, name) if is_pipeline else name_or_path)
        for name, kind in CLIP_COMPONENTS.items()
    }
