"""What a machine does to a run, injected: nothing is lost, and the run that goes on is the one that never stopped.

`pytest -m slow -s tests/test_faults.py` prints the table: faults injected, survived, lost.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Process
from helpers import RESUMED, ROOT, assert_same_runs, launch, torchrun, wait_for

from im2json.files import read_lines
from im2json.runs import RunFolder, complete_checkpoints

pytestmark = pytest.mark.slow

KILLS = 10
FLAGS = (*map(str, RESUMED),)

# train.py in a process of its own, which counts what it puts on disk and kills itself at the event of that number.
PROGRAM = """
import os, signal
import torch
import im2json.files, im2json.inference.evaluate, im2json.model.lora, im2json.training.tracking
from im2json.training import loop
from im2json.training.checkpoint import Checkpoints
from im2json.training.update import Update
events = 0

def counted(call):
    def do(*given, **more):
        global events
        events += 1
        if events == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **more)
    return do

for owner, names in (
    (os, ("replace", "rename", "fsync")), (torch, ("save",)), (im2json.model.lora, ("save_file",)),
    (im2json.files, ("append_lines",)), (im2json.training.tracking, ("append_lines",)),
    (im2json.inference.evaluate, ("append_lines", "score_answer")), (loop, ("report",)), (Update, ("__call__",)),
    (Checkpoints, ("save", "keep_adapter")),
):
    for name in names:
        setattr(owner, name, counted(getattr(owner, name)))
import train
try:
    train.main()
finally:
    os.write(1, f"\\nevents {{events}}\\n".encode())
"""


@pytest.fixture(scope="module")
def tally() -> Iterator[dict[str, list[bool]]]:
    """Fault -> whether each injection of it was survived; printed as a table at the end."""
    survived: dict[str, list[bool]] = {}
    yield survived
    print(f"\n{'fault':<44}{'injected':>9}{'survived':>9}{'lost':>6}")
    for fault, outcomes in survived.items():
        print(f"{fault:<44}{len(outcomes):>9}{sum(outcomes):>9}{outcomes.count(False):>6}")


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> RunFolder:
    return train(tmp_path_factory.mktemp("whole") / "run", *RESUMED)


@pytest.fixture(scope="module")
def whole_of_two(base_args, tmp_path_factory) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("whole") / "two")
    launch("train", "--output", run.path, *base_args, *FLAGS)
    return run


def start(folder: Path, base_args: list[str], at: int, before: str = "") -> Process:
    flags = ["--output", str(folder), *base_args, *FLAGS]
    return Process(before + PROGRAM.format(at=at), *flags, cwd=folder.parent)


def survives(run: RunFolder, whole: RunFolder) -> bool:
    assert_same_runs(run, whole)
    return True


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(base_args, whole, resume, tally, tmp_path):
    """kill -9, between steps, inside a checkpoint's writing and inside an evaluation: wherever the draw falls."""
    counting = start(tmp_path / "counting", base_args, at=-1)
    output, _ = counting.communicate()
    total = int(output.rsplit("events ", 1)[1])
    assert_same_runs(RunFolder(tmp_path / "counting"), whole)
    places = sorted(random.Random(0).sample(range(1, total + 1), KILLS))
    outcomes = tally.setdefault("kill -9 at a random one of the run's writes", [])
    for first, second in zip(places[::2], places[1::2]):
        runs = {at: RunFolder(tmp_path / f"killed-{at}") for at in (first, second)}
        processes = {at: start(run.path, base_args, at) for at, run in runs.items()}
        for at, process in processes.items():
            process.communicate()
            assert process.returncode == -signal.SIGKILL, at
            outcomes.append(False)
            assert not runs[at].done or at == total
            if runs[at].config.exists() and not runs[at].done:
                resume(runs[at])
                outcomes[-1] = survives(runs[at], whole)
            else:  # killed before there was anything to lose
                outcomes[-1] = not complete_checkpoints(runs[at].checkpoints)
    assert all(outcomes)


LIMITED = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"


