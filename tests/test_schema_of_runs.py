"""schema.json in a run folder, --constrain and --schema in train.py and evaluate.py."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from helpers import clear_error, metrics

from im2json.data.sources import load_splits
from im2json.files import read_lines
from im2json.runs import RunFolder
from im2json.scoring.schema import induce

TEST = ("test", "before"), ("test", "after")
ONLY_TOTAL = {"type": "object", "properties": {"total": {"enum": ["1", "2"]}}, "required": ["total"]}


def copied(run: RunFolder, folder: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(run.path, folder)))


def answers(run: RunFolder, *places: tuple[str, str]) -> list[dict[str, Any]]:
    return [row for row in read_lines(run.predictions_file) if (row["split"], row["stage"]) in places]


@pytest.fixture(scope="module")
def constrained(train, tmp_path_factory) -> RunFolder:
    """A run of two steps that evaluates after each; only to be read."""
    folder = tmp_path_factory.mktemp("runs") / "constrained"
    return train(folder, "--constrain", "--steps", 2, "--eval-every", 1, "--max-new-tokens", 20)


def test_the_schema_of_the_training_targets_lies_in_the_folder(finished, dataset):
    schema = json.loads(finished.schema.read_text("utf-8"))
    assert schema == induce(load_splits(dataset)["train"].targets)
    assert schema["properties"]["menu"]["items"]["required"] == ["nm"]


def test_every_answer_of_a_constrained_run_is_valid(constrained, finished):
    rows = list(read_lines(constrained.predictions_file))
    assert {row["stage"] for row in rows} == {"before", "during", "after"}
    schema = json.loads(constrained.schema.read_text("utf-8"))
    for row in rows:
        jsonschema.validate(row["parsed"], schema)
        assert row.get("cut", True) is True
    assert any(row.get("cut") for row in rows)
    values = [row["values"] for row in metrics(constrained) if row["split"] != "train"]
    assert [value["json_validity"] for value in values] == [1.0] * 4
    assert not any("cut" in row for row in read_lines(finished.predictions_file))


def test_constraining_changes_no_weight(constrained, train, tmp_path):
    free = train(tmp_path / "free", "--steps", 2, "--eval-every", 1, "--max-new-tokens", 20)
    weights = [run.checkpoints / "step-2" / "adapter_model.safetensors" for run in (free, constrained)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_evaluate_goes_by_the_edited_schema_or_by_another(finished, cli, tmp_path):
    run = copied(finished, tmp_path / "run")
    run.schema.write_text(json.dumps(ONLY_TOTAL), "utf-8")
    assert cli("evaluate", run.path, "--constrain").exit_code == 0
    assert {row["text"] for row in answers(run, *TEST)} <= {'{"total":"1"}', '{"total":"2"}'}
    assert all(row["constrained"] for row in answers(run, *TEST, ("validation", "after")))
    other = tmp_path / "other.json"
    other.write_text('{"type": "object"}')
    assert cli("evaluate", run.path, "--constrain", "--schema", other).exit_code == 0
    assert {row["text"] for row in answers(run, *TEST)} == {"{}"}
    assert json.loads(run.schema.read_text("utf-8")) == ONLY_TOTAL
    run.schema.unlink()  # as in a run from before there was one
    assert cli("evaluate", run.path, "--constrain").exit_code == 0
    for row in answers(run, *TEST):
        jsonschema.validate(row["parsed"], json.loads(finished.schema.read_text("utf-8")))


def test_a_schema_in_the_middle_of_being_edited_stops_only_what_needs_it(finished, cli, tmp_path):
    run = copied(finished, tmp_path / "run")
    run.schema.write_text('{"type": ')
    assert f"schema {run.schema}: is not JSON" in clear_error(cli("evaluate", run.path, "--constrain"))
    assert cli("evaluate", run.path).exit_code == 0
    assert not any("constrained" in row for row in answers(run, *TEST))


def test_a_run_keeps_the_schema_that_it_was_given_or_that_was_edited(train, resume, tmp_path):
    given = tmp_path / "given.json"
    given.write_text(json.dumps(ONLY_TOTAL), "utf-8")
    run = train(tmp_path / "run", "--schema", given, "--constrain", "--no-test", "--stop-after", 2)
    assert json.loads(run.schema.read_text("utf-8")) == ONLY_TOTAL
    given.unlink()
    run.schema.write_text('{"type": "object", "properties": {}}')
    resume(run)
    assert [row["text"][:3] for row in answers(run, ("validation", "during"))] == ['{"t'] * 4 + ["{}"] * 4
    assert json.loads(run.schema.read_text("utf-8")) == {"type": "object", "properties": {}}


def test_what_is_wrong_with_a_schema_is_said_in_a_line(cli, base_args, finished, tmp_path, monkeypatch):
    file = tmp_path / "mine.json"
    train = ("train", *base_args, "--output", tmp_path / "run", "--schema", file)
    assert f"schema {file} cannot be read: No such file" in clear_error(cli(*train))
    file.write_text('{"type": "object", "properties": {"a": {"type": "string", "oneOf": []}}}')
    assert clear_error(cli(*train)) == f"schema {file}: #/properties/a: oneOf is not supported here"
    file.write_text('{"type": "object", "properties": {"a": {"type": "string", "format": "no such"}}}')
    assert f"schema {file} cannot be decoded by: " in clear_error(cli(*train, "--constrain"))
    assert not (tmp_path / "run").exists()
    assert "--schema goes with --constrain" in clear_error(cli("evaluate", finished.path, "--schema", file))
    assert "--schema was None" in clear_error(cli("train", "--resume", finished.path, "--schema", file))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert "pip install -e '.[constrain]'" in clear_error(cli("evaluate", finished.path, "--constrain"))
