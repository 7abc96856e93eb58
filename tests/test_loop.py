"""The training loop: the same gradients however a step is split, and the same run however often it is stopped."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forks import Process
from helpers import (
    MEASURED,
    QLORA,
    RESUMED,
    assert_same,
    assert_same_runs,
    checkpoint,
    clear_error,
    dtypes,
    metrics,
    reset_accelerate,
    slow,
    wait_for,
    write_dataset,
)
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import im2json.inference.evaluate as evaluating
from im2json.data.collate import Batch, Collator
from im2json.data.loader import StepLoader
from im2json.data.order import Order, Share
from im2json.data.sources import load_splits
from im2json.families import family_of, open_collator
from im2json.files import read_lines
from im2json.inference.decode import Decoder
from im2json.inference.evaluate import Evaluation
from im2json.model.base import load_base
from im2json.model.lora import add_lora, trained
from im2json.model.loss import summed_loss
from im2json.model.replay import Forward
from im2json.options import ModelOptions, TrainOptions
from im2json.runs import RunFolder, complete_checkpoints
from im2json.scoring import METRICS
from im2json.training.checkpoint import Checkpoints
from im2json.training.loop import Ending, asked_to_stop, peak_memory_bytes
from im2json.training.optimizer import learning_rate, make_optimizer
from im2json.training.update import StepOutcome, Update
from im2json.workspace import Workspace

CPU = torch.device("cpu")


class Stopped(Exception):
    """What stops a run in the middle here."""


# --- gradients


class Recorder:
    """An optimizer that keeps the gradients it is given and changes nothing."""

    step_was_skipped = False

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.grads: list[torch.Tensor] = []
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        self.grads = [parameter.grad.clone() for parameter in self.parameters]

    def zero_grad(self, set_to_none: bool) -> None:
        assert not set_to_none
        for parameter in self.parameters:
            parameter.grad.zero_()


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    reset_accelerate()
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def collator(small_model) -> Collator:
    return open_collator(small_model, "extract JSON.")


@pytest.fixture
def model(small_model):
    """LoRA whose B is not zero, so that A has gradients as well."""
    model = add_lora(load_base(small_model, "fp32", "none", CPU), ModelOptions(model="small", r=4, alpha=8.0), seed=0)
    for parameter in trained(model):
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def step_batches(dataset: str, collator: Collator, batch_size: int, microbatch: int, step: int) -> list[Batch]:
    split = load_splits(dataset)["train"]
    order = Order(len(split), batch_size, seed=0)
    loader = StepLoader(split, collator, order, Share(microbatch))
    return next(loader.steps(step, step + 1))


def tokens(batches: list[Batch]) -> int:
    return sum(int((batch.labels != -100).sum()) for batch in batches)


def update_of(model: Any, optimizer: Any, accelerator: Accelerator, max_grad_norm: float) -> Update:
    """An update of all LoRA weights, each a parameter of its own, by this optimizer."""
    return Update(
        Forward(model, family_of(model.get_base_model().config).hidden_states),
        trained(model),
        optimizer,
        accelerator,
        max_grad_norm,
        microbatch=8,
    )


@pytest.mark.parametrize("step", [0, 1], ids=["full", "short"])
def test_any_split_of_a_step_gives_the_same_gradients(dataset, collator, model, accelerator, step):
    """Steps of 8 and of the 2 examples that are left, in microbatches of 8, 4, 2, 3 and 1, against the mean over all
    target tokens."""
    whole = step_batches(dataset, collator, 8, 8, step)
    assert [len(batch.ids) for batch in whole] == [[8], [2]][step]
    (batch,) = whole
    mean = model(**batch.inputs, labels=batch.labels).loss  # transformers' own
    expected = torch.autograd.grad(mean, trained(model))
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
    for microbatch in (8, 4, 2, 3, 1):
        batches = step_batches(dataset, collator, 8, microbatch, step)
        assert len(batches) == math.ceil(len(batch.ids) / microbatch)
        recorder = Recorder(trained(model))
        outcome = update_of(model, recorder, accelerator, 1e9)(batches, tokens(batches))
        assert recorder.steps == 1
        assert outcome.loss == pytest.approx(float(mean.detach()), rel=1e-6)
        assert outcome.grad_norm == pytest.approx(float(norm), rel=1e-5)
        for got, wanted in zip(recorder.grads, expected):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * float(norm))
        assert not any(parameter.grad.any() for parameter in trained(model))


def test_gradients_are_scaled_down_to_the_norm(dataset, collator, model, accelerator):
    batches = step_batches(dataset, collator, 8, 4, 0)
    free, clipped = Recorder(trained(model)), Recorder(trained(model))
    outcomes = [
        update_of(model, recorder, accelerator, limit)(batches, tokens(batches))
        for recorder, limit in ((free, 1e9), (clipped, 0.01))
    ]
    assert outcomes[0].grad_norm == outcomes[1].grad_norm > 0.02
    for one, other in zip(free.grads, clipped.grads):
        torch.testing.assert_close(other, one * 0.01 / outcomes[0].grad_norm, rtol=1e-4, atol=1e-9)


def test_runs_of_any_microbatch_log_the_same(train, tmp_path):
    """The whole script, over a full step, its short last one and into the next epoch."""
    runs = [
        train(tmp_path / str(size), "--batch-size", 8, "--microbatch", size, "--no-test", "--eval-every", 0)
        for size in (8, 4, 2)
    ]
    logs = [[row["values"] for row in metrics(run)] for run in runs]
    assert len(logs[0]) == 4
    for log in logs[1:]:
        for got, wanted in zip(log, logs[0]):
            assert got == pytest.approx(wanted, rel=1e-4)


def test_auto_is_a_microbatch_of_four_on_a_cpu_and_stays_auto_in_the_config(train, resume, tmp_path):
    flags = ("--batch-size", 6, "--no-test", "--eval-every", 0)
    four, auto = (train(tmp_path / str(size), *flags, "--microbatch", size) for size in (4, "auto"))
    assert metrics(auto) == metrics(four)
    assert auto.read_config().train.microbatch == "auto"
    assert json.loads((auto.path / "config.json").read_text())["options"]["microbatch"] == "auto"
    resume(auto, "--steps", 5)
    assert len(metrics(auto)) == 5


# --- memory that runs out


def out_of_memory(monkeypatch: pytest.MonkeyPatch, fits: Callable[[int, int], bool]) -> None:
    """Have the GPU's memory run out where not `fits(call, examples)`, calls counted from 1."""
    calls = itertools.count(1)

    def loss(paligemma: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not fits(next(calls), len(hidden)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return summed_loss(paligemma, hidden, labels)

    monkeypatch.setattr("im2json.training.update.summed_loss", loss)


def test_out_of_memory_halves_the_microbatch_and_redoes_the_step(train, tmp_path, monkeypatch, capsys):
    """With dropout: the step that is begun anew draws the masks that it would have drawn."""
    flags = ("--batch-size", 8, "--dropout", 0.2, "--no-test", "--eval-every", 0)
    small = train(tmp_path / "small", *flags, "--microbatch", 2)
    out_of_memory(monkeypatch, lambda call, examples: examples <= 2)
    large = train(tmp_path / "large", *flags, "--microbatch", 8)
    assert metrics(large) == metrics(small)
    printed = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert len(printed) == 2  # and not once more in the steps that follow
    assert "8 examples" in printed[0] and printed[0].endswith("--microbatch 4")
    assert "4 examples" in printed[1] and printed[1].endswith("--microbatch 2")


def test_gradients_of_a_step_that_memory_ran_out_in_are_dropped(train, tmp_path, monkeypatch):
    flags = ("--batch-size", 8, "--microbatch", 4, "--no-test", "--eval-every", 0)
    whole = train(tmp_path / "whole", *flags)
    out_of_memory(monkeypatch, lambda call, examples: call != 2)  # the second half of the first step
    broken = train(tmp_path / "broken", *flags)
    for got, wanted in zip(metrics(broken), metrics(whole), strict=True):
        assert got["values"] == pytest.approx(wanted["values"], rel=1e-4)


def test_no_room_for_one_example_is_an_error(cli, base_args, tmp_path, monkeypatch):
    out_of_memory(monkeypatch, lambda call, examples: False)
    error = clear_error(cli("train", *base_args, "--no-test", "--output", tmp_path / "run"))
    assert error.startswith("CUDA out of memory.") and "--gradient-checkpointing" in error


def test_the_peak_is_of_the_gpus_memory_where_there_is_a_gpu(monkeypatch):
    assert 10**7 < peak_memory_bytes() < 10**11
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert peak_memory_bytes() == 123


# --- the learning rate


def slow_rate(step: int, total: int, options: TrainOptions) -> float:
    """The schedule in words: so many warmup steps climb to lr, then it falls from lr to 0 over the rest."""
    warmup = math.ceil(total * options.warmup)
    climbing = [options.lr * k / warmup for k in range(1, warmup + 1)]
    rest = total - warmup
    shapes = {
        "cosine": [(1 + math.cos(math.pi * k / rest)) / 2 for k in range(rest)],
        "linear": [(rest - k) / rest for k in range(rest)],
        "constant": [1.0] * rest,
    }
    return (climbing + [options.lr * share for share in shapes[options.schedule]])[step]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(100, 0.03), (10, 0.25), (7, 0.0), (4, 1.0), (1, 0.03)])
