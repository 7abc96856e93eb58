"""Several processes do what one does: the same steps, metrics and files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import launch, metrics, write_dataset
from safetensors.torch import load_file

from im2json.files import read_lines
from im2json.runs import RunFolder


@pytest.fixture(scope="module")
def nine(tmp_path_factory) -> str:
    """9 examples to train on: in batches of 4 the third step holds a single one, and leaves a process nothing."""
    return str(write_dataset(tmp_path_factory.mktemp("data") / "nine", train=9, validation=5, test=3))


@pytest.fixture(scope="module")
def flags(nine) -> list[Any]:
    return ["--dataset", nine, "--steps", 4, "--microbatch", 2, "--eval-batch-size", 2, "--save-every", 1, "--keep", 9]


@pytest.fixture(scope="module")
def one(train: Callable[..., RunFolder], flags, tmp_path_factory) -> RunFolder:
    return train(tmp_path_factory.mktemp("one") / "run", *flags)


# Has each process say which files of the run it opens for writing, makes or renames.
WATCHED = """
import os, sys

def watch(event, given):
    writes = event in ("os.mkdir", "os.rename") or event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes and f"{os.sep}run{os.sep}" in str(given[0]):
        os.write(1, f"process {os.environ['RANK']} writes {given[0]}\\n".encode())

sys.addaudithook(watch)
"""


def writers(printed: str) -> set[str]:
    return {line.split()[1] for line in printed.splitlines() if line.startswith("process ") and " writes " in line}


@pytest.fixture(scope="module")
def two(base_args, flags, tmp_path_factory) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("two") / "run")
    printed = launch("train", "--output", run.path, *base_args, *flags, before=WATCHED)
    assert printed.count("run folder: ") == 1
    assert writers(printed) == {"0"}
    return run


def test_two_processes_take_the_same_steps(one, two):
    """Loss, gradients and adapter of every step, the short one included."""
    assert len(metrics(one)) == len(metrics(two)) == 8
    for got, wanted in zip(metrics(two), metrics(one)):
        assert (got["step"], got["split"], got.get("stage")) == (wanted["step"], wanted["split"], wanted.get("stage"))
        assert got["values"] == pytest.approx(wanted["values"], rel=1e-4, abs=1e-9)
    assert metrics(two)[1]["values"] == pytest.approx(metrics(one)[1]["values"], rel=1e-6)
    # AdamW's first moment after one step is a tenth of the gradients
    got, wanted = (first_moments(run) for run in (two, one))
    norm = torch.cat([moment.flatten() for moment in wanted]).norm()
    assert norm > 1e-4
    for moment, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(moment, other, rtol=0, atol=1e-6 * float(norm))
    for step in (1, 2, 3, 4):
        got, wanted = (load_file(run.checkpoints / f"step-{step}" / "adapter_model.safetensors") for run in (two, one))
        assert got.keys() == wanted.keys()
        for name in wanted:  # its updates are about lr = 0.01 for gradients of any size, and so for rounding errors
            torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-5)


def first_moments(run: RunFolder) -> list[torch.Tensor]:
    stored = torch.load(run.checkpoints / "step-1" / "optimizer.pt", weights_only=True, map_location="cpu")
    return [state["exp_avg"] for _, state in sorted(stored["optimizer"]["state"].items())]


def test_two_processes_evaluate_each_example_once_and_in_order(one, two):
    rows = list(read_lines(two.predictions_file))
    places = [(row["stage"], row["step"], row["id"]) for row in rows]
    assert places == [(row["stage"], row["step"], row["id"]) for row in read_lines(one.predictions_file)]
    assert len(set(places)) == len(places) == 3 + 2 * 5 + 3
    assert [row["id"] for row in rows if row["stage"] == "before"] == [f"test/{i}.png" for i in range(3)]
    during = [row["id"] for row in rows if row["stage"] == "during" and row["step"] == 2]
    assert during == [f"validation/{i}.png" for i in range(5)]


# Has each process say which it is, and how long each target is that it has scored an answer to.
COUNTING = """
import os
import sys
import im2json.inference.evaluate as evaluate
score = evaluate.score_answer

def noting(evaluator, key, settings, labelled, answer):
    _, target = labelled
    sys.stdout.write(f"wrote {os.environ['RANK']} {len(target['a'])}\\n")
    return score(evaluator, key, settings, labelled, answer)

