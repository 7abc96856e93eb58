"""The processes of a job on this machine: start them, signal them, and run a program for its output."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import psutil

from im2json.errors import UserError
from im2json.sweeps.jobs import STOP_REQUESTED, Job


class Output(NamedTuple):
    """What a program left when it ended."""

    status: int
    text: str  # on stdout


def launch(job: Job, command: Sequence[str], log: BinaryIO, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start the processes of a job as a group of their own. They write to the log and hold its lock.

    Raises:
        OSError, UserError: if the program cannot be started.
    """
    job.process_file.unlink(missing_ok=True)
    environment = {**os.environ, **environment}
    # The group has a session of its own, so that Ctrl-C in the terminal reaches only the command that started the job,
    # which then asks each job once.
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment, cwd=job.folder,
        )  # fmt: skip
    except ValueError as error:  # a null character in an option
        raise UserError(str(error)) from error
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "")
    job.process_file.write_text(f"{process.pid}\n{socket.gethostname()}\n{gpus}\n")
    return process


def signal_group(job: Job, number: int) -> None:
    """Send a signal to all processes of a job that runs on this machine.

    SIGTERM is sent only once, whichever sweep sends it, because a second one makes a run end without a checkpoint.
    SIGKILL also goes to the descendants, because a launcher puts the processes of a run on several GPUs outside its own
    group.
    """
    group = job.process_group()
    if group is None or (number == signal.SIGTERM and group.stop_requested):
        return
    with contextlib.suppress(OSError, psutil.Error):  # the job has just ended
        children = psutil.Process(group.number).children(recursive=True) if number == signal.SIGKILL else []
        os.killpg(group.number, number)
        for process in children:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if number == signal.SIGTERM:
            with job.process_file.open("a") as file:
                file.write(f"{STOP_REQUESTED}\n")


def run_python(arguments: Sequence[str], log: Path) -> Output:
    """Run a Python program to its end and return its output; its stderr goes to the log."""
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, text=True
        )
    return Output(done.returncode, done.stdout)