def test_learning_rates(schedule, total, warmup):
    options = TrainOptions(lr=0.2, schedule=schedule, warmup=warmup)
    for step in range(total):
        assert learning_rate(step, total, options) == pytest.approx(slow_rate(step, total, options), rel=1e-12)
    assert max(learning_rate(step, total, options) for step in range(total)) == pytest.approx(0.2)
    assert min(learning_rate(step, total, options) for step in range(total)) > 0


def test_the_rate_is_what_the_run_uses(train, tmp_path):
    run = train(tmp_path / "run", "--warmup", 0.5, "--schedule", "linear", "--no-test", "--eval-every", 0)
    assert [row["values"]["lr"] for row in read_lines(run.metrics_file)] == [0.005, 0.01, 0.01, 0.005]
    stored = torch.load(run.checkpoints / "step-4" / "optimizer.pt", weights_only=True)
    assert [group["lr"] for group in stored["optimizer"]["param_groups"]] == [0.005]


# --- what is not finite


def copied_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {key: {k: torch.as_tensor(v).clone() for k, v in value.items()} for key, value in optimizer.state.items()}


@pytest.mark.parametrize("poison", ["pixel", "gradient"])
def test_what_is_not_finite_stops_before_the_optimizer_is_touched(dataset, collator, model, accelerator, poison):
    parameters = trained(model)
    optimizer = accelerator.prepare(make_optimizer(parameters, TrainOptions(optimizer="adamw", lr=0.01)))
    batches = step_batches(dataset, collator, 8, 4, 0)
    update = update_of(model, optimizer, accelerator, 1.0)
    assert not update(batches, tokens(batches)).non_finite
    before, state = [parameter.detach().clone() for parameter in parameters], copied_state(optimizer.optimizer)
    assert len(state) == len(parameters)
    if poison == "pixel":
        batches[1].inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    else:
        parameters[3].register_hook(lambda gradient: gradient * float("inf"))
    outcome = update(batches, tokens(batches))
    assert outcome.non_finite
    assert math.isfinite(outcome.loss) is (poison == "gradient")
    assert not math.isfinite(outcome.grad_norm)
    assert all(torch.equal(one, other) for one, other in zip(before, parameters))
    after = copied_state(optimizer.optimizer)
    assert all(torch.equal(state[key][name], after[key][name]) for key in state for name in state[key])
    assert not any(parameter.grad.any() for parameter in parameters)


