"""The metrics that an evaluation reports: their names, what each measures, and whether more is better.

Import this module freely: it loads neither numpy nor rapidfuzz.
"""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """Describe a metric in one line, and say whether a larger value is the better one."""

    help: str
    higher_is_better: bool

    def gain(self, value: float) -> float:
        """Return the value, negated where lower is better, so that the largest gain is the best."""
        return value if self.higher_is_better else -value


METRICS: dict[str, Metric] = {
    "json_validity": Metric("share of predictions that are strict JSON and an object", True),
    "json_repaired": Metric("share of predictions that were not strict JSON and were repaired before scoring", False),
    "exact_match": Metric("share of predictions whose parsed value equals the target", True),
    "ted_accuracy": Metric("Donut's tree-edit accuracy: 1 - distance / size of the target, at least 0", True),
    "field_f1": Metric("Donut's F1 over (path, value) pairs, micro-averaged, list positions ignored", True),
    "field_precision": Metric("share of the predicted (path, value) pairs that are in the target", True),
    "field_recall": Metric("share of the target's (path, value) pairs that were predicted", True),
    "key_f1": Metric("field_f1 without the values: only the paths have to agree", True),
    "structure_similarity": Metric("Jaccard similarity of the sets of key paths", True),
    "value_accuracy": Metric("share of equal values over the paths, list positions included, in both documents", True),
    "value_similarity": Metric("mean similarity of values over the paths, list positions included, in both", True),
    "edit_distance": Metric("Levenshtein distance of the key-sorted texts, divided by the longer text's length", False),
}
"""Every metric in the order of tables. All values are within [0, 1]. Evaluations also report `num`, the number of
examples, which is not a metric."""


MIN_EXAMPLES = 5
"""Fewer examples say little about others, so they have neither an interval nor a verdict."""

TOO_FEW = "too few"
"""Shown in place of the interval or the verdict of fewer than MIN_EXAMPLES examples."""


def labelled(name: str) -> str:
    """Return a metric's name for a table or plot, with a note where lower is better. Other names are unchanged."""
    lower = name in METRICS and not METRICS[name].higher_is_better
    return f"{name} (lower is better)" if lower else name
