"""What the tests of sweeps share: plans, jobs and boards without a run, and whole sweeps in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from forks import FORKING, Process
from helpers import ROOT, clear_error, wait_for

from im2json.files import append_lines, lock
from im2json.scoring import StreamingEvaluator
from im2json.sweeps.grid import Plan, make_plan, read_plan
from im2json.sweeps.jobs import Job, PointJob, make_jobs
from im2json.sweeps.leaderboard import Board, make_board
from im2json.sweeps.processes import launch

__all__ = ["ROOT", "clear_error", "wait_for"]


def plan(overrides: dict[str, Any] | None = None, **grid: Any) -> Plan:
    """Return the plan of a grid."""
    return make_plan(grid, overrides or {})


def hold(job: Job, gpus: str = "", before: str = "") -> subprocess.Popen:
    """Start a process as the job. It runs the shell code `before`, and then logs "got it" at each SIGTERM."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    program = f"{before} trap 'echo got it' TERM; echo ready; while :; do sleep 0.05; done"
    with job.log.open("ab") as log:
        assert lock(log)
        process = launch(job, ["sh", "-c", program], log, {"CUDA_VISIBLE_DEVICES": gpus})
    wait_for(lambda: "ready" in job.log.read_text())
    return process


def write_run(folder: Path, right: list[bool], **result: Any) -> None:
    """Write a finished run. Each validation example has one field, which is wrong at step 1 and as given at step 2."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for step, marks in ((1, [False] * len(right)), (2, right)):
        append_lines(
            folder / "predictions.jsonl",
            (
                {"id": str(i), "step": step, "split": "validation", "stage": "during", "target": {"a": str(i)},
                 "text": json.dumps({"a": str(i) if mark else "?"})}
                for i, mark in enumerate(marks)
            ),
        )  # fmt: skip
    evaluator = StreamingEvaluator()
    for i, mark in enumerate(right):
        evaluator.update(json.dumps({"a": str(i) if mark else "?"}), {"a": str(i)}, str(i))
    stored = {"step": 2, "best_step": 2, "validation": evaluator.compute(), "trainable": 9, "seconds": 61.0,
              "peak_memory_bytes": 2**30}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(stored | result))


def board_of(sweep: Path, found: Plan, rights: dict[str, list[bool]]) -> Board:
    """Return the leaderboard after the runs of the named points, with these answers right; other points have no run."""
    for point in found.points:
        if point.name in rights:
            write_run(sweep / "points" / point.id, rights[point.name])
    board = make_board(found, make_jobs(found.points, sweep))
    assert board is not None
    return board


def small_base(model: str, dataset: str) -> dict[str, Any]:
    """Return the base of a grid whose points take 8 steps."""
    return {
        "model": model, "dataset": dataset, "precision": "fp32", "quant": "none", "r": 4, "dropout": 0,
        "lr": 0.01, "optimizer": "adamw", "batch_size": 4, "steps": 8, "eval_every": 2, "max_new_tokens": 6,
        "metric": "edit_distance",
    }  # fmt: skip


def start_sweep(grid: Path, output: Path, *flags: str) -> subprocess.Popen:
    """Start sweep.py, which runs two points at a time."""
    command = [sys.executable, str(ROOT / "sweep.py"), str(grid), "--output", str(output), "--jobs", "2", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=environment, **pipes)


SWEEP = FORKING + "import sweep\nsweep.main()\n"


def sweep_to_its_end(grid: Path, output: Path, *flags: str) -> tuple[int, str]:
    """Run sweep.py with forked points, and return its exit status and its output."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = Process(SWEEP, str(grid), "--output", str(output), "--jobs", "2", *flags, env=environment)
    printed = "".join(process.communicate(timeout=300))
    assert process.returncode is not None
    return process.returncode, printed


def jobs_of(grid: Path, sweep: Path, *overrides: str) -> dict[str, PointJob]:
    """Return the jobs of a sweep by the names of their points."""
    return {job.point.name: job for job in make_jobs(read_plan(grid, overrides).points, sweep)}


def worker_of(job: Job) -> int:
    """Return the process that has started a job's launcher."""
    group = job.process_group()
    assert group is not None
    status = Path(f"/proc/{group.number}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))
