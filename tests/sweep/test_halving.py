"""Successive halving drops the worse half of the settings at each rung, and the same ones when it is called again."""

from __future__ import annotations

from pathlib import Path

from sweeps import clear_error, plan

from im2json.files import append_lines
from im2json.sweeps.halving import halve
from im2json.sweeps.jobs import make_jobs


def halved(found, sweep: Path, curves: dict[str, list[float]], fails: str = "") -> tuple[list, list, dict[str, str]]:
    """Halve points that have these values of field_f1 at steps 2, 4, ...; return dropped, starts and states."""
    jobs, starts, dropped = make_jobs(found.points, sweep), [], []

    def run() -> None:
        for job in (job for job in jobs if job.state in ("to do", "stopped")):
            starts.append((job.point.name, job.stop_after))
            if job.point.name == fails:
                job.state = "failed"
                continue
            job.run.path.mkdir(parents=True, exist_ok=True)
            job.run.config.touch()
            curve = curves[job.point.name]
            end = min(job.stop_after or 99, 2 * len(curve))
            steps = range(job.validated() + 2, end + 1, 2)
            rows = [{"step": s, "split": "validation", "values": {"field_f1": curve[s // 2 - 1]}} for s in steps]
            append_lines(job.run.metrics_file, rows)
            if end == 2 * len(curve):
                job.run.result.touch()
            job.state = job.state_on_disk()

    halve(jobs, "field_f1", run, dropped)
    assert {d.metric for d in dropped} <= {"field_f1"}
    return [(d.setting, d.step, d.value) for d in dropped], starts, {job.point.name: job.state for job in jobs}


def test_the_worse_half_is_dropped_at_each_rung(tmp_path):
    found = plan(base={"eval_every": 2}, grid={"r": [1, 2, 3, 4, 5]})
    curves = {"r=1": [1, 2, 2, 2], "r=2": [5, 2, 1, 9], "r=3": [4, 3, 7, 8], "r=4": [5, 8, 8, 7], "r=5": [3, 9, 9, 9]}
    once = halved(found, tmp_path, curves)
    assert once[0] == [("r=5", 2, 3), ("r=1", 2, 1), ("r=2", 4, 2)]
    assert once[1][:5] == [(f"r={r}", 2) for r in range(1, 6)]
    assert once[1][5:] == [("r=2", 4), ("r=3", 4), ("r=4", 4), ("r=3", 8), ("r=4", 8)]
    assert once[2] == {"r=1": "dropped", "r=2": "dropped", "r=3": "done", "r=4": "done", "r=5": "dropped"}
    assert halved(found, tmp_path, curves) == (once[0], [], once[2])  # a second call starts nothing


def test_settings_are_halved_by_the_mean_of_their_seeds(tmp_path):
    found = plan(base={"eval_every": 2}, grid={"r": [1, 2]}, seeds=[0, 1])
    curves = {"r=1 seed=0": [9, 9], "r=1 seed=1": [2, 2], "r=2 seed=0": [6, 6], "r=2 seed=1": [6, 6]}
    dropped, starts, states = halved(found, tmp_path / "a", curves)
    assert dropped == [("r=1", 2, 5.5)] and starts[4:] == [("r=2 seed=0", None), ("r=2 seed=1", None)]
    assert list(states.values()) == ["dropped", "dropped", "done", "done"]
    dropped, _, states = halved(found, tmp_path / "b", curves, fails="r=1 seed=1")
    assert dropped == [("r=2", 2, 6)] and list(states.values()) == ["done", "failed", "dropped", "dropped"]


def test_a_setting_that_is_done_is_not_dropped(tmp_path):
    """For example a setting that was finished before, without halving."""
    found = plan(base={"eval_every": 2}, grid={"r": [1, 2]})
    (tmp_path / "points" / found.points[0].id).mkdir(parents=True)
    jobs = make_jobs(found.points, tmp_path)
    append_lines(jobs[0].run.metrics_file, [{"step": 2, "split": "validation", "values": {"field_f1": 0.1}}])
    jobs[0].run.result.touch()
    dropped, starts, states = halved(found, tmp_path, {"r=2": [5, 5]})
    assert dropped == [] and states == {"r=1": "done", "r=2": "done"} and starts[0] == ("r=2", 2)


def test_halving_takes_the_same_validations_of_all_points_and_a_sweep_that_starts(cli, tmp_path):
    (tmp_path / "g.json").write_text('{"grid": {"eval_every": [5, 10]}}')
    message = clear_error(cli("sweep", tmp_path / "g.json", "--output", tmp_path / "sweep", "--halve", "field_f1"))
    assert message == "--halve compares validations at the same step, so eval_every may not differ: [5, 10]"
    assert not (tmp_path / "sweep").exists()
    for flag in ("--dry-run", "--list"):
        assert "leave out --dry-run and --list" in cli("sweep", tmp_path / "g.json", "--halve", "field_f1", flag).output
