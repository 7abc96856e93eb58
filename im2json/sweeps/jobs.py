"""A sweep's jobs: the run of each point, how far it is, and the command that starts or resumes it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from im2json.files import is_locked
from im2json.machine import named_gpus
from im2json.runs import RunFolder
from im2json.sweeps.grid import Point

TAIL_LINES = 6
"""Lines at the end of a log that are shown if they contain no error."""
STOP_REQUESTED = "asked to stop"
"""The line in a job's process file that says that SIGTERM was sent."""

State = Literal["to do", "running", "stopped", "paused", "done", "dropped", "failed"]
"""stopped: the run folder can be resumed. paused: the run has reached `stop_after`. dropped: halving ended it."""


class ProcessGroup(NamedTuple):
    """The processes of a job that runs on this machine."""

    number: int
    gpus: set[str]
    stop_requested: bool


@dataclass
class Job:
    """A point, its run folder, and how far it is.

    The job's log is locked as long as one of its processes lives, so any sweep can see whether the job is running.
    """

    point: Point
    run: RunFolder
    state: State = "to do"
    stop_after: int | None = None  # step after which the run is paused
    started: float = 0.0  # when this sweep started it, in seconds since the epoch; 0 if another sweep started it

    @property
    def log(self) -> Path:
        """The file that gets the output of the job's processes."""
        return self.run.path.with_name(f"{self.run.path.name}.log")

    @property
    def process_file(self) -> Path:
        """The file that tells a later sweep which processes run the job.

        Its lines are the number of the process group, the machine, and the GPUs; STOP_REQUESTED follows once the
        processes were asked to stop.
        """
        return self.run.path.with_name(f"{self.run.path.name}.pid")

    def process_group(self) -> ProcessGroup | None:
        """Return the processes of the job, or None if it does not run on this machine."""
        if not is_locked(self.log):  # other processes may have the number by now
            return None
        try:
            number, machine, gpus, *more = self.process_file.read_text().splitlines()
            group = ProcessGroup(int(number), set(named_gpus(gpus)), more == [STOP_REQUESTED])
            return group if machine == socket.gethostname() else None
        except (OSError, ValueError):  # the file is about to be written, or has just been removed
            return None

    def state_on_disk(self) -> State:
        """Return the state that the log's lock and the run folder show."""
        return "running" if is_locked(self.log) else self.state_at_rest()

    def state_at_rest(self) -> State:
        """Return the state that the run folder shows, of a job that is not running."""
        if self.run.done:
            return "done"
        if self.stop_after is not None and self.validated() >= self.stop_after:
            return "paused"
        return "stopped" if self.run.config.exists() else "to do"

    def validated(self) -> int:
        """Return the step of the last validation, or 0 before the first."""
        return max((line.step for line in self.run.log("validation")), default=0)

    def log_error(self, message: str) -> None:
        """End the log with an error that the run could not write itself."""
        with self.log.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"Error: {message}\n")

    def log_tail(self) -> str:
        """Return the end of the log: the last error and what follows it, or else the last lines."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 8192))
            text = file.read().decode("utf-8", "replace")
        lines = [line.rsplit("\r", 1)[-1] for line in text.splitlines() if line.strip()]
        errors = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
        return "\n".join(f"    {line}" for line in lines[errors[-1] if errors else -TAIL_LINES :])


def make_jobs(points: Sequence[Point], sweep: Path) -> list[Job]:
    """Return a job for each point, in the state that its folder under `sweep` shows."""
    jobs = [Job(point, RunFolder(sweep / "points" / point.id)) for point in points]
    for job in jobs:
        job.state = job.state_on_disk()
    return jobs


def train_command(job: Job, processes: int, threads: int | None) -> list[str]:
    """Return the command that starts or resumes the run of a job.

    Args:
        processes: of the run: one per GPU, or 1 on the CPU.
        threads: CPU threads per process, unless the point has its own number; None leaves it to the run.
    """
    # Ray kills the children of a worker that it kills; the run is a child of the launcher, and saves.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--num_processes", str(processes)]
    if processes > 1:
        launch += ["--main_process_port", "0"]  # any unused port, because other points run on this machine
    run = str(job.run.path)
    if job.run.config.exists():
        flags = ["--resume", run, *job.point.resume_flags]
    else:
        flags = [*job.point.flags, "--output", run]
    if job.stop_after is not None:
        flags += ["--stop-after", str(job.stop_after)]
    if threads is not None and job.point.config.train.threads is None:
        flags += ["--threads", str(threads)]
    return [*launch, "-m", "im2json", "train", *flags]
