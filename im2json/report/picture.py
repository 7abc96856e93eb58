"""One picture of a prediction: the document, what it should become, and what the model wrote."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

from im2json.jsontext import parse
from im2json.scoring.metrics import same_value

# All in pixels.
FONT_SIZE = 14
LINE = 19
MARGIN = 18
PADDING = 12
HEADER = 32
DOCUMENT_WIDTH = 420
COLUMN_WIDTH = 400
MIN_HEIGHT, MAX_HEIGHT = 360, 940  # of the document and of the columns

PAGE, CARD, BORDER = "#eef0f3", "#ffffff", "#c9ced6"
INK, MUTED, HEADER_INK = "#1d232b", "#6b7480", "#ffffff"
SLATE, GREEN, AMBER, RED = "#44505e", "#2c7a4b", "#9a6700", "#b03a2e"
WRONG = "#fbe3df"  # behind lines that the target does not have


@dataclass(frozen=True)
class _Column:
    title: str
    verdict: str
    colour: str  # of the header
    lines: list[tuple[str, bool]]  # text as wide as the column at most, and whether the target has it


def prediction_panel(image: Image.Image, target_text: str, before_text: str | None, after_text: str) -> Image.Image:
    """The document beside its target and the model's text before and after training; mode RGB.

    Without `before_text` there is one column for the prediction. A JSON object is shown indented, its lines
    that the target does not have tinted; other text is shown as it is. Text that does not fit is clipped, and
    a line at the end says so; characters that the font lacks are shown as JSON escapes.
    """
    columns = [_column("target", target_text, None)]
    if before_text is not None:
        columns.append(_column("before training", before_text, target_text))
    columns.append(_column("prediction" if before_text is None else "after training", after_text, target_text))

    document = _fit(image.convert("RGB"))
    needed = [HEADER + 2 * PADDING + LINE * len(column.lines) for column in columns]
    height = min(max(MIN_HEIGHT, document.height, *needed), MAX_HEIGHT)
    width = MARGIN + document.width + MARGIN + len(columns) * (COLUMN_WIDTH + MARGIN)
    panel = Image.new("RGB", (width, MARGIN + height + MARGIN), PAGE)
    draw = ImageDraw.Draw(panel)
    panel.paste(document, (MARGIN, MARGIN))
    draw.rectangle((MARGIN - 1, MARGIN - 1, MARGIN + document.width, MARGIN + document.height), outline=BORDER)
    left = MARGIN + document.width + MARGIN
    for column in columns:
        _draw_column(draw, column, left, height)
        left += COLUMN_WIDTH + MARGIN
    return panel


def _fit(image: Image.Image) -> Image.Image:
    """As large as the space allows, enlarged at most twice; never thinner than a pixel."""
    scale = min(DOCUMENT_WIDTH / image.width, MAX_HEIGHT / image.height, 2.0)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _column(title: str, text: str, target_text: str | None) -> _Column:
    parsed = parse(text)
    if target_text is None:
        verdict, colour = "", SLATE
    elif parsed is None:
        verdict, colour = "not a JSON object", RED
    elif same_value(parsed, parse(target_text)):
        verdict, colour = "equals the target", GREEN
    else:
        verdict, colour = "differs", AMBER
    lines = _readable(text)
    judged = target_text is not None and parsed is not None  # the header says enough of what is no JSON
    right = _shared(lines, _readable(target_text or "")) if judged else [True] * len(lines)
    wrapped = [(part, ok) for line, ok in zip(lines, right) for part in _wrap(line, _columns_of_text())]
    return _Column(title, verdict, colour, wrapped)


def _readable(text: str) -> list[str]:
    """Indented where it is a JSON object, in characters that the font has."""
    parsed = parse(text)
    shown = text if parsed is None else json.dumps(parsed, ensure_ascii=False, indent=2)
    shown = shown.replace("\r\n", "\n").expandtabs(4)
    missing = {ord(char): _escape(char) for char in set(shown) if char != "\n" and not _has_glyph(char)}
    return shown.translate(missing).split("\n")


def _escape(char: str) -> str:
    return json.dumps(char)[1:-1] if not char.isascii() else f"\\u{ord(char):04x}"


def _shared(lines: Sequence[str], target: Sequence[str]) -> list[bool]:
    """For each line, whether the target has it at its place, a comma at the end aside."""
    most = MAX_HEIGHT // LINE  # more are not shown, and comparing costs their product
    here, there = ([line.rstrip(",") for line in side[:most]] for side in (lines, target))
    right = [False] * len(lines)
    for start, _, size in difflib.SequenceMatcher(None, here, there, autojunk=False).get_matching_blocks():
        right[start : start + size] = [True] * size
    return right


def _wrap(line: str, width: int) -> list[str]:
    """Parts of at most `width` characters, broken at a space if one is near; continued two further in."""
    indent = " " * min(len(line) - len(line.lstrip(" ")) + 2, width // 2)
    parts = []
    while len(line) > width:
        space = line.rfind(" ", max(len(indent) + 1, width - 16), width + 1)
        end = space if space > 0 else width
        parts.append(line[:end])
        line = indent + line[end:].lstrip(" ")
    return [*parts, line]


def _draw_column(draw: ImageDraw.ImageDraw, column: _Column, left: int, height: int) -> None:
    top, right, font = MARGIN, left + COLUMN_WIDTH, _font()
    draw.rectangle((left, top, right - 1, top + height - 1), fill=CARD, outline=BORDER)
    draw.rectangle((left, top, right - 1, top + HEADER - 1), fill=column.colour)
    middle = top + HEADER // 2
    draw.text((left + PADDING, middle), column.title, HEADER_INK, font, anchor="lm")
    draw.text((right - PADDING, middle), column.verdict, HEADER_INK, font, anchor="rm")

    room = (height - HEADER - 2 * PADDING) // LINE
    lines = column.lines if len(column.lines) <= room else column.lines[: room - 1]
    y = top + HEADER + PADDING
    if not any(text for text, _ in lines):
        draw.text((left + PADDING, y), "(nothing)", MUTED, font)
        return
    for text, ok in lines:
        if not ok:
            draw.rectangle((left + 1, y - 1, right - 2, y + LINE - 2), fill=WRONG)
        draw.text((left + PADDING, y), text, INK, font)
        y += LINE
    if len(lines) < len(column.lines):
        rest = len(column.lines) - len(lines)
        draw.text((left + PADDING, y), f"... clipped: {rest} more lines", MUTED, font)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The package's monospace font, or Pillow's own where the package was stripped of it."""
    file = files("im2json") / "data" / "fonts" / "mono.ttf"
    if not file.is_file():
        return ImageFont.load_default(FONT_SIZE)
    return ImageFont.truetype(BytesIO(file.read_bytes()), FONT_SIZE)


@cache
def _columns_of_text() -> int:
    """Characters that fit side by side."""
    return int((COLUMN_WIDTH - 2 * PADDING) / _font().getlength("M"))


@cache
def _has_glyph(char: str) -> bool:
    if char == " ":
        return True
    if not char.isprintable():
        return False
    # Fonts draw one and the same box for all that they lack; U+FFFF is in none.
    mask, box = (_font().getmask(c) for c in (char, "\uffff"))
    return mask.size != box.size or bytes(mask) != bytes(box)
