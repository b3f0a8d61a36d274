"""Label maps as users hold them, without a pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.conditions.label_maps import label_batch, resize_labels
from diffusers_ext.conditions.palettes import SCENES_PALETTE, colorize_labels

LABELS = np.arange(6).reshape(2, 3)


def test_forms():
    wanted = torch.arange(6).reshape(1, 2, 3)
    wide = Image.fromarray(LABELS.astype(np.int32))
    assert wide.mode == "I"
    colors = Image.fromarray(colorize_labels(LABELS))
    for form in (LABELS, LABELS.astype(np.uint8), torch.from_numpy(LABELS), wide, [wide]):
        found = label_batch(form, 6)
        assert found.dtype == torch.int64 and torch.equal(found, wanted)
    assert torch.equal(label_batch([colors, LABELS], 7, palette=SCENES_PALETTE.tolist()), wanted.expand(2, -1, -1))


def test_the_message_names_the_place():
    with pytest.raises(ValueError, match=r"`sketch` holds 2 unknown label\(s\), 4 at x=1, y=1: this model .* 0 to 3"):
        label_batch(LABELS, 4, name="sketch")
    with pytest.raises(TypeError, match=r"must hold integers, one label a pixel, received torch\.bool"):
        label_batch(LABELS > 2, 4)


def test_colours_in_arrays_are_no_labels():
    """Of (h, w, 3) each row would otherwise be a map of its own."""
    palette = SCENES_PALETTE.tolist()
    colors = colorize_labels(LABELS)
    wanted = torch.arange(6).reshape(1, 2, 3)
    for form in (colors, torch.from_numpy(colors), colors[None]):
        assert torch.equal(label_batch(form, 7, palette=palette), wanted)
    assert torch.equal(label_batch(np.stack([colors, colors]), 7, palette=palette), wanted.expand(2, -1, -1))
    with pytest.raises(ValueError, match="`sketch` is a coloured picture, but the pipeline has no `label_palette`"):
        label_batch(np.zeros((4, 5, 3), dtype=np.uint8), 7, name="sketch")
    with pytest.raises(ValueError, match=r"`sketch` has the colour \(90, 0, 90\) in row 0"):
        label_batch(np.full((4, 5, 3), (90, 0, 90), dtype=np.uint8), 7, palette=palette, name="sketch")
    with pytest.raises(ValueError, match=r"has the colour \(32, 32, 32\) for labels 0 and 7"):
        label_batch(colors, 8, palette=[*palette, palette[0]])


def test_resizing_takes_the_nearest_label():
    labels = torch.tensor([[[1, 5], [300, 7]]])
    assert resize_labels(labels, 4, 2).tolist() == [[[1, 5], [1, 5], [300, 7], [300, 7]]]
    assert resize_labels(labels, 1, 1).tolist() == [[[7]]]
    assert resize_labels(labels, 2, 2) is labels
