"""Run jobs on a backend, several at a time, and leave none of them behind."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import click

from im2json.errors import UserError
from im2json.sweeps.jobs import Job
from im2json.sweeps.processes import Output

POLL_SECONDS = 0.5
NOTICE = "stopping: every point finishes its step and writes a checkpoint; once more stops at once"


class Backend(Protocol):
    """The machine or the machines that run the jobs."""

    def has_capacity(self, running: Sequence[Job]) -> bool:
        """Return whether one more job can run beside those that are running."""

    def start(self, job: Job, running: Sequence[Job]) -> bool:
        """Start or resume a job; return False if another sweep has started it.

        Raises:
            OSError, UserError: if its program cannot be started.
        """

    def is_running(self, job: Job) -> bool:
        """Return whether any process of the job lives, whichever sweep started it."""

    def stop(self, job: Job, at_once: bool) -> None:
        """Ask a running job to save and end, or kill it at once."""

    def run_python(self, arguments: list[str], log: Path) -> Output:
        """Run a Python program to its end and return its output; its stderr goes to the log."""


def run_jobs(jobs: Sequence[Job], backend: Backend, show: Callable[[], None], notice: str = NOTICE) -> None:
    """Run every job until it is done, paused at its `stop_after`, or failed.

    Args:
        show: called after each look at the jobs.
        notice: printed at the first request to stop.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once all jobs have saved and ended. A second request kills them.
    """
    with stop_requests() as requests:
        handled = 0
        try:
            while True:
                for job in jobs:
                    if job.state == "running" and not backend.is_running(job):
                        _finish(job, stopping=bool(requests))
                if not requests:
                    _start_waiting(jobs, backend)
                show()
                if not any(job.state == "running" for job in jobs):
                    break
                if len(requests) > handled:
                    if not handled:  # requests that came since the last look count as one, however many they are
                        click.echo(notice, err=True)
                    _stop_all(jobs, backend, at_once=handled > 0)
                    handled = len(requests)
                time.sleep(POLL_SECONDS)
        finally:
            _stop_all(jobs, backend, at_once=False)  # a job is still running only if this function failed
    if requests:
        raise KeyboardInterrupt


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in the list that this yields, instead of letting them interrupt."""
    requests: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda given, frame: requests.append(given)) for number in numbers}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_waiting(jobs: Sequence[Job], backend: Backend) -> None:
    """Start as many of the waiting jobs as the backend can run."""
    for job in jobs:
        if job.state in ("to do", "stopped"):
            running = [other for other in jobs if other.state == "running"]
            if not backend.has_capacity(running):
                return
            _start(job, backend, running)


def _start(job: Job, backend: Backend, running: Sequence[Job]) -> None:
    job.log.parent.mkdir(parents=True, exist_ok=True)  # the sweep's own folder: its error ends the sweep
    now = time.time()
    try:
        job.started = now if backend.start(job, running) else 0.0
        job.state = "running"
    except (OSError, UserError) as error:  # for example, an option is too long for a command line
        job.log_error(f"its program could not be started: {error}")
        job.state = "failed"


def _finish(job: Job, stopping: bool) -> None:
    """Set the state of a job whose processes have ended."""
    ours, job.started = job.started > 0, 0.0
    job.process_file.unlink(missing_ok=True)
    job.state = job.state_on_disk()
    if job.state not in ("done", "paused") and ours and not stopping and not job.retry():
        job.state = "failed"


def _stop_all(jobs: Sequence[Job], backend: Backend, at_once: bool) -> None:
    for job in jobs:
        if job.state == "running":
            backend.stop(job, at_once)
