"""train.py and evaluate.py from end to end: the files they leave, and one clear line for every mistake."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers import (
    COUNTS,
    MEASURED,
    ROOT,
    clear_error,
    metrics,
    prefix_inputs,
    reset_accelerate,
    slow,
    write_dataset,
)
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from transformers import PaliGemmaProcessor

from im2json.cli import resume_advice
from im2json.files import append_lines, read_lines
from im2json.jsontext import parse
from im2json.options import OPTIONS, TrainConfig, flag_name
from im2json.report.table import before_after_table
from im2json.runs import RunFolder, locked
from im2json.scoring import METRICS, StreamingEvaluator

VALUES = {*METRICS, "num"}


# --- a finished run


def test_config_json(finished, small_model, dataset):
    stored = json.loads(finished.config.read_text())
    assert stored["options"].keys() == OPTIONS.keys()
    assert (stored["options"]["model"], stored["options"]["dataset"]) == (small_model, dataset)
    assert (stored["options"]["r"], stored["options"]["alpha"]) == (4, 8.0)
    assert stored["versions"]["torch"] == importlib.metadata.version("torch")
    assert TrainConfig.from_values(stored["options"]) == finished.read_config()
    # what runs of earlier versions hold of the same data, or they could not be resumed
    assert stored["data"] == {"train": "f7460fcae25c24fc", "validation": "57001d815bd26315", "test": "899488f333345e84"}


def test_metrics_jsonl(finished):
    rows = list(read_lines(finished.metrics_file))
    places = [(row["split"], row.get("stage"), row["step"]) for row in rows]
    best = json.loads(finished.result.read_text())["best_step"]
    assert places == [
        ("test", "before", 0), ("train", None, 1), ("train", None, 2), ("validation", "during", 2),
        ("train", None, 3), ("train", None, 4), ("validation", "during", 4), ("test", "after", best),
    ]  # fmt: skip
    for row in rows:
        wanted = {"loss", "lr", "grad_norm", *MEASURED} if row["split"] == "train" else VALUES
        assert row["values"].keys() == wanted
    assert [row["values"]["num"] for row in rows if row["split"] != "train"] == [
        COUNTS["test"], COUNTS["validation"], COUNTS["validation"], COUNTS["test"],
    ]  # fmt: skip
    losses = [row["values"]["loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < losses[0]


def test_predictions_jsonl(finished, dataset):
    rows = list(read_lines(finished.predictions_file))
    best = json.loads(finished.result.read_text())["best_step"]
    expected = [
        ("before", 0, "test"), ("during", 2, "validation"), ("during", 4, "validation"), ("after", best, "test"),
    ]  # fmt: skip
    assert [(row["stage"], row["step"], row["split"], row["id"]) for row in rows] == [
        (stage, step, split, f"{split}/{i}.png") for stage, step, split in expected for i in range(COUNTS[split])
    ]
    for row in rows:
        assert set(row) == {"id", "step", "split", "stage", "text", "parsed", "confidence", "target", "scores"}
        assert row["parsed"] == parse(row["text"])
        assert row["scores"].keys() == METRICS.keys()
        line = (Path(dataset) / row["split"] / "metadata.jsonl").read_text().splitlines()[int(row["id"][-5])]
        assert row["target"] == json.loads(json.loads(line)["ground_truth"])["gt_parse"]
    # a metric that is a mean over examples is that of the rows
    logged = {(row.get("stage"), row["step"], row["split"]): row["values"] for row in read_lines(finished.metrics_file)}
    for place in expected:
        chosen = [row for row in rows if (row["stage"], row["step"], row["split"]) == place]
        for name in ("edit_distance", "json_validity", "ted_accuracy"):
            mean = sum(row["scores"][name] for row in chosen) / len(chosen)
            assert logged[place][name] == pytest.approx(mean)


def test_result_json(finished):
    result = json.loads(finished.result.read_text())
    assert result.keys() >= {
        "step", "best_step", "validation", "test", "trainable", "total", "seconds", "examples_per_second",
        "peak_memory_bytes",
    }  # fmt: skip
    rows = list(read_lines(finished.metrics_file))
    logged = {(row.get("stage"), row["step"]): row["values"] for row in rows}
    assert result["test"] == {"before": logged["before", 0], "after": logged["after", result["best_step"]]}
    assert result["validation"] == logged["during", result["best_step"]]
    assert result["step"] == 4
    assert (result["trainable"], result["total"]) == (8_192, 279_232 + 8_192)
    assert result["examples"] == 4 + 4 + 2 + 4
    assert result["examples_per_second"] == pytest.approx(result["examples"] / result["seconds"], rel=0.02)
    assert 10**7 < result["peak_memory_bytes"] < 10**11


def test_what_else_lies_in_a_run_folder(finished):
    names = {path.name for path in finished.path.iterdir() if not path.name.startswith(".")}
    assert names >= {"config.json", "metrics.jsonl", "predictions.jsonl", "checkpoints", "adapter", "tb", "result.json"}
    assert [path.name for path in sorted(finished.checkpoints.iterdir())] == ["step-2", "step-4"]
    asked = json.loads((finished.adapter / "im2json.json").read_text())
    assert asked == {
        "model_type": "paligemma", "prompt": "extract JSON.",
        "letterbox": False, "trim": "off", "image_tokens": None, "prefix_mask": "full", "quant": "none",
        "max_new_tokens": 6, "text": "<image>extract JSON.",
        "seen": "a picture of 28 x 28 pixels, squashed to that square",
    }  # fmt: skip
    processor = PaliGemmaProcessor.from_pretrained(finished.adapter)
    assert processor.tokenizer("é")["input_ids"]
    assert not list(finished.path.rglob("*.tmp*"))


# --- TensorBoard


@pytest.fixture(scope="module")
def events(finished) -> EventAccumulator:
    (file,) = finished.tensorboard.iterdir()
    assert file.name.startswith("events.out.tfevents.")
    accumulator = EventAccumulator(str(finished.tensorboard), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_shows_every_scalar(finished, events):
    best = json.loads(finished.result.read_text())["best_step"]
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in ("loss", "lr", "grad_norm", *MEASURED)} <= tags
    assert {f"{split}/{name}" for split in ("validation", "test") for name in METRICS} <= tags
    assert not any(tag.endswith("/num") for tag in tags)
    logged = [row for row in read_lines(finished.metrics_file) if row["split"] == "train"]
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(row["step"], pytest.approx(row["values"]["loss"], rel=1e-6)) for row in logged]
    assert [event.step for event in events.Scalars("validation/field_f1")] == [2, 4]
    assert [event.step for event in events.Scalars("test/field_f1")] == [0, best]


def test_tensorboard_is_one_run_with_its_hyperparameters(finished, events):
    """In the event file of the curves, and with metrics that were logged as scalars: else the HParams view is empty."""
    assert [path for path in finished.tensorboard.rglob("*") if path.is_dir()] == []
    content = events.summary_metadata
    plugin = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
        for tag, metadata in content.items() if metadata.plugin_data.plugin_name == "hparams"
    }  # fmt: skip
    assert set(plugin) == {
        "_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info",
    }  # fmt: skip
    named = {info.name.tag for info in plugin["_hparams_/experiment"].experiment.metric_infos}
    assert {f"validation_best/{name}" for name in METRICS} | {f"test/{name}" for name in METRICS} == named
    assert named <= set(events.Tags()["scalars"])
    values = plugin["_hparams_/session_start_info"].session_start_info.hparams
    given = finished.read_config().flat().items()
    assert set(values) == {name for name, value in given if value is not None and OPTIONS[name].affects_result}
    assert values["r"].number_value == 4
    assert values["dora"].bool_value is False
    assert values["precision"].string_value == "fp32"


def test_tensorboard_shows_pictures_config_and_lengths(finished, events):
    tags = events.Tags()
    assert set(tags["images"]) == {
        *(f"pictures/test_{stage}/{i}" for stage in ("before", "after") for i in range(3)),
        *(f"pictures/validation_during/{i}" for i in range(3)),
    }  # fmt: skip
    assert [event.step for event in events.Images("pictures/validation_during/0")] == [2, 4]
    assert "config/text_summary" in tags["tensors"]
    (config,) = events.Tensors("config/text_summary")
    assert b"target_modules: language" in config.tensor_proto.string_val[0]
    (lengths,) = events.Tensors("target_lengths/text_summary")
    assert b"longest 43" in lengths.tensor_proto.string_val[0]


# --- evaluate.py


def test_evaluate_repeats_the_runs_numbers(finished, cli, tmp_path):
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    result, rows = json.loads(run.result.read_text()), list(read_lines(run.predictions_file))
    printed = cli("evaluate", run.path, "--json")
    assert printed.exit_code == 0, printed.output
    found = json.loads(printed.stdout)
    assert found.pop("confidence")["fields"] == {}  # nothing it wrote is an object
    assert found == result["test"]
    again = list(read_lines(run.predictions_file))
    assert sorted(map(str, again)) == sorted(map(str, rows))
    with Image.open(run.path / "test.png") as picture:
        assert picture.size > (100, 50)
        assert len(picture.convert("RGB").getcolors(10**6)) > 10
    assert json.loads(run.result.read_text()) == result
    assert_same_files(run, finished, ("metrics.jsonl", "config.json"))


def assert_same_files(one: RunFolder, other: RunFolder, names: tuple[str, ...]) -> None:
    for name in names:
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes()


def test_evaluate_keeps_the_picture_of_its_own_split(train, cli, dataset, tmp_path, monkeypatch):
    """Where a run never validated its adapter, evaluate.py does that as well."""
    import im2json.inference.evaluate as evaluating

    run, panel, drawn = train(tmp_path / "run", "--eval-every", 0), evaluating.prediction_panel, []
    monkeypatch.setattr(evaluating, "prediction_panel", lambda *given: drawn.append(given) or panel(*given))
    assert cli("evaluate", run.path).exit_code == 0
    assert len(list(run.path.glob("*.png"))) == len(drawn) == 1
    rows = [row for row in read_lines(run.predictions_file) if row["id"] == "test/0.png"]
    written = {row["stage"]: row["text"] for row in rows}
    ((picture, target, *texts),) = drawn
    assert picture.tobytes() == Image.open(f"{dataset}/test/0.png").tobytes()
    assert (json.loads(target), texts) == (rows[0]["target"], [written["before"], written["after"]])


def test_evaluate_prints_a_table_and_takes_other_splits(finished, cli, tmp_path):
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    printed = cli("evaluate", run.path, "--split", "validation")
    assert printed.exit_code == 0, printed.output
    assert "validation split, generated text:" in printed.stdout
    header, _, *lines = printed.stdout.splitlines()[printed.stdout.splitlines().index(
        "validation split, generated text:") + 1:]  # fmt: skip
    assert header.split() == ["metric", "before", "after", "change"]
    assert [line.split()[0] for line in lines[: len(METRICS)]] == list(METRICS)
    assert (run.path / "validation.png").is_file()
    assert "validation split" in run.report.read_text("utf-8") and "test split" in finished.report.read_text("utf-8")
    result = json.loads(run.result.read_text())
    _, _, after, *_ = re.split(" {2,}", next(line for line in lines if line.startswith("edit_distance")))
    assert after == f"{result['validation']['edit_distance']:.3f}"
    stages = {(row["split"], row["stage"]) for row in read_lines(run.predictions_file)}
    assert stages == {(s, g) for s in ("test", "validation") for g in ("before", "after")} | {("validation", "during")}


def test_evaluate_makes_the_validation_answers_that_a_run_kept_without_confidence(finished, cli, tmp_path):
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    rows = list(read_lines(run.predictions_file))
    run.predictions_file.unlink()
    append_lines(run.predictions_file, ({name: row[name] for name in row if name != "confidence"} for row in rows))
    printed = cli("evaluate", run.path, "--target-precision", 0.9, "--check-sum", "menu.price = total", "--json")
    assert printed.exit_code == 0, printed.output
    counts = json.loads(printed.stdout)["checks"]["menu.price = total"]
    assert counts["cannot_say"] == COUNTS["test"] and counts["holds"] == counts["fails"] == 0
    again = list(read_lines(run.predictions_file))
    validated = [row for row in again if (row["split"], row["stage"]) == ("validation", "after")]
    assert len(validated) == COUNTS["validation"] and all("confidence" in row for row in validated)
    assert all(row["checks"] == {"menu.price = total": None} for row in validated)


def test_evaluate_names_options_of_confidence_that_are_wrong(finished, cli):
    result = cli("evaluate", finished.path, "--against", finished.path, "--target-precision", 0.9)
    assert result.exit_code == 2 and "--target-precision goes with a RUN alone" in result.stderr
    assert cli("evaluate", finished.path, "--target-precision", 1).exit_code == 2
    assert "--check-sum 'menu.price' is no equation" in clear_error(
        cli("evaluate", finished.path, "--check-sum", "menu.price")
    )


def test_evaluate_tells_the_adapter_from_the_base(finished, cli, tmp_path):
    """With weights that write something else, after differs and before does not."""
    from safetensors.torch import load_file, save_file

    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    weights = load_file(run.adapter / "adapter_model.safetensors")
    save_file({name: value * 30 for name, value in weights.items()}, run.adapter / "adapter_model.safetensors")
    assert cli("evaluate", run.path).exit_code == 0

    def texts(folder: RunFolder, stage: str) -> list[str]:
        return [r["text"] for r in read_lines(folder.predictions_file) if (r["split"], r["stage"]) == ("test", stage)]

    assert texts(run, "before") == texts(finished, "before")
    assert texts(run, "after") != texts(finished, "after")


def test_evaluate_takes_another_precision(finished, cli, tmp_path):
    """A run in fp16 on a GPU can be looked at on a CPU."""
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    stored = json.loads(run.config.read_text())
    stored["options"]["precision"] = "fp16"
    run.config.write_text(json.dumps(stored))
    assert "--precision fp16 needs a GPU" in clear_error(cli("evaluate", run.path))
    result = cli("evaluate", run.path, "--precision", "fp32", "--eval-batch-size", 1, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["after"]["num"] == COUNTS["test"]


def test_evaluate_needs_a_run(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "it has no config.json" in clear_error(cli("evaluate", tmp_path / "empty"))
    error = clear_error(cli("evaluate", tmp_path / "emtpy"))
    assert error == f"{tmp_path / 'emtpy'}: there is no such run folder (did you mean {tmp_path / 'empty'}?)"


def test_evaluate_needs_an_adapter(finished, cli, tmp_path):
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    (run.adapter / "adapter_model.safetensors").unlink()
    assert "holds no adapter" in clear_error(cli("evaluate", run.path))


# --- the same command twice, other ways to run


def test_the_same_command_works_twice_and_gives_the_same(cli, base_args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = cli("train", *base_args, "--no-test")
        assert result.exit_code == 0, result.output
    one, other = (RunFolder(path) for path in sorted((tmp_path / "runs").iterdir()))
    assert one.done and other.done
    assert metrics(one) == metrics(other)
    weights = "adapter/adapter_model.safetensors"
    assert_same_files(one, other, (weights,))


def opening(run: RunFolder) -> list[str]:
    """What a run of base_args prints before its first evaluation."""
    options = run.read_config()
    lengths = "targets of 38 tokens (median), 95 % at most 43, longest 43"
    return [
        f"reading the data set {options.data.dataset}",
        "too few rows for scores that say much about others: 4 in validation, 3 in test",
        *(f"{split:<12}{count:>5} {lengths}" for split, count in COUNTS.items()),
        f"loading the model {options.model.model} (weights in fp32, computation in fp32)",
        f"run folder: {run.path}   watch it: tensorboard --logdir {run.path.parent}",
    ]


def evaluated(run: RunFolder, stage: str, step: int) -> str:
    """The line of one evaluation."""
    (line,) = (line for line in run.log(stage=stage) if line.step == step)
    names = ("field_f1", "ted_accuracy", "json_validity", "exact_match", "edit_distance")
    values = "  ".join(f"{name} {line.values[name]:.3f}" for name in names)
    return f"step    {step}  {line.split} {stage:<7} {values}"


def closing(run: RunFolder, report: object) -> list[str]:
    return [
        "",
        f"look at the answers    {report}",
        f"look at the curves     tensorboard --logdir {run.path.parent}",
        f"read new pictures      im2json extract {run.path} PICTURES",
    ]


def test_a_run_prints_these_lines_and_no_others(cli, base_args, tmp_path):
    run = RunFolder(tmp_path / "run")
    first = cli("train", *base_args, "--output", run.path, "--stop-after", 2)
    assert "training: 2/4 [" in first.stderr  # which a sweep reads
    second = cli("train", "--resume", run.path, "--output", run.path)
    result = json.loads(run.result.read_text())
    best = result["best_step"]
    validating = "4 examples, scoring 4 examples of the validation split every 2 steps"
    assert first.stdout.splitlines() == [
        *opening(run),
        "scoring the base model on 3 examples of the test split",
        evaluated(run, "before", 0),
        f"training for 4 steps of {validating}",
        evaluated(run, "during", 2),
        f"stopped after step 2 as asked: {resume_advice(run.path)}",
    ]
    assert second.stdout.splitlines() == [
        *opening(run),
        f"training for 2 more steps of {validating}",
        evaluated(run, "during", 4),
        f"scoring the adapter of step {best} on 3 examples of the test split",
        evaluated(run, "after", best),
        f"4 steps in {result['seconds']:.0f} s without the evaluations, best adapter from step {best}",
        "",
        "text generated for the 3 examples of the test split:",
        *before_after_table(**result["test"]).splitlines(),
        *closing(run, run.report),
    ]


def test_a_run_without_evaluations_says_that_it_kept_the_last_adapter(cli, base_args, tmp_path):
    run = RunFolder(tmp_path / "run")
    done = cli("train", *base_args, "--output", run.path, "--eval-every", 0, "--no-test")
    seconds = json.loads(run.result.read_text())["seconds"]
    assert done.stdout.splitlines() == [
        *opening(run),
        "training for 4 steps of 4 examples, without scoring the validation split",
        f"4 steps in {seconds:.0f} s without the evaluations, the last adapter",
        *closing(run, f"im2json evaluate {run.path}"),
    ]


def test_a_data_set_below_the_working_directory_is_named_from_there(cli, base_args, dataset, tmp_path, monkeypatch):
    shutil.copytree(dataset, tmp_path / "data" / "mine")
    monkeypatch.chdir(tmp_path)
    said = cli("train", *base_args, "--dataset", "data/mine", "--steps", 1, "--eval-every", 0, "--no-test").stdout
    assert "reading the data set data/mine\n" in said


def test_no_test_leaves_the_test_split_alone(train, tmp_path):
    run = train(tmp_path / "run", "--no-test")
    result = json.loads(run.result.read_text())
    assert result["test"] is None
    assert {row["split"] for row in read_lines(run.predictions_file)} == {"validation"}
    assert result["validation"].keys() == VALUES


def test_eval_examples_limits_validation_alone(train, tmp_path):
    run = train(tmp_path / "run", "--eval-examples", 2)
    nums = {row["split"]: row["values"]["num"] for row in read_lines(run.metrics_file) if row["split"] != "train"}
    assert nums == {"validation": 2, "test": COUNTS["test"]}


def test_max_new_tokens_bounds_the_text(train, tmp_path, small_model):
    tokenizer = PaliGemmaProcessor.from_pretrained(small_model).tokenizer
    lengths = {}
    for limit in (3, 9):
        run = train(tmp_path / str(limit), "--max-new-tokens", limit, "--steps", 1)
        texts = [row["text"] for row in read_lines(run.predictions_file)]
        lengths[limit] = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert lengths[3] <= 3 < lengths[9]


def test_gradient_checkpointing_and_bf16_run_through(train, tmp_path):
    plain = train(tmp_path / "plain", "--no-test", "--eval-every", 0)
    less = train(tmp_path / "less", "--no-test", "--eval-every", 0, "--gradient-checkpointing", "on")
    assert_same_files(plain, less, ("adapter/adapter_model.safetensors",))
    half = train(tmp_path / "half", "--quant", "nf4", "--precision", "bf16", "--dora", "--rslora", "--dropout", 0.1)
    first, last = ([r["values"]["loss"] for r in metrics(half) if r["split"] == "train"][i] for i in (0, -1))
    assert last < first


@pytest.mark.slow
def test_accelerate_launch_trains_and_evaluates(base_args, tmp_path):
    """As the README says it, with no configuration of accelerate and a precision that is not that of the run."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    for command in (
        ["-m", "accelerate.commands.launch", "--mixed_precision", "bf16", str(ROOT / "train.py"), *base_args],
        [str(ROOT / "evaluate.py")],
    ):
        run = ["--output", str(tmp_path / "run")] if len(command) > 1 else [str(tmp_path / "run")]
        done = subprocess.run(
            [sys.executable, *command, *run], capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr
        assert "of the test split:" in done.stdout or "test split, generated text:" in done.stdout
        if len(command) > 1:
            assert "--precision fp32 wins over accelerate's mixed_precision bf16" in done.stdout
    assert RunFolder(tmp_path / "run").done


# --- mistakes: one clear line each


def stop(cli, base_args: list[str], tmp_path: Path, *flags: object) -> str:
    """The error of train.py with these flags over base_args, which must not leave a run folder behind."""
    error = clear_error(cli("train", *base_args, "--output", tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()
    return error


def test_a_check_that_is_no_equation(cli, base_args, tmp_path):
    assert "--check-sum 'total' is no equation" in stop(cli, base_args, tmp_path, "--check-sum", "total")


def test_an_unknown_model(cli, base_args, tmp_path):
    assert "no such folder" in stop(cli, base_args, tmp_path, "--model", "./nowhere")
    assert "`tiny` is embedded" in stop(cli, base_args, tmp_path, "--model", "tinny")
    (tmp_path / "file").touch()
    assert "is a file" in stop(cli, base_args, tmp_path, "--model", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    error = stop(cli, base_args, tmp_path, "--model", tmp_path / "empty")
    assert f"--model {tmp_path / 'empty'}" in error and "model_type" in error


def refused_by_hub(monkeypatch, kind: type[Exception], status: int) -> None:
    response: Any = types.SimpleNamespace(status_code=status, headers={}, request=None)

    def refuse(*_: Any, **__: Any) -> None:
        raise kind(f"{status} Client Error.\n\nCannot access it.", response=response)

    monkeypatch.setattr("im2json.model.hub.hf_hub_download", refuse)


def test_a_gated_model_without_access(cli, base_args, tmp_path, monkeypatch):
    refused_by_hub(monkeypatch, GatedRepoError, 403)
    error = stop(cli, base_args, tmp_path, "--model", "google/paligemma-3b-pt-224")
    assert "accept its licence at https://huggingface.co/google/paligemma-3b-pt-224" in error
    assert "`hf auth login`" in error


def test_a_model_that_the_hub_does_not_know(cli, base_args, tmp_path, monkeypatch):
    refused_by_hub(monkeypatch, RepositoryNotFoundError, 404)
    error = stop(cli, base_args, tmp_path, "--model", "google/paligemma-3b-pt-225")
    assert "--model google/paligemma-3b-pt-225: no such folder, and the hub has no model of this name" in error


def test_no_network(cli, base_args, tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("An error happened while trying to locate the file.\nCheck your connection.")

    monkeypatch.setattr("im2json.model.hub.hf_hub_download", refuse)
    error = stop(cli, base_args, tmp_path, "--model", "google/paligemma-3b-pt-224")
    assert "the hub could not be reached" in error


def test_an_unknown_data_set(cli, base_args, tmp_path, monkeypatch):
    assert "there is no such folder" in stop(cli, base_args, tmp_path, "--dataset", "./nowhere")

    def refuse(path: str, **_: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    error = stop(cli, base_args, tmp_path, "--dataset", "nobody/nothing")
    assert "--dataset nobody/nothing" in error and "check the name" in error


def test_a_split_that_is_not_there(cli, base_args, tmp_path):
    error = stop(cli, base_args, tmp_path, "--train-split", "trian")
    assert "--train-split trian" in error and "it has " in error
    assert all(split in error.partition("it has ")[2] for split in COUNTS)


def test_a_folder_without_metadata(cli, base_args, tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    error = stop(cli, base_args, tmp_path, "--dataset", tmp_path / "data")
    assert "metadata.jsonl" in error and "file_name" in error


def bad_metadata(folder: Path) -> str:
    path = folder / "train" / "metadata.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({"file_name": "1.png", "ground_truth": '{"gt_parse": {"total": }'})
    path.write_text("\n".join(lines) + "\n")
    return "metadata.jsonl:2"


def missing(folder: Path) -> str:
    (folder / "validation" / "2.png").unlink()
    return "2.png"


def truncated(folder: Path) -> str:
    path = folder / "test" / "0.png"
    os.truncate(path, path.stat().st_size // 2)
    return "0.png"


def no_picture(folder: Path) -> str:
    (folder / "train" / "3.png").write_text("I am a text")
    return "3.png"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (bad_metadata, "is not JSON"),
        (missing, "there is no such picture file"),
        (truncated, "damaged or cut short"),
        (no_picture, "is not a picture"),
    ],
)
def test_a_bad_row(cli, base_args, tmp_path, damage, said):
    """The list of bad rows is the one message of several lines."""
    folder = write_dataset(tmp_path / "data")
    where = damage(folder)
    result = cli("train", *base_args, "--output", tmp_path / "run", "--dataset", folder)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines[0].startswith(f"Error: 1 of {sum(COUNTS.values())} rows cannot be used: ")
    assert len(lines) == 2
    assert where in lines[1] and said in lines[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("modules", ["q_proj", *slow("language")])  # while it trains, and while it works out features
def test_a_bad_picture_that_a_worker_finds(cli, base_args, tmp_path, modules):
    """It was whole when the rows were checked."""
    folder = write_dataset(tmp_path / "data")

    def spoil(*_: object) -> None:
        (folder / "train" / "3.png").write_bytes(b"no picture any more")

    flags = ["--dataset", folder, "--no-test", "--steps", 8, "--eval-every", 0, "--workers", 1]
    flags += ["--target-modules", modules]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("im2json.training.tracking.Tracker.describe", spoil)
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # torch waits 5 s for the worker to end
        error = clear_error(cli("train", *base_args, *flags, "--output", tmp_path / "run"))
        gc.collect()  # ends the worker
    assert str(folder / "train" / "3.png") in error and "is not a picture" in error


def test_out_of_memory_says_what_takes_less(cli, base_args, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")

    monkeypatch.setattr("im2json.training.update.Update.__call__", full)
    error = clear_error(cli("train", *base_args, "--no-test", "--output", tmp_path / "run"))
    assert error.startswith("CUDA out of memory. Tried to allocate 2.00 GiB. ")
    assert all(flag in error for flag in ("--microbatch", "--gradient-checkpointing", "--eval-batch-size"))


def test_help_lists_every_option_group_by_group(cli):
    result = cli("train", "--help")
    assert [line for line in result.output.splitlines() if line.endswith("options:")] == [
        "Run options:", "Data options:", "Model options:", "Decode options:", "Train options:",
    ]  # fmt: skip
    assert all(f" {flag_name(name)}" in result.output for name in OPTIONS)
    said = " ".join(cli("train", "--help").output.split())
    assert "watches. One of json_validity, json_repaired" in said and "edit_distance. [default: field_f1]" in said


def test_an_output_that_holds_a_run(finished, cli, base_args, tmp_path):
    before = sorted(finished.path.rglob("*"))
    error = clear_error(cli("train", *base_args, "--output", finished.path))
    assert "holds a finished run" in error and f"im2json evaluate {finished.path}" in error
    assert "finished" in clear_error(cli("train", "--resume", finished.path))
    assert sorted(finished.path.rglob("*")) == before
    unfinished = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    unfinished.result.unlink()
    assert f"--resume {unfinished.path}" in clear_error(cli("train", *base_args, "--output", unfinished.path))


def test_options_that_cannot_be(cli):
    for flags, said in (
        (["--r", 0], "at least 1"), (["--lerning-rate", 1], "No such option"), (["--batch-size", "x"], "integer"),
    ):  # fmt: skip
        result = cli("train", *flags)
        assert result.exit_code == 2
        assert flags[0] in result.output and said in result.output
        assert "Traceback" not in result.output


def test_fp16_on_a_cpu(cli, base_args, tmp_path):
    error = stop(cli, base_args, tmp_path, "--precision", "fp16")
    assert "--precision fp16 needs a GPU" in error and "--precision fp32" in error


def test_resuming_nothing_or_with_other_options(cli, finished, tmp_path):
    assert "there is no such run folder" in clear_error(cli("train", "--resume", tmp_path / "nowhere"))
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    run.result.unlink()
    assert "--r was 4, not 8" in clear_error(cli("train", "--resume", run.path, "--r", 8))


def test_a_second_process_on_the_same_run(cli, finished, tmp_path):
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    run.result.unlink()
    append_lines(run.metrics_file, [{"step": 99, "split": "train", "values": {}}])
    with locked(run, True):
        for script, flags in (("train", ["--resume", run.path]), ("evaluate", [run.path])):
            assert f"another process is working on {run.path}" in clear_error(cli(script, *flags))
    assert list(read_lines(run.metrics_file))[-1]["step"] == 99  # nothing was rewound
    assert (run.path / "tb").is_dir() and len(list((run.path / "tb").iterdir())) == 1


def test_a_target_modules_mistake(cli, base_args, tmp_path):
    error = stop(cli, base_args, tmp_path, "--target-modules", "q_proj,query")
    assert "no linear layer is named query" in error and "q_proj" in error


def test_a_traceback_where_it_is_wished_for(cli, base_args, tmp_path, monkeypatch):
    monkeypatch.setenv("IM2JSON_TRACEBACK", "1")
    result = cli("train", *base_args, "--output", tmp_path / "run", "--precision", "fp16")
    assert isinstance(result.exception, ValueError)


@pytest.mark.slow
def test_a_mistake_prints_one_line_in_a_shell(base_args, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *base_args, "--model", "./nowhere"], capture_output=True, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.strip()] == [
        "Error: --model ./nowhere: no such folder, and not a name on the hub (owner/name); `tiny` is embedded"
    ]


def test_ctrl_c_before_the_first_step(cli, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("im2json.commands.train.open_workspace", interrupted)
    result = cli("train", "--output", tmp_path / "run")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Error: interrupted: no step was taken yet"


@pytest.mark.parametrize("name", ["nosuchtracker", "tensorboard"])
def test_a_tracker_that_is_not_there_is_refused(cli, base_args, tmp_path, name):
    error = clear_error(cli("train", *base_args, "--track", name, "--output", tmp_path / "run"))
    assert f"--track {name}" in error


def test_a_model_that_lacks_weights_is_refused(cli, base_args, small_model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(small_model, broken)
    weights = load_file(broken / "model.safetensors")
    kept = {name: value.clone() for name, value in weights.items() if ".layers.0." not in name}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    error = clear_error(cli("train", *base_args, "--model", broken, "--output", tmp_path / "run"))
    assert "lack" in error
    (broken / "model.safetensors").write_bytes((Path(small_model) / "model.safetensors").read_bytes()[:1000])
    clear_error(cli("train", *base_args, "--model", broken, "--output", tmp_path / "run"))


# --- the embedded base


@pytest.fixture(scope="module")
def seventy_steps(train, tmp_path_factory) -> tuple[RunFolder, Any]:
    """A run of the embedded base that writes JSON, and its workspace with the best adapter.

    The validation split serves, because the test split would be answered twice, and before training in full length.
    """
    from im2json.workspace import open_workspace, start_accelerator

    flags = "--steps 70 --eval-every 70 --eval-examples 40 --no-test --threads 1"
    run = train(tmp_path_factory.mktemp("seventy") / "run", base=flags.split())
    reset_accelerate()
    config = run.read_config()
    return run, open_workspace(config, *start_accelerator(config), adapter=run.adapter)


@pytest.mark.slow
def test_no_draft_changes_what_a_trained_model_writes(seventy_steps):
    from im2json.inference.decode import Decoder, Request
    from im2json.model.lora import merged_copy

    _, space = seventy_steps
    collator, limit, rng = space.collator, space.settings.max_new_tokens, random.Random(0)
    examples = [space.splits["validation"][i] for i in range(40)]
    targets = [collator.target_ids(example.target) for example in examples]
    sources = {
        "none": [[]] * 40,
        "the target": targets,
        "another's": targets[1:] + targets[:1],
        "the target reversed": [target[::-1] for target in targets],
        "random tokens": [rng.choices(range(1, 1500), k=len(target)) for target in targets],
    }
    pixels = collator.pictures_of(examples)["pixel_values"]
    decoder, written, passes = Decoder(merged_copy(space.model, torch.float32), collator), {}, {}
    for name, drafts in sources.items():
        before = decoder.passes
        requests = [
            Request(lambda i=i: {"pixel_values": pixels[i : i + 1]}, limit, drafts[i])  # type: ignore[misc]
            for i in range(40)
        ]
        written[name] = dict(decoder.answers(requests, limit, max(map(len, drafts)), 40))
        passes[name] = decoder.passes - before
    for name, answers in written.items():
        for number, answer in answers.items():
            plain = written["none"][number]
            assert answer.tokens == plain.tokens, name
            assert answer.logprobs == pytest.approx(plain.logprobs, abs=1e-4), name
    assert passes["the target"] < passes["none"] / 2, passes


@pytest.mark.slow
def test_merged_and_unmerged_answer_alike(seventy_steps):
    """Compare the merged copy that evaluations decode with transformers on the 4-bit layers and LoRA beside them."""
    run, space = seventy_steps
    texts: list[str] = []
    for start in range(0, 40, 20):
        examples = [space.splits["validation"][i] for i in range(start, start + 20)]
        inputs = prefix_inputs(space.collator, space.collator.pictures_of(examples))
        with torch.no_grad():
            output = space.model.eval().generate(  # B x (P + T)
                **inputs, max_new_tokens=space.settings.max_new_tokens, do_sample=False
            )
        texts += space.collator.texts(output[:, inputs["input_ids"].shape[1] :].tolist())
    kept = list(read_lines(run.predictions_file))
    assert sum(row["text"] == text for row, text in zip(kept, texts, strict=True)) >= 36
    merged, unmerged = StreamingEvaluator(), StreamingEvaluator()
    for row, text in zip(kept, texts):
        merged.update(row["text"], row["target"], id=row["id"])
        unmerged.update(text, row["target"], id=row["id"])
    metrics = merged.compute()
    assert metrics["field_f1"] > 0.5
    for name, value in unmerged.compute().items():
        assert value == pytest.approx(metrics[name], abs=0.02), name
