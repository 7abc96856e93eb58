"""Score a set of predictions in every way: metrics, intervals, fields and errors."""

from __future__ import annotations

from typing import Any

from im2json.catalogue import METRICS
from im2json.jsontext import Reading, read
from im2json.scoring.errors import ErrorCounts, example_errors
from im2json.scoring.evaluator import StreamingEvaluator
from im2json.scoring.fieldtable import FieldTable


class Scorecard:
    """A StreamingEvaluator, a FieldTable and ErrorCounts over the same examples. Mergeable like them."""

    def __init__(self, seed: int = 0) -> None:
        self.metrics = StreamingEvaluator(seed)
        self.fields = FieldTable()
        self.errors = ErrorCounts()

    def update(self, prediction: str | Reading, target: dict[str, Any], id: str | None = None) -> dict[str, float]:
        """Count one example, and return its own scores, as `StreamingEvaluator.update` does."""
        reading = read(prediction) if isinstance(prediction, str) else prediction
        scores = self.metrics.update(reading, target, id)
        self.fields.update(reading.value or {}, target)
        self.errors.update(example_errors(reading, target))
        return scores

    def merge(self, other: Scorecard) -> None:
        """Add the examples that another has counted.

        Raises:
            ValueError: if the seeds differ.
        """
        self.metrics.merge(other.metrics)
        self.fields.merge(other.fields)
        self.errors.merge(other.errors)

    def as_json(self) -> dict[str, Any]:
        """Return the scores as an object that JSON can hold, except before the first example, when metrics are NaN.

        The bounds are None for fewer than MIN_EXAMPLES examples.

        {"num", "metrics": {name: {"value", "low", "high"}}, "fields": [the fields of FieldRow], "errors": {class:
        {"examples", "occurrences"}}}
        """
        values, bounds = self.metrics.compute(), self.metrics.intervals()
        return {
            "num": int(values["num"]),
            "metrics": {
                name: {"value": values[name], **dict(zip(("low", "high"), bounds[name] or (None, None)))}
                for name in METRICS
            },
            "fields": [row._asdict() for row in self.fields.compute()],
            "errors": self.errors.compute(),
        }
