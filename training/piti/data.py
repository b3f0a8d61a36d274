"""The data of train_piti.py: a picture, and what a stage is told of it."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Generator, Tensor
from transformers import PreTrainedTokenizerBase

from diffusers_ext.data.annotations import ROW, NamedRows
from diffusers_ext.data.crops import choose_text, draw_crop
from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.pipelines.tokenization import tokenize_texts
from diffusers_ext.training.piti.args import PITIArgs
from diffusers_ext.training_utils.args import DataArgs


def load_rows(args: PITIArgs, data: DataArgs) -> tuple[NamedRows, NamedRows]:
    """Training and validation set; rows also tell what an error calls them."""
    train_set, validation_set = load_pictures(data, columns=(data.caption_column,))
    return NamedRows(train_set, data.image_column), NamedRows(validation_set, data.image_column)


# Without networks, so that loader processes can be started with it on every platform.
@dataclass(frozen=True)
class TextReader:
    """Makes a training sample of a row: the picture, cut and mirrored, and the tokens of one of its captions.

    Args:
        data: How pictures are cut.
        tokenizer: Of the pipeline.
        window: Tokens of a text, padding included.
        lower_case: Whether texts are written in lower case first.
    """

    data: DataArgs
    tokenizer: PreTrainedTokenizerBase
    window: int
    lower_case: bool

    def __call__(self, row: dict[str, Any], generator: Generator) -> dict[str, Tensor | str]:
        """The `image` (3, h, w) in [-1, 1], the `text`, and its `tokens` (window,).

        Draws, in this order: four numbers of the crop, then which of the captions.

        Raises:
            ValueError: the row does not fit; the message names its picture.
        """
        data, picture = self.data, row[self.data.image_column]
        try:
            crop = draw_crop(
                picture.size,
                data.resolution,
                generator,
                center_crop=data.center_crop,
                random_flip=data.random_flip,
            )
            image = crop.image(picture, data.resolution)
            text = choose_text(row[data.caption_column], generator)
        except ValueError as error:
            raise ValueError(f"{row[ROW]}: {error}") from error
        return {"image": image, "text": text, "tokens": self.tokens(text)}

    def tokens(self, text: str) -> Tensor:
        """A text as the pipeline tokenizes it (window,)."""
        text = text.lower() if self.lower_case else text
        return tokenize_texts(self.tokenizer, [text], self.window)[0][0]

    def without_augmentation(self) -> "TextReader":
        """The one of the validation: the centre, not mirrored."""
        return replace(self, data=self.data.without_augmentation())
