"""What a prediction is worth: JSON text, tree edit, metrics.

`METRICS` costs nothing to import; the other public names load numpy and rapidfuzz when first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from im2json.scoring.catalogue import METRICS, Metric

if TYPE_CHECKING:
    from im2json.scoring.evaluator import StreamingEvaluator
    from im2json.scoring.metrics import score

__all__ = ["METRICS", "Metric", "StreamingEvaluator", "score"]

_HOMES = {"StreamingEvaluator": "im2json.scoring.evaluator", "score": "im2json.scoring.metrics"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