@pytest.mark.parametrize("poison", ["picture", "gradient"])
def test_a_run_that_is_not_finite_names_step_examples_and_advice(
    cli, train, base_args, dataset, tmp_path, monkeypatch, poison
):
    """A picture that is seen first in the third step is not a number, or makes the gradient infinite."""
    original = Collator.__call__
    ids, order = load_splits(dataset)["train"].ids, Order(10, 4, seed=0)
    third = [ids[i] for i in order.step(2)]

    def poisoned(self: Collator, examples: Any) -> Batch:
        batch = original(self, examples)
        for row, id in enumerate(batch.ids):
            if id == third[0]:
                batch.inputs["pixel_values"][row] = float("nan") if poison == "picture" else 1e30
        return batch

    flags = ("--save-every", 1, "--no-test", "--eval-every", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Collator, "__call__", poisoned)
        error = clear_error(cli("train", *base_args, *flags, "--output", tmp_path / "run"))
    assert error.startswith("step 3: ")
    assert "nan" in error or "inf" in error
    assert all(id in error for id in third)
    assert not any(id in error for id in ids if id not in third)
    assert "--lr" in error and "--precision" in error and "not updated" in error
    run, whole = RunFolder(tmp_path / "run"), train(tmp_path / "whole", *flags, "--keep", 9)
    assert not run.done
    assert [row["step"] for row in read_lines(run.metrics_file)] == [1, 2]
    assert run.latest_checkpoint().name == "step-2"
    assert_same(checkpoint(run, 2), checkpoint(whole, 2))


def overflowing(monkeypatch: pytest.MonkeyPatch, steps: Collection[int]) -> None:
    """Have these steps skip their update, as in fp16, which needs a GPU."""
    original, calls = Update.__call__, itertools.count(1)

    def call(self: Update, *given: Any) -> StepOutcome:
        outcome = original(self, *given)
        return replace(outcome, skipped=True, grad_norm=math.inf) if next(calls) in steps else outcome

    monkeypatch.setattr(Update, "__call__", call)


def test_overflows_are_counted_and_ten_in_a_row_stop_the_run(train, cli, base_args, tmp_path, monkeypatch):
    flags = ("--steps", 12, "--eval-every", 0, "--no-test")
    with monkeypatch.context() as patch:
        overflowing(patch, skipped := {*range(2, 11), 12})
        run = train(tmp_path / "run", *flags)
    rows = {row["step"]: row["values"] for row in read_lines(run.metrics_file)}
    assert [rows[step].get("skipped_updates") for step in rows] == [None, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10]
    assert {step for step in rows if "grad_norm" not in rows[step]} == skipped
    assert json.loads(run.result.read_text())["skipped_updates"] == 10
    overflowing(monkeypatch, range(2, 12))
    error = clear_error(cli("train", *base_args, *flags, "--output", tmp_path / "other"))
    assert error.startswith("step 11: 10 updates in a row overflowed in fp16") and "--precision bf16" in error


# --- the best adapter, and patience


