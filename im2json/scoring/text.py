"""JSON as text: what a model learns to write, what edit distances are taken on, and reading predictions."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

MAX_DEPTH = 100
"""Levels of objects and lists that a document may nest. Deeper ones are refused, so that every walk over a
document can recurse without reaching the interpreter's limit, wherever it is called from."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def canonical(obj: Any) -> str:
    """The text a model learns to write: compact JSON, the source's key order, non-ASCII as it is.

    Lone surrogates, which no UTF-8 file can hold, are written as JSON escapes. Raises ValueError where
    `obj` is not JSON (NaN and infinities included) or nests deeper than MAX_DEPTH.
    """
    return _dump(obj, sort_keys=False)


def scoring_text(obj: Any) -> str:
    """`canonical` with the keys sorted: two objects that differ in key order alone have the same text."""
    return _dump(obj, sort_keys=True)


def _dump(obj: Any, sort_keys: bool) -> str:
    try:
        text = json.dumps(obj, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON value: {error}") from error
    if _may_be_too_deep(text) and _too_deep(obj):
        raise ValueError(f"the value nests deeper than {MAX_DEPTH} levels")
    if text.isascii():
        return text
    return _SURROGATE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def parse(text: str) -> dict[str, Any] | None:
    """The object that a prediction is, or None where it is no object in strict JSON. Never raises on a str.

    White space around the object is allowed. None for: anything but an object at the top (a list of objects
    too, since a target is an object), NaN, Infinity and numbers that overflow to it, integers beyond the
    interpreter's limit (4,300 digits), nesting beyond MAX_DEPTH, raw control characters within strings, text
    before or behind. Of a key that occurs twice the last value holds, as in most JSON readers. Lone
    surrogates from escapes are kept.
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or (_may_be_too_deep(text) and _too_deep(value)):
        return None
    return value


def repeated_key(pairs: list[tuple[str, Any]]) -> str | None:
    """The key that stands most often in an object, where one stands more than once: json.loads keeps its last value."""
    counts = Counter(key for key, _ in pairs)
    return counts.most_common(1)[0][0] if len(counts) < len(pairs) else None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number too large for a float")
    return value


def _may_be_too_deep(text: str) -> bool:
    """A cheap test of the text that spares nearly every document the walk."""
    return text.count("{") + text.count("[") > MAX_DEPTH


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, dict | list | tuple)]
        if not containers:
            return False
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return True
