"""Run jobs on an existing Ray cluster, each as a task, in a sweep folder that all machines of the cluster share."""

from __future__ import annotations

import logging
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from im2json.errors import UserError, first_line
from im2json.files import is_locked, lock
from im2json.sweeps.jobs import STOP_REQUESTED, Job
from im2json.sweeps.processes import Output, launch, run_python, signal_group
from im2json.sweeps.scheduler import POLL_SECONDS

ANSWER_SECONDS = 5
"""How long a cluster may take to accept a connection. Ray itself tries for minutes."""
RETRIES = 3
"""How often Ray tries a job again after its worker or machine was lost. Each try resumes from the last checkpoint."""


class Cluster:
    """The backend of a cluster. Ray runs as many jobs as the cluster can hold, and queues the others."""

    def __init__(self, address: str, capacity: int | None, gpus_per_run: int | None) -> None:
        """Connect to a cluster.

        Args:
            address: HOST:PORT, or auto for the cluster on this machine.
            capacity: jobs that are handed to Ray at a time; None means one per GPU, or 1 if the cluster has no GPU.
            gpus_per_run: None means 1, or 0 if the cluster has no GPU.

        Raises:
            UserError: if Ray is not installed, no cluster answers, or no machine has as many GPUs.
        """
        check_address(address)
        try:
            import ray
        except ImportError:
            raise UserError("--ray needs Ray: pip install 'im2json[ray]'") from None
        self.ray = ray
        self.tasks: dict[str, Any] = {}  # job id -> Ray's task
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
            raise UserError(f"--ray {address}: no Ray cluster answers there ({first_line(error)})") from None
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray has replaced it
        self.capacity = capacity or max(1, int(ray.cluster_resources().get("GPU", 0)))
        most = max(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
        self.gpus = gpus_per_run or min(1, int(most))
        if self.gpus > most:
            raise UserError(f"--gpus-per-run {self.gpus}: no machine of the cluster has more than {most:g} GPU(s)")

    def has_capacity(self, running: Sequence[Job]) -> bool:
        return len(running) < self.capacity

    def start(self, job: Job, running: Sequence[Job]) -> bool:
        # Without GPUs a job takes one core, or as many as the user says.
        threads = None if self.gpus else job.threads or 1
        run = self.ray.remote(num_gpus=self.gpus, num_cpus=threads or 1, max_retries=RETRIES)(run_job)
        self.tasks[job.id] = run.remote(job, max(1, self.gpus), threads)
        return True

    def is_running(self, job: Job) -> bool:
        task = self.tasks.get(job.id)
        if task is None or not self.ray.wait([task], timeout=0)[0]:
            return task is not None or is_locked(job.log)
        del self.tasks[job.id]
        try:
            self.ray.get(task)
        except self.ray.exceptions.TaskCancelledError:
            pass
        except self.ray.exceptions.RayTaskError as error:  # its text begins with the location, so use the cause
            job.log_error(f"Ray gave up on this {job.kind}: {first_line(error.cause)}")
        except self.ray.exceptions.RayError as error:
            job.log_error(f"Ray gave up on this {job.kind}: {first_line(error)}")
        return is_locked(job.log)

    def stop(self, job: Job, at_once: bool) -> None:
        if task := self.tasks.get(job.id):
            self.ray.cancel(task, force=at_once)
        if at_once or task is None:  # another sweep started a job without a task
            signal_group(job, signal.SIGKILL if at_once else signal.SIGTERM)

    def run_python(self, arguments: list[str], log: Path) -> Output:
        run = self.ray.remote(num_gpus=self.gpus, max_retries=RETRIES)(run_python)
        return self.ray.get(run.remote(arguments, log))


def check_address(address: str) -> None:
    """Check that a cluster answers at an address, which Ray itself would try for minutes.

    Raises:
        UserError: if none does, or the address is not HOST:PORT.
    """
    found = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:([0-9]+)", address)
    if address != "auto" and found is None:
        raise UserError(f"--ray {address}: expected the HOST:PORT of a cluster, or auto for the one on this machine")
    if found is not None:
        host, port = found.groups()
        try:
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise UserError(f"--ray {address}: no Ray cluster answers there ({error})") from None


def run_job(job: Job, processes: int, threads: int | None) -> None:
    """Run a job to its end on the machine that Ray has chosen; this function is the task.

    If the worker that runs this function ends in any way, the guard asks the job to save and stop, and Ray's next try
    resumes it.
    """
    # A shell ignores SIGINT in what it starts in the background, but Ray cancels a task by SIGINT.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with job.log.open("ab") as log:
            while not lock(log):  # the processes that a lost worker started are ending
                time.sleep(POLL_SECONDS)
            if job.state_at_rest() in ("done", "paused"):
                return
            process = launch(job, job.command(processes, threads), log, {})
        guard = start_guard(job, process.pid)
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
        guard.communicate(b"\n")
    except KeyboardInterrupt:  # Ray cancels the task; it ends a worker by SystemExit, which the guard handles
        signal_group(job, signal.SIGTERM)
        while is_locked(job.log):
            time.sleep(POLL_SECONDS)
        raise


def start_guard(job: Job, group: int) -> subprocess.Popen:
    """Start a guard that asks a process group to stop, unless that was done, when this process ends.

    A line on the guard's stdin dismisses it. The guard waits in a grandchild of this process, because Ray kills the
    children of a worker that it kills.
    """
    file = shlex.quote(str(job.process_file))
    stop = f"grep -qx '{STOP_REQUESTED}' {file} || {{ kill -TERM -{group} && echo '{STOP_REQUESTED}' >> {file}; }}"
    return subprocess.Popen(
        ["sh", "-c", f"exec 3<&0; (read _ <&3 || {{ {stop}; }}) &"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
