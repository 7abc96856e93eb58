"""An open picture of any mode -> an upright RGB one, in at most 8 bytes a pixel.

Pillow keeps a picture of any mode in at most 4 bytes a pixel. So the result is filled strip by strip, and nothing else
is as large as the picture.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

STRIP = 1 << 16
"""Pixels of a strip, at most, if a row has no more."""

NOTE = "im2json note"
"""The key of a picture's `info` under which a note on how it was read is kept."""

DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip
"""What Pillow raises on damaged files."""

_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations whose rows become columns
_FROM_THE_END = (3, 4, 6, 7)  # those whose first row becomes the last row or column

_WHITES = (255, 1023, 4095, 16383, 65535)
"""The largest values of scanners with 8, 10, 12, 14 and 16 bits."""

# TIFF's tags
_BITS, _PHOTOMETRIC, _MAX_VALUE, _SAMPLE_FORMAT, _SMAX_VALUE = 258, 262, 281, 339, 341

Convert = Callable[[Image.Image], Image.Image]


def load_upright_rgb(picture: Image.Image) -> Image.Image:
    """Load a picture, apply its EXIF orientation, convert it to RGB, and put what is transparent on white.

    Values of more than 8 bits are scaled by the range that the file declares or uses. Where that is less than the range
    of their bits, the result's `info` has a note under NOTE. A picture that needs no change is returned as it is.

    Raises:
        One of DAMAGE: if the file is damaged or cut short.
    """
    declared = _declared_whites(picture)
    # Pillow drops the lower 8 bits of colours.
    narrowed = any(";16" in str(tile) for tile in getattr(picture, "tile", ()))
    picture.load()
    orientation = _orientation(picture)
    note = None
    convert: Convert = _to_rgb
    if picture.mode.startswith("I") or picture.mode == "F":
        convert, note = _GreyScaling.of(picture, declared)
    elif narrowed and picture.mode in ("RGB", "RGBA"):
        convert, note = _colour_scaling(picture)
    if convert is _to_rgb and picture.mode == "RGB" and orientation == 1 and not picture.has_transparency_data:
        return picture
    upright = _by_strips(picture, convert, orientation)
    if note is not None:
        upright.info[NOTE] = note
    return upright


def reading_note(picture: Image.Image) -> str | None:
    """Return the note on how a picture was read, if it has one."""
    note: str | None = picture.info.get(NOTE)
    return note


def _orientation(picture: Image.Image) -> int:
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except DAMAGE:
        return 1  # broken EXIF says nothing about the pixels
    return orientation if isinstance(orientation, int) and orientation in _METHODS else 1


