"""What --adapter and --resume change in a run, and what they leave as it would have been."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from run_files import (
    checkpoints,
    different,
    figures,
    last_weights,
    predictions,
    read_json,
    read_rows,
    result,
    scores,
    texts,
    weights,
)

pytest_plugins = ["wiring_runs"]

# --- going on from another run's adapter


WARM = ("--lr", 0.05, "--steps", 2, "--eval-every", 1, "--keep", 9, "--constrain", "--max-new-tokens", 16)


@pytest.fixture(scope="module")
def warm(make_run, best_first, tmp_path_factory) -> Path:
    """A run that begins with the adapter of `best_first`."""
    return make_run(tmp_path_factory.mktemp("runs") / "warm", "--adapter", best_first, like=WARM)


def test_a_run_with_an_adapter_begins_with_the_best_of_the_other_run(warm, best_first):
    assert checkpoints(warm) == [0, 1, 2]
    assert weights(warm / "checkpoints" / "step-0") == weights(best_first / "adapter")
    assert weights(warm / "checkpoints" / "step-0") != last_weights(best_first)


def test_a_run_with_an_adapter_takes_over_its_lora_prompt_and_letterbox(warm, best_first):
    ours, theirs = figures(warm), figures(best_first)
    assert (ours["lora"], ours["reading"]) == (theirs["lora"], theirs["reading"])


def test_before_is_the_base_alone_with_an_adapter_too(warm, best_first):
    rows = predictions(warm, "test", "before")
    assert texts(rows) == texts(predictions(best_first, "test", "before"))
    assert texts(rows) != texts(predictions(best_first, "test", "after"))
    assert result(warm)["test"]["before"] == scores(rows)


def test_after_is_the_best_of_the_run_and_not_the_adapter_it_began_with(warm, best_first, read_split):
    rows = predictions(warm, "test", "after")
    assert {row["step"] for row in rows} == {result(warm)["best_step"]}
    assert texts(rows) == read_split(warm / "adapter", "test") != texts(predictions(best_first, "test", "after"))
    step = result(warm)["best_step"]
    assert (
        weights(warm / "adapter") == weights(warm / "checkpoints" / f"step-{step}") != weights(best_first / "adapter")
    )


@pytest.mark.slow
def test_the_options_of_a_run_with_an_adapter_say_how_the_adapter_was_made(make_run, tmp_path):
    other = make_run(tmp_path / "other", "--alpha", 32, "--target-modules", "q_proj", "--steps", 1, "--no-test")
    run = make_run(tmp_path / "run", "--adapter", other, "--no-test", like=WARM)
    options = read_json(run / "config.json")["options"]
    assert (options["r"], options["alpha"], options["target_modules"]) == (4, 32.0, "q_proj")
    assert figures(run)["lora"] == figures(other)["lora"]


@pytest.mark.slow
def test_a_prompt_that_is_given_wins_over_the_adapters(make_run, best_first, tmp_path):
    run = make_run(tmp_path / "run", "--adapter", best_first, "--prompt", "else", "--no-letterbox", like=WARM)
    reading = read_json(run / "adapter" / "im2json.json")
    assert (reading["prompt"], reading["letterbox"]) == ("else", False)


# --- going on with a stopped run


@pytest.fixture
def resume(cli) -> Callable[..., Path]:
    """`resume(run, *flags)` goes on with the run in a folder."""

    def run(path: Path, *flags: object) -> Path:
        assert not (path / "result.json").exists()
        done = cli("train", "--resume", path, *flags)
        assert done.exit_code == 0, done.output
        return path

    return run


def test_a_run_stopped_after_its_best_step_ends_as_the_one_that_was_not(make_run, resume, best_first, tmp_path):
    run = resume(make_run(tmp_path / "run", "--stop-after", 2))
    assert different(figures(run), figures(best_first)) == set()


def test_before_is_the_base_alone_where_a_resumed_run_with_an_adapter_scores_it(
    make_run, resume, best_first, warm, tmp_path
):
    """It was to leave the test split alone at first, and the adapter that it began with is gone by now."""
    other = shutil.copytree(best_first, tmp_path / "other")
    run = make_run(tmp_path / "run", "--adapter", other, "--no-test", "--stop-after", 1, like=WARM)
    shutil.rmtree(other)
    resume(run, "--test")
    ours, theirs = figures(run), figures(warm)
    assert different(ours, theirs) == {"steps"}  # the test split is logged later, and that is all
    assert sorted(map(str, ours["steps"])) == sorted(map(str, theirs["steps"]))


@pytest.mark.slow
def test_options_that_change_no_result_may_change_on_the_way(make_run, resume, best_first, tmp_path):
    run = make_run(tmp_path / "run", "--stop-after", 1)
    resume(
        run,
        *("--eval-batch-size", 1, "--save-every", 3, "--keep", 1, "--check-sum", "total=total", "--workers", 1),
        *("--gradient-checkpointing", "on", "--cache-features", 0, "--launch", "single", "--dequantize", "off"),
    )
    assert different(figures(run), figures(best_first)) == {"checkpoints", "columns"}
    assert [{"checks" in row for row in read_rows(run / "predictions.jsonl") if row["step"] == n} for n in (0, 3)] == [
        {False},
        {True},
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (("--eval-every", 2), [("during", 1), ("during", 2), ("during", 4), ("after", 1)]),
        (("--patience", 1), [("during", 1), ("during", 2), ("after", 1)]),
        (("--steps", 3), [("during", 1), ("during", 2), ("during", 3), ("after", 1)]),
        (("--no-test",), [("during", 1), ("during", 2), ("during", 3), ("during", 4)]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_options_that_change_the_result_hold_from_there_on(make_run, resume, tmp_path, flags, steps):
    run = resume(make_run(tmp_path / "run", "--steps", 4, "--stop-after", 1), *flags)
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["split"] != "train"]
    assert [(row["stage"], row["step"]) for row in rows] == [("before", 0), *steps]
    assert (result(run)["test"] is None) == ("--no-test" in flags)


@pytest.mark.slow
def test_answers_are_held_to_the_schema_until_a_resume_says_otherwise(make_run, resume, tmp_path):
    run = resume(make_run(tmp_path / "run", "--stop-after", 1), "--no-constrain")
    held = {(row["stage"], row["step"], "constrained" in row) for row in read_rows(run / "predictions.jsonl")}
    assert held == {
        ("before", 0, True),
        *(
            (stage, step, step < 2 and stage != "after")
            for stage, step in (("during", 1), ("during", 2), ("during", 3), ("after", result(run)["best_step"]))
        ),
    }
