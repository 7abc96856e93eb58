"""Look at every row before the first step: which are bad, and which pictures are there more than once."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from im2json.data.example import Row, RunSplit, Split
from im2json.data.lengths import Measured, TargetMeter
from im2json.data.modes import reading_note
from im2json.data.pictures import count_pages
from im2json.data.stored import StoredSplit, bad_rows, listed
from im2json.errors import UserError
from im2json.jsontext import canonical
from im2json.records import Content


@dataclass(frozen=True)
class Checkup:
    """Hold what opening every row of a data set has shown."""

    rows: dict[str, list[Row]]  # that can be used, by the split that they were found in
    problems: dict[str, dict[str, str]]  # by split: the id of each bad row, and what is wrong with it
    copies: list[list[Row]]  # rows that show the same picture, pixel by pixel

    @property
    def bad(self) -> list[str]:
        return [problem for problems in self.problems.values() for problem in problems.values()]

    @property
    def total(self) -> int:
        """Rows, the bad ones included."""
        return len(self.bad) + sum(map(len, self.rows.values()))

    def copies_between(self, splits: Mapping[str, RunSplit]) -> list[str]:
        """Return a line for each picture that is in more than one of the splits, which says where."""
        return [
            " = ".join(f"{row} ({split})" for split, row in group)
            for group in self._copies_in(splits)
            if len({split for split, _ in group}) > 1
        ]

    def copies_within(self, splits: Mapping[str, RunSplit]) -> dict[str, int]:
        """Return how many rows of each split repeat a picture of that split, if any do."""
        counts = [Counter(split for split, _ in group) for group in self._copies_in(splits)]
        repeated = {name: sum(max(0, count[name] - 1) for count in counts) for name in splits}
        return {name: count for name, count in repeated.items() if count}

    def _copies_in(self, splits: Mapping[str, RunSplit]) -> list[list[tuple[str, str]]]:
        """Return the splits and ids of the copies."""
        split_of = {row: name for name, split in splits.items() for row in split.rows}
        return [[(split_of[row], row.id) for row in group if row in split_of] for group in self.copies]


def check_split(
    *splits: Split, measure: TargetMeter | None = None, skip_bad: int = 0, on_row: Callable[[], object] | None = None
) -> Checkup:
    """Open every row of these splits as `examine` does, and allow up to `skip_bad` bad ones.

    Raises:
        UserError: if there are more, listing 20 of them and a count of the rest, or if a split has no row left.
    """
    found = examine(splits, measure, on_row)
    if len(found.bad) > skip_bad:
        raise bad_rows(found.bad, found.total)
    for name, rows in found.rows.items():
        if not rows:
            raise UserError(listed(f"of split {name} no row can be used:", list(found.problems[name].values())))
    return found


def examine(
    splits: Iterable[Split],
    measure: TargetMeter | None = None,
    on_row: Callable[[], object] | None = None,
    only: Collection[str] | None = None,
) -> Checkup:
    """Open every row of these splits, and return what is wrong, without a limit on bad rows.

    A row's target must be a JSON object that `measure` finds no fault with, and its picture must decode to the end. The
    pictures of the embedded receipts are drawn by ourselves and not opened.

    Args:
        on_row: called after each row, for a progress bar.
        only: the ids of the rows to open. Default: all.
    """
    splits = list(splits)
    rows: dict[str, list[Row]] = {split.name: [] for split in splits}
    problems: dict[str, dict[str, str]] = {split.name: {} for split in splits}
    alike: dict[bytes, list[Row]] = defaultdict(list)
    same: dict[bytes, list[Row]] = defaultdict(list)
    # Pillow lets go of the interpreter while it decodes, so threads are enough.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for split in splits:
            over = pool.map if isinstance(split, StoredSplit) else map
            ids = {i: id for i, id in enumerate(split.ids) if only is None or id in only}
            for (i, id), each in zip(ids.items(), over(partial(_open, split, measure), ids)):
                judged = each if isinstance(each, str) else _judge(split, i, id, each, measure)
                if isinstance(judged, str):
                    problems[split.name][id] = judged
                else:
                    row, look = judged
                    rows[split.name].append(row)
                    alike[look].append(row)
                if on_row is not None:
                    on_row()
        # Hashing every pixel would make this half as slow again; few pictures are worth it, and opened twice.
        suspects = [row for group in alike.values() if group[1:] for row in group]
        for row, key in zip(suspects, pool.map(lambda row: _digest(row.split[row.index].image), suspects)):
            same[key].append(row)
    return Checkup(rows, problems, [group for group in same.values() if group[1:]])


@dataclass(frozen=True)
class _Opened:
    """A row whose picture and target could be read."""

    target: dict[str, Any]
    content: Content
    look: bytes  # a digest that tells the picture from nearly all others
    pages: int = 1  # of the picture's file
    scaled: str | None = None  # how the values of the picture were scaled
    size: tuple[int, int] | None = None  # of the picture, width and height in pixels
    shown: tuple[int, int] | None = None  # what of it the image processor gets


def _open(split: Split, measure: TargetMeter | None, i: int) -> _Opened | str:
    """Return what a row holds, or a line on what is wrong with it."""
    if not isinstance(split, StoredSplit):
        target, source = split.targets[i], split.ids[i].encode()  # all that a receipt's picture is drawn from
        return _Opened(target, Content.of(source, canonical(target)), source)
    try:
        example, picture = split.read(i)
    except UserError as error:
        return str(error)
    image = example.image
    look = repr(image.size).encode() + _digest(image.resize((64, 64), Image.Resampling.NEAREST))
    content = Content.of(picture, canonical(example.target))
    shown = image.size if measure is None else measure.collator.shown(image).size
    return _Opened(example.target, content, look, count_pages(picture), reading_note(image), image.size, shown)


def _judge(split: Split, i: int, id: str, opened: _Opened, measure: TargetMeter | None) -> tuple[Row, bytes] | str:
    """Return a row that could be read and what tells its picture from others, or a line on what is wrong with it."""
    measured = Measured(0) if measure is None else measure(opened.target, opened.shown)
    where = split.where(i) if isinstance(split, StoredSplit) else id
    if measured.problem is not None:
        return f"{where}: {measured.problem}"
    altered = None if measured.difference is None else f"{where}: {measured.difference}"
    row = Row(
        split, i, id, opened.target, opened.content, measured.tokens, altered, opened.pages, opened.scaled,
        measured.image_tokens, measured.scale, _kept(opened),
    )  # fmt: skip
    return row, opened.look


def _kept(opened: _Opened) -> float:
    """Return the share of a picture's pixels that the image processor gets, or 1 where it may get more."""
    if opened.size is None or opened.shown is None:
        return 1.0
    return min(1.0, opened.shown[0] * opened.shown[1] / (opened.size[0] * opened.size[1]))


def _digest(picture: Image.Image) -> bytes:
    """Return a digest that is equal for RGB pictures of equal pixels, whatever files they came from."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
