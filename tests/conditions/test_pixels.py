"""A picture or mask of any PIL mode, array or tensor is read right or refused with advice that works."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.conditions.images import image_list
from diffusers_ext.conditions.label_maps import label_batch
from diffusers_ext.conditions.masks import mask_batch, mask_values
from diffusers_ext.conditions.pixels import read_grey, read_rgb
from diffusers_ext.data.image_folder import decode_image

RAMP = np.linspace(0, 1, 32, dtype=np.float32).reshape(4, 8)
BYTES = (RAMP * 255).round().astype(np.uint8)
HALF = np.zeros((4, 8), dtype=np.uint8)
HALF[:, 4:] = 255  # white in the right half
ON = torch.from_numpy(HALF > 0)[None]


def _deep(values: np.ndarray, mode: str) -> Image.Image:
    return Image.fromarray(values).convert(mode) if mode == "I" else Image.fromarray(values)


GREYS = {
    "L": Image.fromarray(BYTES),
    "LA": Image.fromarray(BYTES).convert("LA"),
    "RGB": Image.fromarray(BYTES).convert("RGB"),
    "RGBA": Image.fromarray(BYTES).convert("RGBA"),
    "P": Image.fromarray(BYTES).convert("P"),
    "I;16": _deep((RAMP * 65535).round().astype(np.uint16), "I;16"),
    "I;16B": Image.frombytes("I;16B", (8, 4), (RAMP * 65535).round().astype(">u2").tobytes()),
    "I of 8 bits": Image.fromarray(BYTES.astype(np.int32)),
    "I of 16 bits": Image.fromarray((RAMP * 65535).round().astype(np.int32)),
    "F": Image.fromarray(RAMP),
    "F beyond 1 by rounding": Image.fromarray(RAMP * np.float32(1.0000002)),
}


@pytest.mark.parametrize("kind", GREYS)
def test_grey_pictures_of_every_depth_are_the_same_picture(kind):
    found = image_list(GREYS[kind])[0]
    assert found.shape == (3, 4, 8)
    torch.testing.assert_close(found, torch.from_numpy(RAMP).expand(3, 4, 8), atol=1 / 255, rtol=0)


@pytest.mark.parametrize("kind", GREYS)
def test_sampling_and_training_read_the_same_pixels_from_a_file(kind, tmp_path):
    suffix = "png" if kind in ("L", "LA", "RGB", "RGBA", "P", "I;16") else "tif"
    GREYS[kind].save(tmp_path / f"a.{suffix}")
    trained = np.asarray(decode_image(tmp_path / f"a.{suffix}"))
    with Image.open(tmp_path / f"a.{suffix}") as opened:
        sampled = image_list(opened)[0]
    assert torch.equal(sampled, torch.from_numpy(trained).permute(2, 0, 1).float() / 255)
    assert trained.min() < 2 and trained.max() > 253  # neither black nor clipped


def test_a_picture_turned_by_exif_is_upright_in_both(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(BYTES).convert("RGB").save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(BYTES, -1)
    trained = np.asarray(decode_image(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as opened:
        assert np.array_equal(trained[..., 0], upright)
        assert torch.equal(image_list(opened)[0][0], torch.from_numpy(upright.copy()).float() / 255)
        assert np.array_equal(read_grey(opened), upright)
        labels = label_batch(opened.convert("L"), 256)
        assert np.array_equal(labels[0].numpy(), upright)


def test_transparent_pictures_lie_on_white_and_masks_on_black():
    pixels = np.zeros((4, 8, 4), dtype=np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, HALF
    picture = Image.fromarray(pixels)
    assert image_list(picture)[0][:, 0, 0].tolist() == [1, 1, 1]
    torch.testing.assert_close(image_list(picture)[0][:, 0, 7], torch.tensor([200 / 255, 0, 0]))
    assert np.array_equal(read_rgb(picture), read_rgb(picture.convert("RGBa")))
    brush = np.full((4, 8, 4), 255, dtype=np.uint8)  # white paint, as editors export it
    brush[..., 3] = HALF
    for mask in (Image.fromarray(brush), Image.fromarray(brush[..., 2:]), Image.fromarray(HALF).convert("RGBA")):
        assert torch.equal(mask_batch(mask), ON)
        assert torch.equal(mask_values(mask), ON.float())
    keyed = Image.fromarray(BYTES * 0).convert("P")  # one index of a palette is transparent
    keyed.info["transparency"] = 0
    assert bool((image_list(keyed)[0] == 1).all())


MASKS = {
    "1": Image.fromarray(HALF).convert("1"),
    "P": Image.fromarray(HALF).convert("P"),
    "I;16": _deep(HALF.astype(np.uint16) * 257, "I;16"),
    "I": Image.fromarray(HALF.astype(np.int32)),
    "I of 0 and 1": Image.fromarray((HALF // 255).astype(np.int32)),
    "F": Image.fromarray((HALF / 255).astype(np.float32)),
    "array": HALF,
    "array (H, W, 1)": HALF[..., None],
    "array (b, H, W, 1)": HALF[None, ..., None],
    "bool array": HALF > 0,
    "float array beyond 1 by rounding": (HALF / 255).astype(np.float32) * np.float32(1.0000002),
    "uint16 array": HALF.astype(np.uint16) * 257,
    "int64 tensor": torch.from_numpy(HALF // 255).long(),
    "tensor (H, W, 1)": torch.from_numpy(HALF)[..., None],
    "tensor (b, 1, H, W)": torch.from_numpy(HALF)[None, None],
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind_are_the_same_mask(kind):
    assert torch.equal(mask_batch(MASKS[kind]), ON)
    assert torch.equal(mask_values(MASKS[kind]), ON.float())


SOFT = np.where(HALF > 0, 200, 90).astype(np.uint8)
BRUSH = np.full((4, 8, 4), 255, dtype=np.uint8)
BRUSH[..., 3] = SOFT


@pytest.mark.parametrize(
    "mask",
    [
        SOFT,
        SOFT / 255,
        torch.from_numpy(SOFT),
        Image.fromarray(SOFT),
        Image.fromarray(SOFT).convert("RGB"),
        Image.fromarray(BRUSH),
        _deep(SOFT.astype(np.uint16) * 257, "I;16"),
        Image.fromarray(SOFT.astype(np.float32) / 255),
    ],
)
def test_soft_masks_are_refused_with_advice_that_works(mask):
    assert float(mask_values(mask).max()) == pytest.approx(200 / 255, abs=1e-3)  # read right where they may be soft
    with pytest.raises(ValueError, match="must be binary") as error:
        mask_batch(mask)
    advice = re.findall("`([^`]+)`", str(error.value))[1]
    middle = {np.uint8: 127, np.uint16: 32767}.get(np.asarray(mask).dtype.type, 0.5)
    assert torch.equal(mask_batch(eval(advice, {"np": np, "mask": mask, "middle": middle})), ON)


@pytest.mark.parametrize(
    ("picture", "highest"),
    [
        (Image.fromarray(BYTES.astype(np.float32)), 255),
        (Image.fromarray((RAMP.astype(np.float64) * 2.0**31).clip(0, 2**31 - 1).astype(np.int32)), 2.0**31),
        (Image.fromarray(np.full((4, 8), -1, dtype=np.int32)), None),
        (Image.fromarray(np.full((4, 8), np.nan, dtype=np.float32)), None),
    ],
)
def test_values_of_unknown_range_are_refused_with_advice_that_works(picture, highest):
    with pytest.raises(ValueError, match="Scale them") as error:
        image_list(picture)
    with pytest.raises(ValueError, match=r"Cannot read the picture 'a\.tif'.*Scale them"):
        decode_image(picture, name="'a.tif'")
    with pytest.raises(ValueError, match="holds values from"):
        mask_batch(picture)
    if highest is not None:
        advice = re.findall("`([^`]+)`", str(error.value))[1]
        cured = eval(advice, {"np": np, "Image": Image, "image": picture, "highest": highest})
        torch.testing.assert_close(image_list(cured)[0][0], torch.from_numpy(RAMP), atol=1 / 255, rtol=0)


def test_arrays_of_one_channel_are_grey_and_others_get_advice():
    for grey in (RAMP[..., None], torch.from_numpy(RAMP)[None], RAMP[None, ..., None]):
        assert torch.equal(image_list(grey)[0], torch.from_numpy(RAMP).expand(3, 4, 8))
    assert torch.equal(image_list(np.full((4, 8, 3), 1.0000002, dtype=np.float32))[0], torch.ones(3, 4, 8))
    with pytest.raises(ValueError, match=r"received 0 to 1\.0052;"):
        image_list((np.arange(96).reshape(4, 8, 3) / 95 * 1.0052).astype(np.float32))
    with pytest.raises(ValueError, match=r"received \(4, 8\).*`image\[\.\.\., None\]`"):
        image_list(RAMP)
    with pytest.raises(ValueError, match=r"received \(4, 8, 4\).*`PIL\.Image\.fromarray\(image\)`"):
        image_list(BRUSH)
    with pytest.raises(TypeError, match=r"int32.*`image / 65535` for 16 bits"):
        image_list(np.zeros((4, 8, 3), dtype=np.int32))
    with pytest.raises(ValueError, match=r"received \(4, 8, 3\)\. Pass one of its channels: `mask\[\.\.\., 0\]`"):
        mask_batch(np.repeat(HALF[..., None], 3, axis=2))
    with pytest.raises(ValueError, match="mode 'LAB', which has no conversion to RGB"):
        image_list(Image.new("LAB", (4, 4)))
    assert label_batch(np.ones((4, 8, 1), dtype=np.int64), 2).shape == (1, 4, 8)
