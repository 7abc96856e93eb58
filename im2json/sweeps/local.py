"""Run jobs on this machine, each on GPUs or CPU cores of its own."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from im2json.errors import UserError
from im2json.files import is_locked, lock
from im2json.machine import available_cores, named_gpus, visible_gpus
from im2json.sweeps.jobs import Job
from im2json.sweeps.processes import Output, launch, run_python, signal_group

Environment = dict[str, str]
"""Variables of a job's processes: CUDA_VISIBLE_DEVICES on GPUs, none on a CPU."""


@dataclass(frozen=True)
class Shares:
    """How jobs share a machine."""

    environments: list[Environment]  # one for each job that can run at the same time
    processes: int  # of each job
    threads: int | None  # of each process on a CPU; None leaves it to the run


def share_machine(jobs: int | None, gpus_per_run: int | None) -> Shares:
    """Share this machine's GPUs, or its cores if it has no GPU.

    Args:
        jobs: at the same time; None means 1 on a CPU, and as many as the GPUs allow otherwise.
        gpus_per_run: None means 1.

    Raises:
        UserError: if there are fewer GPUs.
    """
    gpus = visible_gpus()
    if not gpus:
        if gpus_per_run is not None:
            raise UserError(f"--gpus-per-run {gpus_per_run}: no GPU was found here")
        count = jobs or 1
        return Shares([{}] * count, 1, max(1, available_cores() // count))
    size = gpus_per_run or 1
    if size > len(gpus):
        raise UserError(f"--gpus-per-run {size}: {len(gpus)} GPU(s) were found here")
    groups = [gpus[first : first + size] for first in range(0, len(gpus) - size + 1, size)]
    return Shares([{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[:jobs]], size, None)


class Local:
    """The backend of this machine. A job that runs has one of the environments for itself."""

    def __init__(self, environments: list[Environment], make_command: Callable[[Job], list[str]]) -> None:
        self.environments = environments
        self.make_command = make_command
        self.processes: dict[str, subprocess.Popen] = {}  # job id -> the launcher

    def unused(self, running: Sequence[Job]) -> list[Environment]:
        """Return the environments that no running job uses; a killed sweep may have started some of the jobs."""
        groups = (job.process_group() for job in running)
        busy = {gpu for group in groups if group is not None for gpu in group.gpus}
        unused = [
            environment
            for environment in self.environments
            if busy.isdisjoint(named_gpus(environment.get("CUDA_VISIBLE_DEVICES", "")))
        ]
        return unused[: max(0, len(self.environments) - len(running))]

    def has_capacity(self, running: Sequence[Job]) -> bool:
        return bool(self.unused(running))

    def start(self, job: Job, running: Sequence[Job]) -> bool:
        # Another sweep may have used the last environment since `has_capacity`.
        environment, *_ = self.unused(running) or self.environments
        with job.log.open("ab") as log:
            if not lock(log):
                return False
            self.processes[job.id] = launch(job, self.make_command(job), log, environment)
        return True

    def is_running(self, job: Job) -> bool:
        process = self.processes.get(job.id)
        # A run outlives a launcher that is stopped, and keeps the log locked.
        if (process is not None and process.poll() is None) or is_locked(job.log):
            return True
        self.processes.pop(job.id, None)
        return False

    def stop(self, job: Job, at_once: bool) -> None:
        signal_group(job, signal.SIGKILL if at_once else signal.SIGTERM)

    def run_python(self, arguments: list[str], log: Path) -> Output:
        return run_python(arguments, log)
