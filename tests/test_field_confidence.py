"""A run's confidence, from its predictions to calibration.json, the output of evaluate.py, and report.html."""

from __future__ import annotations

import html.parser
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from im2json.files import append_lines
from im2json.jsontext import canonical, map_leaves, read
from im2json.report.comparison import confidence_table, run_report
from im2json.report.run import OK, WRONG, write_report
from im2json.runs import RunFolder
from im2json.scoring.confidence import Calibration, calibration_error, judge_leaves, kept
from im2json.scoring.examples import calibrate, kept_predictions, read_calibration
from im2json.scoring.field_confidence import ALL, NO_TARGET, run_confidence

NASTY = "</script><script>alert(1)</script>"
METRICS = {"before": {"field_f1": 0.0}, "after": {"field_f1": 0.5}}


def row(id: str, split: str, rng: random.Random, stage: str = "after") -> dict[str, Any]:
    """Return an answer whose leaves are wrong twice as often as their confidence says."""
    target = {"menu": [{"nm": f"item {i}", "price": str(i)} for i in range(1, 4)], "total": "6", "note": NASTY}
    sure = map_leaves(target, lambda _: round(1 - 0.2 * rng.random() ** 3, 6))
    said = json.loads(json.dumps(target))
    for i, item in enumerate(said["menu"]):
        for key in item:
            item[key] += "?" if rng.random() < 2 * (1 - sure["menu"][i][key]) else ""
    said["foreign"], sure["foreign"] = "x", 0.4
    return {"id": id, "step": 7, "split": split, "stage": stage, "text": canonical(said), "confidence": sure,
            "target": target, "scores": {}}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run, rng = RunFolder(tmp_path), random.Random(0)
    rows = [row(f"v{i}", "validation", rng, "during") for i in range(60)] + [
        row(f"t{i}", "test", rng) for i in range(20)
    ]
    rows.append({"id": "cut", "step": 7, "split": "test", "stage": "after", "text": "no json", "confidence": None,
                 "target": {"total": "1"}, "scores": {}})  # fmt: skip
    append_lines(run.predictions_file, rows)
    return run


def leaves_of(run: RunFolder, split: str) -> list[Any]:
    return [leaf for kept in run.predictions(split) for leaf in judge_leaves(kept)]


def test_calibration_is_kept_with_the_run(run):
    found = calibrate(run, 7)
    leaves = leaves_of(run, "validation")
    assert found == Calibration.fit([leaf.confidence for leaf in leaves], [leaf.right for leaf in leaves])
    assert read_calibration(run) == (found, 7)
    stored = json.loads(run.calibration.read_text())
    assert stored["fitted_on"]["leaves"] == len(leaves)
    assert stored["calibration_error"]["after"] < stored["calibration_error"]["before"]
    assert calibrate(run, 8) is None  # nothing was kept then
    run.calibration.write_text("{}")
    with pytest.raises(ValueError, match=r"calibration\.json does not hold a calibration"):
        read_calibration(run)


def test_field_confidence_is_that_of_calibrated_leaves(run):
    calibration = calibrate(run, 7)
    found = run_confidence(run, kept_predictions(run, "test"), target_precision=0.9)
    leaves = leaves_of(run, "test")
    sure, right = [float(calibration(leaf.confidence)) for leaf in leaves], [leaf.right for leaf in leaves]
    assert list(found.groups) == [ALL, "menu.nm", "menu.price", "note", "total", NO_TARGET]
    group = found.groups[ALL]
    assert group[:4] == pytest.approx(
        (len(leaves), sum(right) / len(right), sum(sure) / len(sure), calibration_error(sure, right))
    )
    assert group[5:] == pytest.approx(kept(sure, right, found.threshold))
    assert group.precision > 0.85 and 0.1 < group.kept < 1
    assert found.groups[NO_TARGET][:2] == (20, 0)
    assert f"{group.kept:.1%} of the fields are kept" in confidence_table(found)
    assert "kept" not in confidence_table(run_confidence(run, kept_predictions(run, "test")))
    printed = json.loads(run_report(run, "test", METRICS, 0.9, as_json=True))
    assert printed["confidence"]["fields"][ALL]["kept"] == group.kept


def test_a_precision_that_validation_cannot_promise(run):
    calibrate(run, 7)
    found = run_confidence(run, kept_predictions(run, "test"), target_precision=0.9999)
    assert found.groups[ALL].kept == 0 and found.groups[ALL].precision is None
    assert "validation has no threshold" in confidence_table(found)
    assert found.as_json()["threshold"] is None


def test_answers_without_confidence(run):
    rows = [json.loads(line) for line in run.predictions_file.read_text().splitlines()]
    run.predictions_file.unlink()
    append_lines(run.predictions_file, ({name: v for name, v in row.items() if name != "confidence"} for row in rows))
    assert calibrate(run, 7) is None and not run.calibration.exists()
    assert "no field has a confidence" in run_report(run, "test", METRICS)
    write_report(run, "test", lambda id: Image.new("RGB", (9, 9)))
    assert "kept by a version without it" in run.report.read_text("utf-8")


class Page(html.parser.HTMLParser):
    """The tags with their attributes, and the text of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.data += data


@pytest.fixture
def page(run) -> Page:
    calibrate(run, 7)
    write_report(run, "test", lambda id: Image.new("L", (900, 40 + len(id))), METRICS["before"])
    page = Page()
    page.feed(run.report.read_text("utf-8"))
    return page


def test_the_page_is_one_file_and_data_cannot_break_out(page, run):
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not [attrs for _, attrs in page.tags if attrs.keys() & {"src", "href"}]
    assert "http" not in run.report.read_text("utf-8").replace(page.data, "")


def test_examples_are_complete_and_marked_as_they_are_scored(page, run):
    examples = json.loads(page.data)
    rows = {row["id"]: row for row in map(json.loads, run.predictions_file.read_text().splitlines())}
    assert [e["f1"] for e in examples] == sorted(e["f1"] for e in examples)
    assert {e["id"] for e in examples} == {id for id, row in rows.items() if row["split"] == "test"}
    for example in examples:
        row, (right, predicted, wanted) = rows[example["id"]], example["right"]
        for side, count in (("target", wanted), ("prediction", predicted)):
            states = [state for *_, state, _ in example[side]]
            assert (states.count(OK), states.count(WRONG)) == (right, count - right)
        text = "".join(head + leaf for _, head, leaf, *_ in example["target"])
        assert json.loads(text) == row["target"]
        assert read(row["text"]).value is None or len(example["fields"]) >= (right < max(predicted, wanted))
        assert row["text"].lower() in example["search"]
    assert examples[0]["id"] == "cut" and examples[0]["errors"] == {"invalid_json": 1}
