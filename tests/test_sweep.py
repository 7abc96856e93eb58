"""sweep.py: grids that are checked before anything starts, points that are never repeated, and an answer in the end."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psutil
import pytest
from forks import Process
from helpers import ROOT, clear_error, wait_for

from im2json.options import FIELDS, TrainConfig
from im2json.runs import RunFolder, append_lines, read_lines
from im2json.scoring import StreamingEvaluator
from im2json.sweep.answer import answer, score_test, write_board
from im2json.sweep.cluster import start_guard
from im2json.sweep.grid import make_plan, read_plan
from im2json.sweep.halving import Dropped, halve, value_at
from im2json.sweep.launch import (
    Here,
    Job,
    command,
    is_locked,
    launch,
    lock,
    make_jobs,
    make_slots,
    run_jobs,
    signal_group,
)
from im2json.sweep.leaderboard import make_board, markdown
from im2json.sweep.progress import Progress


def plan(overrides: dict[str, Any] | None = None, **grid: Any):
    return make_plan(grid, overrides or {})


def options(points: list, *names: str) -> list[tuple]:
    return [tuple(point.config.flat()[name] for name in names) for point in points]


# --- the grid


def test_a_grid_crosses_its_axes():
    points = plan(base={"steps": 5}, grid={"r": [8, 16], "lr": [1e-3, 2e-3]}).points
    assert options(points, "r", "lr", "alpha", "steps") == [
        (8, 1e-3, 16, 5), (8, 2e-3, 16, 5), (16, 1e-3, 32, 5), (16, 2e-3, 32, 5),
    ]  # fmt: skip
    assert [point.name for point in points[:2]] == ["r=8 lr=0.001", "r=8 lr=0.002"]


def test_an_ablation_varies_one_axis_at_a_time_around_its_base():
    found = plan(base={"r": 32}, ablate={"r": [8, 32], "alpha": ["r", "2r"], "dropout": [0, 0.05]})
    assert options(found.points, "r", "alpha", "dropout") == [(32, 64, 0), (8, 16, 0), (32, 32, 0), (32, 64, 0.05)]
    assert [point.name for point in found.points] == ["base", "r=8", "alpha=r", "dropout=0.05"]
    assert found.base == {"r": 32, "alpha": "2r", "dropout": 0}
    assert found.points[1].place == {"r": 8, "alpha": "2r", "dropout": 0}


def test_an_alpha_that_follows_r_is_told_as_such():
    """The point r=8 has alpha 16, so its place is not that of the base's 64."""
    for base in ({"r": 32}, {"r": 32, "alpha": "2r"}):
        found = plan(base=base, ablate={"alpha": [16, 64, 5], "r": [8]})
        assert options(found.points, "r", "alpha") == [(32, 64), (32, 16), (32, 5), (8, 16)]
        assert found.base == {"alpha": "2r", "r": 32} and found.points[-1].place == {"alpha": "2r", "r": 8}
        assert found.axes == {"alpha": ["2r", 16, 5], "r": [32, 8]}
    assert plan(base={"r": 32}, ablate={"alpha": [16, 64]}).axes == {"alpha": [16, 64]}
    found = plan(base={"r": 32, "alpha": 64}, ablate={"alpha": [16, 64], "r": [8]})
    assert found.points[-1].place == {"alpha": 64, "r": 8} and options(found.points[-1:], "alpha") == [(64,)]


def test_a_line_break_in_a_value_is_shown_escaped(tmp_path):
    found = plan(grid={"prompt": ["read\nit", "read it"]})
    assert [point.name for point in found.points] == [r"prompt='read\nit'", "prompt=read it"]
    told = markdown(board_of(tmp_path, found, {r"prompt='read\nit'": [True], "prompt=read it": [False]}))
    assert [line[:3] for line in told.splitlines()[2:5]] == ["| *", "| p", ""]
    assert r"- prompt: 'read\nit' is best" in told


def test_seeds_repeat_every_point():
    points = plan(grid={"r": [8, 16]}, seeds=[0, 1]).points
    assert options(points, "r", "seed") == [(8, 0), (8, 1), (16, 0), (16, 1)]
    assert [point.setting for point in points] == ["r=8", "r=8", "r=16", "r=16"]


@pytest.mark.parametrize(
    ("alpha", "r", "wanted"), [("2r", 8, 16), ("r", 8, 8), ("0.5r", 8, 4), (5, 8, 5), ("3r", 16, 48)]
)
def test_alpha_may_depend_on_r(alpha, r, wanted):
    assert options(plan(base={"alpha": alpha}, grid={"r": [r]}).points, "alpha") == [(wanted,)]
    assert options(plan(base={"r": r}, grid={"alpha": [alpha]}).points, "alpha") == [(wanted,)]


def test_alpha_follows_the_r_of_a_preset():
    assert options(plan(preset="cord", base={"alpha": "r"}).points, "r", "alpha", "lr") == [(32, 32, 2e-4)]


def test_an_id_says_what_decides_the_result_and_nothing_else():
    def ids(*rs: int, **base: Any) -> list[str]:
        return [point.id for point in plan(base=base, grid={"r": list(rs)}).points]

    assert ids(8, 16) == ids(8, 12, 16)[::2] == ids(8, 16, threads=1, workers=2, keep=5, lr=5e-3)
    assert not set(ids(8, 16)) & set(ids(8, 16, steps=7))
    (alone,) = plan(base={"r": 8, "alpha": "2r"}).points
    assert alone.id == ids(8)[0] == plan(ablate={"r": [16]}, base={"r": 8}).points[0].id


