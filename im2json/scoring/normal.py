"""Bring documents into the form in which they are compared: Donut's normal form, and ours where Donut has none.

Donut (clovaai/donut 1.0.9, donut/util.py, JSONParseEvaluator) strips values, sorts keys by (length, name),
wraps what is not in a list into one, and drops what is empty. We follow it, except where it loses data or
confuses values:

- 0 and false are kept, and false and true are written as in JSON (Donut drops the first two and writes
  "True");
- a list that holds objects and scalars keeps both (Donut keeps the scalars alone), and booleans as well;
- lists within a list are spliced into it (Donut drops them);
- a value that contains the characters "<leaf>" is a value like any other.

null, "" and empty containers are dropped as in Donut: a field without a value is no field. Also as in Donut, a value
of white space alone is an empty leaf, but is dropped if it is in a list.
"""

from __future__ import annotations

from typing import Any

from im2json.jsontext import MAX_DEPTH

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
    """Return a number or a boolean as its JSON text.

    Raises:
        ValueError: if it is neither.
    """
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, int | float):
        return str(value)
    raise ValueError(f"a document holds JSON values only, not {type(value).__name__}")


def fields(items: list[Any]) -> list[tuple[str, str]]:
    """Return the (path, leaf) pairs of a document in normal form. A path is its keys, joined by dots."""
    found: list[tuple[str, str]] = []
    _collect(items, "", found)
    return found


def _collect(items: list[Any], path: str, found: list[tuple[str, str]]) -> None:
    for item in items:
        if isinstance(item, str):
            found.append((path, item))
        else:
            for key, values in item.items():
                _collect(values, f"{path}.{key}" if path else key, found)
