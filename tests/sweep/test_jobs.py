"""Jobs on this machine: what is started, what is stopped, and what is shown of it."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from sweeps import clear_error, hold, plan, wait_for

from im2json.files import append_lines, is_locked, lock
from im2json.sweeps.grid import read_plan
from im2json.sweeps.jobs import PointJob, make_jobs
from im2json.sweeps.local import Local, share_machine
from im2json.sweeps.processes import signal_group
from im2json.sweeps.progress import Progress
from im2json.sweeps.scheduler import run_jobs


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr("im2json.sweeps.scheduler.POLL_SECONDS", 0.01)


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


def test_a_stopped_point_is_resumed_with_the_options_that_do_not_affect_the_result(tmp_path):
    found = plan(base={"microbatch": 1, "gradient_checkpointing": "on", "workers": None, "steps": 5, "threads": 2})
    (job,) = make_jobs(found.points, tmp_path)
    assert "--resume" not in job.command(1, 1)
    job.run.path.mkdir(parents=True)
    job.run.config.touch()
    flags = job.command(1, 1)
    assert flags[flags.index("--resume") + 2 :] == [
        "--microbatch",
        "1",
        "--gradient-checkpointing",
        "on",
        "--threads",
        "2",
    ]


def test_an_impossible_output_is_one_line_that_names_it(cli, tmp_path):
    (tmp_path / "g.json").write_text("{}")
    for output in (tmp_path / "g.json", tmp_path / "g.json" / "below"):
        assert clear_error(cli("sweep", tmp_path / "g.json", "--output", output)).startswith(f"--output {output}")


class Stub:
    """A backend whose points run until they are killed; the program of the `refused` point cannot be started."""

    def __init__(self, refused: str = "") -> None:
        self.refused = refused
        self.running: set[str] = set()
        self.started: list[str] = []
        self.stops: list[bool] = []

    def has_capacity(self, running):
        return not running

    def start(self, job, running):
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

    def run_python(self, arguments, log):
        raise AssertionError


def test_a_point_that_cannot_be_started_fails_and_the_others_go_on(tmp_path):
    jobs, backend = make_jobs(plan(grid={"r": [1, 2, 3]}).points, tmp_path), Stub(refused="r=2")

    def show() -> None:
        backend.running.clear()

    run_jobs(jobs, backend, show)
    assert "Argument list too long" in jobs[1].log_tail()
    assert jobs[1].state == "failed" and backend.started == ["r=1", "r=3"]


def test_many_requests_in_one_look_stop_the_points_once_and_gently(tmp_path, capsys):
    jobs, backend, looks = make_jobs(plan().points, tmp_path), Stub(), iter(range(9))

    def show() -> None:
        if (look := next(looks)) in (0, 2):
            for _ in range(3 - look):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, backend, show)
    assert backend.stops == [False, True] and capsys.readouterr().err.count("stopping: ") == 1


def test_a_point_gets_sigterm_once_whoever_sends_it(tmp_path):
    (job,) = make_jobs(plan().points, tmp_path)
    process = hold(job)
    for _ in range(3):
        signal_group(job, signal.SIGTERM)
        wait_for(lambda: "got it" in job.log.read_text())
        time.sleep(0.2)
    assert job.log.read_text().count("got it") == 1
    signal_group(job, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL


def test_killing_a_point_also_kills_processes_in_sessions_of_their_own(tmp_path):
    (job,) = make_jobs(plan().points, tmp_path)
    process = hold(job, before="setsid sleep 100 & echo $!;")
    child = psutil.Process(int(job.log.read_text().split()[0]))
    wait_for(lambda: os.getpgid(child.pid) == child.pid)
    signal_group(job, signal.SIGKILL)
    process.wait(10)
    wait_for(lambda: not psutil.pid_exists(child.pid) or child.status() == psutil.STATUS_ZOMBIE)


def test_each_gpu_has_one_point_and_a_failed_one_leaves_its_gpu_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    shares = share_machine(None, None)
    jobs = make_jobs(plan(grid={"r": [1, 2, 3, 4, 5]}).points, tmp_path)
    running, most = tmp_path / "running", []
    running.mkdir()

    def program(job: PointJob) -> list[str]:
        end = "exit 1" if job is jobs[1] else f"mkdir {job.run.path} && echo '{{}}' > {job.run.result}"
        mine = f'"{running}/$CUDA_VISIBLE_DEVICES"'
        return ["sh", "-c", f"mkdir {mine} && sleep 0.6; rmdir {mine}; echo on $CUDA_VISIBLE_DEVICES; {end}"]

    run_jobs(jobs, Local(shares.environments, program), lambda: most.append(len(list(running.iterdir()))))
    assert shares.processes == 1 and [job.state for job in jobs] == ["done", "failed", "done", "done", "done"]
    said = [job.log.read_text().split() for job in jobs]  # two points at a time on one GPU would log that mkdir failed
    assert [words[:1] for words in said] == [["on"]] * 5
    assert [words[1] for words in said[:2]] == ["0", "1"] and {words[1] for words in said[2:]} == {"0", "1"}
    assert max(most) == 2


def test_a_point_left_running_keeps_its_gpus(tmp_path):
    jobs = make_jobs(plan(grid={"r": [1, 2, 3]}).points, tmp_path)
    process = hold(jobs[0], "1")
    try:
        single = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "012"]
        assert Local(single, lambda job: []).unused(jobs[:1]) == [single[0], single[2]]
        assert Local(single[1:2], lambda job: []).has_capacity(jobs[:1]) is False
        pairs = [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
        assert Local(pairs, lambda job: []).unused(jobs[:1]) == pairs[1:]
        assert Local([{}, {}], lambda job: []).unused(jobs[:1]) == [{}]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: not is_locked(jobs[0].log))
    assert len(Local(single, lambda job: []).unused([])) == 3


def test_looking_at_a_sweep_takes_no_right_to_write(tmp_path):
    log = tmp_path / "a.log"
    log.touch(0o400)
    assert not is_locked(log)
    with log.open("rb") as file:
        assert lock(file) and is_locked(log)


def test_the_time_left_is_that_to_the_rung_and_known_for_points_of_this_sweep_alone(tmp_path):
    (job,) = make_jobs(plan(base={"steps": 100}).points, tmp_path)
    job.run.path.mkdir(parents=True)
    rows = [{"step": step, "split": "train", "time": 1000.0 + step, "values": {}} for step in (1, 2, 3)]
    append_lines(job.run.metrics_file, rows)
    job.state, job.stop_after = "running", 13
    progress = Progress([job], "field_f1")
    assert progress._row(job)[-1] == ""  # another sweep may have paused it for long
    job.started = 1000.0
    assert progress._row(job)[-1] == "0:10 left"
    job.stop_after = None
    assert progress._row(job)[-1] == "1:37 left"


@pytest.mark.parametrize(
    ("gpus", "jobs", "gpus_per_run", "visible", "processes"),
    [
        ("0,1,2", None, None, ["0", "1", "2"], 1),
        ("0,1,2", 2, None, ["0", "1"], 1),
        ("0,1,2,5,GPU-7", None, 2, ["0,1", "2,5"], 2),
        ("", 3, None, [None, None, None], 1),
        ("", None, None, [None], 1),
    ],
)
def test_points_share_the_gpus_or_the_cores(gpus, jobs, gpus_per_run, visible, processes, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    shares = share_machine(jobs, gpus_per_run)
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in shares.environments] == visible
    assert shares.processes == processes
    assert shares.threads is None if gpus else shares.threads >= 1


def test_gpus_that_are_not_there_are_an_error(monkeypatch, cli, tmp_path):
    (tmp_path / "g.json").write_text('{"grid": {"r": [8]}}')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert clear_error(cli("sweep", tmp_path / "g.json", "--gpus-per-run", 2)).startswith("--gpus-per-run 2: 1 GPU(s)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "no GPU was found" in clear_error(cli("sweep", tmp_path / "g.json", "--gpus-per-run", 1))


@pytest.mark.parametrize("height", [24, 80])
def test_a_terminal_shows_as_many_points_as_fit(height, monkeypatch, capsys, tmp_path):
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
