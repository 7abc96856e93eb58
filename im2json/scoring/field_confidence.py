"""Measure how well a run's confidence holds on a split, over all fields and field by field."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from im2json.records import Prediction
from im2json.runs import RunFolder
from im2json.scoring.confidence import (
    Calibration,
    Leaf,
    area_under_risk_coverage,
    calibration_error,
    judge_leaves,
    kept,
    threshold_for,
)
from im2json.scoring.examples import calibration_predictions, read_calibration
from im2json.scoring.normal import fields, normal_items

ALL = "(all)"
"""The group of all leaves."""
NO_TARGET = "(no target has it)"
"""The group of leaves at paths that no target has."""


class Group(NamedTuple):
    """How well the calibrated confidence of some predicted leaves holds."""

    leaves: int
    right: float  # share
    confidence: float  # mean
    calibration_error: float
    aurc: float  # area under the risk-coverage curve
    kept: float | None = None  # share at the threshold or above; None without a threshold
    precision: float | None = None  # of those kept; None if none is kept


@dataclass(frozen=True)
class FieldConfidence:
    """The predicted leaves of a split, and how well their confidence holds by key path, ALL first."""

    leaves: Sequence[Leaf]  # calibrated
    calibration: Calibration
    groups: dict[str, Group]
    target_precision: float | None = None
    threshold: float | None = None  # of the calibrated confidence; inf if no threshold reaches the target precision

    def as_json(self) -> dict[str, Any]:
        """Return everything but the leaves; an infinite threshold is null."""
        found = self.threshold if self.threshold is not None and math.isfinite(self.threshold) else None
        return {
            "calibration": self.calibration._asdict(),
            "target_precision": self.target_precision,
            "threshold": found,
            "fields": {path: group._asdict() for path, group in self.groups.items()},
        }


def run_confidence(
    run: RunFolder, predictions: Iterable[Prediction], target_precision: float | None = None
) -> FieldConfidence:
    """Return the confidence of predictions that a run kept, without those that have none.

    Args:
        target_precision: find the threshold above which this share is right, on the predictions that the calibration
            was fitted to.

    Raises:
        UserError: if the run's calibration.json was not written by us.
    """
    calibration, step = read_calibration(run) or (Calibration(), None)
    kept_here = [prediction for prediction in predictions if prediction.has_confidence]
    leaves = calibrated((leaf for prediction in kept_here for leaf in judge_leaves(prediction)), calibration)
    threshold = None
    if target_precision is not None and step is not None:
        validated = calibration_predictions(run, step)
        known = calibrated((leaf for prediction in validated for leaf in judge_leaves(prediction)), calibration)
        threshold = threshold_for([leaf.confidence for leaf in known], [leaf.right for leaf in known], target_precision)
    wanted = {path for prediction in kept_here for path, _ in fields(normal_items(prediction.target))}
    by_path: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        by_path.setdefault(leaf.path if leaf.path in wanted else NO_TARGET, []).append(leaf)
    ordered = sorted(by_path.items(), key=lambda item: (item[0] == NO_TARGET, item[0]))
    groups = {path: _group(some, threshold) for path, some in [(ALL, leaves), *ordered] if some}
    return FieldConfidence(leaves, calibration, groups, target_precision, threshold)


def calibrated(leaves: Iterable[Leaf], calibration: Calibration) -> list[Leaf]:
    """Return the leaves with calibrated confidence."""
    return [leaf._replace(confidence=float(calibration(leaf.confidence))) for leaf in leaves]


def _group(leaves: Sequence[Leaf], threshold: float | None) -> Group:
    sure, right = [leaf.confidence for leaf in leaves], [leaf.right for leaf in leaves]
    found = Group(
        len(leaves),
        sum(right) / len(leaves),
        sum(sure) / len(leaves),
        calibration_error(sure, right),
        area_under_risk_coverage(sure, right),
    )
    if threshold is None:
        return found
    share, precision = kept(sure, right, threshold)
    return found._replace(kept=share, precision=None if math.isnan(precision) else precision)