@pytest.mark.parametrize("kilobytes", [6, 60, 300])
def test_a_run_that_may_not_write_further_stops_in_one_line(base_args, whole, resume, tally, tmp_path, kilobytes):
    """As on a full disk, at a file of that size: a log, an adapter, or a checkpoint."""
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes << 10}, resource.RLIM_INFINITY))\n"
    run = RunFolder(tmp_path / "run")
    process = start(run.path, base_args, at=-1, before=LIMITED + limit)
    _, errors = process.communicate()
    outcomes = tally.setdefault("no room for a file", [])
    outcomes.append(False)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors, errors[errors.index("Traceback") :]
    (said,) = (line for line in errors.splitlines() if line.startswith("Error: "))
    assert f"go on with im2json train --resume {run.path}" in said
    assert run.config.exists()
    resume(run)
    outcomes[-1] = survives(run, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_reaches_workers_too_and_saves(base_args, whole, resume, tally, tmp_path, number):
    """As a terminal and a scheduler send it, to the whole process group."""
    run = RunFolder(tmp_path / "run")
    slow = "import im2json.training.loop as loop, time\nreport = loop.report\n"
    slow += "loop.report = lambda *given: (time.sleep(0.5), report(*given))\n"
    flags = ["--output", str(run.path), *base_args, *FLAGS, "--workers", "2"]
    process = Process(slow + "import train; train.main()", *flags, cwd=tmp_path, new_session=True)
    outcomes = tally.setdefault("SIGINT or SIGTERM to all, with workers", [])
    outcomes.append(False)
    wait_for((run.checkpoints / "step-2").exists, process)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].endswith(f"go on with im2json train --resume {run.path}")
    resume(run)
    outcomes[-1] = survives(run, whole)


DYING = """
import ctypes, os, signal, sys
sys.path.insert(0, {root!r})
import torch
import im2json.training.loop as loop
report, last = loop.report, os.environ["RANK"] == "1"

def dying(tracker, bar, state, *more):
    if last and state.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    report(tracker, bar, state, *more)
    if {stuck} and state.step == 3:  # as in a collective of NCCL: in C, without the GIL, deaf to signals
        mutex = ctypes.create_string_buffer(64)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
    if {given_up} and state.step == 3:  # as NCCL does with a collective when it is told to
        torch.distributed.all_reduce = lambda tensor: None

loop.report = dying
import train
train.main()
"""


@pytest.mark.parametrize("collective", ["fails", "is stuck", "is given up"])
def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(base_args, whole_of_two, tally, tmp_path, collective):
    """Of two processes one is killed: the other one ends within seconds and says why, even out of a collective that
    never returns, or returns with nothing added up; resumed, the run equals one that was left alone."""
    run = RunFolder(tmp_path / "run")
    outcomes = tally.setdefault(f"one of two processes killed, and the other's collective {collective}", [])
    outcomes.append(False)
    program = DYING.format(root=str(ROOT), stuck=collective == "is stuck", given_up=collective == "is given up")
    process = torchrun(2, program, "--output", run.path, *base_args, *FLAGS)
    wait_for((run.checkpoints / "step-2").exists, process)
    printed = "".join(process.communicate(timeout=300))
    assert printed.count("exitcode  : -9") == 1  # or the launcher had to kill the other one, after 30 s
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in printed
    (said,) = (line for line in printed.splitlines() if line.startswith("Error: "))
    assert said == (
        f"Error: process 1 of 2 was lost; what was saved is kept: go on with im2json train --resume {run.path}"
    )
    assert not run.done
    assert max(row["step"] for row in read_lines(run.metrics_file)) == 3  # none was taken without the other process
    launch("train", "--resume", run.path)
    outcomes[-1] = survives(run, whole_of_two)


def test_an_evaluation_that_loses_a_process_ends_with_one_line(whole_of_two):
    program = (
        f"import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "import im2json.inference.evaluate as room\n"
        "score = room.score_answer\n"
        "def dying(*given):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        time.sleep(5)\n"  # until the other one waits for it
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return score(*given)\n"
        "room.score_answer = dying\n"
        "import evaluate; evaluate.main()"
    )
    process = torchrun(2, program, whole_of_two.path)
    _, errors = process.communicate(timeout=300)
    said = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert said == ["Error: process 1 of 2 was lost; evaluate once more"], errors
    assert process.returncode != 0


def test_a_request_to_stop_is_heeded_by_all_processes(base_args, whole_of_two, tally, tmp_path):
    """SIGTERM to the launcher, which hands it on: both finish the step, and wait for its checkpoint."""
    program = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import im2json.training.loop as loop\n"
        "from im2json.training.checkpoint import Checkpoints\n"
        "report, save = loop.report, Checkpoints.save\n"
        "loop.report = lambda *given: (time.sleep(0.5), report(*given))\n"
        "Checkpoints.save = lambda self: (time.sleep(2 * self.update.accelerator.is_main_process), save(self))\n"
        "import train; train.main()"
    )
    run = RunFolder(tmp_path / "run")
    outcomes = tally.setdefault("SIGTERM to the launcher of two processes", [])
    outcomes.append(False)
    process = torchrun(2, program, "--output", run.path, *base_args, *FLAGS)
    wait_for((run.checkpoints / "step-2").exists, process)
    process.send_signal(signal.SIGTERM)
    printed = "".join(process.communicate(timeout=300))
    assert printed.count(f"Error: interrupted: go on with im2json train --resume {run.path}\n") == 2, printed
    assert "terminate called" not in printed  # as where a thread is left in a collective
    assert not run.done
    launch("train", "--resume", run.path)
    outcomes[-1] = survives(run, whole_of_two)
