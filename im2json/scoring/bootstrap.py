"""Weights of the streaming bootstrap.

A bootstrap replicate draws as many examples as there are, with replacement. How often it draws a given one
is close to Poisson with mean 1, independently of the others, so an example can be weighted when it comes,
without knowing how many there will be (the online bootstrap of Oza and Russell, 2001; N. Chamandy et al.,
"Estimating Uncertainty for Massive Data Streams", Google, 2012). An example's weights follow from a seed
and its key alone: neither the order of the examples nor how they are spread over processes changes a
replicate, and two runs that score the same examples are resampled alike, which is what a paired comparison
needs.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

REPLICATES = 1000
"""Replicates of the bootstrap: 25 of them lie beyond each end of a 95 % interval."""


def _poisson_table() -> NDArray[np.uint8]:
    """A Poisson variate of mean 1 for every 16-bit number: its distribution inverted, to 1/65536."""
    below = np.cumsum([math.exp(-1) / math.factorial(count) for count in range(12)])
    return np.searchsorted(below, (np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.uint8)


_POISSON = _poisson_table()


def example_key(seed: int, id: str | None, content: str) -> bytes:
    """What names an example: its id, or its content where it has none."""
    kind, name = ("content", content) if id is None else ("id", id)
    return hashlib.sha256(f"{seed}\0{kind}\0{name}".encode("utf-8", "surrogatepass")).digest()


def poisson_weights(key: bytes, count: int = REPLICATES) -> NDArray[np.uint8]:
    """`count` independent Poisson weights of mean 1, the same for the same key on any machine."""
    numbers = np.frombuffer(hashlib.shake_128(key).digest(2 * count), dtype="<u2")
    return _POISSON[numbers]


def interval(replicates: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of a metric's replicates; those that drew no example (NaN) are left out."""
    drawn = replicates[~np.isnan(replicates)]
    if not len(drawn):
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
