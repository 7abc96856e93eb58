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
        """Decode row `i` (0 <= i < len). Raises IndexError past the end, ValueError for a bad row."""
