"""What a model card says about a pipeline: how to install the package, load the pipeline, and draw with it."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

# `training_utils/hub.py` says the same: neither of the two may import the other.
INSTALL = "pip install .  # in a checkout of diffusers_ext; with its wheel: pip install path/to/diffusers_ext-*.whl"
PROMPT = "a red circle"


class CardMixin:
    """A pipeline class that knows the lines of its card."""

    _pipeline_tag: str | None = None  # the Hub's name of the task
    _card_tags: tuple[str, ...] = ()
    _example = ""  # Python lines that draw with `pipe`; {prompt} stands for a text

    @classmethod
    def card_tags(cls) -> dict[str, Any]:
        """Task and tags for a card's header."""
        return {"pipeline_tag": cls._pipeline_tag, "tags": ["diffusers", "diffusers_ext", *cls._card_tags]}

    @classmethod
    def example_lines(cls, config: Mapping[str, Any], prompt: str | None = None) -> str:
        """Python lines that draw with `pipe`.

        Args:
            config: The pipeline's own, or its `model_index.json`: the names of classes are there.
            prompt: A text that the network knows.
        """
        text = (PROMPT if prompt is None else prompt).replace("\\", "\\\\").replace('"', '\\"')
        return cls._example.replace("{prompt}", " ".join(text.split()))

    @classmethod
    def usage(
        cls,
        name: str,
        config: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        *,
        without_import: bool = False,
    ) -> str:
        """Python lines that load the pipeline and draw with it.

        Args:
            name: Repository on the Hub, or a folder.
            config: See `example_lines`, and so for `prompt`.
            without_import: For a folder that `diffusers-ext export-hub --no-import` wrote.
        """
        loader, imports, trust = f"diffusers_ext.{cls.__name__}", "\nimport diffusers_ext\n", ""
        if without_import:
            loader, trust = "DiffusionPipeline", ", trust_remote_code=True"
            imports = "from diffusers import DiffusionPipeline\n\n# the package diffusers_ext must be installed"
        load = f'pipe = {loader}.from_pretrained("{name}", dtype=torch.float32{trust})'
        return f"import torch\n{imports}\n{load}\n{cls.example_lines(config or {}, prompt)}\n"


def pipeline_card(pipeline: type[CardMixin], repo_id: str, config: Mapping[str, Any]) -> ModelCard:
    """A card for a pipeline of which nothing else is known."""
    header = ModelCardData(library_name="diffusers", **pipeline.card_tags()).to_yaml()
    code = pipeline.usage(repo_id, config).strip()
    text = f"# {repo_id.split('/')[-1]}\n\nA `{pipeline.__name__}`.\n\n## Use\n"
    return ModelCard(f"---\n{header}\n---\n\n{text}\n```shell\n{INSTALL}\n```\n\n```python\n{code}\n```\n")
