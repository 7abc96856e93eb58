"""Score a stream of predictions in constant memory, with intervals, and compare two streams."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from im2json.catalogue import METRICS, MIN_EXAMPLES
from im2json.errors import UserError
from im2json.jsontext import Reading, scoring_text
from im2json.records import Prediction
from im2json.scoring.bootstrap import REPLICATES, example_key, interval, poisson_weights
from im2json.scoring.metrics import SUMS, from_sums, score


class StreamingEvaluator:
    """Keeps sums over examples, for all examples and for every bootstrap replicate. Its size is constant.

    Evaluators of different processes merge into one that equals a single pass up to the rounding of sums (1e-12). An
    evaluator can be pickled (about 100 kB).
    """

    def __init__(self, seed: int = 0) -> None:
        """Start without examples. Only evaluators with the same bootstrap seed can be merged or compared."""
        self._seed = seed
        self._sums = np.zeros((len(SUMS), 1 + REPLICATES))  # the first column counts every example once
        self._examples = 0  # a sum over the examples' keys, which is the same in any order

    def update(self, prediction: str | Reading, target: dict[str, Any], id: str | None = None) -> dict[str, float]:
        """Count one example, and return its own scores by the names of METRICS.

        Args:
            prediction: the text, or its reading.
            id: names the example for the bootstrap. Examples without an id are named by their target, so those with
                equal targets are drawn together.

        Raises:
            ValueError: if the target is not a JSON object, but never because of the prediction's content.
        """
        sums = score(prediction, target)
        key = example_key(self._seed, id, scoring_text(target) if id is None else "")
        self._sums[:, 0] += sums
        self._sums[:, 1:] += sums[:, None] * poisson_weights(key)
        self._examples = (self._examples + int.from_bytes(key[:8], "little")) % 2**64
        return {name: float(value) for name, value in from_sums(sums).items()}

    def merge(self, other: StreamingEvaluator) -> None:
        """Add the examples that another evaluator has counted, which stays unchanged.

        Raises:
            ValueError: if the seeds differ.
        """
        if self._seed != other._seed:
            raise ValueError(f"evaluators of seeds {self._seed} and {other._seed} cannot be merged")
        self._sums += other._sums
        self._examples = (self._examples + other._examples) % 2**64

    def compute(self) -> dict[str, float]:
        """Return every metric of METRICS over all examples so far, and their number `num`.

        The field metrics and key_f1 are micro-averages, and the others means over examples (`from_sums` has the
        formulas). Before the first example, every metric is NaN and num is 0.
        """
        num = float(self._sums[SUMS.index("num"), 0])
        return {name: float(values[0]) for name, values in self._values().items()} | {"num": num}

    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """Return the 95 % interval (low, high) of every metric of METRICS, by a Poisson bootstrap over examples.

        It is the percentile interval of REPLICATES replicates. It is too narrow for a handful of examples, and has no
        width if all examples score the same. It is None for fewer than MIN_EXAMPLES examples.
        """
        enough = self._sums[SUMS.index("num"), 0] >= MIN_EXAMPLES
        return {name: interval(values[1:]) if enough else None for name, values in self._values().items()}

    def _values(self) -> dict[str, NDArray[Any]]:
        values = from_sums(self._sums)
        undrawn = self._sums[SUMS.index("num")] == 0
        return {name: np.where(undrawn, np.nan, value) for name, value in values.items()}


class Difference(NamedTuple):
    """A metric of two runs on the same examples, and their difference second - first with its 95 % interval."""

    first: float
    second: float
    difference: float
    low: float
    high: float

    @property
    def exceeds_noise(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def compare(first: StreamingEvaluator, second: StreamingEvaluator) -> dict[str, Difference]:
    """Compare two evaluators of the same examples by a paired bootstrap, metric by metric.

    Both give an example the same weight in every replicate, so the noise that they share cancels in the difference. The
    interval is NaN for fewer than MIN_EXAMPLES examples.

    Raises:
        ValueError: if the seeds or the examples differ, by id or else by target.
    """
    same = first._seed == second._seed and first._examples == second._examples
    if not same or not np.array_equal(first._sums[SUMS.index("num")], second._sums[SUMS.index("num")]):
        raise ValueError("only evaluators that counted the same examples with the same seed can be compared")
    before, after = first._values(), second._values()
    enough = first._sums[SUMS.index("num"), 0] >= MIN_EXAMPLES
    compared = {}
    for name in METRICS:
        differences = after[name] - before[name]
        low, high = interval(differences[1:]) if enough else (math.nan, math.nan)
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
