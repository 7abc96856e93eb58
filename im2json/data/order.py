"""Which examples make up which step: a pure function of (seed, step), so that a resumed run needs no sampler state."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from im2json.options import TrainOptions


def even(total: int, most: int) -> int:
    """Return the part size, at most `most`, that splits `total` most evenly."""
    return -(-total // -(-total // most))


class Share(NamedTuple):
    """The part of a step that one process computes, and how."""

    microbatch: int  # examples per forward and backward pass, at most
    rank: int = 0
    processes: int = 1


class Order:
    """The order in which a training split is seen.

    Every epoch is its own permutation, seeded by (seed, epoch) and cut into steps of `batch_size` examples; the last
    step of an epoch holds what is left. Which examples a step has does not depend on the number of processes, the
    size of a microbatch, or on how long examples are.

    Args:
        lengths: target tokens of each example.
        image_tokens: of each example, where they differ.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        image_tokens: Sequence[int] | None = None,
    ) -> None:
        assert num_examples > 0 and batch_size > 0
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed
        self.lengths = lengths
        self.whole = [sum(both) for both in zip(lengths, image_tokens)] if lengths and image_tokens else lengths
        self.steps_per_epoch = math.ceil(num_examples / batch_size)
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)

    def steps(self, epochs: float) -> int:
        """Return the optimizer updates in this many epochs, at least one."""
        return max(1, round(epochs * self.steps_per_epoch))

    def total(self, options: TrainOptions) -> int:
        """Return the updates of a whole run."""
        return options.steps or self.steps(options.epochs)

    def step(self, step: int) -> list[int]:
        """Return the indices of the examples of the update after `step` updates."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        return self._permutation(epoch)[start : start + self.batch_size].tolist()

    def target_tokens(self, step: int) -> int:
        """Return the target tokens of a step, over all processes."""
        assert self.lengths is not None
        return sum(self.lengths[i] for i in self.step(step))

    def microbatches(self, step: int, share: Share) -> list[list[int]]:
        """Return a process's share of a step, in microbatches; empty if a short step leaves nothing for it.

        Examples of like length come into the same microbatch, so that little of it is padding; every process gets
        some of each length. The gradient of a step does not depend on how it is dealt out.
        """
        indices = self.step(step)
        if self.whole is not None:
            indices.sort(key=self.whole.__getitem__)
        mine = indices[share.rank :: share.processes]
        return [mine[i : i + share.microbatch] for i in range(0, len(mine), share.microbatch)]
