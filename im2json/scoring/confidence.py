"""Compute the confidence of each leaf of a prediction, calibrate it, and measure how well it holds.

The confidence of a leaf is the probability that the model gave to its text and to what leads to it: the product over
all tokens since the previous leaf, or since the answer's first brace, with keys, brackets and quotes, because the path
of a leaf must be right too. It is calibrated on answers whose targets are known. A leaf is right as in the field
metrics: its (path, value) pair, without list positions, is one of the target's that no leaf before it has matched.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from im2json.errors import UserError
from im2json.jsontext import Reading, leaf_spans, map_leaves, read
from im2json.records import Prediction
from im2json.scoring.normal import fields, key_path, normal_items

Array = NDArray[np.float64]

DIGITS = 6
"""Decimals of a stored confidence. For log-odds, 0 and 1 count as one unit of the last decimal away from 0 and 1."""

BINS = 15
"""Bins of the calibration error, as in Guo et al. (2017)."""


class Leaf(NamedTuple):
    """A predicted leaf, its confidence, and whether the target has it."""

    path: str
    value: str
    confidence: float
    right: bool


def leaf_confidence(
    text: str, starts: Sequence[int], logprobs: Sequence[float], reading: Reading | None = None
) -> dict[str, Any] | None:
    """Return the object that a text is read as, with each leaf replaced by its probability; None if it is unreadable.

    Args:
        starts: index in the text at which each token begins, ascending; the tokens of one character share an index.
        logprobs: of each token, in nats; minus infinity for a token that the model did not write.
        reading: of the text, if it was read before.
    """
    reading = read(text) if reading is None else reading
    spans = leaf_spans(text, reading)
    if spans is None:
        return None
    ends = [reading.start]  # and those of the leaves, in the order of the text
    map_leaves(spans, lambda span: ends.append(span[1]))
    ends.sort()

    def probability(span: tuple[int, int]) -> float:
        begin = ends[bisect_left(ends, span[1]) - 1]
        first = bisect_left(starts, starts[bisect_right(starts, begin) - 1])
        return round(math.exp(math.fsum(logprobs[first : bisect_left(starts, span[1])])), DIGITS)

    confidence: dict[str, Any] = map_leaves(spans, probability)
    return confidence


def judge_leaves(prediction: Prediction) -> list[Leaf]:
    """Return the leaves of a prediction in the text's order, each with its confidence and whether it is right.

    Empty leaves, which are no field, are left out.

    Raises:
        UserError: if the prediction has no confidence for each of its leaves.
    """
    document = prediction.reading.value
    if document is None:
        return []
    open_pairs = Counter(fields(normal_items(prediction.target)))
    found = []
    try:
        for path, value, confidence in _pairs(document, prediction.confidence, ""):
            right = open_pairs[path, value] > 0
            open_pairs[path, value] -= right
            found.append(Leaf(path, value, float(confidence), right))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"example {prediction.id!r} has no confidence for each of its leaves") from None
    return found


def _pairs(value: Any, confidence: Any, path: str) -> Iterator[tuple[str, str, float]]:
    """Yield `normal.fields` of a document as parsed, each with its confidence."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _pairs(inner, confidence[key], key_path(path, key))
    elif isinstance(value, list):
        for item, sure in zip(value, confidence, strict=True):
            yield from (pair for pair in _pairs(item, sure, path) if pair[1] or isinstance(item, dict))
    else:
        yield from ((path, text, confidence) for text in normal_items(value))


class Calibration(NamedTuple):
    """Platt scaling of the log-odds: 1 / (1 + exp(-(slope x log(p / (1 - p)) + intercept))), which keeps the order.

    It has only two parameters because a validation split holds few wrong leaves (J. Platt, "Probabilistic Outputs for
    Support Vector Machines", 1999; Guo et al., "On Calibration of Modern Neural Networks", 2017, compare with it on
    log-odds).
    """

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, confidence: Any) -> Any:
        """Return calibrated confidence in the given shape; 0, for what the model did not write, stays 0."""
        calibrated = 1 / (1 + np.exp(-(self.slope * _log_odds(confidence) + self.intercept)))
        return np.where(np.asarray(confidence, float) > 0, calibrated, 0.0)

    def of(self, confidence: dict[str, Any]) -> dict[str, Any]:
        """Return the result of `leaf_confidence`, calibrated."""
        calibrated: dict[str, Any] = map_leaves(confidence, lambda p: round(float(self(p)), DIGITS))
        return calibrated

    @classmethod
    def fit(cls, confidence: Sequence[float], right: Sequence[bool]) -> Calibration:
        """Fit the parameters to Platt's targets, (right + 1) / (right + 2) and 1 / (wrong + 2), by Newton's method.

        The parameters are finite even if all leaves are right. A slope below 0 becomes 0.

        Raises:
            ValueError: if there are no leaves.
        """
        if not len(confidence):
            raise ValueError("there are no leaves to calibrate confidence on")
        is_right = np.asarray(right, bool)
        high, low = (is_right.sum() + 1) / (is_right.sum() + 2), 1 / ((~is_right).sum() + 2)
        wanted = np.where(is_right, high, low)
        x = np.stack([_log_odds(confidence), np.ones(len(wanted))], 1)  # leaves x 2
        slope, intercept = _logistic(x, wanted)
        if slope < 0:
            slope, (intercept,) = 0.0, _logistic(x[:, 1:], wanted)
        return cls(float(slope), float(intercept))


