"""Points as programs, several at a time, none lost, none left behind: on this machine, or where a cluster puts them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import click
import psutil

from im2json.errors import UserError
from im2json.files import is_locked, lock
from im2json.machine import available_cores, named_gpus, visible_gpus
from im2json.runs import RunFolder
from im2json.sweep.grid import Point

POLL_SECONDS = 0.5
TAIL_LINES = 6
STOP_REQUESTED = "asked to stop"
NOTICE = "stopping: every point finishes its step and writes a checkpoint; once more stops at once"


@dataclasses.dataclass
class Job:
    """A point, its folder, and how far it is. Its log stays locked for as long as one of its processes lives."""

    point: Point
    run: RunFolder
    # done, running, stopped (has something to go on from), to do, paused (after stop_after), dropped, failed
    state: str = ""
    stop_after: int | None = None  # the step after which it is to be left
    started: float = 0.0  # by this sweep, in seconds since the epoch; 0 for what a killed sweep left running

    @property
    def log(self) -> Path:
        return self.run.path.with_name(f"{self.run.path.name}.log")

    @property
    def group(self) -> Path:
        """Who runs the point, for the sweep that comes after a killed one: a line each for the number of the process
        group, its machine and its GPUs, and a last one, STOP_REQUESTED, once it was asked to stop."""
        return self.run.path.with_name(f"{self.run.path.name}.pid")

    def holder(self) -> tuple[int, set[str], bool] | None:
        """The process group, its GPUs, and whether it was asked to stop, if the point runs on this machine."""
        if not is_locked(self.log):  # the number may be that of others by now
            return None
        try:
            number, machine, gpus, *more = self.group.read_text().splitlines()
            here = machine == socket.gethostname()
            return (int(number), set(named_gpus(gpus)), more == [STOP_REQUESTED]) if here else None
        except (OSError, ValueError):  # it is about to be written, or has just been removed
            return None

    def state_on_disk(self) -> str:
        return "running" if is_locked(self.log) else self.state_at_rest()

    def state_at_rest(self) -> str:
        if self.run.done:
            return "done"
        if self.stop_after is not None and self.validated() >= self.stop_after:
            return "paused"
        return "stopped" if self.run.config.exists() else "to do"

    def validated(self) -> int:
        """The step of the last validation; 0 before the first."""
        return max((line.step for line in self.run.log("validation")), default=0)

    def complain(self, why: str) -> None:
        """Have the log end with an error that train.py could not tell itself."""
        with self.log.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"Error: {why}\n")

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

    def has_room(self, beside: Sequence[Job]) -> bool:
        """Whether one more point can run beside these."""

    def start(self, job: Job, beside: Sequence[Job]) -> bool:
        """Start a job, or go on with it; False where a sweep beside this one has it.

        Raises:
            OSError, UserError: if its program cannot be started.
        """

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
    flags = ["--resume", run, *job.point.free] if job.run.config.exists() else [*job.point.flags, "--output", run]
    if job.stop_after is not None:
        flags += ["--stop-after", str(job.stop_after)]
    if threads is not None and job.point.config.train.threads is None:
        flags += ["--threads", str(threads)]
    return [*launch, str(train), *flags]


def make_slots(jobs: int | None, gpus_per_run: int | None) -> tuple[list[dict[str, str]], int, int | None]:
    """Where points can run at the same time: (environments, processes a point, CPU threads a point).

    Raises:
        UserError: if there are not as many GPUs.
    """
    gpus = visible_gpus()
    if not gpus:
        if gpus_per_run is not None:
            raise UserError(f"--gpus-per-run {gpus_per_run}: no GPU was found here")
        count = jobs or 1
        return [{}] * count, 1, max(1, available_cores() // count)
    share = gpus_per_run or 1
    if share > len(gpus):
        raise UserError(f"--gpus-per-run {share}: {len(gpus)} GPU(s) were found here")
    groups = [gpus[first : first + share] for first in range(0, len(gpus) - share + 1, share)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[:jobs]], share, None


class Here:
    """This machine: a slot with an environment of its own for each point that runs."""

    def __init__(self, slots: list[dict[str, str]], make_command: Callable[[Job], list[str]]) -> None:
        self.slots = slots
        self.make_command = make_command
        self.processes: dict[str, subprocess.Popen] = {}  # by point

    def free_slots(self, beside: Sequence[Job]) -> list[dict[str, str]]:
        """The slots that are left beside these points, of which a killed sweep may have started some."""
        holders = (job.holder() for job in beside)
        taken = {gpu for holder in holders if holder is not None for gpu in holder[1]}
        free = [slot for slot in self.slots if taken.isdisjoint(named_gpus(slot.get("CUDA_VISIBLE_DEVICES", "")))]
        return free[: max(0, len(self.slots) - len(beside))]

    def has_room(self, beside: Sequence[Job]) -> bool:
        return bool(self.free_slots(beside))

    def start(self, job: Job, beside: Sequence[Job]) -> bool:
        slot, *_ = self.free_slots(beside) or self.slots  # which may have been taken since `has_room`
        with job.log.open("ab") as log:
            if not lock(log):
                return False
            self.processes[job.point.id] = launch(job, self.make_command(job), log, slot)
        return True

    def is_running(self, job: Job) -> bool:
        process = self.processes.get(job.point.id)
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
    environment = {**os.environ, "TQDM_MININTERVAL": "5", **environment}
    # a session of its own: Ctrl-C in the terminal is for the sweep alone, which then asks each point once
    try:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment,
        )  # fmt: skip
    except ValueError as error:  # a null character in an option
        raise UserError(str(error)) from error
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "")
    job.group.write_text(f"{process.pid}\n{socket.gethostname()}\n{gpus}\n")
    return process


def signal_group(job: Job, number: int) -> None:
    """Send a signal to all processes of a job that runs on this machine.

    SIGTERM is sent once, whoever sends it: a second one has train.py end at once, without a checkpoint. SIGKILL is for
    what they started as well: the processes of a run on several GPUs are no part of their launcher's group.
    """
    if (holder := job.holder()) is None:
        return
    group, _, asked = holder
    if number == signal.SIGTERM and asked:
        return
    with contextlib.suppress(OSError, psutil.Error):  # it has just ended
        started = psutil.Process(group).children(recursive=True) if number == signal.SIGKILL else []
        os.killpg(group, number)
        for process in started:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if number == signal.SIGTERM:
            with job.group.open("a") as file:
                file.write(f"{STOP_REQUESTED}\n")


def run_jobs(jobs: list[Job], place: Place, show: Callable[[], None]) -> None:
    """Bring every job to an end: done, paused after the step that was asked for, or failed.

    Args:
        show: called after every look at the jobs.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM. The points were asked to save and stop, and have ended; a request
            after they were asked ends them at once.
    """
    with stop_requests() as requests:
        heard = 0
        try:
            while True:
                for job in jobs:
                    if job.state == "running" and not place.is_running(job):
                        finish(job, stopping=bool(requests))
                if not requests:
                    start_all(jobs, place)
                show()
                if not any(job.state == "running" for job in jobs):
                    break
                if len(requests) > heard:
                    if not heard:  # the first look that finds any asks, however many came since the last
                        click.echo(NOTICE, err=True)
                    _stop_all(jobs, place, at_once=heard > 0)
                    heard = len(requests)
                time.sleep(POLL_SECONDS)
        finally:
            _stop_all(jobs, place, at_once=False)  # only where something went wrong here is one running still
    if requests:
        raise KeyboardInterrupt


def start_all(jobs: list[Job], place: Place) -> None:
    """Start as many of the jobs that wait as there is room for."""
    for job in jobs:
        if job.state in ("to do", "stopped"):
            running = [other for other in jobs if other.state == "running"]
            if not place.has_room(running):
                return
            start(job, place, running)


def _stop_all(jobs: list[Job], place: Place, at_once: bool) -> None:
    for job in jobs:
        if job.state == "running":
            place.stop(job, at_once)


def start(job: Job, place: Place, running: Sequence[Job]) -> None:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    now = time.time()
    try:
        job.started = now if place.start(job, running) else 0.0
        job.state = "running"
    except (OSError, UserError) as error:  # as where an option is too long for a command line
        job.complain(f"its program could not be started: {error}")
        job.state = "failed"


def finish(job: Job, stopping: bool) -> None:
    ours, job.started = job.started > 0, 0.0
    job.group.unlink(missing_ok=True)
    job.state = job.state_on_disk()
    if job.state not in ("done", "paused") and ours and not stopping:
        job.state = "failed"


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