evaluate.score_answer = noting
"""


@pytest.mark.slow
def test_processes_share_long_and_short_answers_alike(small_model, base_args, nine, tmp_path):
    """Where the first half of a split is long and the second short, neither process has the long ones."""
    lengths = [40, 38, 36, 34, 5, 4, 3, 2]
    data = Path(shutil.copytree(nine, tmp_path / "data"))
    rows = [
        json.dumps({"file_name": f"{i % 5}.png", "ground_truth": json.dumps({"gt_parse": {"a": "x" * length}})})
        for i, length in enumerate(lengths)
    ]
    (data / "validation" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    flags = ["--dataset", data, "--steps", 1, "--eval-every", 1, "--eval-batch-size", 2, "--no-test"]
    printed = launch("train", "--output", tmp_path / "run", *base_args, *flags, before=COUNTING)
    written = sorted(tuple(map(int, line.split()[1:])) for line in printed.splitlines() if line.startswith("wrote "))
    assert written == [(0, 3), (0, 5), (0, 36), (0, 40), (1, 2), (1, 4), (1, 34), (1, 38)]
    rows = list(read_lines(RunFolder(tmp_path / "run").predictions_file))
    assert [len(row["target"]["a"]) for row in rows] == lengths


def test_two_processes_leave_one_result(one, two):
    results = [json.loads(run.result.read_text()) for run in (one, two)]
    for name in ("step", "best_step", "trainable", "total", "examples", "target_tokens"):
        assert results[0][name] == results[1][name]
    for part in ("before", "after"):
        assert results[1]["test"][part] == pytest.approx(results[0]["test"][part], abs=1e-9)
        assert results[1]["test"][part]["num"] == 3
    assert len(list(two.tensorboard.iterdir())) == 1
    assert list(two.path.rglob("*.tmp*")) == []


def stopped_after_two(run: RunFolder, folder: Path) -> RunFolder:
    """A copy of a finished run as it was after its second step."""
    copy = RunFolder(Path(shutil.copytree(run.path, folder)))
    copy.result.unlink()
    for step in (3, 4):
        shutil.rmtree(copy.checkpoints / f"step-{step}")
    return copy


def assert_like(run: RunFolder, whole: RunFolder) -> None:
    for got, wanted in zip(metrics(run), metrics(whole), strict=True):
        assert got["values"] == pytest.approx(wanted["values"], rel=1e-4, abs=1e-9)
    for name, value in load_file(run.checkpoints / "step-4" / "adapter_model.safetensors").items():
        wanted = load_file(whole.checkpoints / "step-4" / "adapter_model.safetensors")[name]
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one(one, tmp_path):
    """As if the machine had grown: the number of processes changes nothing."""
    run = stopped_after_two(one, tmp_path / "run")
    printed = launch("train", "--resume", run.path, before=WATCHED)
    assert writers(printed) == {"0"}
    assert printed.count("begun on 1 process, goes on with 2: 4 examples a step, all processes together, as") == 1
    assert_like(run, one)


def test_one_process_resumes_a_run_of_two(one, two, resume, tmp_path, capsys):
    run = stopped_after_two(two, tmp_path / "run")
    resume(run)
    assert "begun on 2 processes, goes on with 1: 4 examples a step, all processes" in capsys.readouterr().out
    assert_like(run, one)


@pytest.mark.slow
def test_two_processes_evaluate_a_finished_run(one, tmp_path):
    run = RunFolder(Path(shutil.copytree(one.path, tmp_path / "run")))
    before = list(read_lines(run.predictions_file))
    printed = launch("evaluate", run.path, before=WATCHED)
    assert printed.count("test split, generated text") == 1
    assert writers(printed) == {"0"}
    assert sorted(map(str, read_lines(run.predictions_file))) == sorted(map(str, before))


@pytest.mark.slow
def test_a_step_smaller_than_the_processes_works(base_args, nine, train, tmp_path):
    """Three processes and two examples a step."""
    flags = ["--dataset", nine, "--batch-size", 2, "--microbatch", 1, "--steps", 2, "--eval-every", 0, "--no-test"]
    launch("train", "--output", tmp_path / "three", *base_args, *flags, processes=3)
    runs = RunFolder(tmp_path / "three"), train(tmp_path / "one", *flags)
    got, wanted = (load_file(run.adapter / "adapter_model.safetensors") for run in runs)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-5)


# Has each process say whose features it works out, two at a time, or one of them find the disk full.
SHARING = """
import os, sys
import im2json.model.features as features
from im2json.data.collate import Collator
pictures, features.CHUNK = Collator.pictures_of, 2

def told(self, examples):
    sys.stdout.write(f"process {os.environ['RANK']} saw " + " ".join(example.id for example in examples) + "\\n")
    return pictures(self, examples)

Collator.pictures_of = told
if "full" in sys.argv:
    sys.argv.remove("full")
    features.open = lambda *given: open("/dev/full" if os.environ["RANK"] == "1" else given[0], "r+b")
"""


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_two_processes_share_kept_features(base_args, flags, train, tmp_path, full):
    language = [*flags, "--target-modules", "language", "--steps", 8, "--eval-every", 0, "--no-test"]
    one, two = train(tmp_path / "one", *language), RunFolder(tmp_path / "two")
    more = ["full"] if full else []
    printed = launch("train", "--output", two.path, *base_args, *language, *more, before=SHARING)
    assert [row["values"]["loss"] for row in metrics(two)] == pytest.approx(
        [row["values"]["loss"] for row in metrics(one)], rel=1e-4
    )
    saw = [line.split() for line in printed.splitlines() if line.startswith("process ")]
    if full:
        assert "cannot be kept: [Errno 28] No space left on device" in printed
    else:
        assert "worked out once" in printed
        seen = {rank: sorted(id for _, of, _, *ids in saw if of == rank for id in ids) for rank in "01"}
        assert seen["0"] == [f"train/{i}.png" for i in (0, 1, 4, 5, 8)]
        assert seen["1"] == [f"train/{i}.png" for i in (2, 3, 6, 7)]
