"""Points as programs, several at a time, none lost, none left behind: on this machine, or where a cluster puts them."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import click

from im2json.runs import RunFolder, read_lines
from im2json.sweep.grid import Point

POLL_SECONDS = 0.5
TAIL_LINES = 6
NOTICE = "stopping: every point finishes its step and writes a checkpoint; once more stops at once"


@dataclasses.dataclass
class Job:
    """A point, its folder, and how far it is. Its log stays locked for as long as one of its processes lives."""

    point: Point
    run: RunFolder
    state: str = (
        ""  # done, running, stopped (has something to go on from), to do, left (after stop_after), dropped, failed
    )
    stop_after: int | None = None  # the step after which it is to be left
    started: float = 0.0  # by this sweep, in seconds since the epoch; 0 for what a killed sweep left running

    @property
    def log(self) -> Path:
        return self.run.path.with_name(f"{self.run.path.name}.log")

    @property
    def group(self) -> Path:
        """Holds the number of the running process group, for the sweep that comes after a killed one."""
        return self.run.path.with_name(f"{self.run.path.name}.pid")

    def state_on_disk(self) -> str:
        return "running" if is_locked(self.log) else self.state_at_rest()

    def state_at_rest(self) -> str:
        if self.run.done:
            return "done"
        if self.stop_after is not None and self.validated() >= self.stop_after:
            return "left"
        return "stopped" if self.run.config.exists() else "to do"

    def validated(self) -> int:
        """The step of the last validation; 0 before the first."""
        return max((row["step"] for row in read_lines(self.run.metrics) if row["split"] == "validation"), default=0)

    def last_words(self) -> str:
        """The end of the log: train.py's error, or the last lines."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 8192))
            text = file.read().decode("utf-8", "replace")
        lines = [line.rsplit("\r", 1)[-1] for line in text.splitlines() if line.strip()]
        errors = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
        return "\n".join(f"    {line}" for line in lines[errors[-1] if errors else -TAIL_LINES :])


class Place(Protocol):
    """Where points run."""

    @property
    def capacity(self) -> int:
        """Points at a time."""

    def start(self, job: Job) -> bool:
        """Start a job, or go on with it; False where a sweep beside this one has it."""

    def is_running(self, job: Job) -> bool:
        """Whether something of the job lives, whoever started it."""

    def stop(self, job: Job, at_once: bool) -> None:
        """Ask a running job to save and end, or end it."""

    def output_of(self, arguments: list[str], log: Path) -> tuple[int, str]:
        """Run a Python program to its end: its exit status and what it printed; its errors go to the log."""


def make_jobs(points: list[Point], sweep: Path) -> list[Job]:
    """A job for each point, in the state that its folder under `sweep` shows."""
    jobs = [Job(point, RunFolder(sweep / "points" / point.id)) for point in points]
    for job in jobs:
        job.state = job.state_on_disk()
    return jobs


def command(job: Job, train: Path, processes: int, threads: int | None) -> list[str]:
    """What starts a point, or goes on with it. `processes`: GPUs of the run, or 1 on the CPU."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--num_processes", str(processes)]
    if processes > 1:
        launch += ["--main_process_port", "0"]  # a free one: other points are on this machine
    run = str(job.run.path)
    flags = ["--resume", run] if job.run.config.exists() else [*job.point.flags, "--output", run]
    if job.stop_after is not None:
        flags += ["--stop-after", str(job.stop_after)]
    if threads is not None and job.point.config.train.threads is None:
        flags += ["--threads", str(threads)]
    return [*launch, str(train), *flags]


def make_slots(jobs: int | None, gpus_per_run: int | None) -> tuple[list[dict[str, str]], int, int | None]:
    """Where points can run at the same time: (environments, processes a point, CPU threads a point).

    Raises:
        ValueError: if there are not as many GPUs.
    """
    gpus = visible_gpus()
    if not gpus:
        if gpus_per_run is not None:
            raise ValueError(f"--gpus-per-run {gpus_per_run}: no GPU was found here")
        count = jobs or 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return [{}] * count, 1, max(1, cores // count)
    share = gpus_per_run or 1
    if share > len(gpus):
        raise ValueError(f"--gpus-per-run {share}: {len(gpus)} GPU(s) were found here")
    groups = [gpus[first : first + share] for first in range(0, len(gpus) - share + 1, share)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[:jobs]], share, None


def visible_gpus() -> list[str]:
    """The GPUs that CUDA may use, by number or name."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