def _log_odds(confidence: Any) -> Array:
    edge = 10.0**-DIGITS
    p = np.clip(np.asarray(confidence, float), edge, 1 - edge)
    return np.log(p) - np.log1p(-p)


def _logistic(x: Array, wanted: Array) -> Array:
    """Return the maximum-likelihood weights of a logistic regression, with a ridge of 1e-6 for constant columns."""

    def loss(weights: Array) -> float:
        z = x @ weights
        return float((np.logaddexp(0, z) - wanted * z).sum() + 5e-7 * weights @ weights)

    weights = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ weights))
        gradient = x.T @ (p - wanted) + 1e-6 * weights
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + 1e-6 * np.eye(len(weights)), gradient)
        size = 1.0
        while loss(weights - size * step) > loss(weights) and size > 1e-6:  # a full Newton step may overshoot
            size /= 2
        weights = weights - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    return weights


def calibration_error(confidence: Sequence[float], right: Sequence[bool], bins: int = BINS) -> float:
    """Return the expected calibration error: the mean over leaves of |mean confidence - share right| of a leaf's bin.

    All bins hold equally many leaves, in the order of confidence. Most leaves are near 1, so bins of equal width would
    be empty except for the last. NaN without leaves.
    """
    gaps = [abs(sure - share) * count for sure, share, count in reliability(confidence, right, bins)]
    return sum(gaps) / len(confidence) if len(confidence) else math.nan


def reliability(confidence: Sequence[float], right: Sequence[bool], bins: int = BINS) -> list[tuple[float, float, int]]:
    """Return (mean confidence, share right, leaves) of each bin of the calibration error that has leaves.

    Leaves of equal confidence have no order, so each of them counts as right by the share of them that is right.
    """
    sure, shared = _ordered(confidence, right)
    parts = zip(np.array_split(sure, bins), np.array_split(shared, bins))
    return [(float(a.mean()), float(b.mean()), len(a)) for a, b in parts if len(a)][::-1]


def risk_coverage(confidence: Sequence[float], right: Sequence[bool]) -> tuple[Array, Array]:
    """Return the share of leaves kept and the share of wrong ones among them, for each number of most confident leaves.

    Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", 2017. Ties count as in `reliability`.
    """
    _, shared = _ordered(confidence, right)
    count = np.arange(1, len(shared) + 1)
    return count / max(1, len(shared)), np.cumsum(1 - shared) / count


def area_under_risk_coverage(confidence: Sequence[float], right: Sequence[bool]) -> float:
    """Return AURC, the mean risk of `risk_coverage`: smaller is better, 0 if all are right, NaN without leaves."""
    _, risk = risk_coverage(confidence, right)
    return float(risk.mean()) if len(risk) else math.nan


def threshold_for(confidence: Sequence[float], right: Sequence[bool], precision: float) -> float:
    """Return the least threshold at which the leaves kept have this precision, or inf if there is none.

    As in conformal risk control (Angelopoulos et al., 2022), one wrong leaf more than observed is assumed among those
    kept, because few leaves may reach a precision by luck.
    """
    sure, shared = _ordered(confidence, right)
    count = np.arange(1, len(sure) + 1)
    met = (np.cumsum(1 - shared) + 1) / (count + 1) <= 1 - precision + 1e-12
    met &= np.append(sure[1:] < sure[:-1], True)  # equal leaves are kept together
    return float(sure[met][-1]) if met.any() else math.inf


def kept(confidence: Sequence[float], right: Sequence[bool], threshold: float) -> tuple[float, float]:
    """Return the share of leaves at the threshold or above, and the share of these that is right; NaN if undefined."""
    above = np.asarray(confidence) >= threshold
    if not len(above):
        return math.nan, math.nan
    return float(above.mean()), float(np.asarray(right, float)[above].mean()) if above.any() else math.nan


def _ordered(confidence: Sequence[float], right: Sequence[bool]) -> tuple[Array, Array]:
    """Return confidence in descending order, and for each the share right among leaves of the same confidence."""
    sure, inverse, count = np.unique(np.asarray(confidence, float), return_inverse=True, return_counts=True)
    share = np.bincount(inverse, np.asarray(right, float), len(sure)) / np.maximum(count, 1)
    return np.repeat(sure[::-1], count[::-1]), np.repeat(share[::-1], count[::-1])
