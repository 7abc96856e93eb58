"""Points as programs on this machine: several at a time, none lost, none left behind."""

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
from typing import BinaryIO

import click

from im2json.runs import RunFolder
from im2json.sweep.grid import Point

POLL_SECONDS = 0.5
TAIL_LINES = 6
NOTICE = "stopping: every point finishes its step and writes a checkpoint; once more stops at once"


@dataclasses.dataclass
class Job:
    """A point, its folder, and how far it is. Its log stays locked for as long as one of its processes lives."""

    point: Point
    run: RunFolder
    state: str = ""  # done, running, stopped (has something to go on from), to do, failed
    process: subprocess.Popen | None = None  # of this sweep; a running job without one was left by a killed sweep
    slot: int | None = None  # the place that it runs in, while it runs
    started: float = 0.0  # in seconds since the epoch

    @property
    def log(self) -> Path:
        return self.run.path.with_name(f"{self.run.path.name}.log")

    @property
    def group(self) -> Path:
        """Holds the number of the running process group, for the sweep that comes after a killed one."""
        return self.run.path.with_name(f"{self.run.path.name}.pid")

    def state_on_disk(self) -> str:
        if is_locked(self.log):
            return "running"
        return "done" if self.run.done else "stopped" if self.run.config.exists() else "to do"

    def signal(self, number: int) -> None:
        """Send a signal to all processes of a running job."""
        with contextlib.suppress(OSError, ValueError):
            if is_locked(self.log):  # so the number is still that of this job
                os.killpg(self.process.pid if self.process else int(self.group.read_text()), number)

    def last_words(self) -> str:
        """The end of the log: train.py's error, or the last lines."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 8192))
            text = file.read().decode("utf-8", "replace")
        lines = [line.rsplit("\r", 1)[-1] for line in text.splitlines() if line.strip()]
        errors = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
        return "\n".join(f"    {line}" for line in lines[errors[-1] if errors else -TAIL_LINES :])


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


def run_jobs(
    jobs: list[Job],
    slots: list[dict[str, str]],
    make_command: Callable[[Job], list[str]],
    show: Callable[[], None],
) -> None:
    """Bring every job to an end: done or failed.

    Args:
        slots: the environment of each place to run in.
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
                    if job.state == "running" and not is_running(job):
                        finish(job, stopping=bool(requests))
                free = len(slots) - sum(job.state == "running" for job in jobs)
                waiting = [job for job in jobs if job.state in ("to do", "stopped")]
                for job in waiting[: 0 if requests else max(0, free)]:
                    place = min(set(range(len(slots))) - {other.slot for other in jobs})
                    start(job, make_command(job), place, slots[place])
                show()
                if not any(job.state == "running" for job in jobs):
                    break
                if len(requests) > heard:
                    heard = len(requests)
                    click.echo(NOTICE, err=True)
                    for job in jobs:
                        job.signal(signal.SIGTERM if heard == 1 else signal.SIGKILL)
                time.sleep(POLL_SECONDS)
        finally:
            for job in jobs:  # only where something went wrong here is one running still
                job.signal(signal.SIGTERM)
    if requests:
        raise KeyboardInterrupt


def start(job: Job, arguments: list[str], slot: int, environment: dict[str, str]) -> None:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        if not lock(log):  # by a sweep that runs beside this one
            job.state = "running"
            return
        job.group.unlink(missing_ok=True)
        # a session of its own: Ctrl-C in the terminal is for the sweep alone, which then asks each point once
        job.process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "TQDM_MININTERVAL": "5", **environment},
        )  # fmt: skip
        job.group.write_text(str(job.process.pid))
    job.state, job.slot, job.started = "running", slot, time.time()


def is_running(job: Job) -> bool:
    """Whether one of the job's processes lives: train.py does after its launcher was stopped."""
    if job.process is not None and job.process.poll() is None:
        return True
    return is_locked(job.log)


def finish(job: Job, stopping: bool) -> None:
    ours, job.process, job.slot = job.process is not None, None, None
    job.group.unlink(missing_ok=True)
    job.state = job.state_on_disk()
    if job.state != "done" and ours and not stopping:
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