class Here:
    """This machine: a slot with an environment of its own for each point that runs."""

    def __init__(self, slots: list[dict[str, str]], make_command: Callable[[Job], list[str]]) -> None:
        self.slots = slots
        self.make_command = make_command
        self.processes: dict[str, tuple[subprocess.Popen, int]] = {}  # by point, with the slot

    @property
    def capacity(self) -> int:
        return len(self.slots)

    def start(self, job: Job) -> bool:
        taken = {slot for _, slot in self.processes.values()}
        slot = next(number for number in range(len(self.slots)) if number not in taken)
        with job.log.open("ab") as log:
            if not lock(log):
                return False
            process = launch(job, self.make_command(job), log, self.slots[slot])
        self.processes[job.point.id] = process, slot
        return True

    def is_running(self, job: Job) -> bool:
        process, _ = self.processes.get(job.point.id, (None, None))
        # train.py lives on after its launcher was stopped, and so does the log's lock
        if (process is not None and process.poll() is None) or is_locked(job.log):
            return True
        self.processes.pop(job.point.id, None)
        return False

    def stop(self, job: Job, at_once: bool) -> None:
        signal_group(job, signal.SIGKILL if at_once else signal.SIGTERM)

    def output_of(self, arguments: list[str], log: Path) -> tuple[int, str]:
        return output_of(arguments, log)


def output_of(arguments: list[str], log: Path) -> tuple[int, str]:
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, text=True
        )
    return done.returncode, done.stdout


def launch(job: Job, arguments: list[str], log: BinaryIO, environment: dict[str, str]) -> subprocess.Popen:
    """Start a job's processes, a group of their own, which write to the log and hold its lock."""
    job.group.unlink(missing_ok=True)
    # a session of its own: Ctrl-C in the terminal is for the sweep alone, which then asks each point once
    process = subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "TQDM_MININTERVAL": "5", **environment},
    )  # fmt: skip
    job.group.write_text(str(process.pid))
    return process


def signal_group(job: Job, number: int) -> None:
    """Send a signal to all processes of a job that runs on this machine."""
    with contextlib.suppress(OSError, ValueError):
        if is_locked(job.log):  # so the number is still that of this job
            os.killpg(int(job.group.read_text()), number)


def run_jobs(jobs: list[Job], place: Place, show: Callable[[], None]) -> None:
    """Bring every job to an end: done, left after the step that was asked for, or failed.

    Args:
        show: called after every look at the jobs.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM. The points were asked to save and stop, and have ended; the second
            request ends them at once.
    """
    with stop_requests() as requests:
        heard = 0
        try:
            while True:
                for job in jobs:
                    if job.state == "running" and not place.is_running(job):
                        finish(job, stopping=bool(requests))
                free = place.capacity - sum(job.state == "running" for job in jobs)
                waiting = [job for job in jobs if job.state in ("to do", "stopped")]
                for job in waiting[: 0 if requests else max(0, free)]:
                    start(job, place)
                show()
                if not any(job.state == "running" for job in jobs):
                    break
                if len(requests) > heard:
                    heard = len(requests)
                    click.echo(NOTICE, err=True)
                    _stop_all(jobs, place, at_once=heard > 1)
                time.sleep(POLL_SECONDS)
        finally:
            _stop_all(jobs, place, at_once=False)  # only where something went wrong here is one running still
    if requests:
        raise KeyboardInterrupt


def _stop_all(jobs: list[Job], place: Place, at_once: bool) -> None:
    for job in jobs:
        if job.state == "running":
            place.stop(job, at_once)


def start(job: Job, place: Place) -> None:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.state, now = "running", time.time()
    job.started = now if place.start(job) else 0.0


def finish(job: Job, stopping: bool) -> None:
    ours, job.started = job.started > 0, 0.0
    job.group.unlink(missing_ok=True)
    job.state = job.state_on_disk()
    if job.state not in ("done", "left") and ours and not stopping:
        job.state = "failed"


def lock(file: BinaryIO) -> bool:
    """Lock an open file, for all processes that inherit it; False where it is locked already."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("ab") as file:
        return not lock(file)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """While it is entered, Ctrl-C and SIGTERM are only noted, in the list that it gives."""
    requests: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda given, frame: requests.append(given)) for number in numbers}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
