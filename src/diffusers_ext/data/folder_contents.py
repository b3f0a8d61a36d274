"""What lies in a folder of pictures: the pictures, the texts beside them, tables, and what is none of these."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")  # the usual ones
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"))
# Pillow knows these files, but cannot read them by itself, or they are no pictures
_NO_PICTURES = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"))
# pictures that Pillow reads with plug-ins or not at all
_OTHER_PICTURES = frozenset(
    ".heic .heif .hif .avif .avifs .webp .jxl .jxr .jp2 .j2k .svg .svgz .eps .ai .exr .hdr .xcf .psb .raw .cr2 .cr3 "
    ".nef .arw .dng .orf .rw2 .raf .pef .srw".split()
)
_SNIFFED = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000")  # formats with a clear signature
_LEFTOVERS = frozenset(("thumbs.db", "desktop.ini", "__macosx"))  # of operating systems; like hidden files, no data


@lru_cache(maxsize=1)
def picture_suffixes() -> frozenset[str]:
    """Suffixes of the files that Pillow reads here, plug-ins included."""
    known = Image.registered_extensions()  # imports Pillow's own plug-ins
    return frozenset(name for name, kind in known.items() if kind in Image.OPEN and kind not in _NO_PICTURES)


def is_metadata(name: str) -> bool:
    """Whether a file name is `metadata` with a suffix of a table, in any letter case."""
    return name.lower() in METADATA_NAMES


def is_hidden(name: str) -> bool:
    """Files that no user means: hidden ones, and what operating systems leave behind."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


@dataclass
class FolderContents:
    """The files below a folder, by kind, each kind in one order on every file system."""

    folder: Path
    pictures: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    def relative(self, path: Path) -> str:
        """How messages call a file."""
        return os.fspath(path.relative_to(self.folder))

    def names(self, paths: list[Path], count: int = 3) -> str:
        """The first few of `paths` for a message."""
        shown = ", ".join(repr(self.relative(path)) for path in paths[:count])
        return shown if len(paths) <= count else f"{shown} and {len(paths) - count} more"


def read_contents(folder: Path) -> FolderContents:
    """Sorts the files below `folder`. A file of unknown suffix that Pillow recognises is a picture too.

    Raises:
        ValueError: there are pictures in a format that Pillow does not read, a link leads nowhere, or to a folder
            that it lies in; names the file.
    """
    contents, unreadable = FolderContents(folder), []
    for path in _files(folder, (os.path.realpath(folder),)):
        suffix = path.suffix.lower()
        if suffix in picture_suffixes():
            contents.pictures.append(path)
        elif suffix in _OTHER_PICTURES:
            unreadable.append(path)
        elif is_metadata(path.name):
            contents.metadata.append(path)
        elif suffix in CAPTION_SUFFIXES:
            contents.texts.append(path)
        elif suffix == ".parquet":
            contents.tables.append(path)
        else:
            (contents.pictures if _looks_like_a_picture(path) else contents.others).append(path)
    if unreadable:
        raise ValueError(
            f"{str(folder)!r} has {len(unreadable)} pictures in a format that Pillow does not read here, such as "
            f"{contents.relative(unreadable[0])!r}: convert them, install a plug-in for them, or move them away."
        )
    return contents


def _files(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if is_hidden(entry.name):
            continue
        path = folder / entry.name
        if entry.is_symlink() and not path.exists():
            raise ValueError(f"{str(path)!r} is a link to something that does not exist: repair or remove it.")
        if not entry.is_dir():
            yield path
            continue
        real = os.path.realpath(path)
        if real in above:
            raise ValueError(f"{str(path)!r} is a link to a folder that it lies in: remove it.")
        yield from _files(path, (*above, real))


def _looks_like_a_picture(path: Path) -> bool:
    try:
        with Image.open(path, formats=_SNIFFED):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # whatever a parser says of a file that is something else
        return False


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its mark, without the mark.

    Raises:
        ValueError: it is in another encoding; names the file and the line.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"Line {line} of {str(path)!r} is not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8."
        ) from error


def text_lines(text: str) -> list[str]:
    """Lines as files end them; `str.splitlines` also splits at characters that may stand within a caption."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def captions_beside(contents: FolderContents) -> list[list[str] | None]:
    """For each picture the lines of the text file of its name (`a.png`: `a.txt`, `a.caption`), each a caption.

    Raises:
        ValueError: a picture has two such files, or one is not UTF-8.
    """
    exact: dict[tuple[Path, str], list[Path]] = {}
    folded: dict[tuple[Path, str], list[Path]] = {}
    for path in contents.texts:
        exact.setdefault((path.parent, path.stem), []).append(path)
        folded.setdefault((path.parent, path.stem.casefold()), []).append(path)
    captions: list[list[str] | None] = []
    for picture in contents.pictures:
        key = (picture.parent, picture.stem)
        found = exact.get(key) or folded.get((key[0], key[1].casefold()), [])
        if len(found) > 1:
            raise ValueError(
                f"{contents.relative(picture)!r} in {str(contents.folder)!r} has captions in both {found[0].name!r} "
                f"and {found[1].name!r}: keep one of them."
            )
        lines = [line.strip() for line in text_lines(read_text(found[0]))] if found else None
        captions.append(None if lines is None else [line for line in lines if line])
    return captions
