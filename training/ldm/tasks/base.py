"""What a task adds to latent diffusion: columns of the data, a raw condition, its encoder, a picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Generator, Tensor, nn

from diffusers_ext.data.annotations import ROW, NamedRows
from diffusers_ext.data.crops import Crop, Resampling, draw_crop
from diffusers_ext.data.labels import Classes, as_asked
from diffusers_ext.pipelines.ldm.base import LDMBasePipeline
from diffusers_ext.training.ldm.args import CONTEXT_TASKS, LDMArgs
from diffusers_ext.training_utils.args import DataArgs, TrainArgs

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Task:
    """One value of `--task`. It holds options and formats, no network: loader processes get a copy.

    The words of the paper (section 3.3): a condition for cross-attention is a context, another is concatenated. What
    is trained drops conditions per sample, so that guidance is possible: a context becomes the null condition, a map
    zeros (the authors' released training code drops none, though they released models with guidance).

    Args:
        args, data: The options.
        factor: Pixels a side of a latent.
        num_labels: Classes, categories or labels that the networks know.
    """

    pipeline: ClassVar[type[LDMBasePipeline]]
    stock: ClassVar[str | None] = None  # the class of diffusers whose repositories the pipeline also loads
    conditioner: ClassVar[str | None] = None  # the component that is trained along with the U-Net
    conditioner_options: ClassVar[dict[str, Any]] = {}  # beside the condition
    raw_condition: ClassVar[str | None] = None  # what `read` calls that which the conditioner is given
    has_one_answer: ClassVar[bool] = False  # whether a sample should be the original

    args: LDMArgs
    data: DataArgs
    factor: int = 1
    num_labels: int | None = None

    def __post_init__(self) -> None:
        self.is_context = self.args.task in CONTEXT_TASKS
        self.crop_scale = self.args.resolved_crop_scale
        self.resampling: Resampling = "bicubic"  # how pictures are resized

    # ---- data

    def columns(self) -> tuple[str, ...]:
        """The columns that the task reads beside the picture."""
        return ()

    def prepare(self, sets: tuple[Dataset, Dataset]) -> tuple[Dataset, Dataset]:
        """Training and validation set, with what a pipeline to fine-tune changes of them."""
        return sets

    def names_in(self, sets: Sequence[NamedRows]) -> Classes | None:
        """The classes of the data as they are found there; None for a task without."""
        return None

    def find_names(self, sets: Sequence[NamedRows]) -> Classes | None:
        """The classes of the data, or None for a task without.

        Args:
            sets: Training and validation set; what is held out may hold a name that no other picture has.

        Raises:
            ValueError: a label is none, or their number is not that of `--num_labels`.
        """
        found = self.names_in(sets)
        if found is None:
            return None
        return as_asked(found, self.args.num_labels, rows_are_checked=self.args.task == "class")

    def check_rows(self, rows: NamedRows) -> None:
        """Refuses now labels that would stop the training in its middle; not called for `scenes`.

        Raises:
            ValueError: naming the picture.
        """

    def sample(self, row: dict[str, Any], generator: Generator) -> dict[str, Tensor | str]:
        """A row as a training sample: the picture (or its cached moments) and the raw condition, cropped alike.

        Draws, in this order: four of the crop, then those of the condition.

        Raises:
            ValueError: the row does not fit; the message names its picture.
        """
        try:
            if "moments" in row:
                crop = self.crop(tuple(row["size"].tolist()), generator)
                return {"moments": row["moments"], **self.read(row, None, crop, generator)}
            picture = row[self.data.image_column]
            crop = self.crop(picture.size, generator)
            image = crop.image(picture, self.data.resolution, self.resampling)
            return {"image": image, **self.read(row, image, crop, generator)}
        except ValueError as error:
            raise ValueError(f"{row[ROW]}: {error}") from error

    def crop(self, size: tuple[int, int], generator: Generator) -> Crop:
        """Where a picture of this (width, height) is cut; four draws."""
        return draw_crop(
            size, self.data.resolution, generator, scale=self.crop_scale,
            center_crop=self.data.center_crop, random_flip=self.data.random_flip,
        )  # fmt: skip

    def read(
        self, example: dict[str, Any], image: Tensor | None, crop: Crop, generator: Generator
    ) -> dict[str, Tensor | str]:
        """The raw condition of a row.

        Args:
            example: The row.
            image: Its picture (3, h, w), cut by `crop`; None where a cache stands for it.
            crop: Labels and boxes are cut alike.
            generator: For the draws of the condition.
        """
        return {}

    # ---- networks

    @staticmethod
    def concatenated_channels(args: LDMArgs, latent_channels: int) -> int:
        """Channels of the condition behind the latents."""
        return 0

    @staticmethod
    def new_conditioner(args: LDMArgs, num_labels: int | None, vocab_size: int, num_stages: int) -> nn.Module | None:
        """What encodes the condition, new; None where nothing has to. See `networks.build_conditioner`."""
        return None

    def new_tokenizer(self, captions: Sequence[str], train: TrainArgs) -> Any:
        """The tokenizer of a task whose condition is text."""
        return None

    def new_config(self, names: Classes | None) -> dict[str, Any]:
        """What a new pipeline's constructor takes beside its networks."""
        return {
            "null_condition": self.args.dropout_of_condition > 0,
            "default_guidance_scale": self.args.guidance_scale,
        }

    def known_labels(self, pipe: Any) -> int | None:
        """How many classes, categories or labels a pipeline knows."""
        return None

    def check_pretrained(self, pipe: Any) -> None:
        """Refuses a pipeline that cannot learn what the options ask for."""

    def follow(self, pipe: Any) -> None:
        """Takes over from the pipeline what reading a sample depends on."""
        self.factor, self.num_labels = pipe.vae_scale_factor, self.known_labels(pipe)

    # ---- objective

    def trained_conditioner(self, pipe: Any) -> nn.Module | None:
        """The component of the pipeline that is trained along with the U-Net."""
        return None if self.conditioner is None else getattr(pipe, self.conditioner)

    def checkpoint_gradients(self, conditioner: Any) -> None:
        """Trades compute for memory in the conditioner, where it is large."""

    def null_condition(self, pipe: Any) -> Tensor | None:
        """What a dropped context becomes before the conditioner: a class (), or tokens (l,); None for maps."""
        return None

    def condition(self, pipe: Any, batch: dict[str, Any]) -> Tensor | None:
        """What the conditioner is given (or the U-Net, where there is none) for a collated batch."""
        return None if self.raw_condition is None else batch[self.raw_condition]

    # ---- validation

    def call(self, pipe: Any, batch: dict[str, Any], examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the pipeline is called with for a batch.

        Args:
            examples: The rows that the batch was read from.
        """
        raise NotImplementedError

    def square(self) -> dict[str, Any]:
        """The size of the samples, where the condition has none."""
        return {"height": self.data.resolution, "width": self.data.resolution}

    def shown(self, pipe: Any, batch: dict[str, Any]) -> Tensor | None:
        """The conditions as pictures (b, 3, h, w) in [-1, 1], where they are any."""
        return None

    def annotated(self, pipe: Any, images: Tensor, call: dict[str, Any]) -> Tensor:
        """Samples (b, 3, h, w) in [-1, 1], and once more with what they were to follow, where it can be drawn."""
        return images
