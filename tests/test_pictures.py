"""Pictures of every mode come out upright, in RGB and with their whole range, in little memory."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from im2json.data.modes import NOTE, STRIP
from im2json.data.pictures import decode_picture
from im2json.errors import UserError

RAMP = np.linspace(0, 1, 256)


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **({"compress_level": 1} if form == "PNG" else {}), **options)
    return file.getvalue()


def greys(data: bytes) -> list[int]:
    """Return the greys of the first row."""
    return np.asarray(decode_picture(data, "x"))[0, :, 0].tolist()


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """Return a PNG with a chunk behind its header."""
    chunk = struct.pack(">I", len(content)) + kind + content
    return png[:33] + chunk + struct.pack(">I", zlib.crc32(kind + content)) + png[33:]


def grey_tiff(values: np.ndarray, bits: int, photometric: int = 1, order: str = "<", **tags: int) -> bytes:
    """Return a TIFF of grey values, written by hand."""
    height, width = values.shape
    if bits == 12:
        flat = [int(value) for value in values.ravel()]
        data = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in zip(flat[::2], flat[1::2]))
    else:
        data = values.astype(f"{order}u{bits // 8}").tobytes()
    fields = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 200, 277: 1, 278: height}
    fields |= {279: len(data)} | {int(tag[1:]): value for tag, value in tags.items()}
    entries = [struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", v) for tag, v in sorted(fields.items())]
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return (head + b"".join(entries) + bytes(4)).ljust(200, b"\0") + data


def scan(white: float, dtype: type = np.uint16) -> np.ndarray:
    """Return a ramp from black to white, 2 x 256."""
    return np.tile((RAMP * white).round(0 if white > 1 else 9).astype(dtype), (2, 1))


WIDE = {
    "PNG of 16 bits": (encoded(Image.fromarray(scan(65535))), False),
    "PNG of 12 bits in 16": (encoded(Image.fromarray(scan(4095))), True),
    "PNG of 8 bits in 16": (encoded(Image.fromarray(scan(255))), True),
    "PNG that says 12 bits, unscaled": (with_chunk(encoded(Image.fromarray(scan(4095))), b"sBIT", b"\x0c"), True),
    "PNG that says 12 bits, scaled": (with_chunk(encoded(Image.fromarray(scan(65535))), b"sBIT", b"\x0c"), False),
    "TIFF of 10 bits in 16": (encoded(Image.fromarray(scan(1023)), "TIFF"), True),
    "TIFF of 12 bits, packed": (grey_tiff(scan(4095), 12), True),
    "TIFF of 14 bits in 16, big-endian": (grey_tiff(scan(16383), 16, order=">"), True),
    "TIFF of 32 bits": (encoded(Image.fromarray(scan(2**31 - 1, np.int32)), "TIFF"), True),
    "TIFF of 32 bits, unsigned": (grey_tiff(scan(2**32 - 1, np.uint32), 32), True),
    "TIFF of floats up to 1": (encoded(Image.fromarray(scan(1, np.float32)), "TIFF"), False),
    "TIFF of floats up to 255": (encoded(Image.fromarray(scan(255, np.float32)), "TIFF"), False),
    "JPEG 2000 of 12 bits in 16": (encoded(Image.fromarray(scan(4095)), "JPEG2000"), True),
    "PGM of 12 bits": (b"P5 256 2 4095\n" + scan(4095).astype(">u2").tobytes(), False),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_values_of_more_than_8_bits_keep_their_range(name):
    data, noted = WIDE[name]
    assert np.abs(np.array(greys(data)) - RAMP * 255).max() <= 1
    assert (NOTE in decode_picture(data, "x").info) == noted


def test_a_declared_range_holds_for_a_dark_picture():
    dark = Image.fromarray(scan(900))
    assert max(greys(with_chunk(encoded(dark), b"sBIT", b"\x0c"))) == round(900 / 4095 * 255)
    assert max(greys(grey_tiff(scan(900), 12))) == round(900 / 4095 * 255)
    assert max(greys(grey_tiff(scan(900), 16, t281=4095))) == round(900 / 4095 * 255)
    assert max(greys(b"P5 256 2 65535\n" + scan(900).astype(">u2").tobytes())) == round(900 / 65535 * 255)


@pytest.mark.parametrize("form", ["ICO", "TGA", "PCX"])
def test_formats_that_are_not_read_are_to_be_converted(form):
    with pytest.raises(
        UserError, match=r"^x: is not a picture that can be read \(.*\); convert it to PNG or JPEG first$"
    ):
        decode_picture(encoded(Image.new("RGB", (16, 16)), form), "x")


@pytest.mark.parametrize("start", ["", "\ufeff", f"\ufeff<?xml version='1.0'?>\n<!-- {'a' * 3000} -->\n"])
@pytest.mark.parametrize("tag", ["<svg>", "<svg:svg xmlns:svg='x'>"])
def test_svg_drawings_are_known(start, tag):
    with pytest.raises(UserError, match=r"^x: is an SVG drawing"):
        decode_picture((start + tag).encode(), "x")


def test_a_picture_that_comes_out_nearly_black_is_named():
    hot = scan(3000)
    hot[0, 0] = 65535
    for array in (hot, scan(3000).astype(np.int32) - 5000):
        picture = decode_picture(encoded(Image.fromarray(array), "TIFF"), "x")
        assert "it is nearly black" in picture.info[NOTE]


def test_a_negative_is_read_as_what_it_shows():
    assert greys(grey_tiff(scan(4095), 16, photometric=0)) == greys(grey_tiff(scan(4095), 16))[::-1]


def test_floats_that_resampling_has_pushed_beyond_white_are_clipped():
    values = scan(1, np.float32)
    values[0, -1] = 1.02
    assert greys(encoded(Image.fromarray(values), "TIFF"))[-3:] == [253, 254, 255]


def colour_tiff(values: np.ndarray) -> bytes:
    """Return a TIFF of 16 bits a channel, which Pillow reads but does not write."""
    height, width, _ = values.shape
    data = values.astype("<u2").tobytes()
    fields = {256: width, 257: height, 258: 122, 259: 1, 262: 2, 273: 200, 277: 3, 278: height, 279: len(data)}
    entries = [
        struct.pack("<HHII", tag, 3 if tag == 258 else 4, 3 if tag == 258 else 1, v) for tag, v in fields.items()
    ]
    head = b"II" + struct.pack("<HIH", 42, 8, len(entries)) + b"".join(entries) + bytes(4)
    assert len(head) == 122
    return (head + struct.pack("<HHH", 16, 16, 16)).ljust(200, b"\0") + data


def test_colours_of_12_bits_in_16_are_not_nearly_black():
    for white, step in ((65535, 1), (4095, 17)):
        picture = decode_picture(colour_tiff(np.dstack([scan(white)] * 3)), "x")
        assert np.abs(np.asarray(picture)[0, :, 1] - RAMP * 255).max() <= step
        assert (NOTE in picture.info) == (white == 4095)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_of_many_strips_is_turned_as_a_whole(orientation):
    height = 5 * STRIP // 1000 + 17
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, 1000), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_picture(encoded(stored, exif=exif), "x")
    method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    wanted = stored if method is None else stored.transpose(Image.Transpose(method))
    assert found.size == wanted.size
    assert found.tobytes() == wanted.convert("RGB").tobytes()


SIDE = 2000
MEASURE = """
import sys
from im2json.data.pictures import decode_picture
from im2json.errors import UserError

