"""A page of sampled pictures: rows of cells, each with its text and a mark that says how it was judged."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIDE, SMALL, GAP, LINE = 128, 64, 12, 16  # of a result, of what was given, between them, of a line of text
RIGHT, NAMED, WRONG = (30, 140, 60), (215, 140, 10), (200, 40, 40)
LEGEND = ((RIGHT, "everything right"), (NAMED, "shape and colour right, size, place or number not"), (WRONG, "wrong"))


@dataclass(frozen=True)
class Cell:
    """One sample.

    Args:
        picture: What was drawn, or what was described.
        text: What was asked, or what was said of the picture.
        shape_and_color, everything: The verifier's judgement.
        given: What the sample started from, drawn small above it.
    """

    picture: Image.Image
    text: str
    shape_and_color: bool
    everything: bool
    given: Image.Image | None = None


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels where words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw_mark(draw: ImageDraw.ImageDraw, x: int, y: int, color: tuple[int, int, int]) -> None:
    """A tick; a cross where the sample is wrong."""
    if color == WRONG:
        strokes = [[(x, y), (x + 8, y + 8)], [(x, y + 8), (x + 8, y)]]
    else:
        strokes = [[(x - 1, y + 4), (x + 2, y + 8), (x + 9, y)]]
    for stroke in strokes:
        draw.line(stroke, fill=color, width=2)


def draw_page(title: str, rows: Sequence[tuple[str, Sequence[Cell]]], footer: str) -> Image.Image:
    """The page: each row has a heading and its cells side by side."""
    font, bold, large = (ImageFont.load_default(size=size) for size in (12, 14, 18))
    placed, y = [], 40
    for heading, cells in rows:
        lines = [wrap(cell.text, font, SIDE - 14) for cell in cells]
        above = SMALL + 4 if any(cell.given for cell in cells) else 0
        placed.append((heading, cells, lines, y, above))
        y += 24 + above + SIDE + 6 + LINE * max(len(one) for one in lines) + GAP
    width = GAP + max(len(cells) for _, cells in rows) * (SIDE + GAP)
    page = Image.new("RGB", (width, y + 44), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 8), title, fill="black", font=large)
    for heading, cells, lines, top, above in placed:
        draw.text((GAP, top), heading, fill="black", font=bold)
        for column, (cell, texts) in enumerate(zip(cells, lines, strict=True)):
            x, at = GAP + column * (SIDE + GAP), top + 24
            if cell.given:
                page.paste(resize(cell.given, SMALL), (x, at))
            page.paste(resize(cell.picture, SIDE), (x, at + above))
            below = at + above + SIDE + 6
            color = RIGHT if cell.everything else NAMED if cell.shape_and_color else WRONG
            draw_mark(draw, x + 1, below + 3, color)
            for number, text in enumerate(texts):
                draw.text((x + 14, below + LINE * number), text, fill="black", font=font)
    x = GAP
    for color, meaning in LEGEND:
        draw_mark(draw, x, y + 3, color)
        draw.text((x + 14, y), meaning, fill="black", font=font)
        x += 38 + int(font.getlength(meaning))
    draw.text((GAP, y + 20), footer, fill="black", font=font)
    return page


def resize(picture: Image.Image, side: int) -> Image.Image:
    return picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
