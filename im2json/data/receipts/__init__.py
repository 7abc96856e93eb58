"""Synthetic receipts with their JSON: the embedded data set.

No receipt was photographed or scanned. Each is generated from (seed, split, index) alone, in the schema of CORD v2
(Park et al. 2019, https://github.com/clovaai/cord) and with the variety of that data set.

    words.py     words, a third of them random
    content.py   what a receipt says: its lines and its target
    layout.py    how it looks: lines, fonts, and a style in which the lines fit
    printing.py  the picture, with the centre of every character
"""

from __future__ import annotations

import functools
from typing import Any

from im2json.data.example import Example
from im2json.data.receipts.content import Receipt, draw_receipt
from im2json.data.receipts.printing import Page, print_page

DESCRIPTION = "synthetic receipts in CORD v2's schema, drawn from a seed (no real document among them)"
COUNTS = {"train": 400, "validation": 50, "test": 100}


def render(receipt: Receipt) -> Page:
    """Return the picture of a receipt, with the centre of every character in it."""
    return print_page(receipt.lines, receipt.style)


class Receipts:
    """A split of the synthetic receipts. A receipt is drawn each time that it is read."""

    def __init__(self, split: str, count: int | None = None, seed: int = 0):
        """Define a split of `count` receipts, by default as many as COUNTS has for it.

        Raises:
            ValueError: if COUNTS has no such split and `count` is not given.
        """
        if count is None and split not in COUNTS:
            raise ValueError(f"the receipts have no split {split!r}; there are {', '.join(COUNTS)}")
        self._split, self._seed = split, seed
        self._count = COUNTS[split] if count is None else count
        if self._count < 0:
            raise ValueError(f"a split cannot hold {self._count} receipts")

    @property
    def name(self) -> str:
        return self._split

    @functools.cached_property
    def ids(self) -> list[str]:
        return [self._id(index) for index in range(self._count)]

    @functools.cached_property
    def targets(self) -> list[dict[str, Any]]:
        return [draw_receipt(self._seed, self._split, index).target for index in range(self._count)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < self._count:
            raise IndexError(f"{self._split} holds {self._count} receipts, there is none at {i}")
        receipt = draw_receipt(self._seed, self._split, i)
        return Example(self._id(i), render(receipt).image, receipt.target)

    def _id(self, index: int) -> str:
        return f"receipts-{self._seed}-{self._split}-{index}"
