"""Progress of long work: a bar on a terminal and in a notebook, now and then a line in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TypeAlias

from tqdm import std
from tqdm.auto import tqdm

SECONDS_PER_LINE = 30.0
IN_NOTEBOOK = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)


class ProgressLines:
    """What a bar says as lines, for a file: a terminal draws a bar over the last one, while a file would keep them all.

    Its methods are those of a tqdm bar that are needed here.
    """

    def __init__(self, total: int, description: str, unit: str, done: int, keep: bool) -> None:
        self.total, self.n, self.initial = total, done, done
        self.description, self.unit, self.keep = description, unit, keep
        self.postfix = ""
        self.written = done  # what the last line said
        self.start = self.last = time.monotonic()
        if keep:
            self._write()

    def set_postfix(self, values: Mapping[str, str], refresh: bool = False) -> None:
        self.postfix = ", ".join(f"{name}={value}" for name, value in values.items())

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.last >= SECONDS_PER_LINE:
            self._write()

    def _write(self) -> None:
        self.last, self.written = time.monotonic(), self.n
        line = std.tqdm.format_meter(
            self.n, self.total, self.last - self.start, prefix=self.description, unit=self.unit, initial=self.initial,
            postfix=self.postfix, bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )  # fmt: skip
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *error: object) -> None:
        if self.keep and self.n > self.written:
            self._write()


Bar: TypeAlias = std.tqdm | ProgressLines


def progress_bar(
    total: int, description: str, unit: str, *, done: int = 0, shown: bool = True, keep: bool = True
) -> Bar:
    """Return a bar of `total` units on stderr, with the time taken and the time left, to be used in a `with`.

    Args:
        done: units that were done before.
        shown: whether this process shows it. One of several should.
        keep: leave the bar on the screen when it is done. In a file, work that is not kept and takes less than
            SECONDS_PER_LINE leaves no line.
    """
    if shown and not IN_NOTEBOOK and not sys.stderr.isatty():
        return ProgressLines(total, description, unit, done, keep)
    return tqdm(
        total=total, desc=description, unit=unit, initial=done, disable=not shown, leave=keep, dynamic_ncols=True,
        smoothing=0.1,
    )  # fmt: skip
