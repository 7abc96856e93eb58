"""Write the HTML page of a run: scores and confidence of its answers on a split, field by field, and the examples."""

from __future__ import annotations

import base64
import html
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from io import BytesIO
from typing import Any

from PIL import Image

from im2json.catalogue import labelled
from im2json.files import atomically
from im2json.jsontext import canonical, dumps
from im2json.records import Prediction
from im2json.report.page import html_page, html_table
from im2json.report.plot import Curve, curve_plot, legend
from im2json.report.table import cell_text, counted, interval_text
from im2json.runs import RunFolder
from im2json.scoring import METRICS
from im2json.scoring.confidence import DIGITS, Calibration, judge_leaves, reliability, risk_coverage
from im2json.scoring.errors import example_errors
from im2json.scoring.examples import kept_predictions
from im2json.scoring.field_confidence import ALL, FieldConfidence, calibrated, run_confidence
from im2json.scoring.metrics import matches
from im2json.scoring.normal import fields, key_path, normal_items
from im2json.scoring.scorecard import Scorecard

LONGEST_SIDE = 480
"""Pixels of a document; larger documents are scaled down."""

MOST = 1_000
"""Examples on the page: the worst, if there are more."""

FIELDS_LEGEND = (
    "ECE, the expected calibration error, is how far confidence lies from the share of values that are right, on "
    "average. AURC, the area under the risk-coverage curve, is the share of wrong values among the surest ones, "
    "averaged over how many are kept. Lower is better for both."
)

POINTS = 200
"""Points that are drawn of the risk-coverage curve."""

JsonLine = tuple[int, str, str, int, float | None]
"""A line of indented JSON: depth, text before the leaf, leaf, state (OK, WRONG or NO_FIELD), and confidence.

It is a plain tuple because the page embeds it as JSON, which run.js reads by position.
"""

OK, WRONG, NO_FIELD = 0, 1, 2
FAILS = "does not add up"
"""The class of answers that fail a check, in addition to the classes of scoring.errors."""


def write_report(
    run: RunFolder, split: str, picture: Callable[[str], Image.Image], before: Mapping[str, float] | None = None
) -> None:
    """Write report.html, one file that needs no network, about the predictions of a split after training.

    Args:
        picture: returns the document of an example, by its id.
        before: metrics of the base.

    Raises:
        UserError: if the run kept no predictions of this split.
    """
    kept = kept_predictions(run, split)
    confidence = run_confidence(run, kept)
    scorecard = Scorecard()
    scores = {each.id: scorecard.update(each.reading, each.target, each.id)["field_f1"] for each in kept}
    worst = sorted(kept, key=lambda each: scores[each.id])[:MOST]
    examples = [_example(each, scores[each.id], confidence.calibration, picture(each.id)) for each in worst]
    left_out = f" The {MOST} worst of {len(kept)} are shown." if len(kept) > MOST else ""
    parts = [
        f"<p>{counted(len(kept), 'example')} of the {html.escape(split)} split, generated text, "
        "with 95 % intervals.</p>",
        f'<div class="columns">{_metrics(scorecard, before)}{_errors(scorecard)}</div>',
        _fields(scorecard, confidence),
        _confidence(confidence),
        files("im2json.report").joinpath("run.html").read_text("utf-8").replace("<!-- left out -->", left_out),
        f'<script type="application/json" id="data">{_embedded(examples)}</script>',
        f"<script>{files('im2json.report').joinpath('run.js').read_text('utf-8')}</script>",
    ]
    style = files("im2json.report").joinpath("run.css").read_text("utf-8")
    with atomically(run.report) as aside:
        aside.write_text(html_page(f"Run {run.path.name}", style, "\n".join(parts)), "utf-8")


