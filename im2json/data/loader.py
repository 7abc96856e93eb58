"""Feed the loop: the batches of each step, decoded in worker processes where there are any."""

from __future__ import annotations

import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from im2json.data.collate import Batch, Collator
from im2json.data.example import Split
from im2json.data.order import Order, Share
from im2json.errors import UserError
from im2json.machine import own_cores

AHEAD = 32  # pictures that are loaded before they are asked for, where a model reads them one by one

S = TypeVar("S")
T = TypeVar("T")


@contextmanager
def loading_threads(device: torch.device) -> Iterator[Executor]:
    """Provide threads to load pictures in while a model reads: up to 8 beside a GPU, one beside a busy CPU.

    What has not begun when they are left is not done.
    """
    pool = ThreadPoolExecutor(max(1, min(8, own_cores() - 1)) if device.type == "cuda" else 1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def load_ahead(pool: Executor, load: Callable[[S], T], items: Iterable[S], ahead: int) -> Iterator[Future[T]]:
    """Return what `load` makes of each item, in their order, and begin with the first `ahead` at once.

    As many are begun or waiting whenever one is taken. An error is raised by the future of its item.
    """
    rest = iter(items)
    coming = deque(pool.submit(load, item) for item in itertools.islice(rest, ahead))

    def take() -> Iterator[Future[T]]:
        while coming:
            yield coming.popleft()
            coming.extend(pool.submit(load, item) for item in itertools.islice(rest, 1))

    return take()


class StepLoader:
    """One process's microbatches, step by step, from any step on.

    Args:
        workers: processes that decode pictures; 0 has the calling one do it.
        known: makes a batch of indices without decoding a picture, where that is possible.
    """

    def __init__(
        self,
        split: Split,
        collator: Collator,
        order: Order,
        share: Share,
        *,
        workers: int = 0,
        pin_memory: bool = False,
        known: Callable[[Sequence[int]], Batch] | None = None,
    ) -> None:
        self.split: Any = split
        self.collator = collator
        self.order = order
        self.share = share
        self.workers = workers
        self.pin_memory = pin_memory
        self.known = known

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield the microbatches of steps start to stop - 1, or an empty list if a short step leaves this process none.

        Raises:
            UserError: naming the row whose picture or target is bad.
        """
        return self._steps(start, stop) if self.known is None else _ahead(self._steps(start, stop))

    def _steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        plan = [self.order.microbatches(step, self.share) for step in range(start, stop)]
        drawn: dict[str, Any] = {
            "batch_sampler": [indices for step in plan for indices in step],
            "pin_memory": self.pin_memory,
        }
        if self.known is None:
            batches = loaded(self.split, self.collator, self.workers, **drawn)
        else:
            batches = loaded(range(len(self.split)), self.known, 0, **drawn)
        for step in plan:
            yield [next(batches) for _ in step]


def loaded(items: Any, collate: Callable[..., T], workers: int, **settings: Any) -> Iterator[T]:
    """Yield the batches of torch's DataLoader with these settings.

    Raises:
        UserError: as an item raises it, naming the row, in a worker too.
    """
    batches = DataLoader(
        items,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),  # or the loader would draw from the one that dropout uses
        worker_init_fn=_leave_the_group,
        **settings,
    )
    try:
        yield from batches
    except UserError as error:  # from a worker it comes with that process's traceback
        raise UserError(re.split(r"\n[\w.]*Error: ", str(error))[-1].rstrip()) from error


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items, and prepare each in a thread while the previous one is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _leave_the_group(worker: int) -> None:
    os.setpgrp()  # a terminal's Ctrl-C and a scheduler's SIGTERM to the process group are for the run to heed
