"""Make the tables of a scorecard, and of two runs side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from im2json.catalogue import MIN_EXAMPLES, TOO_FEW, labelled
from im2json.report.table import before_after_table, counted, table
from im2json.runs import RunFolder
from im2json.scoring import METRICS, Difference, compare_predictions
from im2json.scoring.checks import CheckCounts, count_checks
from im2json.scoring.examples import kept_predictions, score_predictions
from im2json.scoring.field_confidence import ALL, FieldConfidence, run_confidence
from im2json.scoring.fieldtable import compare_fields
from im2json.scoring.scorecard import Scorecard

MAX_FOREIGN_SHOWN = 10
"""Rows shown of paths that no target has; --json has them all."""


def scorecard_report(scorecard: Scorecard, as_json: bool = False) -> str:
    """Return tables of metrics with their intervals, of fields and of errors, or `scorecard.as_json()` as text."""
    if as_json:
        return json.dumps(scorecard.as_json(), indent=2)
    values, bounds = scorecard.metrics.compute(), scorecard.metrics.intervals()
    metrics = table(
        [[labelled(name), values[name], *(bounds[name] or (None, None))] for name in METRICS],
        ["metric", "value", "low", "high"],
    )
    errors = [[name, found["examples"], found["occurrences"]] for name, found in scorecard.errors.compute().items()]
    num = int(values["num"])
    intervals = "with 95 % intervals" if num >= MIN_EXAMPLES else "too few for intervals"
    parts = [f"{counted(num, 'example')}, {intervals}:\n{metrics}", fields_table(scorecard)]
    return "\n\n".join([*filter(None, parts), table(errors, ["error", "examples", "times"])])


def fields_table(scorecard: Scorecard) -> str:
    """Return a table with a line for each key path, or nothing if there is no field.

    Of the paths that no target has, it holds the most frequent and says how many it leaves out.
    """
    rows = scorecard.fields.compute()
    if not rows:
        return ""
    foreign = [row for row in rows if not row.support and row.path is not None]
    hidden = set(foreign[MAX_FOREIGN_SHOWN:])
    lines = [
        ["(other)" if path is None else path, support, predicted, precision, recall, f1, similarity]
        for row in rows
        if row not in hidden
        for path, support, predicted, precision, recall, f1, similarity in [row]
    ]
    headers = ["field", "support", "predicted", "precision", "recall", "F1", "similarity"]
    more = f"\n... and {len(hidden)} more that no target has" if hidden else ""
    return table(lines, headers) + more


def run_report(
    run: RunFolder,
    split: str,
    metrics: Mapping[str, Mapping[str, float]],
    target_precision: float | None = None,
    as_json: bool = False,
) -> str:
    """Return the metrics of a split before and after training, and details of the answers after it.

    As JSON they are metrics, confidence and checks.

    Raises:
        UserError: if the run kept no predictions of the split.
    """
    kept = kept_predictions(run, split)
    confidence, checks = run_confidence(run, kept, target_precision), count_checks(kept)
    if as_json:
        counts = {"checks": {text: found._asdict() for text, found in checks.items()}} if checks else {}
        return json.dumps({**metrics, "confidence": confidence.as_json(), **counts}, indent=2)
    return (
        f"{split} split, generated text:\n{before_after_table(metrics['before'], metrics['after'])}\n\n"
        f"after, in detail: {scorecard_report(score_predictions(kept))}\n\n"
        f"{confidence_table(confidence)}\n\n{checks_table(checks)}"
        f"predictions  {run.predictions_file}\nreport       {run.report}\npicture      {run.path / f'{split}.png'}"
    )


def confidence_table(found: FieldConfidence) -> str:
    """Return a table with a line for each key path, all leaves together first."""
    if not found.groups:
        return "no answer that could be read holds a value, so no field has a confidence"
    headers = ["confidence", "fields", "right", "mean", "ECE", "AURC"]
    lines = [[path, *group[:5]] for path, group in found.groups.items()]
    note = "right: share of those predicted; mean: calibrated; ECE, AURC: calibration error, area under risk-coverage"
    if found.threshold is None:
        return f"{table(lines, headers)}\n{note}"
    lines = [[*line, *group[5:]] for line, group in zip(lines, found.groups.values())]
    share, precision = found.groups[ALL][5:]
    assert share is not None
    said = (
        f"from {found.threshold:.4f} on, which validation asks for {found.target_precision:g} of those kept to be "
        f"right, {share:.1%} of the fields are kept, and {precision or 0:.2%} of these are right"
        if math.isfinite(found.threshold)
        else f"validation has no threshold at which {found.target_precision:g} of the fields kept are surely right"
    )
    return f"{table(lines, [*headers, 'kept', 'precision'])}\n{note}\n{said}"


def checks_table(checks: Mapping[str, CheckCounts]) -> str:
    """Return a table with a line for each check and an empty line after it, or nothing if there is no check."""
    if not checks:
        return ""
    headers = ["check", "holds", "fails", "cannot say", "an amount is wrong", "and it fails"]
    return table([[text, *found] for text, found in checks.items()], headers) + "\n\n"


def comparison_report(first: RunFolder, second: RunFolder, split: str, as_json: bool = False) -> str:
    """Return a comparison of what two runs answered after training: the metrics and the F1 of every field.

    Raises:
        UserError: if a run kept no answers for the split, or the examples differ.
    """
    rows = kept_predictions(first, split), kept_predictions(second, split)
    metrics, fields = compare_predictions(*rows), compare_fields(*rows)
    if as_json:
        return json.dumps(comparison_json(metrics, fields), indent=2)
    head = f"{split} split, {counted(len(rows[0]), 'example')}\nA  {first.path}\nB  {second.path}"
    return f"{head}\n\n{comparison_tables(metrics, fields)}"


def comparison_tables(metrics: Mapping[str, Difference], fields: Mapping[str, Difference]) -> str:
    """Return a table of metrics and, if there are fields, one of fields."""
    headers = ["A", "B", "B - A", "low", "high", ""]
    rows = [[labelled(name), *_cells(found, METRICS[name].higher_is_better)] for name, found in metrics.items()]
    by_field = [[path, *_cells(found, True)] for path, found in fields.items()]
    note = "low, high: the 95 % interval of B - A by a paired bootstrap; of 20 rows one may exceed the noise by chance"
    parts = [table(rows, ["metric", *headers]), table(by_field, ["F1 of field", *headers]) if by_field else "", note]
    return "\n\n".join(filter(None, parts))


def verdict(found: Difference, higher_is_better: bool) -> str:
    """Return better, worse, within noise, or too few if there are too few examples to say."""
    if math.isnan(found.low):
        return TOO_FEW
    if not found.exceeds_noise:
        return "within noise"
    return "better" if (found.difference > 0) == higher_is_better else "worse"


def comparison_json(metrics: Mapping[str, Difference], fields: Mapping[str, Difference]) -> dict[str, object]:
    """Return {"metrics": {name: ...}, "fields": {path: ...}}, each with the values of a Difference and a verdict."""
    return {
        "metrics": {name: _as_json(found, METRICS[name].higher_is_better) for name, found in metrics.items()},
        "fields": {path: _as_json(found, True) for path, found in fields.items()},
    }


def _as_json(found: Difference, higher_is_better: bool) -> dict[str, object]:
    values = {name: None if math.isnan(value) else value for name, value in found._asdict().items()}
    return values | {"verdict": verdict(found, higher_is_better)}


def _cells(found: Difference, higher_is_better: bool) -> list[object]:
    return list(_as_json(found, higher_is_better).values())
