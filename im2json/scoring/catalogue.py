"""The names of the metrics, what each means in a line, and which way is better. Imports nothing heavy."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """One line of help, and whether a larger value is the better one."""

    help: str
    higher_is_better: bool

    def gain(self, value: float) -> float:
        """The value with a sign that makes more the better."""
        return value if self.higher_is_better else -value


METRICS: dict[str, Metric] = {
    "json_validity": Metric("share of predictions that are strict JSON and an object", True),
    "json_repaired": Metric("share of predictions that are no strict JSON, but were repaired and scored so", False),
    "exact_match": Metric("share of predictions whose parsed value equals the target", True),
    "ted_accuracy": Metric("Donut's tree-edit accuracy: 1 - distance / size of the target, at least 0", True),
    "field_f1": Metric("Donut's F1 over (path, value) pairs, micro-averaged, list positions ignored", True),
    "field_precision": Metric("share of the predicted (path, value) pairs that the target holds", True),
    "field_recall": Metric("share of the target's (path, value) pairs that were predicted", True),
    "key_f1": Metric("field_f1 with the values left out: only the paths have to agree", True),
    "structure_similarity": Metric("Jaccard similarity of the sets of key paths", True),
    "value_accuracy": Metric("share of equal values among the places that both documents fill", True),
    "value_similarity": Metric("mean similarity of values over the places that both documents fill", True),
    "edit_distance": Metric("Levenshtein distance of the key-sorted texts over the longer's length", False),
}
"""Every metric that an evaluation reports (`num`, the number of examples, comes besides), in table order.
All of them lie within [0, 1]."""


def labelled(name: str) -> str:
    """A metric's name as tables and plots show it: where lower is better, it says so. Any other name stays as it is."""
    lower = name in METRICS and not METRICS[name].higher_is_better
    return f"{name} (lower is better)" if lower else name
