"""Score predictions: JSON text, tree edit, metrics, intervals.

`METRICS` costs nothing to import. The other public names load numpy and rapidfuzz when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from im2json.catalogue import METRICS, Metric

if TYPE_CHECKING:
    from im2json.scoring.evaluator import Difference, StreamingEvaluator, compare, compare_predictions

__all__ = ["METRICS", "Difference", "Metric", "StreamingEvaluator", "compare", "compare_predictions"]

_LAZY = {"Difference", "StreamingEvaluator", "compare", "compare_predictions"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("im2json.scoring.evaluator"), name)
