"""Strict JSON as text: what a model learns to write, what a prediction says, and what a user's file holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from im2json.errors import UserError
from im2json.jsontext.numbers import dumps, loads, number_text
from im2json.text import decode, escape_surrogates, shortened

MAX_DEPTH = 100
"""Levels of objects and lists that a document may nest. Deeper ones are refused, so that every walk over a
document can recurse without reaching the interpreter's limit, wherever it is called from."""


def canonical(obj: Any) -> str:
    """Return the text a model learns to write: compact JSON, the source's key order and numbers, non-ASCII as it is.

    Lone surrogates, which no UTF-8 file can hold, are written as JSON escapes. Raises ValueError where
    `obj` is not JSON (NaN and infinities included) or nests deeper than MAX_DEPTH.
    """
    return _compact(obj)


def scoring_text(obj: Any) -> str:
    """Return `canonical` with the keys sorted and equal numbers written alike: equal objects have the same text."""
    return _compact(obj, sort_keys=True, write=number_text)


def _compact(obj: Any, **options: Any) -> str:
    try:
        text = dumps(obj, ensure_ascii=False, allow_nan=False, separators=(",", ":"), **options)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON value: {error}") from error
    if _may_be_too_deep(text) and _too_deep(obj):
        raise ValueError(f"the value nests deeper than {MAX_DEPTH} levels")
    return escape_surrogates(text)


def parse(text: str) -> dict[str, Any] | None:
    """Return the object that a prediction is, or None if it is no object in strict JSON. Never raises on a str.

    White space around the object is allowed. None for: anything but an object at the top (a list of objects
    too, since a target is an object), NaN, Infinity and numbers that overflow to it, numbers longer than
    MAX_DIGITS, nesting beyond MAX_DEPTH, raw control characters within strings, text before or behind. Of a
    key that occurs twice the last value holds, as in most JSON readers. Lone surrogates from escapes are kept.
    """
    try:
        value = loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or (_may_be_too_deep(text) and _too_deep(value)):
        return None
    return value


def load_json(text: str | bytes, where: str) -> Any:
    """Return the value of a JSON text that a user may have written, its numbers as written.

    `where`, a file or a row, begins the error.

    Raises:
        UserError: if the text is not UTF-8 or not JSON (NaN and Infinity included), is longer or deeper than Python's
            reader takes, or an object holds a key twice, of which json.loads would drop one.
    """
    decoded = text if isinstance(text, str) else decode(text, where)
    try:
        return loads(decoded, object_pairs_hook=_unique_keys, parse_constant=_refuse)
    except _RepeatedKeyError as error:
        raise UserError(f"{where}: the key {shortened(error.args[0])!r} stands twice in one object") from None
    except json.JSONDecodeError as error:
        near = decoded[max(0, error.pos - 15) : error.pos + 15]
        at = f"line {error.lineno}, column {error.colno}" if "\n" in decoded.strip() else f"column {error.colno}"
        raise UserError(f"{where}: is not JSON: {error.msg} at {at}, near {near!r}") from None
    except RecursionError:
        raise UserError(f"{where}: is not JSON that can be read: it nests too deep") from None
    except ValueError as error:  # a number of thousands of digits, NaN or Infinity
        raise UserError(f"{where}: is not JSON that can be read: {error}") from None


def parse_target(raw: Any, where: str) -> dict[str, Any]:
    """Return a target as an object, from JSON text or an object, without CORD's and Donut's wrapping.

    {"gt_parse": {...}, ...} becomes the inner object. Of {"gt_parses": [...]}, several equally right answers,
    the first is taken. Raises UserError starting with `where`.
    """
    value = load_json(raw, where) if isinstance(raw, str) else raw
    if isinstance(value, dict) and "gt_parse" in value:
        value = value["gt_parse"]
    elif isinstance(value, dict) and isinstance(value.get("gt_parses"), list):
        if not value["gt_parses"]:
            raise UserError(f"{where}: gt_parses is an empty list; it must hold an object")
        value = value["gt_parses"][0]
    if not isinstance(value, dict):
        raise UserError(f"{where}: the target must be a JSON object, not {kind_of(value)}")
    try:
        canonical(value)
    except ValueError as error:
        raise UserError(f"{where}: the target is {error}") from None
    return value


def kind_of(value: Any) -> str:
    """Return what kind of JSON value this is, for an error."""
    names = {list: "a list", dict: "an object", str: "text", bool: "a boolean", type(None): "null"}
    kind = "a number" if isinstance(value, int | float) else type(value).__name__
    return names.get(type(value), kind)


class _RepeatedKeyError(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise _RepeatedKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return document


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _may_be_too_deep(text: str) -> bool:
    """Return whether a document may nest too deep, by a cheap test that spares nearly all the walk."""
    return text.count("{") + text.count("[") > MAX_DEPTH


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, dict | list | tuple)]
        if not containers:
            return False
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return True


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a document with `function` applied to each leaf."""
    if isinstance(value, dict):
        return {key: map_leaves(inner, function) for key, inner in value.items()}
    if isinstance(value, list):
        return [map_leaves(inner, function) for inner in value]
    return function(value)
