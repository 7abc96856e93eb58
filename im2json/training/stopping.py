"""What ends a run early: being asked to (Ctrl-C, or SIGTERM as schedulers send it), and the loss of a process."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from im2json.errors import UserError

GRACE_SECONDS = 5.0  # for a process to end by itself after another one has
NEVER = datetime.timedelta(days=3650)
NOTICE = b"\nstopping after this step, with a checkpoint; once more stops at once\n"


class StopRequest:
    """While it is entered, the first Ctrl-C or SIGTERM is noted and the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.made = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may ask for signals
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        os.write(2, NOTICE)  # print may have been what was interrupted


@dataclass
class Watch:
    advice: str  # to whom a process of the run was lost


@contextlib.contextmanager
def watched_peers(accelerator: Accelerator, advice: str) -> Iterator[Watch]:
    """When one process of a run exits, stop the others within seconds, even inside a collective.

    With NCCL they would wait for it in the next collective, where no exception and no signal handler gets through. So
    one thread per peer waits for a message that the peer sends when it leaves this context. If the peer dies, the
    system closes the connection, on this machine or another, once the workers that it forked have ended too. A process
    that has not left this context GRACE_SECONDS after a peer failed is ended, with a line that names the peer.

    Raises:
        UserError: raised instead of a RuntimeError, or of the launcher's request to stop, if a process was lost; and
            instead of a RuntimeError if one failed, which prints its own error.
    """
    own, count = accelerator.process_index, accelerator.num_processes
    peers = [rank for rank in range(count) if rank != own]
    group = dist.new_group(backend="gloo", timeout=NEVER) if peers else None
    watched = Watch(advice)
    failures: list[tuple[int, bool]] = []  # the peer, and whether it was lost
    failed, left = threading.Event(), threading.Event()
    untold, telling = set(peers), threading.Lock()

    def reason() -> Exception:
        peer, lost = failures[0]
        if lost:
            return UserError(f"process {peer} of {count} was lost; {watched.advice}")
        return UserError(f"process {peer} of {count} stopped with an error")

    def tell(peer: int, failure: bool) -> None:
        with telling, contextlib.suppress(RuntimeError):  # it may be gone
            if peer in untold:
                untold.remove(peer)
                dist.send(torch.tensor([failure]), dst=peer, group=group)

    def watch(peer: int) -> None:
        word, closed = torch.tensor([True]), False
        try:
            dist.recv(word, src=peer, group=group)
        except RuntimeError:
            closed = True
        tell(peer, False)  # which lets it go
        if word:
            failures.append((peer, closed))
            failed.set()
            if not left.wait(GRACE_SECONDS):
                os.write(2, f"\nError: {reason()}\n".encode())
                os._exit(1)

    threads = [threading.Thread(target=watch, args=[peer], daemon=True) for peer in peers]
    for thread in threads:
        thread.start()
    failure = True
    try:
        yield watched
        failure = False
    except RuntimeError as error:
        if peers and failed.wait(1.0):  # a collective may fail before the thread hears of it
            raise reason() from error
        raise
    except KeyboardInterrupt as error:  # the launcher's, who may have seen it first
        if peers and failed.wait(1.0) and any(lost for _, lost in failures):
            raise reason() from error
        raise
    finally:
        left.set()
        for peer in peers:
            tell(peer, failure)
        until = time.monotonic() + GRACE_SECONDS
        for thread in threads:  # or the interpreter would abort in the middle of what they wait for
            thread.join(max(0.0, until - time.monotonic()))