def _strips(picture: Image.Image) -> Iterator[tuple[int, int, Image.Image]]:
    """Yield each strip, after its first row and the row that follows its last one."""
    rows = max(1, STRIP // picture.width)
    for top in range(0, picture.height, rows):
        bottom = min(top + rows, picture.height)
        yield top, bottom, picture.crop((0, top, picture.width, bottom))


def _by_strips(picture: Image.Image, convert: Convert, orientation: int) -> Image.Image:
    """Return the picture with each strip converted, turned, and put where it belongs."""
    sideways = orientation in _SIDEWAYS
    result = Image.new("RGB", picture.size[::-1] if sideways else picture.size)
    for top, bottom, strip in _strips(picture):
        strip = convert(strip)
        if orientation != 1:
            strip = strip.transpose(_METHODS[orientation])
        start = picture.height - bottom if orientation in _FROM_THE_END else top
        result.paste(strip, (start, 0) if sideways else (0, start))
    return result


def _to_rgb(strip: Image.Image) -> Image.Image:
    if strip.has_transparency_data:
        layered = strip.convert("RGBA")
        paper = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(paper, layered).convert("RGB")
    return strip.convert("RGB")


# --- more than 8 bits


def _declared_whites(picture: Image.Image) -> tuple[int, ...]:
    """Return the values that a file may mean by white, as far as it says. The picture is not loaded yet.

    A PNG whose sBIT says 12 should hold them scaled to 16 bits, but there are writers that do not scale.
    """
    tags: Any = getattr(picture, "tag_v2", {})  # of a TIFF
    for tag in (_SMAX_VALUE, _MAX_VALUE):
        values = tags.get(tag)
        value = values[0] if isinstance(values, tuple) and values else values
        if isinstance(value, int) and value > 0:
            return (value,)
    if tags:
        bits = tags.get(_BITS, (16,))[0]
        return (2**bits - 1,) if 8 < bits < 16 else ()
    if picture.format == "PNG" and getattr(picture, "fp", None) is not None:
        bits = _significant_bits(picture)
        return (2**bits - 1, 65535) if 8 <= bits < 16 else ()
    # Pillow scales the values of a PPM by the maximum that the file names. There are writers of JPEG 2000 that declare
    # 16 bits and use 12 of them.
    return (65535,) if picture.format == "PPM" and picture.mode != "F" else ()


def _significant_bits(picture: Any) -> int:
    """Return what the chunk sBIT of a PNG says of its first channel, or 16. It precedes the pixels."""
    position = picture.fp.tell()
    try:
        picture.fp.seek(8)
        while len(head := picture.fp.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"sBIT":
                return int(picture.fp.read(1)[0])
            if kind == b"IDAT":
                break
            picture.fp.seek(length + 4, 1)  # with its checksum
        return 16
    finally:
        picture.fp.seek(position)


@dataclass(frozen=True)
class _GreyScaling:
    """How strips of 16 or 32 bits a pixel, or of floats, become 8 bits. Pillow would clip all above 255 to white."""

    unsigned: bool  # 32 bits, which Pillow takes for signed ones
    negative: bool  # white is 0
    clear: int | None  # the value that stands for transparent
    white: float = 1.0

    @classmethod
    def of(cls, picture: Image.Image, declared: tuple[int, ...]) -> tuple[_GreyScaling, str | None]:
        """Return the scaling for a picture, and a note if white is less than its values may be."""
        tags: Any = getattr(picture, "tag_v2", {})
        clear = picture.info.get("transparency")
        scaling = cls(
            unsigned=picture.mode == "I" and tags.get(_BITS, (0,))[0] == 32 and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1,
            negative=tags.get(_PHOTOMETRIC) == 0,
            clear=clear if isinstance(clear, int) else None,
        )
        largest, total = -np.inf, 0.0
        for _, _, strip in _strips(picture):
            values = scaling.values(strip)
            largest, total = max(largest, float(values.max())), total + float(values.sum(dtype=np.float64))
        usual = (1, *_WHITES) if picture.mode == "F" else _WHITES
        slack = 1.05 if picture.mode == "F" else 1.0  # resampling may go beyond white
        white = next((white for white in declared or usual if largest <= white * slack), largest)
        nominal = {"F": (1, 255), "I": (255, 65535)}.get(picture.mode, (65535,))
        note = None if white in nominal else f"its values go up to {largest:g}, and {white:g} is taken for white"
        if note is None and not scaling.negative and total * 16 < white * picture.width * picture.height:
            note = f"it is nearly black: its values go up to {largest:g}, but few of them are above {white / 16:g}"
        return dataclasses.replace(scaling, white=float(white)), note

    def values(self, strip: Image.Image) -> NDArray[Any]:
        values = np.asarray(strip)  # H x W
        if self.unsigned:
            return values.view(np.uint32)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        return values

    def __call__(self, strip: Image.Image) -> Image.Image:
        values = self.values(strip)
        grey = values.astype(np.float64).clip(0.0, self.white)
        if self.negative:
            grey = self.white - grey
        if self.clear is not None:
            grey[values == self.clear] = self.white
        return Image.fromarray((grey * (255.0 / self.white)).round().astype(np.uint8))


def _colour_scaling(picture: Image.Image) -> tuple[Convert, str | None]:
    """Return how strips of colours that had 16 bits become RGB, of which Pillow has kept the upper 8, and a note."""
    largest = max(high for _, high in _extrema(picture)[:3])
    white = next((white >> 8 for white in _WHITES if 0 < largest <= white >> 8), 255)
    if white == 255:
        return _to_rgb, None
    table = [min(255, round(value * 255 / white)) for value in range(256)]
    tables = table * len(picture.getbands())
    if picture.mode == "RGBA" and _extrema(picture)[3][1] > white:
        tables[3 * 256 :] = range(256)
    note = f"its 16-bit colours use {8 + white.bit_length()} bits, of which {white.bit_length()} are read"
    return lambda strip: _to_rgb(strip.point(tables)), note


def _extrema(picture: Image.Image) -> tuple[tuple[int, int], ...]:
    return picture.getextrema()  # type: ignore[return-value]
