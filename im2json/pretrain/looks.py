"""What a printed line is by its looks alone: the kinds of its parts, the meaning of its label, what it belongs to.

Nothing here knows how a page was drawn. A page of any lines is read the same way: rows that end in an amount with
the lines below them that belong to them, lines whose label has a known meaning, and the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from im2json.data.receipts.layout import Line

_MONEY = r"(?:Rp\.? ?|[$€£])?(?:\d{1,3}(?:[.,]\d{3})+(?:[.,]\d{2})?|\d+(?:[.,]\d{2})?)"
_PATTERNS = {  # the first that matches the whole text says its kind
    "date": r"\d{1,2}([/.-])\d{1,2}\1\d{2,4}|\d{4}-\d{2}-\d{2}",
    "time": r"\d{1,2}:\d{2}",
    "phone": r"(?:(?:Tel:?|Ph\.) )?\d{2,4}-\d{6,8}",
    "percent": r"\d{1,2}%",
    "rate": f"@ ?{_MONEY}",
    "negative": f"-{_MONEY}",
    "count": r"\d{1,2}[xX]?|[xX]\d{1,2}",
    "amount": _MONEY,
}
_COMPILED = {kind: re.compile(pattern) for kind, pattern in _PATTERNS.items()}
_CODE = re.compile(r"\d{4}")
KINDS = ("words", "code", *_PATTERNS)
LABELS = {  # what labels of the same meaning say, in lower case, without a colon and a percentage
    "sum": ("total", "grand total", "total due", "jumlah"),
    "before": ("subtotal", "sub total", "sub-total", "sub ttl"),
    "less": ("discount", "total disc", "voucher", "member disc", "disc", "promo"),
    "served": ("service", "svc charge", "service chg"),
    "state": ("tax", "pb1", "ppn", "vat"),
    "notes": ("cash", "tunai", "paid cash"),
    "back": ("change", "kembali", "change due"),
    "bank": ("card", "credit card", "visa", "debit card", "mastercard"),
    "pieces": ("items", "item(s)", "total qty", "qty", "total items"),
}
_MEANING = {label: meaning for meaning, labels in LABELS.items() for label in labels}


@dataclass(frozen=True)
class Part:
    """A run of text of one kind."""

    kind: str
    text: str


@dataclass(frozen=True)
class Entry:
    """A line with those that belong to it.

    `what` is row, label or rest; a label has its `meaning`; `below` holds the parts of each line that belongs to a row.
    """

    what: str
    text: str
    parts: tuple[Part, ...]
    meaning: str = ""
    below: tuple[tuple[Part, ...], ...] = ()


def kind_of(text: str) -> str:
    """The kind of a text that is not split: one of KINDS but code, which only its neighbours tell from an amount."""
    return next((kind for kind, pattern in _COMPILED.items() if pattern.fullmatch(text)), "words")


def cell_parts(text: str, leads: bool = False) -> list[Part]:
    """A cell cut into parts: `3x tea` is a count and words, `2 @9,500` a count and a rate, `1234 tea` a code and words.

    `leads`: other cells follow, so that four digits alone are a code.
    """
    if text.startswith("+ ") and len(text) > 2:
        return cell_parts(text[2:])
    if leads and _CODE.fullmatch(text):
        return [Part("code", text)]
    kind = kind_of(text)
    if kind != "words":
        return [Part(kind, text)]
    head, _, rest = text.partition(" ")
    if rest and kind_of(head) == "count":
        return [Part("count", head), *cell_parts(rest)]
    if rest and _CODE.fullmatch(head) and kind_of(rest) == "words":
        return [Part("code", head), *cell_parts(rest)]
    rest, _, tail = text.rpartition(" ")
    kind = kind_of(tail)
    if rest and (kind in ("percent", "rate") or (kind == "count" and not tail.isdigit())):
        return [*cell_parts(rest), Part(kind, tail)]
    return [Part("words", text)]


def line_parts(line: Line) -> tuple[Part, ...]:
    """The parts of a line from left to right."""
    last = len(line.cells) - 1
    return tuple(
        part for at, cell in enumerate(line.cells) for part in cell_parts(cell.text, leads=at == 0 and last > 0)
    )


def only_last_amount(parts: Sequence[Part]) -> tuple[Part, ...]:
    """A row's parts, where of several amounts the last is the amount and those before it are rates."""
    amounts = [at for at, part in enumerate(parts) if part.kind == "amount"]
    return tuple(Part("rate", part.text) if at in amounts[:-1] else part for at, part in enumerate(parts))


def meaning_of(label: str) -> str | None:
    """Which of LABELS a label is, if any."""
    return _MEANING.get(re.sub(r"\s*\d{1,2}%$", "", label.lower().rstrip(": ")))


def _indented(line: Line) -> bool:
    return line.cells[0].align == "l" and line.cells[0].at > 0


def _continues(line: Line) -> bool:
    """Whether the line holds a count, a rate and an amount that belong to the name above."""
    kinds = [part.kind for part in line_parts(line)]
    return _indented(line) and len(kinds) > 2 and kinds[0] == "count" and kinds[-1] == "amount" and "words" not in kinds


def _label(line: Line) -> Entry | None:
    parts = line_parts(line)
    if len(line.cells) == 2 and parts[-1].kind in ("amount", "negative", "count"):
        meaning = meaning_of(line.cells[0].text)
        return Entry("label", line.text, parts[-1:], meaning) if meaning else None
    if len(line.cells) == 1 and [part.kind for part in parts] == ["count", "words"]:
        meaning = meaning_of(parts[1].text)
        return Entry("label", line.text, parts[:1], meaning) if meaning else None
    return None


def _starts_row(line: Line, following: Line | None) -> bool:
    parts = line_parts(line)
    if len(line.cells) > 1:
        return parts[-1].kind in ("amount", "negative")
    return following is not None and _continues(following) and not _indented(line) and parts[-1].kind == "words"


def _below(row: Entry, line: Line) -> Entry:
    """The row together with the line, which belongs to it."""
    parts = line_parts(line)
    if _continues(line) and not any(part.kind == "amount" for part in row.parts):
        return Entry("row", f"{row.text} {line.text}", row.parts + parts)
    return Entry("row", row.text, row.parts, below=(*row.below, parts))


def entries(lines: Sequence[Line]) -> Iterator[Entry]:
    """The page from top to bottom."""
    row: Entry | None = None
    for line, following in zip(lines, [*lines[1:], None]):
        if row is not None and (_indented(line) or line.text.startswith("+ ")):
            row = _below(row, line)
            continue
        if row is not None:
            yield row
            row = None
        label = _label(line)
        if label is not None:
            yield label
        elif _starts_row(line, following):
            row = Entry("row", line.text, line_parts(line))
        else:
            yield Entry("rest", line.text, line_parts(line))
    if row is not None:
        yield row