def scripted(monkeypatch, values: dict[int, float], metric: str, weights: dict[int, Any] | None = None) -> None:
    """Let the evaluations find these values of `metric`, by step; `weights` gets the adapter at each."""

    original = Evaluation.__call__

    def evaluate(self: Evaluation, split: str, step: int, stage: str, **more: Any) -> dict[str, float]:
        if stage != "during":
            return original(self, split, step, stage, **more)
        if weights is not None:
            weights[step] = [parameter.detach().clone() for parameter in trained(self.model)]
        return dict.fromkeys(METRICS, 0.5) | {metric: values[step]}

    monkeypatch.setattr(Evaluation, "__call__", evaluate)


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("field_f1", {1: 0.2, 2: 0.6, 3: 0.6, 4: 0.1}, 2),
        ("edit_distance", {1: 0.9, 2: 0.2, 3: 0.2, 4: 0.7}, 2),
        ("edit_distance", {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.7}, 1),
        ("json_validity", {1: 0.0, 2: 0.0, 3: 0.0, 4: 0.1}, 4),
    ],
)
def test_the_best_adapter_is_kept(train, tmp_path, monkeypatch, metric, values, best):
    weights: dict[int, Any] = {}
    scripted(monkeypatch, values, metric, weights)
    run = train(tmp_path / "run", "--metric", metric, "--eval-every", 1, "--no-test")
    result = json.loads(run.result.read_text())
    assert (result["step"], result["best_step"]) == (4, best)
    assert result["validation"][metric] == values[best]
    kept = sorted(float(value.sum()) for value in load_file(run.adapter / "adapter_model.safetensors").values())
    found = {step: sorted(float(value.sum()) for value in at) for step, at in weights.items()}
    assert [step for step, sums in found.items() if sums == kept] == [best]


@pytest.mark.parametrize(
    ("patience", "values", "last", "best"),
    [
        (1, [0.1, 0.5, 0.5, 0.6], 3, 2),
        (2, [0.1, 0.5, 0.5, 0.6, 0.2, 0.6, 0.7, 0.1], 6, 4),
        (3, [0.1, 0.5, 0.5, 0.6, 0.2, 0.3, 0.7, 0.1], 8, 7),
        (8, [0.5] * 8, 8, 1),
    ],
)
def test_patience_stops_after_so_many_evaluations_without_a_gain(
    train, tmp_path, monkeypatch, patience, values, last, best
):
    scripted(monkeypatch, dict(enumerate(values, start=1)), "field_f1")
    run = train(tmp_path / "run", "--patience", patience, "--eval-every", 1, "--no-test", "--steps", 8)
    result = json.loads(run.result.read_text())
    assert (result["step"], result["best_step"]) == (last, best)
    assert run.latest_checkpoint().name == f"step-{last}"


def test_a_run_that_patience_stopped_does_not_train_on_when_resumed(train, resume, tmp_path, monkeypatch):
    """It was killed while it scored the test split, after its last checkpoint."""
    scripted(monkeypatch, dict(zip(range(1, 9), [0.5] + [0.1] * 7)), "field_f1")
    original = Evaluation.__call__

    def call(self: Evaluation, split: str, step: int, stage: str, **more: Any) -> dict[str, float]:
        if stage == "after":
            raise Stopped
        return original(self, split, step, stage, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "__call__", call)
        with pytest.raises(Stopped):
            train(tmp_path / "run", "--patience", 2, "--eval-every", 1, "--steps", 8)
    run = resume(RunFolder(tmp_path / "run"))
    assert json.loads(run.result.read_text())["step"] == 3


# --- stopping, resuming, evaluating: nothing changes


@pytest.mark.parametrize("precision", ["fp32", *slow("bf16")])
def test_evaluating_changes_nothing(train, tmp_path, precision):
    flags = (*QLORA, "--precision", precision, "--steps", 6, "--save-every", 6)
    often = checkpoint(train(tmp_path / "often", *flags, "--eval-every", 2), 6)
    never = checkpoint(train(tmp_path / "never", *flags, "--eval-every", 0, "--no-test"), 6)
    assert torch.uint8 in dtypes(never["optimizer"])
    for part in ("adapter", "optimizer", "config"):
        assert_same(often[part], never[part])
    other = checkpoint(train(tmp_path / "other", *flags, "--eval-every", 0, "--no-test", "--seed", 1), 6)
    assert_same(other["adapter"], never["adapter"], equal=False)


def stop_at(monkeypatch, step: int, stage: str = "during") -> None:
    """Stop the run in its evaluation at `step`, when half of the predictions are made."""
    original_call, original_answers = Evaluation.__call__, Decoder.answers
    now: dict[str, bool] = {}

    def call(self: Evaluation, split: str, at: int, in_stage: str, **more: Any) -> dict[str, float]:
        now.update(stop=(at, in_stage) == (step, stage))
        return original_call(self, split, at, in_stage, **more)

    def answers(*given: Any) -> Any:
        for number, each in enumerate(original_answers(*given)):
            if now["stop"] and number == 2:
                raise Stopped
            yield each

    monkeypatch.setattr(Evaluation, "__call__", call)
    monkeypatch.setattr(Decoder, "answers", answers)


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory) -> RunFolder:
    return train(tmp_path_factory.mktemp("whole") / "run", *RESUMED)


