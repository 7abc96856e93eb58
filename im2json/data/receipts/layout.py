"""Lay out lines of text on a page of 224 x 224 pixels: choose a font, a size and a style in which they fit.

All positions are in pixels from the upper left corner of the picture; x grows to the right and y downwards.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ImageFont

SIDE = 224  # px
MARGIN = 3  # px of empty border around the text
FONT_FOLDER = Path(__file__).parents[1] / "fonts"
# name -> (file, or None for the font in Pillow; smallest and largest size in px)
FONTS: dict[str, tuple[str | None, int, int]] = {
    "mono": ("mono.ttf", 9, 13),
    "sans": ("sans.ttf", 10, 15),
    "serif": ("serif.ttf", 11, 15),
    "typewriter": ("typewriter.otf", 10, 14),
    "ledger": ("ledger.otf", 11, 15),
    "narrow": ("narrow.ttf", 11, 16),
    "ocr": ("ocr.otf", 9, 13),
    "pillow": (None, 10, 15),
}
ASCII_ONLY = {"ocr", "pillow"}  # these have no accented letters
BIG = 3  # px by which a big line is larger


@dataclass(frozen=True)
class Cell:
    """A run of text in a line.

    Its left end, centre or right end (`align`: l, c or r) is at `at`, a share of the width.
    """

    text: str
    align: str = "l"
    at: float = 0.0


@dataclass(frozen=True)
class Line:
    """Cells from left to right. `rule` adds a stroke above the line; `big` enlarges the line by BIG px."""

    cells: tuple[Cell, ...]
    rule: bool = False
    big: bool = False

    @property
    def text(self) -> str:
        return " ".join(cell.text for cell in self.cells)


@dataclass(frozen=True)
class Style:
    """How a page is printed and photographed. Lengths are in px, levels from 0 to 255, and the angle is in degrees."""

    font: str
    size: int
    pitch: int  # from one line to the next
    tracking: int  # between characters
    left: int
    right: int  # the right edge of the text
    top: int
    paper: int
    ink: int
    desk: int | None  # level of the desk below the paper; None if the paper fills the picture
    tint: tuple[float, float, float]  # factors of red, green and blue
    angle: float
    blur: float  # standard deviation of the Gaussian, below 1
    noise: float  # standard deviation
    shadow: float  # share of light lost in the darkest corner
    shadow_direction: float
    noise_seed: int

    @property
    def degradation(self) -> float:
        """Return how hard the page is to read, from 0 for a clean print to about 1 for the worst, at any font size."""
        contrast = 1 - (self.paper - self.ink) * (1 - self.shadow) / 255
        return 0.4 * contrast + 0.25 * self.blur / 0.8 + 0.2 * self.noise / 14 + 0.15 * abs(self.angle) / 2.5


class Face:
    """The glyphs of a font at a size in px. Each glyph is drawn when it is first used."""

    def __init__(self, font: str, size: int):
        name = FONTS[font][0]
        if name is None:
            default = ImageFont.load_default(size)
            assert isinstance(default, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
            self._font = default
        else:
            self._font = ImageFont.truetype(FONT_FOLDER / name, size, layout_engine=ImageFont.Layout.BASIC)
        self.glyphs: dict[str, tuple[np.ndarray | None, int, int, int]] = {}
        self.ascent = self._font.getmetrics()[0]
        self.middle = self._font.getbbox("x", anchor="ls")[1] / 2  # above the baseline, so negative

    def glyph(self, char: str) -> tuple[np.ndarray | None, int, int, int]:
        """Return (mask, dx, dy, advance). dx and dy are from the pen on the baseline; the mask of a space is None."""
        if char not in self.glyphs:
            self.glyphs[char] = self._draw(char)
        return self.glyphs[char]

    def _draw(self, char: str) -> tuple[np.ndarray | None, int, int, int]:
        advance = max(2, math.floor(self._font.getlength(char) + 0.5))
        if char == " ":  # at these sizes the spaces of some fonts would vanish
            return None, 0, 0, max(3, advance, round(0.3 * self._font.size))
        left, top, right, bottom = self._font.getbbox(char, anchor="ls")
        if right <= left or bottom <= top:
            return None, 0, 0, advance
        mask = self._font.getmask(char, mode="L", anchor="ls")
        width, height = mask.size
        pixels = np.frombuffer(bytes(mask), np.uint8).reshape(height, width)
        return pixels, int(left), int(top), advance

    def width(self, text: str, tracking: int) -> int:
        return sum(self.glyph(char)[3] for char in text) + tracking * len(text)


@functools.cache
def face(font: str, size: int) -> Face:
    """Return the shared Face of a font at a size in px."""
    return Face(font, size)


def cell_start(cell: Cell, glyphs: Face, left: int, right: int, tracking: int) -> tuple[int, int]:
    """Return where the text of a cell starts and ends, in px."""
    width = glyphs.width(cell.text, tracking)
    anchor = left + round(cell.at * (right - left))
    start = anchor - (width if cell.align == "r" else width // 2 if cell.align == "c" else 0)
    return start, start + width


def fits(lines: Sequence[Line], font: str, size: int, tracking: int, left: int, right: int) -> bool:
    """Return whether every line stays between left and right, with a clear gap between its cells."""
    for line in lines:
        glyphs = face(font, size + BIG * line.big)
        gap, end = max(4, glyphs.glyph("0")[3]), left
        for index, cell in enumerate(line.cells):
            start, stop = cell_start(cell, glyphs, left, right, tracking)
            if stop > right or start < (end + gap if index else left):
                return False
            end = stop
    return True


def height(lines: Sequence[Line], pitch: int) -> int:
    """Return the height of the text block in px."""
    return pitch * len(lines) + BIG * sum(line.big for line in lines)


def draw_style(rng: random.Random, lines: Sequence[Line]) -> Style:
    """Return a random style in which the lines fit.

    Raises:
        ValueError: if no font is small enough for them.
    """
    fonts = rng.sample(list(FONTS), len(FONTS))
    if not all(line.text.isascii() for line in lines):
        fonts = [font for font in fonts if font not in ASCII_ONLY]
    left, right = MARGIN + rng.randint(1, 9), SIDE - MARGIN - rng.randint(1, 9)
    for font in [*fonts, "mono"]:
        size = rng.randint(*FONTS[font][1:])
        tracking = int(rng.random() < 0.2)
        while size >= FONTS[font][1]:
            low_enough = height(lines, size + 1) <= SIDE - 2 * MARGIN - 2
            if low_enough and fits(lines, font, size, tracking, left, right):
                return _finish_style(rng, lines, font, size, tracking, left, right)
            size, tracking = size - 1, 0
    longest = max(len(line.text) for line in lines)
    raise ValueError(f"{len(lines)} lines of up to {longest} characters do not fit the page")


def _finish_style(
    rng: random.Random, lines: Sequence[Line], font: str, size: int, tracking: int, left: int, right: int
) -> Style:
    most = SIDE - 2 * MARGIN - 2 - BIG * sum(line.big for line in lines)
    pitch = min(most // len(lines), size + rng.randint(1, max(2, size // 2)))
    spare = SIDE - 2 * MARGIN - height(lines, pitch)
    paper = rng.randint(185, 255)
    worn = rng.random()  # a worn page has less contrast, and more of angle, blur and noise
    return Style(
        font=font, size=size, pitch=pitch, tracking=tracking, left=left, right=right,
        top=MARGIN + round(spare * rng.random()),
        paper=paper,
        ink=rng.randint(0, min(130, paper - 90)) if worn > 0.5 else rng.randint(0, 60),
        desk=rng.randint(20, 170) if rng.random() < 0.25 else None,
        tint=(1.0, 1 - 0.1 * rng.random(), 1 - 0.2 * rng.random()) if rng.random() < 0.4 else (1.0, 1.0, 1.0),
        angle=rng.uniform(-2.5, 2.5) * worn if rng.random() < 0.6 else 0.0,
        blur=rng.uniform(0.3, 0.8) * worn if rng.random() < 0.4 else 0.0,
        noise=rng.uniform(2, 14) * worn if rng.random() < 0.7 else 0.0,
        shadow=rng.uniform(0.05, 0.4) if rng.random() < 0.4 else 0.0,
        shadow_direction=rng.uniform(0, 2 * math.pi),
        noise_seed=rng.getrandbits(62),
    )  # fmt: skip
