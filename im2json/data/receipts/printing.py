"""Print lines of text as the picture of a page, and follow the centre of every character.

Each glyph is drawn once per font and size and copied into the page, so one core prints hundreds of pages per second.
The picture has the size that the model sees, so no resize loses detail.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from im2json.data.receipts.layout import BIG, SIDE, Line, Style, cell_start, face


@dataclass(frozen=True, eq=False)
class Page:
    """A printed page. `gray` is uint8 (SIDE, SIDE); `centres` holds (character, x, y) of all characters but spaces."""

    gray: np.ndarray
    tint: tuple[float, float, float]
    centres: list[tuple[str, float, float]] = field(repr=False)
    degradation: float

    @property
    def image(self) -> Image.Image:
        """Return the page as an RGB picture of SIDE x SIDE."""
        coloured = self.gray[:, :, None] * np.asarray(self.tint, np.float32) + 0.5  # SIDE x SIDE x 3
        return Image.fromarray(coloured.astype(np.uint8))


def print_lines(lines: Sequence[Line], style: Style) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """Return the ink as uint8 (SIDE, SIDE), 255 where it is full, and the centres before any rotation."""
    ink = np.zeros((SIDE, SIDE), np.uint8)
    centres = []
    y = style.top
    for line in lines:
        glyphs = face(style.font, style.size + BIG * line.big)
        if line.rule:
            ink[y, style.left : style.right] = 160
        y += BIG * line.big
        baseline = y + min(glyphs.ascent, style.size)
        for cell in line.cells:
            pen, _ = cell_start(cell, glyphs, style.left, style.right, style.tracking)
            for char in cell.text:
                mask, dx, dy, advance = glyphs.glyph(char)
                if mask is not None:
                    row, column = max(0, baseline + dy), max(0, pen + dx)
                    area = ink[row : row + mask.shape[0], column : column + mask.shape[1]]
                    np.maximum(area, mask[: area.shape[0], : area.shape[1]], out=area)
                    centres.append((char, pen + advance / 2, baseline + glyphs.middle))
                pen += advance + style.tracking
        y += style.pitch
    return ink, centres


@functools.cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    axis = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)
    return axis[None, :], axis[:, None]


@functools.cache
def _noise_bank() -> np.ndarray:
    """Return standard normal numbers for 16 pages. A page takes a slice, which is cheaper than drawing new numbers."""
    return np.random.Generator(np.random.SFC64(0)).standard_normal(16 * SIDE * SIDE, np.float32)


def blur(picture: np.ndarray, radius: float) -> np.ndarray:
    """Blur float32 (rows, columns) by a Gaussian of three taps each way, of standard deviation `radius` below 1 px."""
    tap = np.float32(radius * radius / 2)
    for axis in (0, 1):
        before, after = (slice(None, -1), slice(1, None)) if axis == 0 else (np.s_[:, :-1], np.s_[:, 1:])
        side = picture * tap
        picture = picture * (1 - 2 * tap)
        picture[before] += side[after]
        picture[after] += side[before]
    return picture


def rotate(
    ink: np.ndarray, centres: list[tuple[str, float, float]], angle: float
) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """Return ink and centres turned clockwise by `angle` degrees about the middle of the page."""
    cos, sin, mid = math.cos(math.radians(angle)), math.sin(math.radians(angle)), SIDE / 2
    # PIL takes the inverse map, from the new picture to the old one.
    inverse = (cos, sin, mid - cos * mid - sin * mid, -sin, cos, mid + sin * mid - cos * mid)
    picture = Image.fromarray(ink)
    picture = picture.transform((SIDE, SIDE), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    turned = []
    for char, x, y in centres:
        dx, dy = x - mid, y - mid
        turned.append((char, mid + cos * dx - sin * dy, mid + sin * dx + cos * dy))
    return np.asarray(picture), turned


def print_page(lines: Sequence[Line], style: Style) -> Page:
    """Print the lines in a style."""
    ink, centres = print_lines(lines, style)
    if style.angle:
        ink, centres = rotate(ink, centres, style.angle)
    gray = ink * np.float32((style.ink - style.paper) / 255)  # SIDE x SIDE
    if style.blur:
        gray = blur(gray, style.blur)
    gray += np.float32(style.paper)
    if style.desk is not None:
        gray[:, : max(0, style.left - 5)] = style.desk
        gray[:, style.right + 5 :] = style.desk
    if style.shadow:
        across, down = _grid()
        slope = style.shadow / 1.42
        gray *= (
            (1 - style.shadow / 2)
            - (slope * math.cos(style.shadow_direction)) * across
            - (slope * math.sin(style.shadow_direction)) * down
        )
    if style.noise:
        bank = _noise_bank()
        start = style.noise_seed % (len(bank) - SIDE * SIDE)
        gray += bank[start : start + SIDE * SIDE].reshape(SIDE, SIDE) * np.float32(style.noise)
    np.clip(gray, 0, 255, out=gray)
    return Page(gray.astype(np.uint8), style.tint, centres, style.degradation)
