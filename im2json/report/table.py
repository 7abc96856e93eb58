"""Make plain text tables: aligned and without colour, so that they suit a log file as well as a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from im2json.catalogue import MIN_EXAMPLES, TOO_FEW, labelled
from im2json.scoring import METRICS

BEFORE_AFTER = ["metric", "before", "after", "change", ""]


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """Return rows under headers and a rule, with columns two spaces apart and no newline at the end.

    A column of numbers and None, which is shown as -, is aligned to the right, any other to the left. Floats have three
    decimals.

    Raises:
        ValueError: if a row is not as long as the headers.
    """
    body = [list(row) for row in rows]
    for row in body:
        if len(row) != len(headers):
            raise ValueError(f"a row of {len(row)} cells under {len(headers)} headers: {row!r}")
    cells = [[cell_text(value) for value in row] for row in body]
    columns = range(len(headers))
    widths = [max(_width(text) for text in (headers[c], *(row[c] for row in cells))) for c in columns]
    right = [_is_numeric([row[c] for row in body]) for c in columns]

    def line(texts: Sequence[str]) -> str:
        padded = [
            " " * (widths[c] - _width(texts[c])) + texts[c]
            if right[c]
            else texts[c] + " " * (widths[c] - _width(texts[c]))
            for c in columns
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(headers), rule, *(line(row) for row in cells)])


def before_after_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Return a table with a line for each metric: before, after, change, and whether it is better.

    The metrics are in the order of scoring.METRICS, which says which direction is better. Other names, such as a loss,
    follow in the order given and without a verdict. `num`, the number of examples, is left out. A change that rounds to
    0.000 is "same", and one of fewer than MIN_EXAMPLES examples is "too few" to say.
    """
    return table(before_after_rows(before, after), BEFORE_AFTER)


def before_after_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[list[Any]]:
    """Return the rows of `before_after_table`, for the headers BEFORE_AFTER."""
    given = [name for name in dict.fromkeys([*before, *after]) if name != "num"]
    names = [name for name in METRICS if name in given] + [name for name in given if name not in METRICS]
    enough = after.get("num", MIN_EXAMPLES) >= MIN_EXAMPLES
    return [_comparison(name, before.get(name), after.get(name), enough) for name in names]


def _comparison(name: str, before: float | None, after: float | None, enough: bool) -> list[Any]:
    metric = METRICS.get(name)
    shown = labelled(name)
    if before is None or after is None or metric is None:
        change = None if before is None or after is None else _Signed(after - before)
        return [shown, before, after, change, ""]
    gain = round(after - before if metric.higher_is_better else before - after, 3)
    # nan is neither
    verdict = "better" if gain > 0 else "worse" if gain < 0 else "same" if gain == 0 else ""
    return [shown, before, after, _Signed(after - before), TOO_FEW if verdict and not enough else verdict]


def interval_text(bounds: tuple[float, float] | None, form: str = "[{:.3f}, {:.3f}]") -> str:
    """Return an interval as text, or "too few" where the examples are too few for one."""
    return TOO_FEW if bounds is None else form.format(*bounds)


class _Signed(float):
    """A difference, which is shown with its sign."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 step, 2 steps."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def cell_text(value: Any) -> str:
    """Return a value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        text = f"{value:+.3f}" if isinstance(value, _Signed) else f"{value:.3f}"
        return text[1:] if text in ("-0.000", "+0.000") else text
    # A line break or an escape sequence in a user's data must not break the table.
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(value))


def _is_numeric(values: Sequence[Any]) -> bool:
    kinds = [value for value in values if value is not None]
    return bool(kinds) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in kinds)


def _width(text: str) -> int:
    """Return the columns that a text takes in a terminal: wide East Asian characters take 2, combining ones 0."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