@pytest.mark.parametrize(
    ("step", "stage", "left"),
    [
        (2, "during", "step-1"),
        *slow((None, "after", "step-6"), (0, "before", None), (4, "during", "step-3"), (6, "during", "step-5")),
    ],
)
def test_a_run_stopped_and_resumed_is_the_run_that_was_not(
    train, resume, uninterrupted, tmp_path, monkeypatch, step, stage, left
):
    if stage == "after":
        step = json.loads(uninterrupted.result.read_text())["best_step"]
    with monkeypatch.context() as patch:
        stop_at(patch, step, stage)
        with pytest.raises(Stopped):
            train(tmp_path / "run", *RESUMED)
    run = RunFolder(tmp_path / "run")
    assert not run.done
    assert (run.latest_checkpoint().name if left else run.latest_checkpoint()) == left
    resume(run)
    assert_same_runs(run, uninterrupted)
    assert [path.name for path in run.path.rglob(".*") if path.name != ".lock"] == []


@pytest.mark.parametrize("steps", [3, *slow(4)])
def test_a_run_left_after_a_step_and_resumed_is_the_run_that_was_not(
    train, resume, cli, uninterrupted, tmp_path, steps
):
    run = train(tmp_path / "run", *RESUMED, "--stop-after", steps)
    assert not run.done and run.latest_checkpoint().name == f"step-{steps}"
    error = clear_error(cli("train", "--resume", run.path, "--stop-after", steps))
    assert error == f"--stop-after {steps}: this run has taken {steps} steps already"
    resume(run, "--stop-after", 5)
    assert run.latest_checkpoint().name == "step-5"
    resume(run, "--stop-after", 6)  # where it ends anyway
    assert_same_runs(run, uninterrupted)


@pytest.mark.slow
def test_a_run_stopped_twice_logs_nothing_twice(train, resume, uninterrupted, tmp_path, monkeypatch):
    """And options that change no result may change."""
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            train(run.path, *RESUMED)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Stopped):
            resume(run, "--keep", 1)
    resume(run, "--keep", 1)
    assert [path.name for path in complete_checkpoints(run.checkpoints)] == ["step-6"]
    assert_same(metrics(run), metrics(uninterrupted))
    assert_same(checkpoint(run, 6), checkpoint(uninterrupted, 6))


def test_a_half_written_checkpoint_is_ignored_and_removed(stopped, resume, uninterrupted, tmp_path):
    run = RunFolder(Path(shutil.copytree(stopped, tmp_path / "run")))
    half = run.checkpoints / ".step-4.tmp"
    shutil.copytree(run.checkpoints / "step-3", half)
    (half / "state.json").unlink()
    cut = run.adapter / ".adapter_model.safetensors.tmp-12345"
    cut.write_bytes(b"half")
    resume(run)
    assert not half.exists() and not cut.exists()
    assert_same_runs(run, uninterrupted)


def test_a_run_stopped_before_its_last_word_keeps_its_best_adapter(train, resume, tmp_path, monkeypatch):
    """Killed when everything but result.json was written; its best adapter, spoilt since, is in the checkpoint too."""
    scripted(monkeypatch, {2: 0.9, 4: 0.1, 6: 0.2}, "field_f1")

    def refuse(*_: object) -> None:
        raise Stopped

    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("im2json.commands.train.write_json", refuse)
        with pytest.raises(Stopped):
            train(run.path, *QLORA, "--steps", 6)
    weights = run.adapter / "adapter_model.safetensors"
    best = {name: value.clone() for name, value in load_file(weights).items()}  # which maps the file, as it will be
    logged, written = metrics(run), list(read_lines(run.predictions_file))
    last = run.checkpoints / "step-6" / "adapter_model.safetensors"
    assert_same(load_file(last), best, equal=False)
    shutil.copyfile(last, weights)
    shutil.copytree(run.checkpoints / "step-4", run.checkpoints / "step-3")  # as if it had not come to dropping this
    resume(run)
    assert [path.name for path in complete_checkpoints(run.checkpoints)] == ["step-4", "step-6"]
    assert json.loads(run.result.read_text())["best_step"] == 2
    assert_same(load_file(weights), best)
    assert_same(metrics(run), logged)
    assert_same(list(read_lines(run.predictions_file)), written)


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory) -> Path:
    """A run stopped at step 4, its last checkpoint that of step 3; to be copied."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Stopped):
            train(folder, *RESUMED)
    return folder


DAMAGE = {
    "optimizer cut": lambda path: os.truncate(path / "optimizer.pt", 1000),
    "optimizer empty": lambda path: os.truncate(path / "optimizer.pt", 0),
    "optimizer garbage": lambda path: (path / "optimizer.pt").write_bytes(b"garbage" * 100),
    "optimizer of something else": lambda path: torch.save({"a": 1}, path / "optimizer.pt"),
    "optimizer missing": lambda path: (path / "optimizer.pt").unlink(),
    "weights cut": lambda path: os.truncate(path / "adapter_model.safetensors", 2000),
    "weights of something else": lambda path: save_file({"a": torch.zeros(1)}, path / "adapter_model.safetensors"),
    "best missing": lambda path: (path / "best.safetensors").unlink(),
    "state empty": lambda path: os.truncate(path / "state.json", 0),
    "state of something else": lambda path: (path / "state.json").write_text('{"steps": 3}'),
}


FAST = ["weights of something else"]


@pytest.mark.parametrize("damage", [*FAST, *slow(*(damage for damage in DAMAGE if damage not in FAST))])
def test_a_damaged_checkpoint_is_passed_over(stopped, cli, uninterrupted, tmp_path, damage):
    run = RunFolder(Path(shutil.copytree(stopped, tmp_path / "run")))
    DAMAGE[damage](run.checkpoints / "step-3")
    result = cli("train", "--resume", run.path)
    assert result.exit_code == 0, result.output
    (said,) = (line for line in result.stdout.splitlines() if "is damaged" in line)
    assert said.startswith(str(run.checkpoints / "step-3")) and "kept as damaged-step-3" in said
    assert (run.checkpoints / "damaged-step-3").is_dir()
    assert_same_runs(run, uninterrupted)


def test_a_run_without_a_whole_checkpoint_begins_anew_and_says_so(stopped, resume, uninterrupted, tmp_path, capsys):
    run = RunFolder(Path(shutil.copytree(stopped, tmp_path / "run")))
    for path in complete_checkpoints(run.checkpoints):
        (path / "checksums.json").unlink()
    assert_same_runs(resume(run), uninterrupted)
    assert "this run begins anew" in capsys.readouterr().out


# --- asking a run to stop, and making it longer


def signalled(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Send these signals to the run as its step ends."""
    import im2json.training.loop as loop

    original = loop.report

    def report(tracker: Any, bar: Any, state: Any, *more: Any) -> None:
        original(tracker, bar, state, *more)
        if state.step == step:
            for number in numbers:
                signal.raise_signal(number)

    monkeypatch.setattr(loop, "report", report)


