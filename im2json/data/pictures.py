"""Bytes of a picture file -> an upright RGB picture, or one line saying what is wrong with it."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

from PIL import Image

from im2json.data.kinds import CONVERT, FORMATS, HEIF, is_heic, raw_kind, unreadable_kind
from im2json.data.listing import SYSTEM_FILES, by_suffix, list_tree, looks_like_document, note_hidden
from im2json.data.modes import DAMAGE, load_upright_rgb
from im2json.errors import UserError

# An A3 page at 600 dpi has 70 million pixels; what is larger is a mistake or a decompression bomb.
MAX_PIXELS = 90_000_000
TOO_MANY = f"at most {MAX_PIXELS // 10**6} million are read; scale it down"


class NotReadable(UserError):
    """A file is no picture, or one of a kind that is not read."""


class TooManyPixels(UserError):
    """A picture has more than MAX_PIXELS pixels."""


# How the common formats begin: what starts so and yet is not known to Pillow was a picture once.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")


def decode_picture(data: bytes, where: str) -> Image.Image:
    """Decode a whole picture file: EXIF orientation applied, mode RGB, in its own size.

    Transparent parts come out white, values of more than 8 bits are scaled (see `load_upright_rgb`), of several pages
    the first is taken (see `count_pages`).

    Raises:
        NotReadable: if `data` is no picture, or one of a kind that is not read.
        TooManyPixels: if it has more than MAX_PIXELS.
        UserError: if it is damaged or cut short. All messages start with `where`, which is a file or a row.
    """
    return upright_rgb(_open(data, where), where)


def count_pages(data: bytes) -> int:
    """Return how many pages or frames a picture file holds: 1 where that cannot be found out."""
    try:
        with Image.open(BytesIO(data), formats=_formats(data)) as picture:
            return max(1, int(getattr(picture, "n_frames", 1)))
    except DAMAGE:
        return 1


def _open(data: bytes, where: str) -> Image.Image:
    """Open a picture file, of which only the header is read."""
    if not data:
        raise UserError(f"{where}: the picture is empty (0 bytes)")
    formats = _formats(data)
    if (kind := unreadable_kind(data, formats)) is not None:
        raise NotReadable(f"{where}: is {kind}")
    try:
        picture = Image.open(BytesIO(data), formats=formats)
        kind = raw_kind(picture)
    except Image.UnidentifiedImageError:
        if data.startswith(_SIGNATURES):
            raise UserError(f"{where}: the picture is damaged or cut short (its header)") from None
        raise NotReadable(f"{where}: is not a picture that can be read ({', '.join(FORMATS)}); {CONVERT}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooManyPixels(f"{where}: the picture has too many pixels ({TOO_MANY})") from None
    except DAMAGE as error:
        raise _damaged(error, where) from None
    if kind is not None:
        raise NotReadable(f"{where}: is {kind}")
    return picture


def _damaged(error: Exception, where: str) -> UserError:
    if "not available" in str(error):  # a codec, as Pillow says
        return UserError(
            f"{where}: this build of Pillow cannot read such a picture ({error}); convert it to PNG or JPEG"
        )
    return UserError(f"{where}: the picture is damaged or cut short ({error})")


def _formats(data: bytes) -> tuple[str, ...]:
    """Return the formats to try: FORMATS, and HEIC for a file of that kind where pillow-heif is installed."""
    if not is_heic(data):
        return FORMATS
    try:
        import pillow_heif
    except ImportError:
        return FORMATS
    if HEIF not in Image.OPEN:
        pillow_heif.register_heif_opener()
    return (*FORMATS, HEIF)


def list_pictures(given: Iterable[str], notes: list[str] | None = None) -> list[str]:
    """Return the files that names, folders and patterns stand for, each once, in the order given.

    Of a folder, every file in it and below it that looks like a document, in linked folders too, hidden ones apart.
    Documents that cannot be read, folders that cannot be listed and links that lead nowhere are among them, so that
    each gets its error when it is read. A name like `scans/**/*.png` is a pattern only if no file has that name. A
    file need not exist or be a picture: its error comes when it is read.

    A line on each kind of file that was passed over is appended to `notes`.

    Raises:
        UserError: for a folder or a pattern without pictures.
    """
    found: dict[str, None] = {}
    said = [] if notes is None else notes
    for name in given:
        if os.path.isdir(name):
            files = _in_folder(name, said)
        elif not os.path.lexists(name) and glob.has_magic(name):
            files = []
            for match in _matches(name):
                files += _in_folder(match, said) if os.path.isdir(match) else [match]
        else:
            files = [name]
        if not files:
            raise UserError("; ".join([f"{name}: no picture there ({', '.join(FORMATS)})", *said]))
        found.update(dict.fromkeys(files))
    return list(found)


def _in_folder(folder: str, notes: list[str]) -> list[str]:
    tree, path = list_tree(folder), Path(folder)
    documents = {name for name in tree.files if looks_like_document(path / name)}
    others = [
        name for name in tree.files if name not in documents and os.path.basename(name).lower() not in SYSTEM_FILES
    ]
    notes += tree.notes
    if others:
        notes.append(f"{folder}: files passed over that are no pictures: {by_suffix(others)}")
    note_hidden(folder, tree, notes)
    return sorted(str(path / name) for name in (*documents, *tree.unread))


def _matches(pattern: str) -> list[str]:
    """Return the files and folders that a pattern stands for. Folders at its beginning that exist are taken literally.

    Of the names that linked folders give a file, one is returned: its own if the pattern matches it.
    """
    parts = pattern.split("/")
    literal = next(i for i in range(len(parts)) if not os.path.isdir("/".join(parts[: i + 1]) + "/"))
    base = "".join(f"{part}/" for part in parts[:literal])
    names = glob.glob("/".join(parts[literal:]), root_dir=base or None, recursive=True)
    files: dict[str, str] = {}
    for name in sorted(base + name for name in names):
        folder, own = os.path.split(name)
        real = os.path.realpath(folder)
        if real == os.path.abspath(folder):
            files[os.path.join(real, own)] = name
        else:
            files.setdefault(os.path.join(real, own), name)
    return sorted(files.values())


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
        raise TooManyPixels(f"{where}: {width} x {height} are too many pixels ({TOO_MANY})")
    try:
        return load_upright_rgb(picture)
    except DAMAGE as error:
        raise _damaged(error, where) from None
