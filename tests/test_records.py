"""The typed lines of a run's files: what is read is what was written."""

from __future__ import annotations

import dataclasses
import json

import pytest
from helpers import prediction

from im2json.errors import UserError
from im2json.files import append_lines, read_lines
from im2json.jsontext import load_json, read
from im2json.records import LogLine, Prediction, RunResult
from im2json.report.comparison import run_report
from im2json.runs import RunFolder


def test_lines_of_a_run_survive_their_records(finished):
    for row in read_lines(finished.predictions_file):
        assert json.dumps(Prediction.from_json(row).to_json()) == json.dumps(row)
    for row in read_lines(finished.metrics_file):
        assert json.dumps(LogLine.from_json(row).to_json()) == json.dumps(row)
    stored = json.loads(finished.result.read_text())
    result = finished.read_result()
    assert result is not None
    assert json.dumps(dataclasses.asdict(result)) == json.dumps(stored)
    assert result.kept_step == finished.kept_step == stored["best_step"]


def test_what_is_rare_in_a_line_is_kept_too():
    row = {
        "step": 3, "split": "test", "stage": "after", "constrained": True, "id": "a", "text": '{"a":"1"}',
        "parsed": {"a": "1"}, "confidence": {"a": 0.5}, "cut": True, "checks": {"a = b": None}, "target": {"a": "2"},
        "scores": {"field_f1": 0.0},
    }  # fmt: skip
    found = Prediction.from_json(row)
    assert json.dumps(found.to_json()) == json.dumps(row)
    assert found.constrained and found.cut and found.has_confidence
    assert found.document == found.reading.value == {"a": "1"}
    unreadable = prediction({"text": "no", "target": {}, "confidence": None})
    assert unreadable.has_confidence and unreadable.document == {} and unreadable.to_json()["parsed"] is None
    assert not prediction({"text": "no", "target": {}}).has_confidence  # as older runs left it
    repaired = prediction({"text": "say {'a': 1}", "target": {}})
    assert repaired.document == {"a": 1} and repaired.to_json()["parsed"] is None


def test_a_run_hands_out_the_lines_that_are_wanted(tmp_path):
    run = RunFolder(tmp_path)
    places = [(1, "validation", "during"), (2, "validation", "during"), (0, "test", "before"), (2, "test", "after")]
    append_lines(
        run.predictions_file,
        (
            {"step": step, "split": split, "stage": stage, "id": str(i), "text": "{}", "target": {}}
            for i, (step, split, stage) in enumerate(places)
        ),
    )
    append_lines(
        run.metrics_file, ({"step": s, "split": p, "stage": t, "values": {}, "time": 1.0} for s, p, t in places)
    )

    def ids(*wanted: object) -> str:
        return "".join(each.id for each in run.predictions(*wanted))

    assert (ids(), ids("validation"), ids("test", "after"), ids(None, None, 2)) == ("0123", "01", "3", "13")
    assert ids("validation", "during", 1) == "0" and ids("train") == ""
    assert [line.step for line in run.log("validation")] == [1, 2]
    assert [line.step for line in run.log("test", "before")] == [0]
    assert list(RunFolder(tmp_path / "nothing").predictions()) == []
    assert run.read_result() is None and run.kept_step == 0


def test_a_line_that_is_wrong_is_named(tmp_path):
    run = RunFolder(tmp_path)
    run.predictions_file.write_text('{"step": 1, "split": "test", "stage": "after", "id": "a", "target": {}}\n')
    with pytest.raises(UserError, match=r"predictions\.jsonl:1: is not a line that a run writes"):
        list(run.predictions())
    run.metrics_file.write_text('{"step": 1, "split": "train", "values": {}}\n[1]\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is not a line"):
        list(run.log("train"))
    run.metrics_file.write_text('{"step": 1}\n{"step": \n{"cut short')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is not JSON: Expecting value at"):
        list(read_lines(run.metrics_file))
    run.result.write_text("[]")
    with pytest.raises(UserError, match=r"result\.json is not what a finished run writes"):
        run.read_result()
    with pytest.raises(UserError, match="is not what a finished run writes"):
        RunResult.from_json({"step": 1}, "result.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1,}', "file: is not JSON: .* at column 9, near"),
        (b'{"a":\n [1 2]}', "file: is not JSON: Expecting ',' delimiter at line 2, column 5, near"),
        (b'{"caf\xe9": 1}', r"file: is not UTF-8 text \(byte 5\)"),
        (b'{"a": 1, "b": 2, "a": 3}', "file: the key 'a' stands twice in one object"),
        (b"[" * 100_000, "file: is not JSON that can be read: it nests too deep"),
        (b"9" * 5_000, "file: is not JSON that can be read: Exceeds the limit"),
    ],
    ids=["comma", "line", "latin-1", "key", "depth", "digits"],
)
def test_a_json_error_names_line_and_column(text, says):
    with pytest.raises(UserError, match=says):
        load_json(text, "file")


def test_json_is_read_with_a_byte_order_mark():
    assert load_json(b'\xef\xbb\xbf{"a": 1.0}', "file") == load_json('{"a": 1.0}', "file") == {"a": 1.0}


def test_a_report_reads_each_answer_once(finished, monkeypatch):
    """However many tables are made of it."""
    texts: list[str] = []
    monkeypatch.setattr("im2json.records.read", lambda text: texts.append(text) or read(text))
    metrics = {"before": {"field_f1": 0.0}, "after": {"field_f1": 0.0}}
    run_report(finished, "test", metrics)
    assert texts == [row["text"] for row in read_lines(finished.predictions_file) if row["stage"] == "after"]