@pytest.mark.parametrize("microbatch", [2, "auto"])
@pytest.mark.parametrize("preset", [None, "tiny", "cord"])
def test_the_flags_of_a_point_make_its_config(preset, microbatch, monkeypatch):
    import train

    base = {"model": "somewhere", "rslora": True, "gradient_checkpointing": "off", "alpha": "2r", "prompt": "read it"}
    base["microbatch"] = microbatch
    (point,) = plan(preset=preset, base={**base, "r": 32, "lr": 1.23456789e-4}).points
    configs: list[TrainConfig] = []
    monkeypatch.setattr("im2json.programs.train", lambda config, *more: configs.append(config))
    train.main(point.flags, standalone_mode=False)
    assert configs == [point.config]
    assert configs[0].train.test is False


def test_set_overrides_the_base(tmp_path):
    grid = tmp_path / "g.json"
    grid.write_text('{"base": {"steps": 300}, "grid": {"r": [8]}}')
    (point,) = read_plan(grid, ["steps=50", "dataset=17", "alpha=3r", "letterbox=true", "microbatch=auto"]).points
    flat = point.config.flat()
    names = ("steps", "dataset", "alpha", "letterbox", "microbatch")
    assert [flat[name] for name in names] == [50, "17", 24.0, True, "auto"]


def test_200_points_are_planned_in_under_a_second():
    start = time.process_time()
    found = plan(grid={"r": list(range(1, 26)), "alpha": ["r", "2r"], "dropout": [0, 0.1]}, seeds=[0, 1]).points
    assert len({point.id for point in found}) == 200
    assert time.process_time() - start < 1


