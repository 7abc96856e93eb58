"""Score one prediction against its target.

A document is taken apart in two ways. Fields are the (path, leaf) pairs of Donut's normal form, without list positions
(`im2json.scoring.normal`); Donut's F1 counts them, with paths that are joined as Donut does. Positioned values keep the
list positions, where an object counts as a list of one item, and are compared as parsed: text is never a number.

Only an answer that is an empty object is right for a target without a value. Anything that is no whole object counts
there as a document with one wrong value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from decimal import MAX_EMAX, MIN_EMIN, Context
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from im2json.catalogue import METRICS
from im2json.jsontext import Reading, number_text, read, scoring_text
from im2json.scoring.normal import dotted, fields, key_path, normal_items
from im2json.scoring.tree import tree_edit_accuracy

Array = NDArray[Any]


SUMS = (
    "num",
    "fields_matched",
    "fields_predicted",
    "fields_wanted",
    "keys_matched",
    "json_validity",
    "json_repaired",
    "exact_match",
    "ted_accuracy",
    "structure_similarity",
    "value_accuracy",
    "value_similarity",
    "edit_distance",
)
"""The sums over examples: their number, counts of (path, leaf) pairs, and the metrics that are means over examples.

The counts of keys predicted and wanted equal those of fields.
"""


NO_ANSWER = {"": "?"}
"""What an answer that is no object counts as where the target has no value: nothing of it is right."""


def from_sums(sums: Array) -> dict[str, Array]:
    """Return the metrics of METRICS from sums over examples.

    field_precision, field_recall, field_f1 and key_f1 are ratios of the sums (micro-averages): matched / predicted,
    matched / wanted and 2 matched / (predicted + wanted), which is Donut's tp / (tp + (fp + fn) / 2). Instead of 0 / 0
    they are 1.0 if neither side has a field, and 0.0 otherwise. Without examples the means are NaN.

    Args:
        sums: SUMS along the first axis, and any axes after it.
    """
    num, matched, predicted, wanted, keys_matched = sums[: SUMS.index("json_validity")]
    with np.errstate(invalid="ignore", divide="ignore"):
        values = dict(zip(SUMS[SUMS.index("json_validity") :], sums[SUMS.index("json_validity") :] / num))
    either = predicted + wanted
    values["field_f1"] = _share(2 * matched, either, either)
    values["field_precision"] = _share(matched, predicted, either)
    values["field_recall"] = _share(matched, wanted, either)
    values["key_f1"] = _share(2 * keys_matched, either, either)
    return {name: values[name] for name in METRICS}


def _share(part: Array, whole: Array, either: Array) -> Array:
    return np.divide(part, whole, out=np.where(either == 0, 1.0, 0.0), where=whole != 0)


def score(prediction: str | Reading, target: dict[str, Any]) -> Array:
    """Return the sums of one example, in the order of SUMS.

    A prediction is scored as `jsontext.read` reads it, or as {} if it is unreadable. Only json_validity and exact_match
    require strict JSON.

    Raises:
        ValueError: if the target is not a JSON object, but never because of the prediction's content.
    """
    if not isinstance(prediction, str | Reading):
        raise ValueError(f"a prediction is text, not {type(prediction).__name__}")
    reading = read(prediction) if isinstance(prediction, str) else prediction
    if not isinstance(target, dict):
        raise ValueError(f"a target is a JSON object, not {type(target).__name__}")
    strict = reading.how == "strict"
    document = reading.value or {}
    predicted, wanted = normal_items(document), normal_items(target)
    if not wanted and not predicted and (reading.value is None or reading.truncated):
        document = NO_ANSWER
        predicted = normal_items(document)
    predicted_fields, wanted_fields = fields(predicted), fields(wanted)
    keys_matched = matches((path for path, _ in predicted_fields), (path for path, _ in wanted_fields))
    if any('"' in path for path, _ in [*predicted_fields, *wanted_fields]):  # else Donut's paths are the same
        predicted_fields, wanted_fields = fields(predicted, dotted), fields(wanted, dotted)
    accuracy, similarity = value_scores(positioned_values(document), positioned_values(target))
    return np.array([
        1,
        matches(predicted_fields, wanted_fields),
        len(predicted_fields),
        len(wanted_fields),
        keys_matched,
        strict,
        reading.how == "repaired",
        strict and same_value(document, target),
        tree_edit_accuracy(document, target),
        jaccard(key_paths(document), key_paths(target)),
        accuracy,
        similarity,
        1.0 if document is NO_ANSWER else edit_distance(document, target),
    ])  # fmt: skip


def edit_distance(document: dict[str, Any], target: dict[str, Any]) -> float:
    """Return the Levenshtein distance of the key-sorted texts, over the length of the longer."""
    return Levenshtein.normalized_distance(scoring_text(document), scoring_text(target))


def matches(predicted: Iterable[Any], wanted: Iterable[Any]) -> int:
    """Return how many members two multisets share."""
    left = Counter(wanted)
    return sum(min(count, left[field]) for field, count in Counter(predicted).items())


def key_paths(document: dict[str, Any]) -> set[str]:
    """Return the paths of all keys of a document (`key_path`), inner ones too, without list positions."""
    found: set[str] = set()
    _key_paths(document, "", found)
    return found


def _key_paths(value: Any, path: str, found: set[str]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            here = key_path(path, key)
            found.add(here)
            _key_paths(inner, here, found)
    elif isinstance(value, list):
        for inner in value:
            _key_paths(inner, path, found)


def jaccard(a: set[str], b: set[str]) -> float:
    """Return the size of the intersection over the size of the union, or 1.0 if both sets are empty."""
    return len(a & b) / len(a | b) if a or b else 1.0


Position = tuple[int | str, ...]
"""All keys and list indices that lead to a scalar."""


def positioned_values(document: dict[str, Any]) -> dict[Position, Any]:
    """Return position -> scalar as parsed."""
    found: dict[Position, Any] = {}
    _positioned_values(document, (), found)
    return found


def _positioned_values(value: Any, position: Position, found: dict[Position, Any]) -> None:
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        if isinstance(item, dict):
            for key, inner in item.items():
                _positioned_values(inner, (*position, index, key), found)
        elif isinstance(item, list):
            _positioned_values(item, (*position, index), found)
        else:
            found[*position, index] = item


def value_scores(predicted: dict[Position, Any], wanted: dict[Position, Any]) -> tuple[float, float]:
    """Return the share of equal values and the mean similarity, over the positions that both documents have.

    If they have none in common, both are 0.0, or 1.0 if both documents are empty.
    """
    shared = [(value, wanted[position]) for position, value in predicted.items() if position in wanted]
    if not shared:
        return (0.0, 0.0) if predicted or wanted else (1.0, 1.0)
    equal = sum(same_value(a, b) for a, b in shared)
    return equal / len(shared), sum(similarity(a, b) for a, b in shared) / len(shared)


def same_value(a: Any, b: Any) -> bool:
    """Return whether two parsed JSON values are equal: key order does not matter, 1 equals 1.0, true is not 1.

    Numbers are compared as decimals, all of their digits.
    """
    if isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    if is_number(a) and is_number(b):
        return number_text(a) == number_text(b)
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def similarity(a: Any, b: Any) -> float:
    """Return how similar two scalars are, within [0, 1].

    Numbers: max(0, 1 - |a - b| / max(|a|, |b|)). Others: 1 - Levenshtein distance / length of the longer text, where a
    value that is no text counts as its JSON.
    """
    if is_number(a) and is_number(b):
        return 1.0 if same_value(a, b) else _ratio(a, b)
    a, b = (value if isinstance(value, str) else scoring_text(value) for value in (a, b))
    return float(Levenshtein.normalized_similarity(a, b))


_DECIMALS = Context(prec=30, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])
"""Floats would not do: 1e-400 is 0.0 as a float, and 10**400 is too large for one."""


def _ratio(a: int | float, b: int | float) -> float:
    """Return 1 - |a - b| / max(|a|, |b|), or 0 if that is negative, which it is for numbers of unlike signs."""
    first, second = (_DECIMALS.create_decimal(number_text(number)) for number in (a, b))
    smaller, larger = sorted((first.copy_abs(), second.copy_abs()))
    if not larger or first.is_signed() != second.is_signed():
        return 0.0
    return float(_DECIMALS.divide(smaller, larger))


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)
