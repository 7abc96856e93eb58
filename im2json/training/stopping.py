"""Asking a run to stop: Ctrl-C, or SIGTERM as schedulers send it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

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