def now(kind):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind))

data = open(sys.argv[1], "rb").read()
decode_picture(open(sys.argv[2], "rb").read(), "x")  # loads what Pillow needs
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
before = now("VmRSS")
decode_picture(data, "x")
print(now("VmHWM") - before)
"""
BLANK: dict[str, tuple[Image.Image, str]] = {
    "grey of 16 bits": (Image.fromarray(np.full((SIDE, SIDE), 60000, np.uint16)), "PNG"),
    "floats": (Image.fromarray(np.full((SIDE, SIDE), 0.5, np.float32)), "TIFF"),
    "whole numbers": (Image.fromarray(np.full((SIDE, SIDE), 7, np.int32)), "TIFF"),
    "transparent": (Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 9)), "PNG"),
    "transparent grey": (Image.new("LA", (SIDE, SIDE), (9, 9)), "PNG"),
    "palette": (Image.new("P", (SIDE, SIDE)), "PNG"),
    "inks": (Image.new("CMYK", (SIDE, SIDE)), "JPEG"),
    "colours": (Image.new("RGB", (SIDE, SIDE)), "JPEG"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", BLANK)
def test_loading_takes_at_most_8_bytes_a_pixel(kind, tmp_path):
    picture, form = BLANK[kind]
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"transparency": 0} if picture.mode == "P" else {}
    (tmp_path / "picture").write_bytes(encoded(picture, form, exif=exif, **options))
    (tmp_path / "small").write_bytes(encoded(picture.resize((9, 9)), form, exif=exif, **options))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "picture"), str(tmp_path / "small")]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 4 < peak / SIDE**2 < 8.8
