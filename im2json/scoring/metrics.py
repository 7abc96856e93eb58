"""The scores of one prediction against its target.

A document is looked at in two ways. Fields are the (path, leaf) pairs of Donut's normal form
(`im2json.scoring.normal`), list positions left out; Donut's F1 counts them. Places keep list positions, an
object being a one-item list of itself, and hold the values as parsed, so that numbers compare as numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from rapidfuzz.distance import Levenshtein

from im2json.scoring.normal import fields, normal_items
from im2json.scoring.text import canonical, parse, scoring_text
from im2json.scoring.tree import tree_edit_accuracy


class Counts(NamedTuple):
    """What precision, recall and F1 are ratios of; counts of several examples add up (micro-average)."""

    matched: int
    predicted: int
    wanted: int

    def precision(self) -> float:
        """matched / predicted; with nothing predicted 1.0 where nothing was wanted, else 0.0."""
        return _share(self.matched, self.predicted, not self.wanted)

    def recall(self) -> float:
        """matched / wanted; with nothing wanted 1.0 where nothing was predicted, else 0.0."""
        return _share(self.matched, self.wanted, not self.predicted)

    def f1(self) -> float:
        """tp / (tp + (fp + fn) / 2) as in Donut; 1.0 where nothing was predicted or wanted."""
        return _share(2 * self.matched, self.predicted + self.wanted, True)


def _share(part: float, whole: int, otherwise: bool) -> float:
    return part / whole if whole else float(otherwise)


class Score(NamedTuple):
    """One example's scores: counts for the micro-averaged metrics, values for the means over examples."""

    fields: Counts
    keys: Counts
    means: dict[str, float]

    def named(self) -> dict[str, float]:
        """The scores under the names of METRICS, as if the example were the only one."""
        return ratios(self.fields, self.keys) | self.means


def ratios(field_counts: Counts, key_counts: Counts) -> dict[str, float]:
    """The metrics that are ratios of summed counts."""
    return {
        "field_f1": field_counts.f1(),
        "field_precision": field_counts.precision(),
        "field_recall": field_counts.recall(),
        "key_f1": key_counts.f1(),
    }


def score(prediction: str, target: dict[str, Any]) -> Score:
    """Scores a prediction's text; text that is not strict JSON scores as {}.

    Raises ValueError where the target is not a JSON object; never on account of the prediction's content.
    """
    if not isinstance(prediction, str):
        raise ValueError(f"a prediction is text, not {type(prediction).__name__}")
    if not isinstance(target, dict):
        raise ValueError(f"a target is a JSON object, not {type(target).__name__}")
    parsed = parse(prediction)
    document = {} if parsed is None else parsed
    wanted_fields, predicted_fields = fields(normal_items(target)), fields(normal_items(document))
    predicted_places, wanted_places = places(document), places(target)
    accuracy, similarity = value_scores(predicted_places, wanted_places)
    means = {
        "json_validity": float(parsed is not None),
        "exact_match": float(parsed is not None and same_value(parsed, target)),
        "ted_accuracy": tree_edit_accuracy(document, target),
        "structure_similarity": jaccard(key_paths(document), key_paths(target)),
        "value_accuracy": accuracy,
        "value_similarity": similarity,
        "edit_distance": Levenshtein.normalized_distance(scoring_text(document), scoring_text(target)),
    }
    keys = field_counts((path for path, _ in predicted_fields), (path for path, _ in wanted_fields))
    return Score(field_counts(predicted_fields, wanted_fields), keys, means)


def field_counts(predicted: Iterable[Any], wanted: Iterable[Any]) -> Counts:
    """How many of two multisets' members match."""
    predicted_count, wanted_count = Counter(predicted), Counter(wanted)
    matched = sum(min(count, wanted_count[field]) for field, count in predicted_count.items())
    return Counts(matched, predicted_count.total(), wanted_count.total())


def key_paths(document: dict[str, Any]) -> set[str]:
    """The paths of all keys of a document as parsed, inner ones too, list positions left out."""
    found: set[str] = set()
    _key_paths(document, "", found)
    return found


def _key_paths(value: Any, path: str, found: set[str]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            here = f"{path}\0{key}"
            found.add(here)
            _key_paths(inner, here, found)
    elif isinstance(value, list):
        for inner in value:
            _key_paths(inner, path, found)


def jaccard(a: set[str], b: set[str]) -> float:
    """Size of the intersection over size of the union; 1.0 where both are empty."""
    return len(a & b) / len(a | b) if a or b else 1.0


def places(document: dict[str, Any]) -> dict[str, Any]:
    """Where each scalar of a document stands (keys and list positions) -> the scalar as parsed."""
    found: dict[str, Any] = {}
    _places(document, "", found)
    return found


def _places(value: Any, place: str, found: dict[str, Any]) -> None:
    for position, item in enumerate(value if isinstance(value, list) else [value]):
        if isinstance(item, dict):
            for key, inner in item.items():
                _places(inner, f"{place}\0{position}\0{key}", found)
        elif isinstance(item, list):
            _places(item, f"{place}\0{position}\0", found)
        else:
            found[f"{place}\0{position}"] = item


def value_scores(predicted: dict[str, Any], wanted: dict[str, Any]) -> tuple[float, float]:
    """Share of equal values and mean similarity, over the places that both documents fill.

    Where they share none both are 0.0, unless both are empty, which is 1.0.
    """
    shared = [(value, wanted[place]) for place, value in predicted.items() if place in wanted]
    if not shared:
        return (0.0, 0.0) if predicted or wanted else (1.0, 1.0)
    equal = sum(same_value(a, b) for a, b in shared)
    return equal / len(shared), sum(similarity(a, b) for a, b in shared) / len(shared)


def same_value(a: Any, b: Any) -> bool:
    """Equality of parsed JSON: key order is of no matter, 1 equals 1.0, true is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def similarity(a: Any, b: Any) -> float:
    """How alike two scalars are, within [0, 1].

    Numbers: max(0, 1 - |a - b| / max(|a|, |b|)). Anything else: 1 - Levenshtein distance / length of the
    longer, on text as it is and on the JSON text of other values.
    """
    if is_number(a) and is_number(b):
        try:
            return 1.0 if a == b else max(0.0, 1.0 - abs(a - b) / max(abs(a), abs(b)))
        except OverflowError:  # an integer beyond the range of floats against a float
            return 0.0
    a, b = (value if isinstance(value, str) else canonical(value) for value in (a, b))
    return float(Levenshtein.normalized_similarity(a, b))


def is_number(value: Any) -> bool:
    """True for an int or a float that is not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)
