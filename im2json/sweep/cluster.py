"""Points on a Ray cluster that is there: each a task, in a sweep folder that all its machines share."""

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
from im2json.sweep.launch import (
    POLL_SECONDS,
    STOP_REQUESTED,
    Job,
    command,
    is_locked,
    launch,
    lock,
    output_of,
    signal_group,
)

ANSWER_SECONDS = 5  # for a cluster to take a connection; Ray itself tries for minutes
RETRIES = 3  # of a point whose worker or machine was lost; it goes on from its checkpoint


class Cluster:
    """As many points at a time as the cluster has room for; Ray queues the others."""

    def __init__(self, address: str, train: Path, capacity: int, gpus_per_run: int | None) -> None:
        """
        Raises:
            UserError: if Ray is not installed, no cluster answers, or no machine has as many GPUs.
        """
        check_address(address)
        try:
            import ray
        except ImportError:
            raise UserError("--ray needs Ray: pip install 'im2json[ray]'") from None
        self.ray, self.train, self.capacity = ray, train, capacity
        self.tasks: dict[str, Any] = {}  # by point
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
            raise UserError(f"--ray {address}: no Ray cluster answers there ({first_line(error)})") from None
        finally:
            signal.signal(signal.SIGTERM, handler)  # which Ray has replaced by its own
        most = max(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
        self.gpus = gpus_per_run or min(1, int(most))
        if self.gpus > most:
            raise UserError(f"--gpus-per-run {self.gpus}: no machine of the cluster has more than {most:g} GPU(s)")

    def has_room(self, beside: Sequence[Job]) -> bool:
        return len(beside) < self.capacity

    def start(self, job: Job, beside: Sequence[Job]) -> bool:
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
        except self.ray.exceptions.RayTaskError as error:  # its own text begins with where it was raised
            job.complain(f"Ray gave up on this point: {first_line(error.cause)}")
        except self.ray.exceptions.RayError as error:
            job.complain(f"Ray gave up on this point: {first_line(error)}")
        return is_locked(job.log)

    def stop(self, job: Job, at_once: bool) -> None:
        if task := self.tasks.get(job.point.id):
            self.ray.cancel(task, force=at_once)
        if at_once or task is None:  # without a task, another sweep has started it
            signal_group(job, signal.SIGKILL if at_once else signal.SIGTERM)

    def output_of(self, arguments: list[str], log: Path) -> tuple[int, str]:
        run = self.ray.remote(num_gpus=self.gpus, max_retries=RETRIES)(output_of)
        return self.ray.get(run.remote(arguments, log))


def check_address(address: str) -> None:
    """Raises UserError where there is no cluster to be found, which Ray would take minutes to say."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:([0-9]+)", address)
    if address != "auto" and found is None:
        raise UserError(f"--ray {address}: expected the HOST:PORT of a cluster, or auto for the one on this machine")
    if found is not None:
        host, port = found.groups()
        try:
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise UserError(f"--ray {address}: no Ray cluster answers there ({error})") from None


def run_point(job: Job, train: Path, processes: int, threads: int | None) -> None:
    """The task: a point's program, brought to its end on the machine that Ray has chosen.

    Where the worker that runs this ends, in whatever way, the guard asks the point to save and stop, and Ray's next try
    goes on.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what it starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray cancels a task by it
    try:
        with job.log.open("ab") as log:
            while not lock(log):  # what a lost worker has started is ending
                time.sleep(POLL_SECONDS)
            if job.state_at_rest() in ("done", "paused"):
                return
            process = launch(job, command(job, train, processes, threads), log, {})
        guard = start_guard(job, process.pid)
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
        guard.communicate(b"\n")
    except KeyboardInterrupt:  # as Ray cancels a task; it ends a worker by SystemExit, which is the guard's matter
        signal_group(job, signal.SIGTERM)
        while is_locked(job.log):
            time.sleep(POLL_SECONDS)
        raise


def start_guard(job: Job, group: int) -> subprocess.Popen:
    """What asks a process group to stop, unless it was asked, when this process ends; a line sends it home.

    It waits for the line in a grandchild: Ray kills the children of a worker that it kills.
    """
    note = shlex.quote(str(job.group))
    ask = f"grep -qx '{STOP_REQUESTED}' {note} || {{ kill -TERM -{group} && echo '{STOP_REQUESTED}' >> {note}; }}"
    return subprocess.Popen(
        ["sh", "-c", f"exec 3<&0; (read _ <&3 || {{ {ask}; }}) &"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
