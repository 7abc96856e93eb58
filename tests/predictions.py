"""Predictions for tests, with what a test leaves out filled in."""

from __future__ import annotations

from typing import Any

from im2json.records import Prediction


def prediction(row: dict[str, Any]) -> Prediction:
    """Return the record of a row of id, text and target, and whatever else it holds."""
    return Prediction.from_json({"step": 1, "split": "test", "stage": "after", "id": "x", **row})
