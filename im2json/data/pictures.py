"""Bytes of a picture file -> an upright RGB picture, or one line saying what is wrong with it."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import Image

from im2json.data.modes import DAMAGE, load_upright_rgb
from im2json.errors import UserError

# Named rather than left to Pillow: its EPS reader would run Ghostscript on a file out of a data set.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")

# An A3 page at 600 dpi has 70 million pixels; what is larger is a mistake or a decompression bomb.
MAX_PIXELS = 90_000_000
TOO_MANY = f"at most {MAX_PIXELS // 10**6} million are read; scale it down"

# How the common formats begin: what starts so and yet is not known to Pillow was a picture once.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")


def decode_picture(data: bytes, where: str) -> Image.Image:
    """Decode a whole picture file: EXIF orientation applied, mode RGB, in its own size.

    Transparent parts come out white, values of more than 8 bits are scaled (see `load_upright_rgb`), of several pages
    the first is taken.
    Raises UserError starting with `where` (a file, or a row) if `data` is no picture, is damaged, cut short,
    or has more than MAX_PIXELS pixels.
    """
    if not data:
        raise UserError(f"{where}: the picture is empty (0 bytes)")
    if data[:1024].lstrip().startswith(b"%PDF"):
        raise UserError(f"{where}: is a PDF, not a picture; render its pages to PNG or JPEG first")
    try:
        picture = Image.open(BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        if data.startswith(_SIGNATURES):
            raise UserError(f"{where}: the picture is damaged or cut short (its header)") from None
        raise UserError(f"{where}: is not a picture that can be read ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{where}: the picture has too many pixels ({TOO_MANY})") from None
    except DAMAGE as error:
        raise UserError(f"{where}: the picture is damaged or cut short ({error})") from None
    return upright_rgb(picture, where)


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of picture files, in lower case."""
    return frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS)


def list_pictures(given: Iterable[str]) -> list[str]:
    """Return the files that names, folders and patterns stand for, each once, in the order given.

    Of a folder, the pictures (and PDFs, to be told what they are) in it and below it by name, hidden ones apart. A
    pattern like `scans/**/*.png` is one only where there is no file of that name. A file need not exist or be a
    picture: that is said when it is read.

    Raises:
        UserError: for a folder or a pattern without pictures.
    """
    found: dict[str, None] = {}
    for name in given:
        if os.path.isdir(name):
            files = _in_folder(name)
        elif not os.path.lexists(name) and glob.has_magic(name):
            matches = sorted(glob.glob(name, recursive=True))
            files = [file for match in matches for file in (_in_folder(match) if os.path.isdir(match) else [match])]
        else:
            files = [name]
        if not files:
            raise UserError(f"{name}: no picture there ({', '.join(FORMATS)})")
        found.update(dict.fromkeys(files))
    return list(found)


def _in_folder(folder: str) -> list[str]:
    return sorted(
        str(path)
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in (*suffixes(), ".pdf")
        and not path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def on_square(picture: Image.Image) -> Image.Image:
    """Return the picture centred on a white square of its longer side, scaled down if that had too many pixels."""
    side = min(max(picture.size), math.isqrt(MAX_PIXELS))
    if side < max(picture.size):
        picture = picture.copy()
        picture.thumbnail((side, side))
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def upright_rgb(picture: Image.Image, where: str) -> Image.Image:
    """Load an open picture whole: apply its EXIF orientation, convert it to RGB, and put what is transparent on white.

    Raises UserError starting with `where`, as `decode_picture`.
    """
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{where}: {width} x {height} are too many pixels ({TOO_MANY})")
    try:
        return load_upright_rgb(picture)
    except DAMAGE as error:
        raise UserError(f"{where}: the picture is damaged or cut short ({error})") from None
