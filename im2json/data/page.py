"""Lines of text drawn as a 224 x 224 picture of a printed page, with the centre of every character.

Each glyph is drawn once per font and size and copied into the page, so that one core draws hundreds of pages
a second. The picture is drawn at the size the model sees: nothing is lost to a resize. x grows to the right,
y downwards, in pixels, measured from the upper left corner of the picture.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

SIDE = 224  # px
MARGIN = 3  # px that stay free around the text
FONT_FOLDER = Path(__file__).parent / "fonts"
# name -> (file, or None for the font that Pillow brings along; smallest and largest size in px)
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
    """A run of text in a line: its left end, centre or right end (`align`) at a share of the width."""

    text: str
    align: str = "l"
    at: float = 0.0


@dataclass(frozen=True)
class Line:
    """Cells from left to right. `rule` draws a stroke above the line, `big` enlarges it by BIG px."""

    cells: tuple[Cell, ...]
    rule: bool = False
    big: bool = False

    @property
    def text(self) -> str:
        return " ".join(cell.text for cell in self.cells)


@dataclass(frozen=True)
class Style:
    """How a page is printed and photographed. Lengths in px, levels out of 255, the angle in degrees."""

    font: str
    size: int
    pitch: int  # from one line to the next
    tracking: int  # between characters
    left: int
    right: int  # where the text's width ends
    top: int
    paper: int
    ink: int
    desk: int | None  # level of what the paper lies on, None if the paper fills the picture
    tint: tuple[float, float, float]  # what each of red, green, blue is multiplied by
    angle: float
    blur: float  # standard deviation of the Gaussian, below 1
    noise: float  # standard deviation
    shadow: float  # share of light lost in the darkest corner
    shadow_direction: float
    noise_seed: int

    @property
    def degradation(self) -> float:
        """How hard the page is to read: 0 for a clean print, about 1 for the worst; size is not counted."""
        contrast = 1 - (self.paper - self.ink) * (1 - self.shadow) / 255
        return 0.4 * contrast + 0.25 * self.blur / 0.8 + 0.2 * self.noise / 14 + 0.15 * abs(self.angle) / 2.5


@dataclass(frozen=True, eq=False)
class Page:
    """A drawn page. `gray` is uint8 (SIDE, SIDE); `centres` holds (character, x, y), spaces left out."""

    gray: np.ndarray
    tint: tuple[float, float, float]
    centres: list[tuple[str, float, float]] = field(repr=False)
    degradation: float

    @property
    def image(self) -> Image.Image:
        """The page as an RGB picture of SIDE x SIDE."""
        coloured = self.gray[:, :, None] * np.asarray(self.tint, np.float32) + 0.5  # SIDE x SIDE x 3
        return Image.fromarray(coloured.astype(np.uint8))


class Face:
    """The glyphs of a font at a size in px, each drawn when it is first asked for."""

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
        """(mask, dx, dy from the pen on the baseline, advance); the mask is None for a space."""
        if char not in self.glyphs:
            self.glyphs[char] = self._draw(char)
        return self.glyphs[char]

    def _draw(self, char: str) -> tuple[np.ndarray | None, int, int, int]:
        advance = max(2, math.floor(self._font.getlength(char) + 0.5))
        if char == " ":  # some fonts' spaces vanish at these sizes
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
    """The shared Face of a font at a size in px."""
    return Face(font, size)


def cell_start(cell: Cell, glyphs: Face, left: int, right: int, tracking: int) -> tuple[int, int]:
    """Where the cell's text starts and ends, in px."""
    width = glyphs.width(cell.text, tracking)
    anchor = left + round(cell.at * (right - left))
    start = anchor - (width if cell.align == "r" else width // 2 if cell.align == "c" else 0)
    return start, start + width


def fits(lines: Sequence[Line], font: str, size: int, tracking: int, left: int, right: int) -> bool:
    """Whether every line stays within left and right with a clear gap between its cells."""
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
    """Height of the text block in px."""
    return pitch * len(lines) + BIG * sum(line.big for line in lines)


def draw_style(rng: random.Random, lines: Sequence[Line]) -> Style:
    """A style in which the lines fit. Raises ValueError when no font is small enough for them."""
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
    room = SIDE - 2 * MARGIN - 2 - BIG * sum(line.big for line in lines)
    pitch = min(room // len(lines), size + rng.randint(1, max(2, size // 2)))
    free = SIDE - 2 * MARGIN - height(lines, pitch)
    paper = rng.randint(185, 255)
    worn = rng.random()  # worn pages get more of everything
    return Style(
        font=font, size=size, pitch=pitch, tracking=tracking, left=left, right=right,
        top=MARGIN + round(free * rng.random()),
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


def print_lines(lines: Sequence[Line], style: Style) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """The ink as uint8 (SIDE, SIDE), 255 where it is full, and the unrotated centres."""
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
                    place = ink[row : row + mask.shape[0], column : column + mask.shape[1]]
                    np.maximum(place, mask[: place.shape[0], : place.shape[1]], out=place)
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
    """Standard normal numbers for 16 pages; a page takes a stretch of them, which is cheaper than drawing anew."""
    return np.random.Generator(np.random.SFC64(0)).standard_normal(16 * SIDE * SIDE, np.float32)


def blur(picture: np.ndarray, radius: float) -> np.ndarray:
    """A Gaussian of standard deviation `radius` below 1 px, as three taps each way; float32 (rows, columns)."""
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
    """Ink and centres turned clockwise by `angle` degrees about the middle of the page."""
    cos, sin, mid = math.cos(math.radians(angle)), math.sin(math.radians(angle)), SIDE / 2
    # PIL wants the inverse map: from the new picture to the old one
    inverse = (cos, sin, mid - cos * mid - sin * mid, -sin, cos, mid + sin * mid - cos * mid)
    picture = Image.fromarray(ink)
    picture = picture.transform((SIDE, SIDE), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    turned = []
    for char, x, y in centres:
        dx, dy = x - mid, y - mid
        turned.append((char, mid + cos * dx - sin * dy, mid + sin * dx + cos * dy))
    return np.asarray(picture), turned


def print_page(lines: Sequence[Line], style: Style) -> Page:
    """Draw the lines in a style."""
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
