"""Numbers of JSON with the text that a source wrote for them, which says more than a float can hold.

JSON's numbers are decimals. A float keeps the value of most and the spelling of few: 100.00 comes back as 100.0,
0.00005 as 5e-05, and 12345678901234567.89 as another number. Numbers whose spelling a float would lose are read as
`Number`, a float that keeps its text. Integers, and what Python writes as the source did, are plain ints and floats.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

MAX_DIGITS = 4_300
"""Characters of a number; longer ones are refused. It is the interpreter's own limit for integers."""

MAX_ZEROS = 20
"""Zeros behind the decimal point that `number_text` writes; smaller numbers have an exponent."""


class Number(float):
    """A float that keeps its JSON text. It compares, computes and pickles as a float does."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]
        return (self.text,)


def loads(text: str | bytes, **options: Any) -> Any:
    """Return `json.loads` of a text, with numbers that `dumps` writes as the text has them.

    Raises:
        ValueError: as json.loads does, and if a number is too large for a float or longer than MAX_DIGITS.
    """
    return json.loads(text, parse_float=_read_float, parse_int=_read_int, **options)


def _read_float(text: str) -> float:
    value = float(text)
    if math.isinf(value) or len(text) > MAX_DIGITS:
        raise ValueError(f"a number is too large: {text[:20]}{'...' * (len(text) > 20)}")
    return value if repr(value) == text else Number(text)


def _read_int(text: str) -> int | float:
    return int(text) if text != "-0" else Number(text)


def dumps(value: Any, write: Callable[[float], str] | None = None, **options: Any) -> str:
    """Return `json.dumps` of a value, with each `Number` as its text.

    Args:
        write: returns the text of each float instead.
        options: of json.dumps.
    """
    text = json.dumps(value, **options)
    if not _MAYBE_FLOAT.search(text):
        return text
    floats, write = _floats(value, options.get("sort_keys", False)), write or _as_written
    return _STRING_OR_FLOAT.sub(lambda found: found[0] if found[0][0] == '"' else write(next(floats)), text)


_MAYBE_FLOAT = re.compile(r"(?:^|[\[:,\s])(?:-?\d+[.e]|-?Infinity|NaN)")
_STRING_OR_FLOAT = re.compile(r'"(?:[^"\\]|\\.)*+"|-?\d+(?:\.\d+(?:e[+-]?\d+)?|e[+-]?\d+)|-?Infinity|NaN')


def _floats(value: Any, sort_keys: bool) -> Iterator[float]:
    """Yield the floats of a value in the order in which json.dumps writes them."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict):
        for _, inner in sorted(value.items()) if sort_keys else value.items():
            yield from _floats(inner, sort_keys)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _floats(inner, sort_keys)


def _as_written(number: float) -> str:
    return number.text if isinstance(number, Number) else json.dumps(number)


def number_text(number: int | float) -> str:
    """Return a number's own text: equal numbers have the same, others another, however they were written.

    It is exact, and has no exponent unless more than MAX_ZEROS zeros follow the decimal point.
    """
    if isinstance(number, int):
        return str(number)
    text = number.text if isinstance(number, Number) else repr(float(number))
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    padded = (whole + fraction).lstrip("0")
    digits = padded.rstrip("0")
    if not digits:
        return "0"
    power = int(exponent or 0) - len(fraction) + len(padded) - len(digits)  # of ten, by which the digits are multiplied
    point = len(digits) + power  # digits before the decimal point
    if power >= 0:
        unsigned = digits + "0" * power
    elif point > 0:
        unsigned = f"{digits[:point]}.{digits[point:]}"
    else:
        unsigned = f"0.{'0' * -point}{digits}" if -point <= MAX_ZEROS else f"{digits}e{power}"
    return f"-{unsigned}" if mantissa.startswith("-") else unsigned
