"""Bring documents into the form in which they are compared: Donut's normal form, and ours where Donut has none.

Donut (clovaai/donut 1.0.9, donut/util.py, JSONParseEvaluator) strips values, sorts keys by (length, name),
wraps what is not in a list into one, and drops what is empty. We follow it, except where it loses data or
confuses values:

- 0 and false are kept, and false and true are written as in JSON (Donut drops the first two and writes
  "True");
- numbers that are equal are written alike: 1000.0, 1e3 and 1000 are "1000" (Donut writes "1000.0" for the first two);
- a list that holds objects and scalars keeps both (Donut keeps the scalars alone), and booleans as well;
- lists within a list are spliced into it (Donut drops them);
- a value that contains the characters "<leaf>" is a value like any other.

null, "" and empty containers are dropped as in Donut: a field without a value is no field. Also as in Donut, a value
of white space alone is an empty leaf, but is dropped if it is in a list.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from im2json.jsontext import MAX_DEPTH, number_text

Normal = dict[str, list[Any]]
"""An object in normal form: key -> items, each a str (a leaf) or a Normal (a row)."""


def normal_items(value: Any) -> list[Any]:
    """Return the items of a document, or of a field's value, in normal form; [] if it is empty.

    An object is a list of one item.

    Raises:
        ValueError: if JSON cannot hold the value, or it nests deeper than MAX_DEPTH.
    """
    return _items(value, MAX_DEPTH)


def _items(value: Any, depth: int) -> list[Any]:
    if isinstance(value, str):
        return [value.strip()] if value else []
    if isinstance(value, dict):
        row = _row(value, depth)
        return [row] if row else []
    if isinstance(value, list):
        if depth < 1:
            raise ValueError(f"the document nests deeper than {MAX_DEPTH} levels")
        return [item for element in value for item in _items(element, depth - 1) if item != ""]
    if value is None:
        return []
    return [leaf_text(value)]


def _row(value: dict[str, Any], depth: int) -> Normal:
    if depth < 1:
        raise ValueError(f"the document nests deeper than {MAX_DEPTH} levels")
    row: Normal = {}
    for key in _sorted_keys(value):
        items = _items(value[key], depth - 1)
        if items:
            row[key] = items
    return row


def _sorted_keys(value: dict[str, Any]) -> list[str]:
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"a document's keys are text, not {key!r}")
    return sorted(value, key=lambda key: (len(key), key))


def leaf_text(value: Any) -> str:
    """Return a number or a boolean as JSON text that all equal values share.

    Raises:
        ValueError: if it is neither.
    """
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, int | float):
        return number_text(value)
    raise ValueError(f"a document holds JSON values only, not {type(value).__name__}")


def dotted(path: str, key: str) -> str:
    """Return the path of a key within `path`, as Donut joins them: it may be that of another key, too."""
    return f"{path}.{key}" if path else key


def key_path(path: str, key: str) -> str:
    """Return the path of a key within `path`, which no other key has.

    Keys are joined by dots. A key that holds a dot is quoted as in JSON (`total."unit.price"`), and so is one that is
    empty or begins with a quote or a parenthesis.
    """
    if "." in key or key[:1] in ("", '"', "("):
        key = json.dumps(key, ensure_ascii=False)
    return f"{path}.{key}" if path else key


def fields(items: list[Any], join: Callable[[str, str], str] = key_path) -> list[tuple[str, str]]:
    """Return the (path, leaf) pairs of a document in normal form. `join` makes the path of a key within another."""
    found: list[tuple[str, str]] = []
    _collect(items, "", join, found)
    return found


def _collect(items: list[Any], path: str, join: Callable[[str, str], str], found: list[tuple[str, str]]) -> None:
    for item in items:
        if isinstance(item, str):
            found.append((path, item))
        else:
            for key, values in item.items():
                _collect(values, join(path, key), join, found)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the (path, value) pairs of a document as parsed, in its own order and without list positions."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, key_path(path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, path)
    else:
        yield path, value
