"""Draw one picture of a prediction: the document, its target, and the text of the model."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

from im2json.jsontext import dumps, number_text, parse
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

BACKGROUND, PAPER, BORDER = "#eef0f3", "#ffffff", "#c9ced6"
INK, MUTED, HEADER_INK = "#1d232b", "#6b7480", "#ffffff"
SLATE, GREEN, AMBER, RED = "#44505e", "#2c7a4b", "#9a6700", "#b03a2e"
WRONG = "#fbe3df"  # behind lines that the target does not have


@dataclass(frozen=True)
class _Column:
    title: str
    verdict: str
    colour: str  # of the header
    lines: list[tuple[str, bool]]  # text that fits the column, and whether the target has it


def prediction_panel(image: Image.Image, target_text: str, before_text: str | None, after_text: str) -> Image.Image:
    """Draw the document beside its target and the text of the model before and after training, in mode RGB.

    Without `before_text` there is one column for the prediction. A JSON object is indented, and its lines that the
    target does not have are tinted; other text is shown as it is. Text that does not fit is clipped, and the last line
    says so. Characters that the font lacks are shown as JSON escapes.
    """
    columns = [_column("target", target_text, None)]
    if before_text is not None:
        columns.append(_column("before training", before_text, target_text))
    columns.append(_column("prediction" if before_text is None else "after training", after_text, target_text))

    document = _fit(image.convert("RGB"))
    needed = [HEADER + 2 * PADDING + LINE * len(column.lines) for column in columns]
    height = min(max(MIN_HEIGHT, document.height, *needed), MAX_HEIGHT)
    width = MARGIN + document.width + MARGIN + len(columns) * (COLUMN_WIDTH + MARGIN)
    panel = Image.new("RGB", (width, MARGIN + height + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(panel)
    panel.paste(document, (MARGIN, MARGIN))
    draw.rectangle((MARGIN - 1, MARGIN - 1, MARGIN + document.width, MARGIN + document.height), outline=BORDER)
    left = MARGIN + document.width + MARGIN
    for column in columns:
        _draw_column(draw, column, left, height)
        left += COLUMN_WIDTH + MARGIN
    return panel


def _fit(image: Image.Image) -> Image.Image:
    """Scale a document to the space: enlarge it at most twice, and make it at least one pixel wide and high."""
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
    judged = target_text is not None and parsed is not None  # for text that is no JSON, the header says enough
    right = _shared(*(_readable(side, number_text) for side in (text, target_text or ""))) if judged else None
    pairs = zip(lines, right or [True] * len(lines))
    wrapped = [(part, ok) for line, ok in pairs for part in _wrap(line, _columns_of_text())]
    return _Column(title, verdict, colour, wrapped)


def _readable(text: str, write: Callable[[float], str] | None = None) -> list[str]:
    """Return the lines of a text, indented if it is a JSON object, in characters that the font has.

    Numbers are as the text has them, or as `write` writes them.
    """
    parsed = parse(text)
    shown = text if parsed is None else dumps(parsed, write, ensure_ascii=False, indent=2)
    shown = shown.replace("\r\n", "\n").expandtabs(4)
    missing = {ord(char): _escape(char) for char in set(shown) if char != "\n" and not _has_glyph(char)}
    return shown.translate(missing).split("\n")


def _escape(char: str) -> str:
    return json.dumps(char)[1:-1] if not char.isascii() else f"\\u{ord(char):04x}"


def _shared(lines: Sequence[str], target: Sequence[str]) -> list[bool]:
    """Return for each line whether the target has it in the same order, regardless of a comma at the end."""
    most = MAX_HEIGHT // LINE  # more are not shown, and the cost of comparing is their product
    here, there = ([line.rstrip(",") for line in side[:most]] for side in (lines, target))
    right = [False] * len(lines)
    for start, _, size in difflib.SequenceMatcher(None, here, there, autojunk=False).get_matching_blocks():
        right[start : start + size] = [True] * size
    return right


def _wrap(line: str, width: int) -> list[str]:
    """Break a line into parts of at most `width` characters, at a space if one is near; indent the others by 2 more."""
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
    draw.rectangle((left, top, right - 1, top + height - 1), fill=PAPER, outline=BORDER)
    draw.rectangle((left, top, right - 1, top + HEADER - 1), fill=column.colour)
    middle = top + HEADER // 2
    draw.text((left + PADDING, middle), column.title, HEADER_INK, font, anchor="lm")
    draw.text((right - PADDING, middle), column.verdict, HEADER_INK, font, anchor="rm")

    most = (height - HEADER - 2 * PADDING) // LINE
    lines = column.lines if len(column.lines) <= most else column.lines[: most - 1]
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
    """Return the package's monospace font, or Pillow's own if the package was installed without it."""
    file = files("im2json") / "data" / "fonts" / "mono.ttf"
    if not file.is_file():
        return ImageFont.load_default(FONT_SIZE)
    return ImageFont.truetype(BytesIO(file.read_bytes()), FONT_SIZE)


@cache
def _columns_of_text() -> int:
    """Return how many characters fit in a column."""
    return int((COLUMN_WIDTH - 2 * PADDING) / _font().getlength("M"))


@cache
def _has_glyph(char: str) -> bool:
    if char == " ":
        return True
    if not char.isprintable():
        return False
    # A font draws the same box for every character that it lacks, and no font has U+FFFF.
    mask, box = (_font().getmask(c) for c in (char, "\uffff"))
    return mask.size != box.size or bytes(mask) != bytes(box)
