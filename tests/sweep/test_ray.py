"""Jobs on a Ray cluster: none is left behind, whatever ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from sweeps import clear_error, hold, jobs_of, plan, small_base, start_sweep, sweep_to_its_end, wait_for, worker_of

from im2json.files import is_locked, read_lines
from im2json.sweeps.cluster import start_guard
from im2json.sweeps.jobs import make_jobs
from im2json.sweeps.processes import signal_group


def test_a_missing_cluster_is_reported_at_once(cli, tmp_path):
    (tmp_path / "g.json").write_text("{}")
    for address, why in {
        "127.0.0.1:1": "no Ray cluster answers there", "ray://127.0.0.1:1": "no Ray cluster answers there",
        "local": "expected the HOST:PORT of a cluster", "somewhere": "expected the HOST:PORT of a cluster",
    }.items():  # fmt: skip
        message = clear_error(cli("sweep", tmp_path / "g.json", "--output", tmp_path / "sweep", "--ray", address))
        assert message.startswith(f"--ray {address}: {why}")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("end", ["of the process", "of the task", "after SIGTERM"])
def test_a_guard_sends_sigterm_once_when_its_process_ends(end, tmp_path):
    (job,) = make_jobs(plan().points, tmp_path)
    process = hold(job)
    guard = start_guard(job, process.pid)
    guard.wait(10)  # its child waits
    if end == "after SIGTERM":
        signal_group(job, signal.SIGTERM)
    guard.communicate(b"\n" if end == "of the task" else b"")
    time.sleep(0.5)
    assert job.log.read_text().count("got it") == (end != "of the task")
    signal_group(job, signal.SIGTERM)
    time.sleep(0.3)
    assert job.log.read_text().count("got it") == 1
    signal_group(job, signal.SIGKILL)
    process.wait(10)


@pytest.fixture(scope="module")
def one_core():
    """The address of a Ray cluster that runs one point at a time."""
    from ray import cluster_utils

    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def long_point(small_model, dataset, tmp_path) -> Path:
    """A grid of one point with so many steps that no test sees its end."""
    base = small_base(small_model, dataset) | {"steps": 5000, "eval_every": 5000}
    (tmp_path / "long.json").write_text(json.dumps({"base": base}))
    return tmp_path / "long.json"


@pytest.mark.slow
def test_no_point_of_a_ray_cluster_is_left_behind(one_core, long_point, tmp_path):
    """Whether its worker ends, its sweep is killed, or the sweep is asked to stop, twice at once or once."""
    sweep = tmp_path / "ray"
    (job,) = jobs_of(long_point, sweep).values()

    def steps() -> list[int]:
        return [row["step"] for row in read_lines(job.run.metrics_file)]

    def begun(after: int) -> subprocess.Popen:
        process = start_sweep(long_point, sweep, "--ray", one_core)
        wait_for(lambda: steps()[-1:] > [after])
        return process

    def ended(process: subprocess.Popen, status: int) -> int:
        """Return the step that is saved, once nothing runs any more."""
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == status, printed
        assert printed.count("stopping: ") == (status == 130)
        wait_for(lambda: not is_locked(job.log), seconds=60)
        saved = job.run.latest_checkpoint()
        assert saved is not None
        return int(saved.name.removeprefix("step-"))

    process = begun(2)
    os.kill(worker_of(job), signal.SIGTERM)
    wait_for(lambda: job.log.read_text().count("run folder: ") == 2)  # Ray's next try resumes it
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    saved = ended(process, 130)

    process = begun(saved)
    process.kill()
    saved = ended(process, -signal.SIGKILL)

    process = begun(saved)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=300)
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
