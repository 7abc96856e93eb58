"""Jobs that run as processes of their own: the files of any job, and the points of a sweep."""

from __future__ import annotations

import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

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
class Job(ABC):
    """Work that a command does in processes of its own, and how far it is.

    The job's log is locked as long as one of its processes lives, so any command can see whether the job is running.
    """

    kind: ClassVar[str] = "job"  # in messages
    state: State = field(default="to do", kw_only=True)
    started: float = field(default=0.0, kw_only=True)  # by this command, in seconds since the epoch; 0 if by another
    folder: Path | None = field(default=None, kw_only=True)  # that its command runs in; None: the one of its parent

    @property
    @abstractmethod
    def id(self) -> str:
        """A name that no other job of the same command has."""

    @property
    @abstractmethod
    def stem(self) -> Path:
        """The path that the names of the job's files begin with."""

    @property
    @abstractmethod
    def threads(self) -> int | None:
        """The CPU threads per process that the user asks for, or None."""

    @abstractmethod
    def state_at_rest(self) -> State:
        """Return the state that the job's files show while it is not running."""

    @abstractmethod
    def command(self, processes: int, threads: int | None) -> list[str]:
        """Return the command that starts or resumes the job.

        Args:
            processes: of the job: one per GPU, or 1 on the CPU.
            threads: CPU threads per process, unless the job has its own number; None leaves it to the command.
        """

    def retry(self) -> bool:
        """Count one more failure, and return whether to start the job again."""
        return False

    @property
    def log(self) -> Path:
        """The file that gets the output of the job's processes."""
        return self.stem.with_name(f"{self.stem.name}.log")

    @property
    def process_file(self) -> Path:
        """The file that tells a later command which processes run the job.

        Its lines are the number of the process group, the machine, and the GPUs; STOP_REQUESTED follows once the
        processes were asked to stop.
        """
        return self.stem.with_name(f"{self.stem.name}.pid")

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
        """Return the state that the log's lock and the job's files show."""
        return "running" if is_locked(self.log) else self.state_at_rest()

    def log_error(self, message: str) -> None:
        """End the log with an error that the job could not write itself."""
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


@dataclass
class PointJob(Job):
    """A point of a sweep and its run folder."""

    kind: ClassVar[str] = "point"
    point: Point
    run: RunFolder
    stop_after: int | None = None  # step after which the run is paused

    @property
    def id(self) -> str:
        return self.point.id

    @property
    def stem(self) -> Path:
        return self.run.path

    @property
    def threads(self) -> int | None:
        return self.point.config.train.threads

    def state_at_rest(self) -> State:
        if self.run.done:
            return "done"
        if self.stop_after is not None and self.validated() >= self.stop_after:
            return "paused"
        return "stopped" if self.run.config.exists() else "to do"

    def validated(self) -> int:
        """Return the step of the last validation, or 0 before the first."""
        return max((line.step for line in self.run.log("validation")), default=0)

    def command(self, processes: int, threads: int | None) -> list[str]:
        # Ray kills the children of a worker that it kills; the run is a child of the launcher, and saves.
        launch = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--num_processes", str(processes)]
        if processes > 1:
            launch += ["--main_process_port", "0"]  # any unused port, because other points run on this machine
        run = str(self.run.path)
        if self.run.config.exists():
            flags = ["--resume", run, *self.point.resume_flags]
        else:
            flags = [*self.point.flags, "--output", run]
        if self.stop_after is not None:
            flags += ["--stop-after", str(self.stop_after)]
        if threads is not None and self.threads is None:
            flags += ["--threads", str(threads)]
        return [*launch, "-m", "im2json", "train", *flags]


def make_jobs(points: Sequence[Point], sweep: Path) -> list[PointJob]:
    """Return a job for each point, in the state that its folder under `sweep` shows."""
    jobs = [PointJob(point, RunFolder(sweep / "points" / point.id)) for point in points]
    for job in jobs:
        job.state = job.state_on_disk()
    return jobs
