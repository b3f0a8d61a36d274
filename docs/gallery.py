"""Draws the gallery: `make gallery`, or `python docs/gallery.py --output_dir docs/figures/gallery`.

Every picture in docs/gallery.md comes from here, from the bundled checkpoints alone. Nothing is chosen by hand: image
k of a row is drawn from seed k, an edit from seed 0, and all that are drawn are shown. `overview.png` is the README's.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont

from diffusers_ext import (
    CascadedDiffusionPipeline,
    LDMTextPipeline,
    LDMUpscalePipeline,
    PaellaImageVariationPipeline,
    PaellaImg2ImgPipeline,
    PaellaInpaintPipeline,
    PaellaPipeline,
    PITIPipeline,
    VersatileEditPipeline,
    VersatilePipeline,
)
from diffusers_ext.data.scenes import render, sample_scene

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from parts.piti_scenes import condition_of, condition_picture

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
SIDE = 128  # of an image of 64 pixels on a sheet
PROMPTS = [
    "a large red circle in the center",
    "a large green ring",
    "a large yellow star on the left",
    "a large purple triangle on the right",
    "a small blue square at the top",
    "a large cyan cross",
]


class Row(NamedTuple):
    """Images side by side, each with the text below it, under one title."""

    title: str
    images: list[Image.Image]
    texts: list[str]


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def seed_0() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def load(pipeline: Any, name: str) -> Any:
    return quiet(pipeline.from_pretrained(CHECKPOINTS / name, dtype=torch.float32))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def true_image(index: int, num_objects: int = 1) -> Image.Image:
    """A held-out image of the data set that the checkpoints were trained on."""
    scene = sample_scene(0, index, split="test", grounds=("plain",), num_objects=num_objects)
    return Image.fromarray(render(scene, 64))


def text_to_image() -> list[Row]:
    ldm, versatile = load(LDMTextPipeline, "ldm-text-scenes-64"), load(VersatilePipeline, "versatile-scenes-64")
    paella, count = load(PaellaPipeline, "paella-scenes-64"), len(PROMPTS)
    return [
        Row(
            "Latent Diffusion, 25 steps of DDIM, eta 1",
            ldm(PROMPTS, num_inference_steps=25, eta=1.0, generator=seeds(count)).images,
            PROMPTS,
        ),
        Row(
            "Versatile Diffusion, 20 steps of DDIM, eta 1",
            versatile(PROMPTS, num_inference_steps=20, eta=1.0, generator=seeds(count)).images,
            PROMPTS,
        ),
        Row("Paella, 12 steps", paella(PROMPTS, num_inference_steps=12, generator=seeds(count)).images, PROMPTS),
    ]


def editing() -> list[Row]:
    pipe = load(PaellaPipeline, "paella-scenes-64")
    prompt = "a large red circle in the center"
    picture = pipe(prompt, generator=seed_0()).images[0]
    inpaint, img2img = quiet(PaellaInpaintPipeline.from_pipe(pipe)), quiet(PaellaImg2ImgPipeline.from_pipe(pipe))
    mask = Image.new("L", picture.size)
    mask.paste(255, (16, 16, 48, 48))
    new_prompt = "a large green ring in the center"
    filled = inpaint(new_prompt, image=picture, mask_image=mask, generator=seed_0()).images[0]
    beside = "a large red circle to the left of a large blue square"
    wider = inpaint(beside, image=picture, width=128, position=(0, 0), generator=seed_0()).images[0]
    pink = img2img("a large pink circle in the center", image=picture, strength=0.5, generator=seed_0()).images[0]
    two = ["a large green ring", "a large purple square"]
    regions = pipe(two, regions="columns", width=128, generator=seed_0()).images[0]
    ends = ["a large red circle", "a large red ring"]
    frames = pipe.interpolate(ends, num_frames=6, generator=seed_0()).images
    pipe.load_lora_weights(CHECKPOINTS / "paella-scenes-64", subfolder="image_adapter")
    source = true_image(0)
    vary = quiet(PaellaImageVariationPipeline.from_pipe(pipe))
    variations = vary(source, num_images_per_prompt=5, generator=seeds(5)).images
    return [
        Row(
            "Paella: inpainting, outpainting, image to image",
            [picture, mask.convert("RGB"), filled, wider, pink],
            [prompt, "mask", new_prompt, beside, "a large pink circle in the center, strength 0.5"],
        ),
        Row('Paella: two prompts in one image, regions="columns"', [regions], [" | ".join(two)]),
        Row("Paella: interpolation of two prompts", frames, [ends[0], "", "", "", "", ends[1]]),
        Row("Paella: variations of an image", [source, *variations], ["true image", *[f"seed {k}" for k in range(5)]]),
    ]


def versatile() -> list[Row]:
    pipe = load(VersatilePipeline, "versatile-scenes-64")
    pictures = [true_image(k) for k in range(3)] + [true_image(k, 2) for k in range(3)]
    captions = pipe(image=pictures, data_type="text", temperature=0, num_inference_steps=20, generator=seeds(6)).texts
    variations = pipe(image=pictures, num_inference_steps=20, eta=1.0, generator=seeds(6)).images
    source, prompt = pictures[0], "a large green ring"
    ratios = (0.3, 0.4, 0.5, 0.6, 0.7)
    mixed = [
        pipe(prompt, source, text_ratio=ratio, num_inference_steps=20, eta=1.0, generator=seed_0()).images[0]
        for ratio in ratios
    ]
    editor = quiet(VersatileEditPipeline.from_pipe(pipe))
    start = pipe("a large red circle in the center", num_inference_steps=20, eta=1.0, generator=seed_0()).images[0]
    edited = editor(
        start, "a large blue star", "a large red circle", num_inference_steps=20, temperature=0, generator=seed_0()
    )
    return [
        Row("Versatile Diffusion: image to text (true images, and what the network says)", pictures, captions),
        Row("Versatile Diffusion: variations of these images", variations, [f"seed {k}" for k in range(6)]),
        Row(
            f'Versatile Diffusion: an image and the text "{prompt}" together',
            [source, *mixed],
            ["image", *[f"share of the text {ratio:g}" for ratio in ratios]],
        ),
        Row(
            "Versatile Diffusion: an edit by way of the caption",
            [start, edited.images[0]],
            ["a large red circle in the center", f"caption after the edit: {edited.texts[0]}"],
        ),
    ]


def super_resolution() -> list[Row]:
    pipe = load(LDMUpscalePipeline, "ldm-super-resolution-scenes-64")
    true = [true_image(k, 1 + k % 2) for k in range(6)]
    small = [picture.resize((16, 16), Image.Resampling.BICUBIC) for picture in true]
    large = pipe(image=small, num_inference_steps=25, eta=1.0, generator=seeds(6)).images
    return [
        Row("16 pixels a side", [one.resize((64, 64), Image.Resampling.NEAREST) for one in small], [""] * 6),
        Row("Latent Diffusion: four times as many pixels a side, 25 steps of DDIM, eta 1", large, [""] * 6),
        Row("the true image of 64 pixels", true, [""] * 6),
    ]


def cascade() -> list[Row]:
    pipe = load(CascadedDiffusionPipeline, "cascaded-scenes-64")
    names = ["red circle", "green ring", "yellow star", "purple triangle", "blue square", "cyan cross"]
    options = {"conditioning_mode": "non_truncated", "return_intermediates": True}  # small images without their noise
    drawn = pipe(names, num_inference_steps=50, generator=seeds(6), **options).intermediates
    large = {
        name: [one.resize((64, 64), Image.Resampling.NEAREST) for one in images] for name, images in drawn.items()
    }
    return [
        Row("Cascaded Diffusion: the base draws a class at 16 pixels a side, 50 steps", large["base"], [""] * 6),
        Row("... the second stage makes 32 of them", large["upscale_1"], [""] * 6),
        Row("... and the third 64", large["upscale_2"], names),
    ]


def piti() -> list[Row]:
    folder, rows = CHECKPOINTS / "piti-scenes", []
    scenes = [sample_scene(0, index, split="test", grounds=("plain",), num_objects=1) for index in range(6)]
    for name, drawn in (("label_map", "a label map"), ("sketch", "a sketch"), ("geometry", "normals and depth")):
        pipe = quiet(PITIPipeline.from_prior(folder, folder, subfolder=name, dtype=torch.float32))
        side = pipe.encoder.config["sample_size"]
        conditions = [condition_of(name, scene, side) for scene in scenes]
        given = {key: [one[key] for one in conditions] for key in conditions[0]}
        shown = [condition_picture(name, one, pipe.label_palette) for one in conditions]
        given |= {"normals": shown} if name == "geometry" else {}  # as colours, as one sees them
        images = pipe(**given, num_inference_steps=50, generator=seeds(6)).images
        title = f"PITI draws of it, 50 steps, {images[0].width} pixels a side"
        images = [one.resize((64, 64), Image.Resampling.NEAREST) for one in images]
        rows.append(Row(f"What is given: {drawn}", [one.resize((64, 64)) for one in shown], [""] * 6))
        rows.append(Row(title, images, [""] * 6))
    return rows


def overview(sheets: dict[str, list[Row]]) -> list[Row]:
    """The rows for the README: something of every family."""
    ldm, versatile_rows, paella = sheets["text_to_image"]
    small, large, _ = sheets["super_resolution"]
    captions = sheets["versatile"][0]
    edits = sheets["editing"][0]
    stages, conditions = sheets["cascade"], sheets["piti"]
    return [
        ldm,
        versatile_rows._replace(texts=[""] * 6),
        paella._replace(texts=[""] * 6),
        Row(edits.title, edits.images, edits.texts),
        Row("Versatile Diffusion: captions of images", captions.images, captions.texts),
        Row(
            "Latent Diffusion: super-resolution, 16 to 64 pixels a side",
            [picture for pair in zip(small.images[:3], large.images[:3], strict=True) for picture in pair],
            ["16 pixels", "64 pixels"] * 3,
        ),
        Row(
            "Cascaded Diffusion: classes at 16, 32 and 64 pixels a side",
            [row.images[k] for k in range(2) for row in stages],
            [text for name in stages[-1].texts[:2] for text in ("16 pixels", "32 pixels", name)],
        ),
        Row(
            "PITI: images of a label map, a sketch, normals and depth",
            [row.images[k // 2] for k, row in enumerate(conditions)],
            ["label map", "", "sketch", "", "normals", ""],
        ),
    ]


SHEETS: dict[str, Callable[[], list[Row]]] = {
    "text_to_image": text_to_image,
    "editing": editing,
    "versatile": versatile,
    "super_resolution": super_resolution,
    "cascade": cascade,
    "piti": piti,
}


def wrap(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw_sheet(rows: list[Row]) -> Image.Image:
    """All rows below each other, titles above and texts below the images."""
    font, bold = ImageFont.load_default(size=12), ImageFont.load_default(size=14)
    gap, line = 8, 15
    placed, y, right = [], gap, 0
    for row in rows:
        widths = [image.width * SIDE // 64 for image in row.images]
        lines = [wrap(text, font, width) for text, width in zip(row.texts, widths, strict=True)]
        below = line * max((len(one) for one in lines if one != [""]), default=0)
        placed.append((row, y, widths, lines))
        y += 20 + SIDE + 4 + below + gap
        right = max(right, sum(widths) + gap * (len(widths) + 1), int(bold.getlength(row.title)) + 2 * gap)
    sheet = Image.new("RGB", (right, y), "white")
    pen = ImageDraw.Draw(sheet)
    for row, top, widths, lines in placed:
        pen.text((gap, top), row.title, fill="black", font=bold)
        x = gap
        for image, width, texts in zip(row.images, widths, lines, strict=True):
            sheet.paste(image.convert("RGB").resize((width, SIDE), Image.Resampling.NEAREST), (x, top + 20))
            for number, text in enumerate(texts):
                pen.text((x, top + 20 + SIDE + 2 + line * number), text, fill="black", font=font)
            x += width + gap
    return sheet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the gallery from the bundled checkpoints.", allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "figures" / "gallery")
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    sheets = {name: draw() for name, draw in SHEETS.items()}
    for name, rows in {"overview": overview(sheets), **sheets}.items():
        path = args.output_dir / f"{name}.png"
        draw_sheet(rows).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)  # flat colours: a third
        print(f"{path}: {sum(len(row.images) for row in rows)} images, {path.stat().st_size / 1024:.0f} KiB")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