@pytest.mark.parametrize("number", [signal.SIGTERM, *slow(signal.SIGINT)])
def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(
    cli, resume, base_args, uninterrupted, tmp_path, number
):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    run = RunFolder(tmp_path / "run")
    seldom = ("--save-every", 6) if number == signal.SIGTERM else ()
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, 3, number)
        result = cli("train", *base_args, *RESUMED, *seldom, "--output", run.path)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == f"Error: interrupted: go on with im2json train --resume {run.path}"
    assert complete_checkpoints(run.checkpoints)[-1].name in ("step-3", "step-4")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    resume(run, "--save-every", 1)
    assert_same(metrics(run), metrics(uninterrupted))
    assert_same(checkpoint(run, 6), checkpoint(uninterrupted, 6))


@pytest.mark.parametrize(
    ("ending", "asked", "stops"),
    [(None, False, False), (None, True, True), (Ending.DONE, False, True), (Ending.PATIENCE, False, True)],
)
def test_after_the_last_step_processes_ask_each_other(monkeypatch, ending, asked, stops):
    """Of two, the other one was asked to stop after the step, and a further step would say so."""
    monkeypatch.setattr("im2json.training.loop.gather_object", lambda mine: [*mine, True])
    two: Any = SimpleNamespace(num_processes=2)
    assert asked_to_stop(two, made=asked, passed_on=asked, ending=ending) is stops


def test_asked_twice_a_run_stops_at_once(cli, base_args, tmp_path, monkeypatch):
    signalled(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    run = RunFolder(tmp_path / "run")
    result = cli("train", *base_args, "--no-test", "--output", run.path)
    assert result.exit_code == 130 and f"--resume {run.path}" in result.stderr
    assert [path.name for path in complete_checkpoints(run.checkpoints)] == ["step-2"]


def test_a_finished_run_can_be_made_longer(train, resume, cli, tmp_path):
    flags = ("--schedule", "constant", "--warmup", 0, "--keep", 9, "--no-test")
    whole = train(tmp_path / "whole", *flags, "--steps", 6)
    run = train(tmp_path / "run", *flags, "--steps", 4)
    for given in ((), ("--steps", 4), ("--steps", 2)):
        error = clear_error(cli("train", "--resume", run.path, *given))
        assert error == f"--resume {run.path}: this run is already finished. To train it longer, pass --steps above 4."
    resume(run, "--steps", 6, "--patience", 9)
    assert_same_runs(run, whole)
    stored = json.loads(run.config.read_text())
    assert (stored["options"]["steps"], stored["options"]["patience"]) == (6, 9)
    assert stored["changes"] == [
        {"step": 4, "options": {"steps": {"from": 4, "to": 6}, "patience": {"from": None, "to": 9}}}
    ]
    assert "--seed was 0, not 1" in clear_error(cli("train", "--resume", run.path, "--steps", 8, "--seed", 1))


def test_a_checkpoint_holds_the_loss_scale_of_fp16(model, tmp_path, monkeypatch):
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(make_optimizer(trained(model), TrainOptions(optimizer="adamw", lr=0.01)))
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    checkpoints = Checkpoints(run, update_of(model, optimizer, accelerator, 1.0), keep=1)
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=8.0))
    checkpoints.save()
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=2.0))
    checkpoints.restore(run.latest_checkpoint())
    assert accelerator.scaler.state_dict()["scale"] == 8.0


def test_a_finished_run_without_a_checkpoint_is_not_begun_anew(train, cli, tmp_path):
    run = train(tmp_path / "run", "--no-test", "--save-every", 0)
    kept = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert "this run is finished. It has no complete checkpoint" in clear_error(
        cli("train", "--resume", run.path, "--steps", 9)
    )
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == kept


