"""im2json from Python: train, evaluate and sweep as functions, in one process after another call."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from helpers import reset_accelerate
from PIL import Image
from run_files import one_field

import im2json
from im2json.files import write_json


@pytest.fixture
def options(small_model, dataset):
    yield {
        "model": small_model, "dataset": Path(dataset), "precision": "fp32", "quant": "none", "optimizer": "adamw",
        "r": 4, "dropout": 0, "lr": 0.01, "batch_size": 4, "steps": 2, "eval_every": 1, "max_new_tokens": 6,
        "metric": "edit_distance", "threads": 1,
    }  # fmt: skip
    reset_accelerate()


def test_a_run_comes_back_with_its_metrics_and_predictions_and_reads_pictures(options, dataset, tmp_path):
    run = im2json.train(**options, output=tmp_path / "run")
    assert isinstance(run, im2json.Run)
    assert run.done
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert run.metrics == {"validation": stored["validation"], "test": stored["test"]}
    assert len(run.predictions("test", "after")) == stored["test"]["after"]["num"] == 3
    assert [line.step for line in run.log if line.split == "train"] == [1, 2]

    picture = Path(dataset) / "test" / "0.png"
    (answered,) = [each.text for each in run.predictions("test", "after") if each.id.endswith("0.png")]
    (from_file,), (from_memory,) = run.extractor()([picture]), run.extractor()([Image.open(picture)])
    assert from_file["text"] == from_memory["text"] == answered

    again = im2json.evaluate(run, split="validation")
    assert again == run and again.done
    assert list(again.metrics) == ["validation"] and list(again.metrics["validation"]) == ["before", "after"]
    assert again.metrics["validation"]["after"] == run.metrics["validation"]
    assert im2json.evaluate(again).metrics == {"test": run.metrics["test"]}
    assert {each.split for each in again.predictions(stage="before")} == {"validation", "test"}


def test_a_run_is_evaluated_by_the_schema_in_its_folder_unless_another_is_given(options, tmp_path):
    options |= {"steps": 1, "max_new_tokens": 20, "constrain": True}
    run = im2json.train(**options, output=tmp_path / "run", test=False)
    write_json(run.path / "schema.json", one_field(["1", "22"]))
    write_json(tmp_path / "letters.json", one_field(["a", "bb"]))
    for given, values in (({}, {"1", "22"}), ({"schema": tmp_path / "letters.json"}, {"a", "bb"})):
        im2json.evaluate(run, **given)
        answers = run.predictions("test", "after")
        assert len(answers) == 3 and {answer.document["total"] for answer in answers} <= values


def test_a_second_call_in_the_process_may_have_another_precision(options, tmp_path):
    im2json.train(**options, output=tmp_path / "one", test=False)
    second = im2json.train(**options | {"precision": "bf16"}, output=tmp_path / "two", test=False)
    assert second.done and "test" not in second.metrics


def test_an_interrupted_call_saves_a_checkpoint_and_can_be_continued(options, tmp_path, monkeypatch):
    from im2json.training import loop

    def interrupt(*values):
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "report", interrupt)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            im2json.train(**options, output=tmp_path / "run", test=False)
    stopped = im2json.Run(tmp_path / "run")
    assert not stopped.done and stopped.metrics == {}
    assert (stopped.path / "checkpoints" / "step-1").is_dir()
    assert im2json.train(resume=stopped).done


def test_a_mistake_is_the_line_that_the_command_prints(options, tmp_path):
    with pytest.raises(im2json.UserError, match="did you mean 'dropout'"):
        im2json.train(**options, drop_out=0.1)
    with pytest.raises(im2json.UserError, match="nowhere: there is no such run folder"):
        im2json.evaluate(tmp_path / "nowhere")
    with pytest.raises(im2json.UserError, match="stop_after: 0 is not a step"):
        im2json.train(**options, stop_after=0)
    with pytest.raises(im2json.UserError, match=r"nowhere: there is no such run folder"):
        im2json.Run(str(tmp_path / "nowhere"))
    with pytest.raises(im2json.UserError, match=r"grid\.json: there is no such file"):
        im2json.sweep(tmp_path / "grid.json")
    with pytest.raises(im2json.UserError, match="halve: 'f1' is no metric"):
        im2json.sweep({"grid": {"r": [4]}}, output=tmp_path / "sweep", halve="f1")
    with pytest.raises(im2json.UserError, match="jobs: 0 is too few"):
        im2json.sweep({"grid": {"r": [4]}}, output=tmp_path / "sweep", jobs=0)
    with pytest.raises(im2json.UserError, match="jobz: a sweep has the options"):
        im2json.sweep({"grid": {"r": [4]}}, output=tmp_path / "sweep", jobz=2)
    with pytest.raises(im2json.UserError, match="output: a grid that is not a file"):
        im2json.sweep({"grid": {"r": [4]}})
    with pytest.raises(im2json.UserError, match="unknown key 'base_'"):
        im2json.sweep({"base_": {}}, output=tmp_path / "sweep")
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_settles_is_refused(finished):
    with pytest.raises(im2json.UserError, match="split: 'val' is not one of train, validation, test"):
        im2json.evaluate(finished.path, split="val")
    with pytest.raises(im2json.UserError, match="lr: leave it out"):
        im2json.evaluate(finished.path, lr=3)
    with pytest.raises(im2json.UserError, match="lr: leave it out"):
        im2json.Run(finished.path).extractor(lr=3)
    before = sorted(finished.path.iterdir())
    with pytest.raises(im2json.UserError, match="is the folder of a run: choose another for the sweep"):
        im2json.sweep({"grid": {"r": [4]}}, output=finished.path)
    assert sorted(finished.path.iterdir()) == before


@pytest.mark.slow
def test_a_sweep_comes_back_with_its_leaderboard_and_winner(options, tmp_path):
    base = {name: str(value) if name == "dataset" else value for name, value in options.items()}
    base.pop("r")
    grid = {"base": base, "grid": {"r": [2, 4]}}
    sweep = im2json.sweep(grid, output=tmp_path / "sweep")
    assert {row["config"] for row in sweep.leaderboard} == {"r=2", "r=4"}
    assert sweep.winner.done
    assert json.loads((tmp_path / "sweep" / "grid.json").read_text()) == grid
    assert im2json.sweep(tmp_path / "sweep" / "grid.json", output=tmp_path / "sweep").winner == sweep.winner
