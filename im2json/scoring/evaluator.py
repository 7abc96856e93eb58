"""Scores a stream of predictions in constant memory."""

from __future__ import annotations

import math
from typing import Any

from im2json.scoring.catalogue import METRICS
from im2json.scoring.metrics import Counts, ratios, score

_MEANS = tuple(name for name in METRICS if name not in ratios(Counts(0, 0, 0), Counts(0, 0, 0)))


class StreamingEvaluator:
    """Sums and counts over examples; whatever the number of examples, its size stays the same.

    Evaluators of different processes merge into one that equals a single pass up to the rounding of sums
    (1e-12). Can be pickled.
    """

    def __init__(self) -> None:
        self._num = 0
        self._fields = Counts(0, 0, 0)
        self._keys = Counts(0, 0, 0)
        self._sums = dict.fromkeys(_MEANS, 0.0)

    def update(self, prediction: str, target: dict[str, Any], id: str | None = None) -> dict[str, float]:
        """Counts one example, and returns its own scores under the names of METRICS.

        `id` names the example. Raises ValueError where the target is not a JSON object; never on account of
        the prediction's content.
        """
        scores = score(prediction, target)
        self._num += 1
        self._fields = _add(self._fields, scores.fields)
        self._keys = _add(self._keys, scores.keys)
        for name, value in scores.means.items():
            self._sums[name] += value
        named = scores.named()
        return {name: named[name] for name in METRICS}

    def merge(self, other: StreamingEvaluator) -> None:
        """Takes in the examples that another evaluator counted; the other is left as it is."""
        self._num += other._num
        self._fields = _add(self._fields, other._fields)
        self._keys = _add(self._keys, other._keys)
        for name, value in other._sums.items():
            self._sums[name] += value

    def compute(self) -> dict[str, float]:
        """Every metric of METRICS over all examples so far, and their number `num`.

        The field metrics and key_f1 are ratios of summed counts (micro-averages), the others means over
        examples. Before the first example every metric is NaN and num 0.
        """
        if not self._num:
            return dict.fromkeys(METRICS, math.nan) | {"num": 0.0}
        values = ratios(self._fields, self._keys) | {name: self._sums[name] / self._num for name in _MEANS}
        return {name: values[name] for name in METRICS} | {"num": float(self._num)}


def _add(a: Counts, b: Counts) -> Counts:
    return Counts(a.matched + b.matched, a.predicted + b.predicted, a.wanted + b.wanted)
