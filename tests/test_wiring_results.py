"""Which adapter, split, prompt and step each figure of a run comes from, and what reads as the run did."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import slow, write_dataset
from run_files import (
    checkpoints,
    last_weights,
    logged,
    one_field,
    predictions,
    read_json,
    read_rows,
    result,
    scores,
    texts,
    weights,
)

pytest_plugins = ["wiring_runs"]

# --- the figures of result.json


def test_the_adapter_that_is_kept_is_the_best_and_not_the_last(best_first):
    assert (result(best_first)["best_step"], result(best_first)["step"]) == (1, 3)
    assert checkpoints(best_first) == [1, 2, 3]
    assert weights(best_first / "adapter") == weights(best_first / "checkpoints" / "step-1")
    assert weights(best_first / "adapter") != last_weights(best_first)


def test_the_test_split_is_scored_with_the_best_adapter_after_training(best_first, read_split):
    rows = predictions(best_first, "test", "after")
    assert {row["step"] for row in rows} == {1}
    assert texts(rows) == read_split(best_first / "checkpoints" / "step-1", "test")
    assert texts(rows) != read_split(best_first / "checkpoints" / "step-3", "test")
    assert result(best_first)["test"]["after"] == scores(rows)


def test_the_test_split_is_scored_with_the_base_alone_before_training(best_first, base_alone, read_split):
    rows = predictions(best_first, "test", "before")
    assert {row["step"] for row in rows} == {0}
    assert texts(rows) == read_split(base_alone, "test")
    assert texts(rows) != texts(predictions(best_first, "test", "after"))
    assert result(best_first)["test"]["before"] == scores(rows)


def test_the_validation_of_the_result_is_that_of_the_best_step(best_first):
    first, last = (predictions(best_first, "validation", "during", step) for step in (1, 3))
    assert result(best_first)["validation"] == scores(first)
    assert result(best_first)["validation"] != scores(last)


def test_validation_reads_with_the_adapter_of_its_step(best_first, read_split):
    first, last = (texts(predictions(best_first, "validation", "during", step)) for step in (1, 3))
    assert last == read_split(best_first / "checkpoints" / "step-3", "validation") != first


def test_confidence_is_calibrated_on_the_validation_of_the_best_step(best_first):
    fitted = read_json(best_first / "calibration.json")["fitted_on"]
    assert (fitted["split"], fitted["step"], fitted["examples"]) == ("validation", 1, 4)


def test_the_counts_are_those_of_the_examples_seen(best_first, dataset):
    """Three steps of 4, 4 and 2 examples are the whole split; the small model reads a token a byte, and EOS."""
    rows = read_rows(Path(dataset, "train", "metadata.jsonl"))
    targets = [json.loads(row["ground_truth"])["gt_parse"] for row in rows]
    tokens = sum(len(json.dumps(target, separators=(",", ":"))) + 1 for target in targets)
    assert (result(best_first)["examples"], result(best_first)["target_tokens"]) == (10, tokens)


@pytest.mark.slow
def test_the_best_step_is_the_first_with_the_best_value_of_the_metric(make_run, tmp_path):
    """Where lower is better, too; and that is neither the first nor the last step here."""
    run = make_run(tmp_path / "run", "--lr", 0.03, "--steps", 4, "--metric", "edit_distance", "--no-test")
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["split"] == "validation"]
    values = {row["step"]: row["values"]["edit_distance"] for row in rows}
    assert result(run)["best_step"] == min(values, key=values.__getitem__) == 2
    assert values[1] > values[2]


# --- what is drawn at random


@pytest.fixture(scope="module")
def grad_norms(train, tmp_path_factory) -> Callable[..., list[float]]:
    """`grad_norms(run, *flags)` is what the gradients of 3 steps measure.

    All steps have the same example, and none changes a weight noticeably. So the norms are alike but for dropout.
    """
    dataset = write_dataset(tmp_path_factory.mktemp("one") / "dataset", train=1)
    base = ("--dataset", dataset, "--lr", 1e-12, "--steps", 3, "--eval-every", 0, "--no-test")

    def norms(run: Path, *flags: object) -> list[float]:
        return logged(train(run, *base, *flags).path, "grad_norm")

    return norms


def alike(one: float, other: float) -> bool:
    return one == pytest.approx(other, rel=1e-3)


def test_the_seed_draws_the_first_values_of_lora(grad_norms, tmp_path):
    first, second = (grad_norms(tmp_path / str(seed), "--dropout", 0, "--seed", seed) for seed in (0, 1))
    assert all(alike(norm, first[0]) for norm in first)
    assert all(alike(norm, second[0]) for norm in second)
    assert not alike(first[0], second[0])


def test_dropout_differs_from_step_to_step_and_from_seed_to_seed(grad_norms, tmp_path):
    norms = grad_norms(tmp_path / "run", "--dropout", 0.5)
    assert not any(alike(one, other) for one, other in itertools.combinations(norms, 2))
    # on from that adapter, which has hardly changed, nothing but dropout depends on the seed
    others = grad_norms(tmp_path / "other", "--adapter", tmp_path / "run", "--dropout", 0.5, "--seed", 1)
    assert not any(alike(one, other) for one, other in itertools.product(norms, others))


# --- reading with a trained adapter


@pytest.fixture
def extract(cli, best_first, dataset):
    """`extract(flags)` is what the command answers for the test split."""

    def run(*flags: object, source: Path = best_first) -> list[dict[str, Any]]:
        done = cli("im2json.__main__", "extract", source, *(f"{dataset}/test/{i}.png" for i in range(3)), *flags)
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture
def known(best_first) -> list[str]:
    """What the best adapter answered for the test split."""
    return texts(predictions(best_first, "test", "after"))


def test_extract_reads_as_the_run_did(extract, known):
    assert texts(extract()) == known


def test_an_adapter_alone_is_read_as_in_its_run(extract, best_first, known, digits, tmp_path):
    """What a folder with nothing but the adapter does not know is whether answers were held to a schema."""
    adapter = shutil.copytree(best_first / "adapter", tmp_path / "adapter")
    assert texts(extract("--constrain", "--schema", digits, source=adapter)) == known


@pytest.mark.parametrize(
    "flags",
    [
        ("--prompt", "extract JSON."),
        ("--no-letterbox",),
        *slow(
            (("--max-new-tokens", 4),),
            (("--no-constrain",),),
            (("--schema", "{letters}"),),
            (("--model", "{other_model}"),),
            (("--quant", "nf4"),),
        ),
    ],
    ids=lambda flags: flags[0],
)
def test_extract_reads_otherwise_where_an_option_says_so(extract, known, small_model, tmp_path, flags):
    letters = tmp_path / "letters.json"
    letters.write_text(json.dumps(one_field(["aa", "b", "cccc"])))
    values = {"letters": letters, "other_model": small_model}
    assert texts(extract(*(str(flag).format(**values) for flag in flags))) != known


@pytest.mark.slow
@pytest.mark.usefixtures("own_threads")
@pytest.mark.parametrize(
    "flags",
    [("--eval-batch-size", 1), ("--threads", 2), ("--check-sum", "total=total")],
    ids=lambda flags: flags[0],
)
def test_extract_reads_the_same_whatever_these_options_say(extract, known, flags):
    rows = extract(*flags)
    assert texts(rows) == known
    assert "--threads" not in flags or torch.get_num_threads() == 2
    assert [row.get("checks") for row in rows] == [{"total=total": True} if "--check-sum" in flags else None] * 3


# --- evaluate.py


@pytest.fixture
def evaluate(cli, best_first, tmp_path):
    """`evaluate(flags)` is what evaluate.py finds on a copy of the run, with the copy."""

    def run(*flags: object) -> tuple[dict[str, Any], Path]:
        copy = Path(shutil.copytree(best_first, tmp_path / "copy"))
        done = cli("evaluate", copy, "--json", *flags)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout), copy

    return run


def test_evaluate_finds_what_the_run_did(evaluate, best_first):
    found, copy = evaluate()
    assert {stage: found[stage] for stage in ("before", "after")} == result(best_first)["test"]
    for stage in ("before", "after"):
        assert predictions(copy, "test", stage) == predictions(best_first, "test", stage)


@pytest.mark.slow
def test_evaluate_scores_the_split_that_is_wanted(evaluate, best_first, base_alone, read_split):
    found, copy = evaluate("--split", "validation")
    assert found["after"] == pytest.approx(result(best_first)["validation"])
    assert texts(predictions(copy, "validation", "before")) == read_split(base_alone, "validation")
    assert texts(predictions(copy, "validation", "after", step=1)) == read_split(best_first / "adapter", "validation")


@pytest.mark.slow
def test_evaluate_validates_anew_where_answers_are_no_longer_held_to_the_schema(
    evaluate, best_first, base_alone, read_split
):
    """Confidence is calibrated by answers that were made in the same way."""
    _, copy = evaluate("--no-constrain")
    for split, stage, adapter in (
        ("test", "before", base_alone),
        ("test", "after", best_first / "adapter"),
        ("validation", "after", best_first / "adapter"),
    ):
        rows = predictions(copy, split, stage)
        assert texts(rows) == read_split(adapter, split, constrain=False)
        assert {row["step"] for row in rows} == {0 if stage == "before" else 1}


@pytest.mark.slow
def test_evaluate_holds_answers_to_another_schema(evaluate, tmp_path):
    letters = tmp_path / "letters.json"
    letters.write_text(json.dumps(one_field(["aa", "b", "cccc"])))
    _, copy = evaluate("--schema", letters)
    values = {row["parsed"]["total"] for stage in ("before", "after") for row in predictions(copy, "test", stage)}
    assert values <= {"aa", "b", "cccc"}


@pytest.mark.slow
@pytest.mark.usefixtures("own_threads")
@pytest.mark.parametrize(
    "flags",
    [("--eval-batch-size", 1), ("--threads", 2), ("--precision", "fp32"), ("--check-sum", "total=total")],
    ids=lambda flags: flags[0],
)
def test_evaluate_finds_the_same_whatever_these_options_say(evaluate, best_first, flags):
    found, copy = evaluate(*flags)
    assert {stage: found[stage] for stage in ("before", "after")} == result(best_first)["test"]
    assert "--threads" not in flags or torch.get_num_threads() == 2
    assert all(("checks" in row) == ("--check-sum" in flags) for row in predictions(copy, "test", "after"))


# --- taking a run elsewhere


@pytest.mark.slow
def test_the_exported_model_is_the_best_one(make_run, cli, tmp_path):
    """The command compares its answers with those that the run gave at its best step."""
    run = make_run(tmp_path / "run", "--no-constrain", "--precision", "bf16")
    assert result(run)["best_step"] == 1
    done = cli("im2json.__main__", "export", run, "--out", tmp_path / "model")
    assert done.exit_code == 0, done.output
    assert "4 of 4 answers are the run's to the letter" in done.stdout
    assert read_json(tmp_path / "model" / "im2json.json") == {
        "prompt": "read.", "letterbox": True, "trim": "off", "image_tokens": None, "prefix_mask": "full",
    }  # fmt: skip
    assert read_json(tmp_path / "model" / "generation_config.json")["max_new_tokens"] == 16


@pytest.mark.slow
def test_the_exported_adapter_is_the_best_one(best_first, cli, tmp_path):
    done = cli("im2json.__main__", "export", best_first, "--out", tmp_path / "adapter", "--adapter-only")
    assert done.exit_code == 0, done.output
    assert weights(tmp_path / "adapter") == weights(best_first / "checkpoints" / "step-1")
    for name in ("calibration.json", "schema.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (best_first / name).read_bytes()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"| {result(best_first)['test']['after']['edit_distance']:.3f} |" in card


@pytest.mark.slow
def test_a_sweep_scores_the_test_split_of_its_winner_alone(cli, lively_model, dataset, digits, tmp_path):
    options = {"model": lively_model, "dataset": dataset, "precision": "fp32", "quant": "none"}
    options |= {"r": 4, "optimizer": "adamw", "lr": 0.03, "constrain": True, "schema": str(digits)}
    options |= {"batch_size": 4, "steps": 2, "eval_every": 1, "max_new_tokens": 16, "metric": "edit_distance"}
    (tmp_path / "grid.json").write_text(json.dumps({"base": options, "ablate": {"lr": [0.1]}}))
    sweep = ("sweep", tmp_path / "grid.json", "--output", tmp_path / "sweep")
    for line in cli(*sweep, "--list").stdout.splitlines():  # in this process, which is faster
        command = shlex.split(line)
        assert cli("im2json.__main__", *command[command.index("im2json") + 1 :]).exit_code == 0
    done = cli(*sweep)
    assert done.exit_code == 0, done.output
    runs = {path.name: path for path in (tmp_path / "sweep" / "points").iterdir() if path.is_dir()}
    values = {name: result(path)["validation"]["edit_distance"] for name, path in runs.items()}
    winner, loser = sorted(values, key=values.__getitem__)
    assert values[winner] < values[loser]
    test = read_json(tmp_path / "sweep" / "summary.json")["test"]
    assert test["point"] == winner
    assert test["before"] != test["after"]
    for stage, step in (("before", 0), ("after", result(runs[winner])["best_step"])):
        assert test[stage] == scores(predictions(runs[winner], "test", stage, step))
        assert predictions(runs[loser], "test", stage) == []
