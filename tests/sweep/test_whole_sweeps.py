"""Whole sweeps in processes of their own: nothing is repeated, lost or left behind, on this machine or on a cluster."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from sweeps import jobs_of, small_base, start_sweep, sweep_to_its_end, wait_for, worker_of

from im2json.files import is_locked, read_lines
from im2json.sweeps.halving import value_at
from im2json.sweeps.processes import signal_group


@pytest.fixture(scope="module")
def sound_grid(small_model, dataset, tmp_path_factory) -> Path:
    """A grid of three points."""
    path = tmp_path_factory.mktemp("grid") / "small.json"
    path.write_text(json.dumps({"base": small_base(small_model, dataset), "ablate": {"r": [2, 4], "lr": [0.1]}}))
    return path


@pytest.fixture(scope="module")
def grid(sound_grid) -> Path:
    """The same grid, and a point that cannot begin."""
    stored = json.loads(sound_grid.read_text())
    stored["ablate"]["target_modules"] = ["nothing"]
    path = sound_grid.with_name("grid.json")
    path.write_text(json.dumps(stored))
    return path


def ranked(sweep: Path) -> list[dict[str, str]]:
    """Return the rows of leaderboard.csv without time and memory."""
    with (sweep / "leaderboard.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "peak_memory_bytes")} for row in csv.DictReader(file)
        ]


def judged(sweep: Path) -> Any:
    """Return axes, missing points and test scores of summary.json."""
    summary = json.loads((sweep / "summary.json").read_text())
    return summary["axes"], summary["missing"], summary["test"]


def assert_same_table(sweep: Path, whole: Path) -> None:
    """Assert that a sweep of the sound points ranks and judges as that of all points, but for the one that fails."""
    (axes, missing, test), (other_axes, other_missing, other_test) = judged(sweep), judged(whole)
    other_rows = [{k: v for k, v in row.items() if k != "target_modules"} for row in ranked(whole)]
    assert ranked(sweep) == other_rows and len(other_rows) == 3
    assert axes == other_axes[:2] and [axis["axis"] for axis in other_axes[2:]] == ["target_modules"]
    assert (missing, other_missing) == ([], ["target_modules=nothing"])
    assert test == other_test


@pytest.fixture(scope="module")
def swept(grid, tmp_path_factory) -> tuple[Path, int, str]:
    """A sweep that nothing interrupted: its folder, its exit status and its output."""
    sweep = tmp_path_factory.mktemp("sweeps") / "whole"
    return sweep, *sweep_to_its_end(grid, sweep)


@pytest.mark.slow
def test_a_sweep_ranks_what_finishes_and_reports_what_fails(grid, swept):
    sweep, status, printed = swept
    assert status == 1, printed
    assert {name: job.state for name, job in jobs_of(grid, sweep).items()} == {
        "base": "done", "r=2": "done", "lr=0.1": "done", "target_modules=nothing": "to do",
    }  # fmt: skip
    assert "target_modules=nothing: failed\n    Error: --target-modules: no linear layer is named nothing" in printed
    assert "1 of 4 points failed" in printed
    assert "base: running" in printed and "base: done, step 8 of 8, edit_distance 0." in printed
    values = [float(row["edit_distance"]) for row in ranked(sweep)]
    assert len(values) == 3 and values == sorted(values)
    for job in jobs_of(grid, sweep).values():
        if job.state == "done":
            assert job.run.read_config().flat() == {
                **job.point.config.flat(), "output": str(job.run.path), "threads": job.run.read_config().train.threads,
            }  # fmt: skip
            assert json.loads(job.run.result.read_text())["test"] is None
            predictions = read_lines(job.run.predictions_file)
            assert {row["split"] for row in predictions if row["stage"] != "during"} <= {"test"}
    axes, missing, test = judged(sweep)
    assert [axis["axis"] for axis in axes] == ["r", "lr", "target_modules"]
    assert missing == ["target_modules=nothing"]
    winner = next(j for j in jobs_of(grid, sweep).values() if j.point.setting == ranked(sweep)[0]["config"])
    assert test["point"] == winner.point.id and test["before"]["num"] == test["after"]["num"] == 3


@pytest.mark.slow
def test_a_second_call_repeats_nothing_and_a_new_value_adds_its_points_alone(grid, swept, tmp_path):
    sweep = swept[0]
    files = [path for path in sweep.rglob("*") if path.name in ("metrics.jsonl", "result.json", "test.json")]
    before = {path: path.stat().st_mtime_ns for path in files}
    table = ranked(sweep), judged(sweep)
    longer = json.loads(grid.read_text())
    del longer["ablate"]["target_modules"]
    longer["ablate"]["r"].append(1)
    (tmp_path / "longer.json").write_text(json.dumps(longer))
    status, printed = sweep_to_its_end(tmp_path / "longer.json", sweep)
    assert status == 0, printed
    assert [line for line in printed.splitlines() if line.endswith(": running")] == ["r=1: running"]
    done = [path for path in before if path.name != "test.json"]
    assert [path for path in done if path.stat().st_mtime_ns != before[path]] == []
    assert len(ranked(sweep)) == 4

    status, printed = sweep_to_its_end(grid, sweep)
    assert status == 1
    assert [line for line in printed.splitlines() if line.endswith(": running")] == ["target_modules=nothing: running"]
    assert (ranked(sweep), judged(sweep)) == table


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_of_a_point_ends_with_the_same_table(sound_grid, swept, tmp_path):
    """One of the two running points is killed too, after a checkpoint; the second sweep waits for the other."""
    sweep = tmp_path / "killed"
    process = start_sweep(sound_grid, sweep)
    base, other = list(jobs_of(sound_grid, sweep).values())[:2]
    wait_for(lambda: (base.run.checkpoints / "step-2").exists())
    process.kill()
    signal_group(base, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not is_locked(base.log))
    assert not base.run.done
    process = start_sweep(sound_grid, sweep)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert [row["step"] for row in read_lines(base.run.metrics_file) if row["split"] == "train"] == [*range(1, 9)]
    assert f"run folder: {other.run.path}" in other.log.read_text() and other.log.read_text().count("run folder: ") == 1
    assert_same_table(sweep, swept[0])


@pytest.mark.slow
def test_a_sweep_that_halves_records_what_it_drops(grid, swept, tmp_path):
    """A dropped setting is no failure, the others end as without halving, and nothing is done twice."""
    sweep = tmp_path / "halved"
    flags = ("--halve", "edit_distance")
    status, printed = sweep_to_its_end(grid, sweep, *flags)
    assert status == 1 and "1 of 4 points failed" in printed
    summary = json.loads((sweep / "summary.json").read_text())
    (dropped,) = [found for found in summary["dropped"] if found["step"] == 2]
    jobs = {job.point.setting: job for job in jobs_of(grid, sweep).values()}
    job = jobs[dropped["setting"]]
    assert job.state == "stopped" and job.run.latest_checkpoint().name == "step-2"
    values = {name: value_at(job, "edit_distance", 2) for name, job in jobs_of(grid, swept[0]).items() if job.run.done}
    assert dropped["value"] == max(values.values()) == values[dropped["setting"]]
    whole = {row["config"]: {k: v for k, v in row.items() if k != "rank"} for row in ranked(swept[0])}
    assert [{k: v for k, v in row.items() if k != "rank"} for row in ranked(sweep)] == [
        whole[row["config"]] for row in ranked(sweep)
    ]
    assert f"Dropped by halving: {dropped['setting']} after step 2 (" in (sweep / "leaderboard.md").read_text()
    _, printed = sweep_to_its_end(grid, sweep, *flags)
    assert [line for line in printed.splitlines() if ": running" in line] == ["target_modules=nothing: running"]
    assert json.loads((sweep / "summary.json").read_text())["dropped"] == summary["dropped"]


@pytest.mark.slow
def test_a_ray_cluster_gives_the_table_that_this_machine_gives(sound_grid, swept, tmp_path):
    """The cluster has two machines; one of its workers is killed in the middle of a point."""
    from ray import cluster_utils

    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        sweep = tmp_path / "ray"
        process = start_sweep(sound_grid, sweep, "--ray", cluster.address)
        base, other = list(jobs_of(sound_grid, sweep).values())[:2]
        wait_for(lambda: (base.run.checkpoints / "step-2").exists())
        os.kill(worker_of(base), signal.SIGKILL)
        printed, _ = process.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, printed
    assert base.log.read_text().count("run folder: ") == 2 and other.log.read_text().count("run folder: ") == 1
    assert [row["step"] for row in read_lines(base.run.metrics_file) if row["split"] == "train"] == [*range(1, 9)]
    assert_same_table(sweep, swept[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_leaves_no_process_and_goes_on(sound_grid, tmp_path, number):
    longer = ("--set", "steps=60", "--set", "eval_every=60")
    grid = tmp_path / "two.json"
    grid.write_text(json.dumps({"base": json.loads(sound_grid.read_text())["base"], "ablate": {"r": [2, 4]}}))
    sweep = tmp_path / "stopped"
    process = start_sweep(grid, sweep, *longer)
    jobs = list(jobs_of(grid, sweep, *longer[1::2]).values())
    wait_for(lambda: jobs[0].run.metrics_file.exists())
    process.send_signal(number)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 130, printed
    assert "Error: interrupted: the same command goes on" in printed
    assert "no point has a result yet" in printed
    assert not any(is_locked(job.log) for job in jobs)
    (checkpoint,) = jobs[0].run.checkpoints.iterdir()
    assert 1 <= int(checkpoint.name.removeprefix("step-")) < 60
    if number == signal.SIGTERM:
        _, printed = sweep_to_its_end(grid, sweep, *longer)
        assert "base: done" in printed and len(ranked(sweep)) == 2
        assert [row["step"] for row in read_lines(jobs[0].run.metrics_file)] == [*range(1, 61), 60]