def test_an_end_that_was_passed_is_refused(stopped, cli, tmp_path):
    run = RunFolder(Path(shutil.copytree(stopped, tmp_path / "run")))
    error = clear_error(cli("train", "--resume", run.path, "--steps", 2))
    assert error.endswith("--steps 2 is less than the 3 steps that the run has taken")


def test_a_request_in_the_last_evaluation_is_heeded(cli, resume, base_args, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    original = Evaluation.__call__

    def evaluate(self: Evaluation, split: str, step: int, stage: str, **more: Any) -> dict[str, float]:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(self, split, step, stage, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "__call__", evaluate)
        result = cli("train", *base_args, "--output", run.path)
    assert result.exit_code == 130 and not run.done
    assert [row["step"] for row in read_lines(run.metrics_file) if row["split"] == "validation"] == [2, 4]
    assert json.loads(resume(run).result.read_text())["test"]["after"]


def test_data_that_changed_since_a_run_began_are_refused(train, cli, tmp_path):
    folder = write_dataset(tmp_path / "data")
    run = train(tmp_path / "run", "--dataset", folder, "--no-test")
    run.result.unlink()
    rows = folder / "train" / "metadata.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("37", "38", 1))
    error = clear_error(cli("train", "--resume", run.path))
    assert "its data changed since it began (1 of 17 examples): train/1.png (its target changed); put" in error
    run.splits.rename(tmp_path / "splits.json")  # as of a run that an older version began
    error = clear_error(cli("train", "--resume", run.path))
    assert "the examples or targets of train have changed" in error and str(folder) in error
    (tmp_path / "splits.json").rename(run.splits)
    rows.write_text(before)
    assert cli("train", "--resume", run.path).exit_code == 0


# --- what the first step has to show


def test_a_layer_that_no_gradient_reaches_is_refused(cli, base_args, tmp_path, monkeypatch):
    import im2json.training.loop as loop

    original = loop.check_gradients

    def without_one(model: Any) -> None:
        next(p for name, p in model.named_parameters() if ".lora_B." in name).grad.zero_()
        original(model)

    monkeypatch.setattr(loop, "check_gradients", without_one)
    error = clear_error(cli("train", *base_args, "--no-test", "--output", tmp_path / "run"))
    assert "no gradient reaches 1 of" in error and "lora_B" in error and "--target-modules" in error


@pytest.mark.parametrize("wrong", ["prompt learned", "prompt taken for the target", "a token left out", "EOS left out"])
def test_labels_that_are_not_the_target_are_refused(cli, base_args, tmp_path, monkeypatch, wrong):
    original = Collator.__call__

    def collate(self: Collator, examples: Any) -> Batch:
        batch = original(self, examples)
        first = len(self.prefix_ids)
        if wrong.startswith("prompt"):
            batch.labels[0, first - 1] = 5
            batch.inputs["token_type_ids"][0, first - 1] = int("taken" in wrong)
        elif wrong == "a token left out":
            batch.labels[0, first] = -100
        else:
            batch.labels[batch.labels == self.processor.tokenizer.eos_token_id] = -100
        return batch

    monkeypatch.setattr(Collator, "__call__", collate)
    error = clear_error(cli("train", *base_args, "--no-test", "--output", tmp_path / "run"))
    assert "its labels are not exactly the target's tokens" in error


# --- what the system does to a run


def full_disk(*_: object, **__: object) -> None:
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nEnforce fail")


def test_a_full_disk_is_one_line_and_keeps_what_was_saved(cli, resume, base_args, uninterrupted, tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        original = torch.save

        def save(value: Any, path: Path) -> None:
            (full_disk if "step-4" in str(path) else original)(value, path)

        patch.setattr(torch, "save", save)
        error = clear_error(cli("train", *base_args, *RESUMED, "--output", run.path))
    assert "step-4 cannot be written: PytorchStreamWriter failed" in error and f"--resume {run.path}" in error
    assert_same_runs(resume(run), uninterrupted)


CALLS, CODES = ("rename", "replace", "fsync"), (errno.ENOSPC, errno.EROFS, errno.EACCES)
REFUSALS = list(itertools.product(CALLS, CODES))


@pytest.mark.parametrize(("call", "code"), [REFUSALS[0], *slow(*REFUSALS[1:])])
def test_what_the_system_refuses_is_one_line(cli, resume, base_args, uninterrupted, tmp_path, code, call):
    """No space left, a file system turned read-only, a folder that may not be written to any more."""
    run, original, calls = RunFolder(tmp_path / "run"), getattr(os, call), itertools.count()

    def refuse(path: Any, *more: Any, **keywords: Any) -> Any:
        if (run.checkpoints / "step-3").exists() and next(calls) >= 1:
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *more, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, refuse)
        error = clear_error(cli("train", *base_args, *RESUMED, "--output", run.path))
    assert os.strerror(code) in error and error.endswith(f"go on with im2json train --resume {run.path}")
    assert_same_runs(resume(run), uninterrupted)


def test_a_folder_that_vanished_is_one_line(cli, base_args, tmp_path, monkeypatch):
    import im2json.training.loop as loop

    run = RunFolder(tmp_path / "run")
    original = loop.report

    def report(*given: Any) -> None:
        shutil.rmtree(run.path, ignore_errors=True)
        original(*given)

    monkeypatch.setattr(loop, "report", report)
    error = clear_error(cli("train", *base_args, "--no-test", "--output", run.path))
    assert "No such file or directory" in error and str(run.path) in error


def test_pictures_are_drawn_aside_but_never_while_the_loader_is_set_up(train, tmp_path, monkeypatch):
    """It may fork, and a lock that a drawing thread holds would stay locked in its workers."""
    events, panel, loader = [], evaluating.prediction_panel, Workspace.step_loader

    def slow_panel(*given: Any) -> Any:
        events.append(threading.current_thread() is threading.main_thread())
        time.sleep(0.1)
        events.append("drawn")
        return panel(*given)

    def step_loader(self: Workspace, *given: Any) -> Any:
        events.append("loader")
        return loader(self, *given)

    monkeypatch.setattr(evaluating, "prediction_panel", slow_panel)
    monkeypatch.setattr(Workspace, "step_loader", step_loader)
    run = train(tmp_path / "run", "--eval-every", 0)
    assert events == [False, "drawn"] * 3 + ["loader"] + [False, "drawn"] * 3
    images = EventAccumulator(str(run.tensorboard)).Reload().Tags()["images"]
    assert images == [f"pictures/test_{stage}/{i}" for stage in ("before", "after") for i in range(3)]


def test_a_picture_that_cannot_be_drawn_stops_the_run(cli, base_args, tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluating, "prediction_panel", refused)
    error = clear_error(cli("train", *base_args, "--output", tmp_path / "run"))
    assert "No space left on device" in error and not RunFolder(tmp_path / "run").done


def test_tensorboard_shows_a_resumed_run_as_one(stopped, resume, tmp_path):
    """In one folder, and without what was logged after the checkpoint: the step that was taken twice is shown once."""
    run = RunFolder(Path(shutil.copytree(stopped, tmp_path / "run")))
    assert [row["step"] for row in read_lines(run.metrics_file) if row["split"] == "train"] == [1, 2, 3, 4]
    resume(run)
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("validation/edit_distance")] == [2, 4, 6]
    assert [path for path in run.tensorboard.iterdir() if path.is_dir()] == []


