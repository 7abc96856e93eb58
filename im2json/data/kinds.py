"""The kinds of files that hold documents: formats that are read, and what others are and what to do about them."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache

from PIL import Image, TiffImagePlugin, features

# Named rather than left to Pillow: its EPS reader would run Ghostscript on a file out of a data set.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")

HEIF = "HEIF"
"""The format that pillow-heif registers with Pillow."""

DOCUMENT_SUFFIXES = frozenset((
    ".pdf", ".heic", ".heif", ".hif", ".avif", ".jxl", ".svg", ".svgz", ".psd", ".tga", ".pcx", ".dcx", ".mpo",
    ".jp2", ".j2k", ".jpx", ".webp", ".djvu", ".djv", ".xps", ".oxps", ".ps", ".eps", ".ai", ".wmf", ".emf", ".doc",
    ".docx", ".odt", ".rtf", ".xls", ".xlsx", ".ods", ".ppt", ".pptx", ".odp", ".pages", ".xcf", ".dng", ".cr2",
    ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f", ".3fr", ".iiq",
    ".rwl", ".erf", ".mrw",
))  # fmt: skip
"""Suffixes of files that look like documents, whether they can be read or not."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text begins that stands for a file that Git LFS has not fetched."""
NO_CONTENT = "Git LFS pointer in place of the file; run `git lfs pull`"

CONVERT = "convert it to PNG or JPEG first"
_RENDER = "render its pages to PNG or JPEG first"
_RAW = f"a raw photograph of a camera, not a picture that can be read; {CONVERT}"
_KINDS = (
    (re.escape(LFS_POINTER), f"a {NO_CONTENT}"),
    (rb"\s*%PDF", f"a PDF, not a picture; {_RENDER}"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", f"PostScript, not a picture; {_RENDER}"),
    (rb"AT&TFORM", f"a DjVu document, not a picture; {_RENDER}"),
    (rb"\{\\rtf|\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", f"an Office document, not a picture; {_RENDER}"),
    (rb"PK\x03\x04", "an Office document or a ZIP archive, not a picture; unpack it or render its pages to PNG first"),
    (
        rb"(?:\xef\xbb\xbf)?\s*(?:<[?!][\s\S]{0,20000}?)?<(?:svg:)?svg[\s>]",
        f"an SVG drawing, not a picture of pixels; {_RENDER}",
    ),
    (rb"8BPS", f"a Photoshop file, not a picture that can be read; {CONVERT}"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", f"a JPEG XL picture, which cannot be read; {CONVERT}"),
    (rb"FUJIFILMCCD-RAW|IIU\x00|IIR[OS]|MMOR|FOVb|II\*\x00[\s\S]{4}CR|\x00MRM|[\s\S]{4}ftypcrx", _RAW),
)
_PATTERNS = [(re.compile(pattern), kind) for pattern, kind in _KINDS]

_DNG_VERSION, _SUBFILE_TYPE, _SUB_IFDS = 50706, 254, 330
"""Tags of TIFF files. A raw photograph is a TIFF file whose first picture is a small preview of the one in a SubIFD."""


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of picture files, in lower case."""
    return frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS)


def unreadable_kind(data: bytes, formats: Collection[str]) -> str | None:
    """Return what a file is that holds no picture of these formats, and what to do, as an error goes on after "is "."""
    if is_heic(data):
        if HEIF in formats:
            return None
        return f"a HEIC picture; run `pip install pillow-heif` to have it read, or {CONVERT}"
    if is_avif(data) and not features.check("avif"):
        return f"an AVIF picture, which this build of Pillow cannot read; {CONVERT}"
    return next((kind for pattern, kind in _PATTERNS if pattern.match(data)), None)


def is_heic(data: bytes) -> bool:
    """Return whether a file is a HEIC picture, as iPhones take them, by the brands that it names."""
    brands = _brands(data)
    hevc = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
    return bool(brands & hevc) or (bool(brands & {b"mif1", b"msf1"}) and not is_avif(data))


def is_avif(data: bytes) -> bool:
    """Return whether a file is an AVIF picture, by the brands that it names."""
    return bool(_brands(data) & {b"avif", b"avis"})


def _brands(data: bytes) -> set[bytes]:
    """Return the brands of an ISO base media file: the major one and those that it is compatible with."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 256)
    return {data[8:12]} | {data[at : at + 4] for at in range(16, end, 4)}


def raw_kind(picture: Image.Image) -> str | None:
    """Return what an open TIFF file is if it holds a raw photograph, of which Pillow would show a preview."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return None
    tags = picture.tag_v2
    subfile = tags.get(_SUBFILE_TYPE, 0)
    preview = isinstance(subfile, int) and subfile & 1 == 1 and _SUB_IFDS in tags
    return _RAW if _DNG_VERSION in tags or preview else None