MISTAKES = {
    '{"base": {"rr": 8}}': "base.rr: unknown option 'rr': did you mean 'r'?",
    '{"grid": {"r": [8, "x"]}}': "grid.r: 'x' is not a whole number",
    '{"ablate": {"dropout": [0, 1.5]}}': "ablate.dropout: 1.5 is too large: at most 0.999",
    '{"grid": {"lr": [1e-3, NaN]}}': "grid.lr: nan is not a finite number",
    '{"grid": {"r": []}}': "grid.r: expected a list of values, like [8, 16, 32], not []",
    '{"grid": {"r": 8}}': "grid.r: expected a list of values, like [8, 16, 32], not 8",
    '{"grid": {"r": [8, 16, 8]}}': "grid.r: 8 comes twice",
    '{"grid": {"r": [8], "alpha": ["2r", 16]}}': "r=8 alpha=2r and r=8 alpha=16 are the same point: leave one out",
    '{"base": {"r": 8}, "ablate": {"alpha": ["2r", 16]}}': "ablate.alpha: '2r' and 16 are the same point",
    '{"grid": {"alpha": ["two r"]}}': "grid.alpha: 'two r' is neither a number nor a multiple of r, like \"2r\"",
    '{"grid": {"alpha": ["٣r"]}}': "grid.alpha: '٣r' is neither a number nor a multiple of r, like \"2r\"",
    '{"base": {"alpha": "0r"}}': "base.alpha: 0.0 is too small: more than 0",
    '{"grid": {"alpha": ["%sr"]}}' % ("9" * 400): "grid.alpha: inf is not a finite number",
    '{"grid": {"lr": [1%s]}}' % ("0" * 400): "grid.lr: a whole number of more than 300 digits is too large",
    '{"base": {"steps": 1%s}}' % ("0" * 400): "base.steps: a whole number of more than 300 digits is too large",
    '{"grid": {"prompt": ["a\\u0000b"]}}': r"grid.prompt: 'a\x00b' holds a character that no command line can",
    '{"base": {"dataset": "a\\ud800"}}': r"base.dataset: 'a\ud800' holds a character that no command line can",
    '{"grid": {"threads": [1, 2]}}': "grid.threads: it does not change the result; it belongs into base",
    '{"grid": {"metric": ["key_f1"]}}': "grid.metric: points are ranked by one metric; it belongs into base",
    '{"base": {"output": "there"}}': "base.output: leave it out, sweep.py names the run folders itself",
    '{"base": {"test": true}}': "base.test: leave it out, sweep.py scores the test split once, for the winner",
    '{"base": {"eval_every": 0}}': "eval_every: 0 leaves nothing to rank the points by: at least 1",
    '{"base": {"r": 8}, "grid": {"r": [8]}}': "r is in base (or --set) and an axis of grid: leave one out",
    '{"base": {"seed": 1}, "seeds": [1]}': "base.seed and seeds: leave one out",
    '{"grid": {}, "ablate": {}}': "grid and ablate: give one of the two",
    '{"seeds": [0, -1]}': "seeds: -1 is too small: at least 0",
    '{"preset": "cord2"}': "preset: 'cord2' is not one of tiny, cord",
    '{"preset": ["cord"]}': "preset: ['cord'] is not one of tiny, cord",
    '{"r": [8]}': "unknown key 'r': a grid holds preset, base, grid, ablate, seeds; options go into base",
    '{"grid": {"r": [8], "r": [16]}}': "key 'r' comes twice",
    "[8]": "a grid is a JSON object",
    '{"base":\n {"r": 8,}}': "not JSON: ",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_before_anything_starts(text, cli, tmp_path):
    grid = tmp_path / "g.json"
    grid.write_text(text)
    message = clear_error(cli("sweep", grid, "--output", tmp_path / "sweep"))
    assert message.startswith(str(grid)) and MISTAKES[text] in message
    assert not (tmp_path / "sweep").exists()


def test_a_mistake_in_set_is_one_line_too(cli, tmp_path):
    (tmp_path / "g.json").write_text('{"grid": {"r": [8]}}')
    for given, message in {
        "steps": "--set steps: expected NAME=VALUE, like steps=50",
        "steps=many": "--set steps: 'many' is not a whole number",
        "output=there": "--set output: leave it out, sweep.py names the run folders itself",
        "r=9": "r is in base (or --set) and an axis of grid: leave one out",
    }.items():
        assert clear_error(cli("sweep", tmp_path / "g.json", "--set", given)).endswith(message)


def test_the_line_of_malformed_json_is_named(cli, tmp_path):
    (tmp_path / "g.json").write_text('{"base":\n {"r": 8 "lr": 1}}')
    assert "g.json:2: not JSON" in clear_error(cli("sweep", tmp_path / "g.json"))


@pytest.mark.parametrize("name", ["grid.json", "grid-cord.json"])
def test_the_grids_of_the_repository(name):
    found = read_plan(ROOT / name)
    assert [point.name.split("=")[0] for point in found.points] == ["base", "r", "r", "alpha", "dropout", "lr"]
    assert dict(options(found.points[:3], "r", "alpha")) == {8: 16, 16: 32, 32: 64}
    assert options(found.points[3:4], "r", "alpha") == [(32, 32)]
    assert set(options(found.points, "dropout")) == {(0.0,), (0.05,)}
    rates = {lr for (lr,) in options(found.points, "lr")}
    assert rates == ({2e-4, 2e-5} if "cord" in name else {FIELDS["lr"].default, FIELDS["lr"].default / 10})


# --- the commands


def test_dry_run_and_list_start_nothing(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "g.json").write_text('{"grid": {"r": [8, 16, 32]}}')
    sweep = tmp_path / "sweep"
    ids = [point.id for point in read_plan(tmp_path / "g.json").points]
    for id, name in ((ids[0], "result.json"), (ids[0], "config.json"), (ids[1], "config.json")):
        (sweep / "points" / id).mkdir(parents=True, exist_ok=True)
        (sweep / "points" / id / name).write_text("{}")
    before = sorted(sweep.rglob("*"))
    shown = cli("sweep", tmp_path / "g.json", "--output", sweep, "--dry-run").output
    states = [line.split(": ")[1].split(",")[0] for line in shown.splitlines() if not line.startswith(" ")]
    assert states == ["done", "stopped", "to do"]
    commands = cli("sweep", tmp_path / "g.json", "--output", sweep, "--list").output.splitlines()
    for line, listed in zip(
        (line.strip() for line in shown.splitlines() if line.startswith(" ")), commands, strict=True
    ):
        assert line.startswith(listed) and "--threads" not in listed
    assert f"--resume {sweep / 'points' / ids[1]}" in commands[0]
    assert f"--output {sweep / 'points' / ids[2]}" in commands[1] and "--no-test" in commands[1]
    assert sorted(sweep.rglob("*")) == before


def test_a_stopped_point_goes_on_with_the_options_that_change_no_result(tmp_path):
    found = plan(base={"microbatch": 1, "gradient_checkpointing": "on", "workers": None, "steps": 5, "threads": 2})
    (job,) = make_jobs(found.points, tmp_path)
    assert "--resume" not in command(job, Path("train.py"), 1, 1)
    job.run.path.mkdir(parents=True)
    job.run.config.touch()
    flags = command(job, Path("train.py"), 1, 1)
    assert flags[flags.index("--resume") + 2 :] == [
        "--microbatch",
        "1",
        "--gradient-checkpointing",
        "on",
        "--threads",
        "2",
    ]


def test_an_output_that_cannot_be_is_one_line_that_names_it(cli, tmp_path):
    (tmp_path / "g.json").write_text("{}")
    for output in (tmp_path / "g.json", tmp_path / "g.json" / "below"):
        assert clear_error(cli("sweep", tmp_path / "g.json", "--output", output)).startswith(f"--output {output}")


def test_a_cluster_that_is_not_there_is_told_at_once(cli, tmp_path):
    (tmp_path / "g.json").write_text("{}")
    for address, why in {
        "127.0.0.1:1": "no Ray cluster answers there", "ray://127.0.0.1:1": "no Ray cluster answers there",
        "local": "expected the HOST:PORT of a cluster", "somewhere": "expected the HOST:PORT of a cluster",
    }.items():  # fmt: skip
        message = clear_error(cli("sweep", tmp_path / "g.json", "--output", tmp_path / "sweep", "--ray", address))
        assert message.startswith(f"--ray {address}: {why}")
    assert not (tmp_path / "sweep").exists()


def test_halving_wants_one_beat_of_validations_and_starts_to_be_of_use(cli, tmp_path):
    (tmp_path / "g.json").write_text('{"grid": {"eval_every": [5, 10]}}')
    message = clear_error(cli("sweep", tmp_path / "g.json", "--output", tmp_path / "sweep", "--halve", "field_f1"))
    assert message == "--halve compares validations at the same step, so eval_every may not differ: [5, 10]"
    assert not (tmp_path / "sweep").exists()
    for flag in ("--dry-run", "--list"):
        assert "leave out --dry-run and --list" in cli("sweep", tmp_path / "g.json", "--halve", "field_f1", flag).output


class Stub:
    """A place whose points end when they are asked to; the program of the `refused` one cannot be started."""

    def __init__(self, refused: str = "") -> None:
        self.refused = refused
        self.running: set[str] = set()
        self.started: list[str] = []
        self.stops: list[bool] = []

    def has_room(self, beside):
        return not beside

    def start(self, job, beside):
        if job.point.name == self.refused:
            raise OSError(7, "Argument list too long")
        self.running.add(job.point.id)
        self.started.append(job.point.name)
        return True

    def is_running(self, job):
        return job.point.id in self.running

    def stop(self, job, at_once):
        self.stops.append(at_once)
        if at_once:
            self.running.clear()

    def output_of(self, arguments, log):
        raise AssertionError


def test_a_point_that_cannot_be_started_fails_and_the_others_go_on(tmp_path):
    jobs, place = make_jobs(plan(grid={"r": [1, 2, 3]}).points, tmp_path), Stub(refused="r=2")

    def show() -> None:
        place.running.clear()

    run_jobs(jobs, place, show)
    assert "Argument list too long" in jobs[1].last_words()
    assert jobs[1].state == "failed" and place.started == ["r=1", "r=3"]


def test_many_requests_in_one_look_ask_once_and_gently(tmp_path, capsys):
    jobs, place, looks = make_jobs(plan().points, tmp_path), Stub(), iter(range(9))

    def show() -> None:
        if (look := next(looks)) in (0, 2):
            for _ in range(3 - look):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, place, show)
    assert place.stops == [False, True] and capsys.readouterr().err.count("stopping: ") == 1