def _embedded(value: Any) -> str:
    """Return JSON in which no text can end the script element around it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _metrics(scorecard: Scorecard, before: Mapping[str, float] | None) -> str:
    values, bounds = scorecard.metrics.compute(), scorecard.metrics.intervals()
    rows = [[labelled(name), (before or {}).get(name), values[name], interval_text(bounds[name])] for name in METRICS]
    return f"<section><h2>Metrics</h2>{_table(['metric', 'before', 'after', '95 % interval'], rows)}</section>"


def _errors(scorecard: Scorecard) -> str:
    rows = [[name, found["examples"], found["occurrences"]] for name, found in scorecard.errors.compute().items()]
    return f"<section><h2>Errors</h2>{_table(['error', 'examples', 'times'], rows)}</section>"


def _fields(scorecard: Scorecard, confidence: FieldConfidence) -> str:
    """Return the table of fields, the worst first."""
    rows = []
    for row in sorted(scorecard.fields.compute(), key=lambda row: row.f1):
        group = confidence.groups.get(row.path or "")
        sure = group[2:5] if group else (None, None, None)
        rows.append([row.path or "(other)", row.support, row.predicted, row.precision, row.recall, row.f1, *sure])
    headers = ["field", "support", "predicted", "precision", "recall", "F1", "mean confidence", "ECE", "AURC"]
    return f"<section><h2>Fields by F1</h2><p>{FIELDS_LEGEND}</p>{_table(headers, rows)}</section>"


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return html_table(headers, [[html.escape(cell_text(value)) for value in row] for row in rows])


def _confidence(found: FieldConfidence) -> str:
    """Return plots of reliability and of risk against coverage, or a sentence if the answers have no confidence."""
    if ALL not in found.groups:
        why = "There is none: no answer could be read as JSON, or the answers were kept by a version without it."
        return f"<section><h2>Confidence</h2><p>{why}</p></section>"
    sure, right = [leaf.confidence for leaf in found.leaves], [leaf.right for leaf in found.leaves]
    bins = [(100 * mean, 100 * share) for mean, share, _ in reliability(sure, right)]
    coverage, risk = risk_coverage(sure, right)
    chosen = sorted({round(i * (len(risk) - 1) / POINTS) for i in range(POINTS + 1)})
    curve = [(100 * float(coverage[i]), 100 * float(risk[i])) for i in chosen]
    group = found.groups[ALL]
    summary = (
        f"{group.leaves} predicted fields, {group.right:.1%} of them right; mean confidence {group.confidence:.1%}; "
        f"calibration error {group.calibration_error:.4f}; area under the risk-coverage curve {group.aurc:.5f}."
    )
    diagonal = Curve("as sure as right", 6, [(0, 0), (100, 100)])
    plots = [
        curve_plot([Curve("fields, in 15 bins of equally many", 0, bins), diagonal], "confidence, %", "right, %")
        + legend(["fields, in 15 bins of equally many"]),
        curve_plot([Curve("wrong of those kept", 0, curve)], "the surest fields kept, %", "wrong of those kept, %"),
    ]
    drawn = "".join(f'<div class="wide">{plot}</div>' for plot in plots)
    return f'<section><h2>Confidence</h2><p>{summary}</p><div class="plots">{drawn}</div></section>'


def _example(prediction: Prediction, f1: float, calibration: Calibration, picture: Image.Image) -> dict[str, Any]:
    """Return what run.js shows of an example."""
    id, text, reading = prediction.id, prediction.text, prediction.reading
    document, target = reading.value, prediction.target
    confidence = calibration.of(prediction.confidence) if prediction.confidence else None
    leaves = calibrated(judge_leaves(prediction), calibration) if confidence else []
    leaves = [leaf._replace(confidence=round(leaf.confidence, DIGITS)) for leaf in leaves]
    fails = sum(holds is False for holds in prediction.checks.values())
    wrong = [leaf.confidence for leaf in leaves if not leaf.right]
    pairs, wanted = (Counter(fields(normal_items(side))) for side in (document or {}, target))
    return {
        "id": id,
        "f1": round(f1, 4),
        "least": min((leaf.confidence for leaf in leaves), default=0.0),
        "mistake": max(wrong, default=-1.0),
        "errors": {**example_errors(reading, target), **({FAILS: fails} if fails else {})},
        "fields": sorted({path for path, _ in (pairs - wanted) | (wanted - pairs)}),
        "right": [matches(pairs.elements(), wanted.elements()), pairs.total(), wanted.total()],
        "how": reading.how,
        "target": list(_lines(target, pairs)),
        "prediction": [(0, text, "", NO_FIELD, None)]
        if document is None
        else list(_lines(document, wanted, confidence)),
        "search": f"{id} {text} {canonical(target)}".lower(),
        "picture": _jpeg(picture),
    }


def _lines(document: dict[str, Any], others: Counter[tuple[str, str]], confidence: Any = None) -> Iterator[JsonLine]:
    """Yield indented JSON. A leaf is OK if the other side has an equal pair that no earlier leaf has matched."""
    left = Counter(others)

    def walk(value: Any, sure: Any, path: str, depth: int, head: str, tail: str) -> Iterator[JsonLine]:
        if isinstance(value, dict | list) and value:
            brackets = "{}" if isinstance(value, dict) else "[]"
            yield depth, head + brackets[0], "", NO_FIELD, None
            keys = list(value) if isinstance(value, dict) else range(len(value))
            for i, key in enumerate(keys):
                inner = key_path(path, key) if isinstance(key, str) else path
                name = f"{json.dumps(key, ensure_ascii=False)}: " if isinstance(key, str) else ""
                comma = "," if i < len(value) - 1 else ""
                yield from walk(value[key], sure and sure[key], inner, depth + 1, name, comma)
            yield depth, brackets[1] + tail, "", NO_FIELD, None
            return
        items, state = normal_items(value), NO_FIELD
        for text in items:
            state = OK if left[path, text] > 0 else WRONG
            left[path, text] -= state == OK
        yield depth, head, dumps(value, ensure_ascii=False) + tail, state, sure if items else None

    yield from walk(document, confidence, "", 0, "", "")


def _jpeg(picture: Image.Image) -> str:
    shown = picture.convert("RGB")
    shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    stream = BytesIO()
    shown.save(stream, "JPEG", quality=70)
    return base64.b64encode(stream.getvalue()).decode()
