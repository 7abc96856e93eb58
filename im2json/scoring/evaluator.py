"""Scores a stream of predictions in constant memory, with intervals, and compares two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from im2json.catalogue import METRICS
from im2json.errors import UserError
from im2json.jsontext import Reading, scoring_text
from im2json.records import Prediction
from im2json.scoring.bootstrap import REPLICATES, example_key, interval, poisson_weights
from im2json.scoring.metrics import SUMS, from_sums, score


class StreamingEvaluator:
    """Sums over examples, once as they are and once for every bootstrap replicate; its size never changes.

    Evaluators of different processes merge into one that equals a single pass up to the rounding of sums
    (1e-12). Can be pickled (about 100 kB).
    """

    def __init__(self, seed: int = 0) -> None:
        """`seed` is that of the bootstrap; only evaluators of the same seed can be merged or compared."""
        self._seed = seed
        self._sums = np.zeros((len(SUMS), 1 + REPLICATES))  # the first column counts every example once
        self._examples = 0  # a sum over the examples' keys: who was counted, in any order

    def update(self, prediction: str | Reading, target: dict[str, Any], id: str | None = None) -> dict[str, float]:
        """Counts one example, and returns its own scores under the names of METRICS. A text may have been read already.

        `id` names the example for the bootstrap. Examples without one are named by their target, and those
        whose targets are equal are then drawn together. Raises ValueError where the target is not a JSON
        object; never on account of the prediction's content.
        """
        sums = score(prediction, target)
        key = example_key(self._seed, id, scoring_text(target) if id is None else "")
        self._sums[:, 0] += sums
        self._sums[:, 1:] += sums[:, None] * poisson_weights(key)
        self._examples = (self._examples + int.from_bytes(key[:8], "little")) % 2**64
        return {name: float(value) for name, value in from_sums(sums).items()}

    def merge(self, other: StreamingEvaluator) -> None:
        """Takes in the examples that another evaluator counted; the other is left as it is.

        Raises ValueError where the seeds differ.
        """
        if self._seed != other._seed:
            raise ValueError(f"evaluators of seeds {self._seed} and {other._seed} cannot be merged")
        self._sums += other._sums
        self._examples = (self._examples + other._examples) % 2**64

    def compute(self) -> dict[str, float]:
        """Every metric of METRICS over all examples so far, and their number `num`.

        The field metrics and key_f1 are micro-averages, the others means over examples (`from_sums` has the
        formulas). Before the first example every metric is NaN and num 0.
        """
        num = float(self._sums[SUMS.index("num"), 0])
        return {name: float(values[0]) for name, values in self._values().items()} | {"num": num}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % interval (low, high) of every metric of METRICS, by a Poisson bootstrap over examples.

        The percentile interval of REPLICATES replicates. NaN before the first example; a handful of examples
        gives intervals that are too narrow, and where all examples score the same it has no width.
        """
        return {name: interval(values[1:]) for name, values in self._values().items()}

    def _values(self) -> dict[str, NDArray[Any]]:
        values = from_sums(self._sums)
        undrawn = self._sums[SUMS.index("num")] == 0
        return {name: np.where(undrawn, np.nan, value) for name, value in values.items()}


class Difference(NamedTuple):
    """A metric of two runs on the same examples: second - first, with its 95 % interval."""

    first: float
    second: float
    difference: float
    low: float
    high: float

    @property
    def exceeds_noise(self) -> bool:
        """True where the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def compare(first: StreamingEvaluator, second: StreamingEvaluator) -> dict[str, Difference]:
    """The paired bootstrap of two evaluators that counted the same examples, metric by metric.

    Both weight an example alike in every replicate, so the replicates' differences are free of what the
    examples have in common. Raises ValueError where the examples (by id, or target where there is none) or
    seeds differ.
    """
    same = first._seed == second._seed and first._examples == second._examples
    if not same or not np.array_equal(first._sums[SUMS.index("num")], second._sums[SUMS.index("num")]):
        raise ValueError("only evaluators that counted the same examples with the same seed can be compared")
    before, after = first._values(), second._values()
    compared = {}
    for name in METRICS:
        differences = after[name] - before[name]
        low, high = interval(differences[1:])
        values = float(before[name][0]), float(after[name][0]), float(differences[0])
        compared[name] = Difference(*values, low, high)
    return compared


def compare_predictions(
    first: Iterable[Prediction], second: Iterable[Prediction], seed: int = 0
) -> dict[str, Difference]:
    """Compare the predictions of two runs for the same examples, in any order, as `compare` does.

    Raises:
        UserError: if an id is missing on one side, comes twice, or has different targets.
    """
    evaluators = []
    targets: list[dict[str, str]] = []
    for predictions in (first, second):
        evaluator, seen = StreamingEvaluator(seed), {}
        for prediction in predictions:
            if prediction.id in seen:
                raise UserError(f"example {prediction.id!r} comes twice")
            seen[prediction.id] = scoring_text(prediction.target)
            evaluator.update(prediction.reading, prediction.target, prediction.id)
        evaluators.append(evaluator)
        targets.append(seen)
    one, other = targets
    differing = sorted(id for id in one.keys() | other.keys() if one.get(id) != other.get(id))
    if differing:
        raise UserError(f"{len(differing)} examples are not the same on both sides, the first {differing[0]!r}")
    return compare(*evaluators)