def hold(job: Job, gpus: str = "", before: str = "") -> subprocess.Popen:
    """A process that holds a job, and notes the signals that it gets at the end of its log; it does `before` first."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    program = f"{before} trap 'echo got it' TERM; echo ready; while :; do sleep 0.05; done"
    with job.log.open("ab") as log:
        assert lock(log)
        process = launch(job, ["sh", "-c", program], log, {"CUDA_VISIBLE_DEVICES": gpus})
    wait_for(lambda: "ready" in job.log.read_text())
    return process


def test_a_point_is_asked_once_to_stop_whoever_asks(tmp_path):
    (job,) = make_jobs(plan().points, tmp_path)
    process = hold(job)
    for _ in range(3):
        signal_group(job, signal.SIGTERM)
        wait_for(lambda: "got it" in job.log.read_text())
        time.sleep(0.2)
    assert job.log.read_text().count("got it") == 1
    signal_group(job, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL


def test_a_point_that_is_ended_takes_along_what_its_launcher_started_in_sessions_of_their_own(tmp_path):
    (job,) = make_jobs(plan().points, tmp_path)
    process = hold(job, before="setsid sleep 100 & echo $!;")
    child = psutil.Process(int(job.log.read_text().split()[0]))
    wait_for(lambda: os.getpgid(child.pid) == child.pid)
    signal_group(job, signal.SIGKILL)
    process.wait(10)
    wait_for(lambda: not psutil.pid_exists(child.pid) or child.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("end", ["of the process", "of the task", "after it was asked"])
def test_a_guard_asks_once_when_its_process_ends(end, tmp_path):
    (job,) = make_jobs(plan().points, tmp_path)
    process = hold(job)
    guard = start_guard(job, process.pid)
    guard.wait(10)  # what waits is its child
    if end == "after it was asked":
        signal_group(job, signal.SIGTERM)
    guard.communicate(b"\n" if end == "of the task" else b"")
    time.sleep(0.5)
    assert job.log.read_text().count("got it") == (end != "of the task")
    signal_group(job, signal.SIGTERM)
    time.sleep(0.3)
    assert job.log.read_text().count("got it") == 1
    signal_group(job, signal.SIGKILL)
    process.wait(10)


def test_each_gpu_has_one_point_and_a_failed_one_leaves_its_gpu_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    slots, processes, _ = make_slots(None, None)
    jobs = make_jobs(plan(grid={"r": [1, 2, 3, 4, 5]}).points, tmp_path)
    running, most = tmp_path / "running", []
    running.mkdir()

    def program(job: Job) -> list[str]:
        end = "exit 1" if job is jobs[1] else f"mkdir {job.run.path} && echo '{{}}' > {job.run.result}"
        mine = f'"{running}/$CUDA_VISIBLE_DEVICES"'
        return ["sh", "-c", f"mkdir {mine} && sleep 0.6; rmdir {mine}; echo on $CUDA_VISIBLE_DEVICES; {end}"]

    run_jobs(jobs, Here(slots, program), lambda: most.append(len(list(running.iterdir()))))
    assert processes == 1 and [job.state for job in jobs] == ["done", "failed", "done", "done", "done"]
    said = [job.log.read_text().split() for job in jobs]  # two at a time on a GPU would say that mkdir failed
    assert [words[:1] for words in said] == [["on"]] * 5
    assert [words[1] for words in said[:2]] == ["0", "1"] and {words[1] for words in said[2:]} == {"0", "1"}
    assert max(most) == 2


def test_a_point_left_running_keeps_its_gpus(tmp_path):
    jobs = make_jobs(plan(grid={"r": [1, 2, 3]}).points, tmp_path)
    process = hold(jobs[0], "1")
    try:
        slots = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "012"]
        assert Here(slots, lambda job: []).free_slots(jobs[:1]) == [slots[0], slots[2]]
        assert Here(slots[1:2], lambda job: []).has_room(jobs[:1]) is False
        pairs = [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
        assert Here(pairs, lambda job: []).free_slots(jobs[:1]) == pairs[1:]
        assert Here([{}, {}], lambda job: []).free_slots(jobs[:1]) == [{}]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: not is_locked(jobs[0].log))
    assert len(Here(slots, lambda job: []).free_slots([])) == 3


def test_a_sweep_is_looked_at_without_the_right_to_write(tmp_path):
    log = tmp_path / "a.log"
    log.touch(0o400)
    assert not is_locked(log)
    with log.open("rb") as file:
        assert lock(file) and is_locked(log)


def test_the_time_left_is_that_to_the_rung_and_of_points_of_this_sweep_alone(tmp_path):
    (job,) = make_jobs(plan(base={"steps": 100}).points, tmp_path)
    job.run.path.mkdir(parents=True)
    rows = [{"step": step, "split": "train", "time": 1000.0 + step, "values": {}} for step in (1, 2, 3)]
    append_lines(job.run.metrics, rows)
    job.state, job.stop_after = "running", 13
    progress = Progress([job], "field_f1")
    assert progress._row(job)[-1] == ""  # it may have been paused for long
    job.started = 1000.0
    assert progress._row(job)[-1] == "0:10 left"
    job.stop_after = None
    assert progress._row(job)[-1] == "1:37 left"


@pytest.mark.parametrize(
    ("gpus", "jobs", "share", "places", "processes"),
    [
        ("0,1,2", None, None, ["0", "1", "2"], 1),
        ("0,1,2", 2, None, ["0", "1"], 1),
        ("0,1,2,5,GPU-7", None, 2, ["0,1", "2,5"], 2),
        ("", 3, None, [None, None, None], 1),
        ("", None, None, [None], 1),
    ],
)
def test_points_share_out_the_gpus_or_the_cores(gpus, jobs, share, places, processes, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    slots, found, threads = make_slots(jobs, share)
    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in slots] == places
    assert found == processes
    assert threads is None if gpus else threads >= 1


def test_gpus_that_are_not_there_are_an_error(monkeypatch, cli, tmp_path):
    (tmp_path / "g.json").write_text('{"grid": {"r": [8]}}')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert clear_error(cli("sweep", tmp_path / "g.json", "--gpus-per-run", 2)).startswith("--gpus-per-run 2: 1 GPU(s)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "no GPU was found" in clear_error(cli("sweep", tmp_path / "g.json", "--gpus-per-run", 1))


@pytest.mark.parametrize("height", [24, 80])
def test_a_terminal_shows_the_points_that_it_has_room_for(height, monkeypatch, capsys, tmp_path):
    jobs = make_jobs(plan(grid={"r": list(range(1, 41))}).points, tmp_path)
    jobs[0].state, jobs[7].state = "done", "running"
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", str(height))
    progress = Progress(jobs, "field_f1")
    progress.on_terminal = True
    jobs[7].log.parent.mkdir()
    with jobs[7].log.open("ab") as log:
        assert lock(log)
        progress()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < height and all(len(line) < 60 for line in lines)
    assert next(line.split()[:2] for line in lines if "running" in line) == ["r=8", "running"]
    if height == 24:
        assert lines[-1] == "1 done, 38 to do, 1 running"
    else:
        assert len(lines) == 42


# --- successive halving


def halved(found, sweep: Path, curves: dict[str, list[float]], fails: str = "") -> tuple[list, list, dict[str, str]]:
    """Halving by field_f1 over points that reach these values at steps 2, 4, ...; (dropped, starts, states)."""
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
            append_lines(job.run.metrics, rows)
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
    assert halved(found, tmp_path, curves) == (once[0], [], once[2])  # again, nothing is started


def test_settings_are_halved_by_the_mean_of_their_seeds(tmp_path):
    found = plan(base={"eval_every": 2}, grid={"r": [1, 2]}, seeds=[0, 1])
    curves = {"r=1 seed=0": [9, 9], "r=1 seed=1": [2, 2], "r=2 seed=0": [6, 6], "r=2 seed=1": [6, 6]}
    dropped, starts, states = halved(found, tmp_path / "a", curves)
    assert dropped == [("r=1", 2, 5.5)] and starts[4:] == [("r=2 seed=0", None), ("r=2 seed=1", None)]
    assert list(states.values()) == ["dropped", "dropped", "done", "done"]
    dropped, _, states = halved(found, tmp_path / "b", curves, fails="r=1 seed=1")
    assert dropped == [("r=2", 2, 6)] and list(states.values()) == ["done", "failed", "dropped", "dropped"]


def test_a_setting_that_is_done_is_not_dropped(tmp_path):
    """As where it was finished before, without halving."""
    found = plan(base={"eval_every": 2}, grid={"r": [1, 2]})
    (tmp_path / "points" / found.points[0].id).mkdir(parents=True)
    jobs = make_jobs(found.points, tmp_path)
    append_lines(jobs[0].run.metrics, [{"step": 2, "split": "validation", "values": {"field_f1": 0.1}}])
    jobs[0].run.result.touch()
    dropped, starts, states = halved(found, tmp_path, {"r=2": [5, 5]})
    assert dropped == [] and states == {"r=1": "done", "r=2": "done"} and starts[0] == ("r=2", 2)


# --- the leaderboard


def write_run(folder: Path, right: list[bool], **result: Any) -> None:
    """What a finished run leaves: of each validation example one field, right or wrong at step 2, wrong at step 1."""
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


def board_of(sweep: Path, found, rights: dict[str, list[bool]]):
    """The leaderboard where each point of that name has so many right answers; the others have none yet."""
    for point in found.points:
        if point.name in rights:
            write_run(sweep / "points" / point.id, rights[point.name])
    board = make_board(found, make_jobs(found.points, sweep))
    assert board is not None
    return board


def test_settings_are_ranked_and_each_axis_is_judged(tmp_path):
    found = plan(base={"r": 8}, ablate={"r": [8, 16, 32], "dropout": [0, 0.1], "lr": [5e-3, 1e-3]})
    base, one_less = [True] * 30 + [False] * 10, [True] * 29 + [False] * 11
    board = board_of(
        tmp_path, found, {"base": base, "r=16": [True] * 40, "r=32": [False] * 40, "dropout=0.1": one_less}
    )
    assert [setting.name for setting in board.settings] == ["r=16", "base", "dropout=0.1", "r=32"]
    r, dropout, lr = board.axes
    assert (r["best"], r["runner_up"], r["difference"], r["exceeds_noise"]) == (16, 8, 0.25, True)
    assert 0 < r["low"] < 0.25 < r["high"]
    assert r["sentence"].startswith("r: 16 is best with field_f1 1.000, before 8 with 0.750: the difference +0.250 [")
    assert (dropout["best"], dropout["runner_up"], dropout["exceeds_noise"]) == (0, 0.1, False)
    assert "is within the noise" in dropout["sentence"]
    assert lr["exceeds_noise"] is None and "fewer than two" in lr["sentence"]
    assert board.missing == ["lr=0.001"]

    write_board(board, tmp_path, None)
    shown = (tmp_path / "leaderboard.md").read_text().splitlines()
    assert shown[2].startswith("| **r=16** | 16 | 32 | 0 | 0.005 | 9 | **1.000** [1.000, 1.000] |")
    assert shown[2].endswith("| 1:01 | 1.00 GiB |") and shown[3].startswith(
        "| base | 8 | 16 | 0 | 0.005 | 9 | 0.750 [0."
    )
    with (tmp_path / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["rank"], row["config"], float(row["field_f1"])) for row in rows[:2]] == [
        ("1", "r=16", 1),
        ("2", "base", 0.75),
    ]
    assert json.loads((tmp_path / "summary.json").read_text())["axes"] == board.axes


def test_a_metric_where_lower_is_better_ranks_the_other_way_round(tmp_path):
    found = plan(base={"metric": "edit_distance"}, grid={"r": [8, 16]})
    board = board_of(tmp_path, found, {"r=8": [True, False], "r=16": [True, True]})
    assert [setting.name for setting in board.settings] == ["r=16", "r=8"]
    assert board.axes[0]["best"] == 16 and board.axes[0]["difference"] < 0


def test_axes_that_cross_are_judged_around_the_winner(tmp_path):
    found = plan(grid={"r": [8, 16], "dropout": [0, 0.1]})
    rights = {"r=8 dropout=0": 10, "r=8 dropout=0.1": 38, "r=16 dropout=0": 20, "r=16 dropout=0.1": 40}
    board = board_of(tmp_path, found, {name: [i < n for i in range(40)] for name, n in rights.items()})
    assert [(axis["best"], axis["runner_up"]) for axis in board.axes] == [(16, 8), (0.1, 0)]
    assert [axis["difference"] for axis in board.axes] == pytest.approx([0.05, 0.5])


def test_with_seeds_a_difference_has_to_exceed_theirs_too(tmp_path):
    found = plan(grid={"r": [8, 16]}, seeds=[0, 1])
    right = {"r=8 seed=0": 20, "r=8 seed=1": 36, "r=16 seed=0": 35, "r=16 seed=1": 40}
    board = board_of(tmp_path / "a", found, {name: [i < n for i in range(40)] for name, n in right.items()})
    best = board.settings[0]
    assert (best.name, best.value("field_f1"), best.values("field_f1")) == ("r=16", 37.5 / 40, [35 / 40, 1])
    assert best.best_run("field_f1").path.name == found.points[3].id
    assert board.axes[0]["low"] > 0 and not board.axes[0]["exceeds_noise"]  # 36 of 40 is more than 35
    assert "(0.875 to 1.000)" in markdown(board)
    right["r=8 seed=1"] = 21
    board = board_of(tmp_path / "b", found, {name: [i < n for i in range(40)] for name, n in right.items()})
    assert board.axes[0]["exceeds_noise"]
    del right["r=8 seed=1"]
    board = board_of(tmp_path / "c", found, {name: [i < n for i in range(40)] for name, n in right.items()})
    assert board.axes[0]["exceeds_noise"] is None and "not validated on the same" in board.axes[0]["sentence"]


def test_what_was_dropped_is_told_with_its_metric(tmp_path):
    found = plan(grid={"r": [8, 16]})
    write_run(tmp_path / "points" / found.points[0].id, [True])
    dropped = [Dropped("r=16", 2, "edit_distance", 0.25)]
    board = make_board(found, make_jobs(found.points, tmp_path), dropped)
    assert "Dropped by halving: r=16 after step 2 (edit_distance 0.250)." in markdown(board)
    write_board(board, tmp_path, None)
    assert json.loads((tmp_path / "summary.json").read_text())["dropped"] == [
        {"setting": "r=16", "step": 2, "metric": "edit_distance", "value": 0.25}
    ]


def test_the_test_split_is_scored_once_and_told_as_long_as_it_is_the_winners(tmp_path):
    found = plan(grid={"r": [8, 16]})
    board_of(tmp_path, found, {"r=8": [True, False]})
    scored = []

    def score(winner, log):
        scored.append(winner.path.name)
        return 0, '{"before": {"field_f1": 0.0}, "after": {"field_f1": 0.5}}'

    def told() -> Any:
        return json.loads((tmp_path / "summary.json").read_text())["test"]

    answer(found, make_jobs(found.points, tmp_path), tmp_path, [], score)
    answer(found, make_jobs(found.points, tmp_path), tmp_path, [])  # as after Ctrl-C
    assert told()["point"] == found.points[0].id == scored[0]
    assert "Test split" in (tmp_path / "report.html").read_text()
    board_of(tmp_path, found, {"r=16": [True, True]})
    answer(found, make_jobs(found.points, tmp_path), tmp_path, [])
    assert told() is None and len(scored) == 1


def test_two_sweeps_at_their_end_score_the_test_split_once(tmp_path):
    found = plan(grid={"r": [8]})
    board_of(tmp_path, found, {"r=8": [True]})
    scored = []

    def score(winner, log):
        scored.append(winner.path.name)
        time.sleep(0.5)
        return 0, '{"before": {"field_f1": 0.0}, "after": {"field_f1": 1.0}}'

    run = RunFolder(tmp_path / "points" / found.points[0].id)
    with ThreadPoolExecutor() as both:
        first, second = both.map(lambda _: score_test(run, tmp_path, score), range(2))
    assert first == second and len(scored) == 1


class Page(HTMLParser):
    """What a page shows: its texts, its tables' rows, the titles of its lines, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.lines: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.tags[-2:] == ["polyline", "title"] and data.strip():
            self.lines.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_page_shows_settings_axes_curves_and_the_test_split(tmp_path):
    found = plan(grid={"prompt": ["<script>a&b", "read"], "r": [32, 8]}, seeds=[0, 1])
    rights = {point.name: [i < 20 + n for i in range(40)] for n, point in enumerate(found.points[:-1])}
    board = board_of(tmp_path, found, rights)
    for setting in board.settings:
        for run in setting.runs:
            losses = [{"step": n, "split": "train", "values": {"loss": 1 / n}} for n in (1, 2)]
            append_lines(run.metrics, [*losses, {"step": 2, "split": "validation", "values": {"field_f1": 0.5}}])
    write_board(board, tmp_path, {"point": "its-id", "before": {"field_f1": 0.0}, "after": {"field_f1": 0.75}})
    text = (tmp_path / "report.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags and page.links == [] and "url(" not in text and "//" not in text
    shown = " ".join(page.texts)
    assert f"7 of 8 points have a result, of 4 settings. Without a result: {found.points[-1].name}." in shown
    assert all(axis["sentence"] in shown for axis in board.axes) and "At r=" in shown
    table = {row[0]: row for row in page.rows}
    for setting in board.settings:
        assert f"{setting.value('field_f1'):.3f}[" in table[setting.name][6]
    assert {"ted_accuracy", "edit_distance (lower is better)", "time"} <= set(table["config"])
    assert [cell.strip() for cell in table["field_f1"]] == ["field_f1", "0.000", "0.750", "+0.750", "better"]
    assert len(page.lines) == 7 and "prompt=<script>a&b r=32 seed=1" in page.lines
    assert shown.index(" 32 ", shown.index("At prompt=")) < shown.index(" 8 ", shown.index("At prompt="))


def test_a_page_of_one_setting_and_of_an_ablation_with_gaps(tmp_path):
    found = plan(base={"steps": 2})
    write_board(board_of(tmp_path / "one", found, {"base": [True]}), tmp_path / "one", None)
    page = Page((tmp_path / "one" / "report.html").read_text("utf-8"))
    assert "1 of 1 points have a result." in " ".join(page.texts) and "Training" not in page.texts
    found = plan(base={"r": 16}, ablate={"r": [8, 16, 32], "dropout": [0.1, 0.2]})
    board = board_of(tmp_path / "gaps", found, {"r=32": [True, False]})
    assert board.order == {"r": [8, 16, 32], "dropout": [0.0, 0.1, 0.2]}
    write_board(board, tmp_path / "gaps", None)
    texts = Page((tmp_path / "gaps" / "report.html").read_text("utf-8")).texts
    assert "dropout: fewer than two of its values have a result." in texts
    assert texts.index("8") < texts.index("16", texts.index("8"))


# --- whole sweeps, in processes of their own


@pytest.fixture(scope="module")
def sound_grid(small_model, dataset, tmp_path_factory) -> Path:
    """Three points of 8 steps."""
    base = {
        "model": small_model, "dataset": dataset, "precision": "fp32", "quant": "none", "r": 4, "dropout": 0,
        "lr": 0.01, "optimizer": "adamw", "batch_size": 4, "steps": 8, "eval_every": 2, "max_new_tokens": 6,
        "metric": "edit_distance",
    }  # fmt: skip
    path = tmp_path_factory.mktemp("grid") / "small.json"
    path.write_text(json.dumps({"base": base, "ablate": {"r": [2, 4], "lr": [0.1]}}))
    return path


@pytest.fixture(scope="module")
def grid(sound_grid) -> Path:
    """The same, and a point that cannot begin."""
    stored = json.loads(sound_grid.read_text())
    stored["ablate"]["target_modules"] = ["nothing"]
    path = sound_grid.with_name("grid.json")
    path.write_text(json.dumps(stored))
    return path


def start_sweep(grid: Path, output: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "sweep.py"), str(grid), "--output", str(output), "--jobs", "2", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=environment, **pipes)


# sweep.py with the programs of its points forked: they do the same, without importing torch twice each for it.
FORKING = """
import importlib, os, signal, subprocess, sys, tempfile, traceback
from pathlib import Path
import im2json.sweep.launch as launch

class Forked:
    def __init__(self, arguments, *, stdout, stderr, env, **_):
        self.pid, self.ended = os.fork(), None
        if self.pid:
            return
        status = 1
        try:
            os.setsid()
            os.environ.update(env)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.dup2(stdout.fileno(), 1)
            os.dup2(1 if stderr == subprocess.STDOUT else stderr.fileno(), 2)
            script = next(i for i, argument in enumerate(arguments) if argument.endswith(".py"))
            importlib.import_module(Path(arguments[script]).stem).main(arguments[script + 1 :])
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self):
        if self.ended is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.ended = os.waitstatus_to_exitcode(found[1])
        return self.ended

def run(arguments, *, stderr, **_):
    with tempfile.TemporaryFile() as printed:
        _, status = os.waitpid(Forked(arguments, stdout=printed, stderr=stderr, env={}).pid, 0)
        printed.seek(0)
        text = printed.read().decode()
    return subprocess.CompletedProcess(arguments, os.waitstatus_to_exitcode(status), text)

class forking:  # all of subprocess that the sweep uses
    Popen, run = Forked, run
    PIPE, DEVNULL, STDOUT = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT

launch.subprocess = forking
import sweep
sweep.main()
"""


def sweep_to_its_end(grid: Path, output: Path, *flags: str) -> tuple[int, str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = Process(FORKING, str(grid), "--output", str(output), "--jobs", "2", *flags, env=environment)
    printed = "".join(process.communicate(timeout=300))
    assert process.returncode is not None
    return process.returncode, printed


def jobs_of(grid: Path, sweep: Path, *overrides: str) -> dict[str, Job]:
    return {job.point.name: job for job in make_jobs(read_plan(grid, overrides).points, sweep)}


def ranked(sweep: Path) -> list[dict[str, str]]:
    """leaderboard.csv but for time and memory."""
    with (sweep / "leaderboard.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "peak_memory_bytes")} for row in csv.DictReader(file)
        ]


def judged(sweep: Path) -> Any:
    summary = json.loads((sweep / "summary.json").read_text())
    return summary["axes"], summary["missing"], summary["test"]


def assert_same_table(sweep: Path, whole: Path) -> None:
    """A sweep of the sound points ranks and judges as that of all points does, but for the one that cannot begin."""
    (axes, missing, test), (other_axes, other_missing, other_test) = judged(sweep), judged(whole)
    other_rows = [{k: v for k, v in row.items() if k != "target_modules"} for row in ranked(whole)]
    assert ranked(sweep) == other_rows and len(other_rows) == 3
    assert axes == other_axes[:2] and [axis["axis"] for axis in other_axes[2:]] == ["target_modules"]
    assert (missing, other_missing) == ([], ["target_modules=nothing"])
    assert test == other_test


@pytest.fixture(scope="module")
def swept(grid, tmp_path_factory) -> tuple[Path, int, str]:
    """A sweep that nothing interrupted: its folder, exit status, and what it printed."""
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
            assert {row["split"] for row in read_lines(job.run.predictions) if row["stage"] != "during"} <= {"test"}
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
    """Of the two points that ran, one is killed too, after a checkpoint; the other lives on and is waited for."""
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
    assert [row["step"] for row in read_lines(base.run.metrics) if row["split"] == "train"] == [*range(1, 9)]
    assert f"run folder: {other.run.path}" in other.log.read_text() and other.log.read_text().count("run folder: ") == 1
    assert_same_table(sweep, swept[0])


@pytest.mark.slow
def test_a_sweep_that_halves_records_what_it_drops(grid, swept, tmp_path):
    """The dropped are no failures, the survivors are those of the whole sweep, and nothing is done twice."""
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
    """Two machines' worth of workers, of which one is killed in the middle of a point."""
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
    assert [row["step"] for row in read_lines(base.run.metrics) if row["split"] == "train"] == [*range(1, 9)]
    assert_same_table(sweep, swept[0])


def worker_of(job: Job) -> int:
    """The process that has started a job's launcher."""
    holder = job.holder()
    assert holder is not None
    status = Path(f"/proc/{holder[0]}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))


@pytest.fixture(scope="module")
def one_core():
    """The address of a Ray cluster that runs a point at a time."""
    from ray import cluster_utils

    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def long_point(grid, tmp_path) -> Path:
    """A grid of one point of so many steps that no test sees its end."""
    base = json.loads(grid.read_text())["base"] | {"steps": 5000, "eval_every": 5000}
    (tmp_path / "long.json").write_text(json.dumps({"base": base}))
    return tmp_path / "long.json"


@pytest.mark.slow
def test_no_point_of_a_ray_cluster_is_left_behind(one_core, long_point, tmp_path):
    """Whether its worker ends, its sweep is killed, or the sweep is asked to stop, twice at once or once."""
    sweep = tmp_path / "ray"
    (job,) = jobs_of(long_point, sweep).values()

    def steps() -> list[int]:
        return [row["step"] for row in read_lines(job.run.metrics)]

    def begun(after: int) -> subprocess.Popen:
        process = start_sweep(long_point, sweep, "--ray", one_core)
        wait_for(lambda: steps()[-1:] > [after])
        return process

    def ended(process: subprocess.Popen, status: int) -> int:
        """The step that is saved, once nothing runs any more."""
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == status, printed
        assert printed.count("stopping: ") == (status == 130)
        wait_for(lambda: not is_locked(job.log), seconds=60)
        saved = job.run.latest_checkpoint()
        assert saved is not None
        return int(saved.name.removeprefix("step-"))

    process = begun(2)
    os.kill(worker_of(job), signal.SIGTERM)
    wait_for(lambda: job.log.read_text().count("run folder: ") == 2)  # Ray's next try goes on
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    saved = ended(process, 130)

    process = begun(saved)
    process.kill()
    saved = ended(process, -signal.SIGKILL)

    process = begun(saved)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert not is_locked(job.log)
    assert steps() == [*range(1, len(steps()) + 1)]


@pytest.mark.slow
def test_the_reason_of_a_failed_point_comes_back_from_a_cluster(one_core, long_point, tmp_path):
    grid = json.loads(long_point.read_text())
    grid["base"]["prompt"] = "long " * 40_000
    long_point.write_text(json.dumps(grid))
    status, printed = sweep_to_its_end(long_point, tmp_path / "ray", "--ray", one_core)
    assert status == 1 and "Ray gave up on this point: [Errno 7] Argument list too long" in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_leaves_no_process_and_goes_on(sound_grid, tmp_path, number):
    longer = ("--set", "steps=60", "--set", "eval_every=60")
    grid = tmp_path / "two.json"
    grid.write_text(json.dumps({"base": json.loads(sound_grid.read_text())["base"], "ablate": {"r": [2, 4]}}))
    sweep = tmp_path / "stopped"
    process = start_sweep(grid, sweep, *longer)
    jobs = list(jobs_of(grid, sweep, *longer[1::2]).values())
    wait_for(lambda: jobs[0].run.metrics.exists())
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "Error: interrupted: the same command goes on" in printed
    assert "no point has a result yet" in printed
    assert not any(is_locked(job.log) for job in jobs)
    (checkpoint,) = jobs[0].run.checkpoints.iterdir()
    assert 1 <= int(checkpoint.name.removeprefix("step-")) < 60
    if number == signal.SIGTERM:
        _, printed = sweep_to_its_end(grid, sweep, *longer)
        assert "base: done" in printed and len(ranked(sweep)) == 2
        assert [row["step"] for row in read_lines(jobs[0].run.metrics)] == [*range(1, 61), 60]
