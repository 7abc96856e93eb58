"""Define what every source of data hands out: an example, a split of them, and the rows that a run has of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from im2json.records import Content


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


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a data set that a run can use."""

    split: Split  # that it was found in
    index: int  # there
    id: str
    target: dict[str, Any]
    content: Content
    tokens: int  # of the target, EOS included; 0 if they were not counted
    altered: str | None = None  # where the row is, and how what is learned differs from its target
    pages: int = 1  # of the picture's file, of which the first is read
    scaled: str | None = None  # how the values of the picture had to be scaled
    image_tokens: int = 0  # of the picture; 0 if they were not counted
    scale: float = 1.0  # that the model sees the picture in
    kept: float = 1.0  # share of the picture that --trim keeps


class RunSplit:
    """A split as a run has it: rows of the data set, with the ids that they had when the run began."""

    def __init__(self, name: str, rows: Sequence[Row], ids: Sequence[str] | None = None) -> None:
        self.name = name
        self.rows = rows
        self.ids = [row.id for row in rows] if ids is None else ids

    @property
    def targets(self) -> list[dict[str, Any]]:
        return [row.target for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        row = self.rows[i]
        return dataclasses.replace(row.split[row.index], id=self.ids[i])


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
