"""Points on a Ray cluster that is there: each a task, in a sweep folder that all its machines share."""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from im2json.cli import first_line
from im2json.sweep.launch import POLL_SECONDS, Job, command, is_locked, launch, lock, output_of, signal_group

RETRIES = 3  # of a point whose worker or machine was lost; it goes on from its checkpoint


class Cluster:
    """As many points at a time as the cluster has room for; Ray queues the others."""

    def __init__(self, address: str, train: Path, capacity: int, gpus_per_run: int | None) -> None:
        """
        Raises:
            ValueError: if Ray is not installed, no cluster answers, or no machine has as many GPUs.
        """
        try:
            import ray
        except ImportError:
            raise ValueError("--ray needs Ray: pip install 'im2json[ray]'") from None
        self.ray, self.train, self.capacity = ray, train, capacity
        self.tasks: dict[str, Any] = {}  # by point
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(f"--ray {address}: no Ray cluster answers there ({first_line(error)})") from None
        finally:
            signal.signal(signal.SIGTERM, handler)  # which Ray has replaced by its own
        most = max(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
        self.gpus = gpus_per_run or min(1, int(most))
        if self.gpus > most:
            raise ValueError(f"--gpus-per-run {self.gpus}: no machine of the cluster has more than {most:g} GPU(s)")

    def start(self, job: Job) -> bool:
        # on CPUs a point takes a core, or as many as the grid says
        threads = None if self.gpus else job.point.config.train.threads or 1
        run = self.ray.remote(num_gpus=self.gpus, num_cpus=threads or 1, max_retries=RETRIES)(run_point)
        self.tasks[job.point.id] = run.remote(job, self.train, max(1, self.gpus), threads)
        return True

    def is_running(self, job: Job) -> bool:
        task = self.tasks.get(job.point.id)
        if task is None or not self.ray.wait([task], timeout=0)[0]:
            return task is not None or is_locked(job.log)
        del self.tasks[job.point.id]
        try:
            self.ray.get(task)
        except self.ray.exceptions.TaskCancelledError:
            pass
        except self.ray.exceptions.RayError as error:
            with job.log.open("a") as log:
                log.write(f"Error: Ray gave up on this point: {first_line(error)}\n")
        return is_locked(job.log)

    def stop(self, job: Job, at_once: bool) -> None:
        if task := self.tasks.get(job.point.id):
            self.ray.cancel(task, force=at_once)

    def output_of(self, arguments: list[str], log: Path) -> tuple[int, str]:
        run = self.ray.remote(num_gpus=self.gpus, max_retries=RETRIES)(output_of)
        return self.ray.get(run.remote(arguments, log))


def run_point(job: Job, train: Path, processes: int, threads: int | None) -> None:
    """The task: a point's program, brought to its end on the machine that Ray has chosen.

    Where the worker that runs this dies, the guard asks the point to save and stop, and Ray's next try goes on.
    """
    with job.log.open("ab") as log:
        while not lock(log):  # what a lost worker has started is ending
            time.sleep(POLL_SECONDS)
        if job.state_at_rest() in ("done", "left"):
            return
        process = launch(job, command(job, train, processes, threads), log, {})
    # reads what is never written, until this end is closed, by the end of this task or of this process
    guard = subprocess.Popen(
        ["sh", "-c", f"read _; kill -TERM -{process.pid}"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:  # as Ray cancels a task
        signal_group(job, signal.SIGTERM)
        process.wait()
        raise
    finally:
        guard.kill()
        guard.wait()
