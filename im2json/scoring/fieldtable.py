"""Measure how well each field is read, by sums for each key path without list positions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from im2json.catalogue import MIN_EXAMPLES
from im2json.jsontext import scoring_text
from im2json.records import Prediction
from im2json.scoring.bootstrap import REPLICATES, example_key, interval, poisson_weights
from im2json.scoring.errors import unmatched
from im2json.scoring.evaluator import Difference
from im2json.scoring.normal import fields, normal_items

MAX_FOREIGN = 100
"""Paths that only predictions have and that are kept one by one; the others are added up."""

MAX_FOREIGN_LENGTH = 200
"""Characters. Longer paths that only predictions have are never kept one by one."""

_WANTED, _PREDICTED, _MATCHED, _SIMILARITY, _EXAMPLES = range(5)
Array = NDArray[np.float64]


class FieldRow(NamedTuple):
    """A key path over all examples. `path` is None in the row that adds up the paths that were not kept."""

    path: str | None
    support: int  # values in the targets
    predicted: int
    precision: float | None  # None if nothing was predicted
    recall: float | None  # None if the targets have no value
    f1: float
    similarity: float | None  # mean over the targets' values, 0 for those without a counterpart


class FieldTable:
    """Keeps sums for each key path. Mergeable.

    All paths of targets are kept. Of the paths that only predictions have, the MAX_FOREIGN shortest are kept, so the
    choice depends neither on the order of the examples nor on how they are spread over processes. (If a path was added
    to the others before it occurs in a target, its row lacks what was predicted before.) With a `seed`, every sum is
    also kept for each bootstrap replicate, which takes about 30 kB per path.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed
        columns = 1 if seed is None else 1 + REPLICATES
        self._paths: dict[str, Array] = {}
        self._foreign: set[str] = set()
        self._other = np.zeros((5, columns))

    def update(self, document: dict[str, Any], target: dict[str, Any], id: str | None = None) -> None:
        """Count one example. The document of an unreadable prediction is {}."""
        predicted, wanted = (_by_path(fields(normal_items(side))) for side in (document, target))
        weights = self._weights(target, id)
        for path in predicted.keys() | wanted.keys():
            counts = _counts(predicted.get(path, []), wanted.get(path, []))
            self._add(path, counts[:, None] * weights, path in wanted)
        self._limit()

    def merge(self, other: FieldTable) -> None:
        """Add what another table has counted.

        Raises:
            ValueError: if the seeds differ.
        """
        if self._seed != other._seed:
            raise ValueError(f"field tables of seeds {self._seed} and {other._seed} cannot be merged")
        for path, sums in other._paths.items():
            self._add(path, sums, path not in other._foreign)
        self._other += other._other
        self._limit()

    def compute(self) -> list[FieldRow]:
        """Return a row for each path.

        The paths of targets come first, by name, then those that only predictions have, the most frequent first. The
        last row adds up the paths that were not kept, if there are any.
        """
        wanted = sorted(self._paths.keys() - self._foreign)
        foreign = sorted(self._foreign, key=lambda path: (-self._paths[path][_PREDICTED, 0], path))
        rows = [_row(path, self._paths[path][:, 0]) for path in [*wanted, *foreign]]
        return [*rows, _row(None, self._other[:, 0])] if self._other[_PREDICTED, 0] else rows

    def _weights(self, target: dict[str, Any], id: str | None) -> Array:
        if self._seed is None:
            return np.ones(1)
        key = example_key(self._seed, id, scoring_text(target) if id is None else "")
        return np.concatenate([[1.0], poisson_weights(key)])

    def _add(self, path: str, sums: Array, wanted: bool) -> None:
        if not wanted and path not in self._paths and len(path) > MAX_FOREIGN_LENGTH:
            self._other += sums
            return
        if path in self._paths:
            self._paths[path] += sums
        else:
            self._paths[path] = sums.copy()
            if not wanted:
                self._foreign.add(path)
        if wanted:
            self._foreign.discard(path)

    def _limit(self) -> None:
        if len(self._foreign) > MAX_FOREIGN:
            for path in sorted(self._foreign, key=lambda path: (len(path), path))[MAX_FOREIGN:]:
                self._foreign.remove(path)
                self._other += self._paths.pop(path)


def compare_fields(first: Iterable[Prediction], second: Iterable[Prediction], seed: int = 0) -> dict[str, Difference]:
    """Compare the F1 of every target path by a paired bootstrap, for predictions of the same examples.

    Each interval is a 95 % interval by itself, so of twenty fields one is expected to exceed the noise by chance. It is
    NaN for fields with fewer than MIN_EXAMPLES examples.

    Raises:
        ValueError: if the paths of the targets differ.
    """
    tables = [FieldTable(seed), FieldTable(seed)]
    for table, predictions in zip(tables, (first, second)):
        for prediction in predictions:
            table.update(prediction.document, prediction.target, prediction.id)
    before, after = tables
    paths = sorted(before._paths.keys() - before._foreign)
    if paths != sorted(after._paths.keys() - after._foreign):
        raise ValueError("only predictions for the same targets can be compared field by field")
    return {path: _difference(before._paths[path], after._paths[path]) for path in paths}


def _difference(before: Array, after: Array) -> Difference:
    first, second = _f1(before), _f1(after)
    enough = before[_EXAMPLES, 0] >= MIN_EXAMPLES
    low, high = interval((second - first)[1:]) if enough else (math.nan, math.nan)
    return Difference(float(first[0]), float(second[0]), float(second[0] - first[0]), low, high)


def _f1(sums: Array) -> Array:
    """Return F1 for each replicate, or NaN in a replicate that drew no example with the field."""
    either = sums[_WANTED] + sums[_PREDICTED]
    return np.divide(2 * sums[_MATCHED], either, out=np.full(either.shape, np.nan), where=sums[_WANTED] != 0)


def _by_path(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, leaf in pairs:
        found.setdefault(path, []).append(leaf)
    return found


def _counts(predicted: list[str], wanted: list[str]) -> Array:
    """Return what an example adds to the sums of a path. For similarity, values that are not equal pair in order."""
    if predicted == wanted:
        return np.array([len(wanted)] * 4 + [1], dtype=float)
    have, want = unmatched(predicted, wanted)
    matched = len(wanted) - len(want)
    alike = sum(Levenshtein.normalized_similarity(a, b) for a, b in zip(have, want))
    return np.array([len(wanted), len(predicted), matched, matched + alike, bool(wanted)], dtype=float)


def _row(path: str | None, sums: Array) -> FieldRow:
    wanted, predicted, matched, similarity, _ = map(float, sums)
    return FieldRow(
        path,
        int(wanted),
        int(predicted),
        matched / predicted if predicted else None,
        matched / wanted if wanted else None,
        2 * matched / (wanted + predicted),
        similarity / wanted if wanted else None,
    )
