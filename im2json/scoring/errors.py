"""Classify what is wrong in a prediction, and count the classes over examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from rapidfuzz.distance import OSA

from im2json.jsontext import Reading
from im2json.scoring.normal import Normal, fields, normal_items

ERRORS = {
    "invalid_json": "the prediction is not strict JSON, other than by being cut short",
    "truncated": "the prediction ends before its object does",
    "missing_field": "a value of the target that has no counterpart, in rows that both sides have",
    "extra_field": "a predicted value that has no counterpart, in rows that both sides have",
    "missing_row": "an object of the target's list that has no counterpart",
    "extra_row": "a predicted object of a list that has no counterpart",
    "wrong_value": "a value that differs from its counterpart, by more than a digit slip",
    "digit_slip": "a value with one digit wrong, missing or too many, or two neighbouring digits swapped",
}
"""The classes and what each counts.

An object is a row if either side has several under the same key. A missing or extra row counts once, and its values do
not count as fields. Documents are compared in normal form; an unreadable one counts only as invalid or truncated.
"""

MAX_PAIRS = 2_500
"""Pairs of rows that are compared to align two lists. If there are more, the lists are aligned in order."""


def example_errors(reading: Reading, target: dict[str, Any]) -> Counter[str]:
    """Count how often each class of ERRORS occurs in a prediction, as `jsontext.read` has read it."""
    found: Counter[str] = Counter()
    if reading.how != "strict":
        found["truncated" if reading.truncated else "invalid_json"] += 1
    if reading.value is not None:
        predicted, wanted = normal_items(reading.value), normal_items(target)
        _compare_rows(predicted, wanted, found)
    return found


class ErrorCounts:
    """Counts for each class of ERRORS in how many examples it occurs and how often. Mergeable, constant in memory."""

    def __init__(self) -> None:
        self.examples: Counter[str] = Counter()
        self.occurrences: Counter[str] = Counter()

    def update(self, found: Counter[str]) -> None:
        """Count the errors of one more example."""
        self.examples.update(found.keys())
        self.occurrences.update(found)

    def merge(self, other: ErrorCounts) -> None:
        """Add what another has counted."""
        self.examples.update(other.examples)
        self.occurrences.update(other.occurrences)

    def compute(self) -> dict[str, dict[str, int]]:
        """Return {class: {"examples", "occurrences"}} for all of ERRORS, in their order."""
        return {name: {"examples": self.examples[name], "occurrences": self.occurrences[name]} for name in ERRORS}


def digit_slip(a: str, b: str) -> bool:
    """Return whether two texts differ only in one digit, or in the order of two neighbouring digits."""
    digits = ["".join(char for char in text if char.isdigit()) for text in (a, b)]
    rest = ["".join(char for char in text if not char.isdigit()) for text in (a, b)]
    return rest[0] == rest[1] and all(digits) and OSA.distance(*digits, score_cutoff=1) == 1


def _compare_rows(predicted: list[Normal], wanted: list[Normal], found: Counter[str]) -> None:
    pairs, extra, missing = aligned(predicted, wanted)
    for have, want in pairs:
        _compare(have, want, found)
    if max(len(predicted), len(wanted)) > 1:
        found.update({"extra_row": len(extra)} if extra else {})
        found.update({"missing_row": len(missing)} if missing else {})
    else:
        for kind, rows in (("extra_field", extra), ("missing_field", missing)):
            if rows:
                found[kind] += len(fields(rows))


def _compare(predicted: Normal, wanted: Normal, found: Counter[str]) -> None:
    for key in predicted.keys() | wanted.keys():
        have, want = predicted.get(key, []), wanted.get(key, [])
        if have != want:
            _compare_leaves(_leaves(have), _leaves(want), found)
            _compare_rows(_rows(have), _rows(want), found)


def _compare_leaves(predicted: list[str], wanted: list[str], found: Counter[str]) -> None:
    have, want = unmatched(predicted, wanted)
    for a, b in zip(have, want):
        found["digit_slip" if digit_slip(a, b) else "wrong_value"] += 1
    if len(have) != len(want):
        found["extra_field" if len(have) > len(want) else "missing_field"] += abs(len(have) - len(want))


def unmatched(a: list[str], b: list[str]) -> tuple[list[str], list[str]]:
    """Return two lists of leaves without what they share, as often as they share it."""
    left, right = Counter(a), Counter(b)
    return list((left - right).elements()), list((right - left).elements())


def aligned(
    predicted: list[Normal], wanted: list[Normal]
) -> tuple[list[tuple[Normal, Normal]], list[Normal], list[Normal]]:
    """Pair each row with the row that shares the most fields with it, and return the rows left over on either side.

    Rows that share nothing are paired too, the nearest first, so rows are left over on at most one side.
    """
    if (len(predicted) <= 1 and len(wanted) <= 1) or len(predicted) * len(wanted) > MAX_PAIRS:
        common = min(len(predicted), len(wanted))
        return list(zip(predicted, wanted)), predicted[common:], wanted[common:]
    have, want = ([set(fields([row])) for row in rows] for rows in (predicted, wanted))
    ranked = sorted((-len(have[i] & want[j]), abs(i - j), i, j) for i in range(len(have)) for j in range(len(want)))
    partner: dict[int, int] = {}
    taken: set[int] = set()
    for _, _, i, j in ranked:
        if i not in partner and j not in taken:
            partner[i] = j
            taken.add(j)
    pairs = [(predicted[i], wanted[j]) for i, j in sorted(partner.items())]
    extra = [row for i, row in enumerate(predicted) if i not in partner]
    return pairs, extra, [row for j, row in enumerate(wanted) if j not in taken]


def _leaves(items: Iterable[Any]) -> list[str]:
    return [item for item in items if isinstance(item, str)]


def _rows(items: Iterable[Any]) -> list[Normal]:
    return [item for item in items if not isinstance(item, str)]
