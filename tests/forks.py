"""Processes of their own that start at once: they are forked from a server that has imported torch and all the rest.

A new `python -c` spends ten seconds on imports for two seconds of work. What a forked process does is the same, up to
its end: the interpreter leaves it as it leaves any program, with its exit handlers and its waiting threads.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Process:
    """A Python program in a process of its own; its methods are those of subprocess.Popen.

    Args:
        program: the source code.
        flags: the rest of sys.argv.
        cwd: the folder that it runs in.
        env: its environment; that of the tests if left out.
        new_session: whether it leads a process group of its own.
    """

    def __init__(
        self, program: str, *flags: str, cwd: Path = ROOT, env: dict[str, str] | None = None, new_session: bool = False
    ) -> None:
        request = {
            "program": program, "flags": flags, "cwd": str(cwd), "session": new_session,
            "env": dict(os.environ if env is None else env),
        }  # fmt: skip
        pipes = [os.pipe() for _ in range(3)]
        self.stdout, self.stderr = (os.fdopen(end, encoding="utf-8", errors="replace") for end, _ in pipes[:2])
        self._status = pipes[2][0]
        ends = [end for _, end in pipes]
        server = _server()
        socket.send_fds(server, [f"{json.dumps(request)}\n".encode()], ends)
        self.pid = int(server.recv(32))
        for end in ends:
            os.close(end)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, negative for a signal, once it has ended.

        Raises:
            subprocess.TimeoutExpired: if it has not ended by then.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(os.read(self._status, 32))
            os.close(self._status)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what it prints on both streams, once it has ended; kill it where that takes too long."""
        printed: dict[str, str] = {}

        def read(name: str) -> None:
            with getattr(self, name) as stream:
                printed[name] = stream.read()

        readers = [threading.Thread(target=read, args=[name], daemon=True) for name in ("stdout", "stderr")]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except BaseException:
            self.kill()
            raise
        for reader in readers:
            reader.join()
        return printed["stdout"], printed["stderr"]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> socket.socket:
    """Start the server and return the connection to it; it ends when the connection does."""
    ours, its = socket.socketpair()
    known = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.Popen([sys.executable, __file__, str(its.fileno())], pass_fds=[its.fileno()], env=known)
    its.close()
    return ours


def _next_process(connection: socket.socket) -> dict[str, Any]:
    """Fork a process for each request. Returns in these alone: what was requested."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        received, ends, *_ = socket.recv_fds(connection, 1 << 16, 3)
        while received and not received.endswith(b"\n"):
            received += connection.recv(1 << 16)
        if not received:
            os._exit(0)
        if os.fork() == 0:
            break
        for end in ends:
            os.close(end)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, err, status = ends
    process = os.fork()
    if process:
        os.close(out)
        os.close(err)
        connection.sendall(str(process).encode())
        connection.close()
        _, ended = os.waitpid(process, 0)
        os.write(status, str(os.waitstatus_to_exitcode(ended)).encode())
        os._exit(0)
    connection.close()
    os.close(status)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for end, stream in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(end, stream)
        os.close(end)
    use_streams()
    return json.loads(received)


def use_streams() -> None:
    """Open sys.stdout and sys.stderr anew: those from before a dup2 remember whether they could seek."""
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


# Code before a command that starts jobs: their programs are forked. They do the same, without importing torch again.
FORKING = """
import os, signal, subprocess, sys, tempfile, traceback
import im2json.sweeps.processes as processes
from forks import use_streams
from im2json.app import main

class Forked:
    def __init__(self, arguments, *, stdout, stderr, env, **_):
        self.pid, self.ended = os.fork(), None
        if self.pid:
            return
        status = 1
        try:
            os.setsid()
            os.environ.update(env)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.dup2(stdout.fileno(), 1)
            os.dup2(1 if stderr == subprocess.STDOUT else stderr.fileno(), 2)
            use_streams()
            main(arguments[arguments.index("im2json") + 1 :])
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self):
        if self.ended is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.ended = os.waitstatus_to_exitcode(found[1])
        return self.ended

def run(arguments, *, stderr, **_):
    with tempfile.TemporaryFile() as printed:
        _, status = os.waitpid(Forked(arguments, stdout=printed, stderr=stderr, env={}).pid, 0)
        printed.seek(0)
        text = printed.read().decode()
    return subprocess.CompletedProcess(arguments, os.waitstatus_to_exitcode(status), text)

class forking:  # all of subprocess that jobs use
    Popen, run = Forked, run
    PIPE, DEVNULL, STDOUT = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT

processes.subprocess = forking
"""

IMPORTED = (
    "torch.distributed.launcher.api", "torch.utils.tensorboard",
    "bitsandbytes.optim", "peft.tuners.lora", "transformers.models.paligemma.modeling_paligemma",
    "transformers.models.paligemma.processing_paligemma",
    "transformers.models.gemma.modeling_gemma", "transformers.models.siglip.modeling_siglip",
    "transformers.models.siglip.image_processing_pil_siglip", "im2json.commands.train", "im2json.commands.evaluate",
    "train", "evaluate",
)  # fmt: skip

if __name__ == "__main__":
    from im2json.cli import quiet_libraries

    quiet_libraries()
    gc.disable()  # as in conftest.py
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # so that no collection copies the pages that the processes share
    assert threading.active_count() == 1
    wanted = _next_process(socket.socket(fileno=int(sys.argv[1])))
    if wanted["session"]:
        os.setsid()
    gc.enable()
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["env"])
    sys.argv = ["-c", *wanted["flags"]]
    exec(compile(wanted["program"], "<program>", "exec"), {"__name__": "__main__"})
