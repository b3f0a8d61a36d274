"""The tasks by the words of `--task`."""

from diffusers_ext.training.ldm.tasks.base import Task
from diffusers_ext.training.ldm.tasks.class_label import ClassLabel
from diffusers_ext.training.ldm.tasks.inpainting import Inpainting
from diffusers_ext.training.ldm.tasks.layout import Layout
from diffusers_ext.training.ldm.tasks.semantic import Semantic
from diffusers_ext.training.ldm.tasks.super_resolution import SuperResolution
from diffusers_ext.training.ldm.tasks.text import Text
from diffusers_ext.training.ldm.tasks.unconditional import Unconditional

TASKS: dict[str, type[Task]] = {
    "unconditional": Unconditional,
    "class": ClassLabel,
    "text": Text,
    "layout": Layout,
    "semantic": Semantic,
    "super_resolution": SuperResolution,
    "inpainting": Inpainting,
}
