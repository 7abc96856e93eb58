"""What every source of data hands out: an example, and a split of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from PIL import Image


@dataclass(frozen=True)
class Example:
    """One picture with its target."""

    id: str  # stable from run to run, unique within its data set
    image: Image.Image  # upright, mode RGB, in its own size
    target: dict[str, Any]  # a JSON object, keys in the source's order


@runtime_checkable
class Split(Protocol):
    """A sequence of examples whose pictures are decoded only when asked for.

    `ids` and `targets` hold one entry a row, in row order, and decode no picture.
    """

    @property
    def name(self) -> str:
        """train, validation or test."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def targets(self) -> list[dict[str, Any]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example:
        """Decode row `i` (0 <= i < len). Raises IndexError past the end, UserError for a bad row."""


class FirstExamples:
    """The first `count` examples of a split, or all of them if there are fewer."""

    def __init__(self, split: Split, count: int) -> None:
        self.split = split
        self.count = min(count, len(split))

    @property
    def name(self) -> str:
        return self.split.name

    @property
    def ids(self) -> Sequence[str]:
        return self.split.ids[: self.count]

    @property
    def targets(self) -> list[dict[str, Any]]:
        return self.split.targets[: self.count]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Example:
        if i >= self.count:
            raise IndexError(i)
        return self.split[i]