def test_pictures_of_an_evaluation_are_drawn_before_its_checkpoint_is_there(train, tmp_path, monkeypatch):
    """A run that is killed right after the checkpoint resumes there, and draws none of them again."""
    shown, save = [], Checkpoints.save

    def saving(self: Checkpoints) -> None:
        events = EventAccumulator(str(self.run.tensorboard)).Reload()
        shown.append((self.state.step, [event.step for event in events.Images("pictures/validation_during/0")]))
        save(self)

    def drawing(*given: Any) -> Any:
        time.sleep(0.1)
        return draw(*given)

    draw = evaluating.prediction_panel
    monkeypatch.setattr(evaluating, "prediction_panel", drawing)
    monkeypatch.setattr(Checkpoints, "save", saving)
    train(tmp_path / "run", "--steps", 2, "--eval-every", 1, "--no-test")
    assert shown == [(1, [1]), (2, [1, 2])]


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--keep", 2, "--save-every", 2], [4, 5]),
        (["--save-every", 0], []),
        *slow(
            (["--keep", 1, "--save-every", 1], [5]),
            (["--keep", 3, "--save-every", 1], [3, 4, 5]),
            (["--keep", 9], [2, 4, 5]),
            (["--eval-every", 0], [5]),
        ),
    ],
)
def test_checkpoints_kept(train, tmp_path, flags, steps):
    run = train(tmp_path / "run", "--steps", 5, "--no-test", *flags)
    assert [path.name for path in complete_checkpoints(run.checkpoints)] == [f"step-{step}" for step in steps]
    assert (run.adapter / "adapter_model.safetensors").is_file()


def test_epochs_decide_the_steps_where_none_are_given(cli, base_args, tmp_path):
    place = base_args.index("--steps")
    flags = base_args[:place] + base_args[place + 2 :]
    result = cli("train", *flags, "--epochs", 2, "--eval-every", 0, "--no-test", "--output", tmp_path / "run")
    assert result.exit_code == 0
    rows = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert set(rows[0]["values"]) >= {"loss", "lr", "grad_norm", *MEASURED}


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_is_the_run_that_was_not(uninterrupted, resume, base_args, tmp_path):
    """kill -9, wherever it hits after the third checkpoint; steps are slowed down so that it does hit."""
    program = (
        "import time, train; from im2json.training import loop\n"
        "report = loop.report; loop.report = lambda *given: (time.sleep(0.3), report(*given)); train.main()"
    )
    process = Process(program, "--output", str(tmp_path / "run"), *base_args, *map(str, RESUMED), cwd=tmp_path)
    try:
        wait_for((tmp_path / "run" / "checkpoints" / "step-3").exists, process)
    finally:
        process.kill()
        process.wait()
    run = RunFolder(tmp_path / "run")
    assert not run.done and not (run.checkpoints / "step-6").exists()
    assert_same_runs(resume(run), uninterrupted)
