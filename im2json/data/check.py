"""Look at every row before the first step: which are bad, and which pictures are there more than once."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from im2json.data.example import Split
from im2json.data.modes import reading_note
from im2json.data.pictures import count_pages
from im2json.data.stored import StoredSplit, bad_rows, listed
from im2json.errors import UserError


@dataclass(frozen=True)
class Checkup:
    """What opening every row of a data set's splits showed."""

    splits: dict[str, Split]  # without the bad rows
    problems: dict[str, list[str]]  # a bad row each, by split
    copies: list[list[tuple[str, str]]]  # split and id of the rows that show the same picture, pixel by pixel
    pages: dict[str, int]  # by row, where its picture's file has more than the first page, which is read
    scaled: dict[str, str]  # by row, where its picture's values had to be scaled: how

    @property
    def bad(self) -> list[str]:
        return [problem for problems in self.problems.values() for problem in problems]

    @property
    def total(self) -> int:
        """Rows, the bad ones included."""
        return len(self.bad) + sum(map(len, self.splits.values()))

    def copies_between(self) -> list[str]:
        """Return a line for each picture that is in more than one split, which says where."""
        return [
            " = ".join(f"{row} ({split})" for split, row in group)
            for group in self.copies
            if len({split for split, _ in group}) > 1
        ]

    def copies_within(self) -> dict[str, int]:
        """Return how many rows of each split repeat a picture of that split, if any do."""
        counts = [Counter(split for split, _ in group) for group in self.copies]
        repeated = {name: sum(max(0, count[name] - 1) for count in counts) for name in self.splits}
        return {name: count for name, count in repeated.items() if count}

    def pages_note(self) -> str:
        """Return a note that names the rows whose file has several pages."""
        files = [f"{row}: {count} pages" for row, count in self.pages.items()]
        return listed(f"files with several pages, of which the first is read: {len(files)}", files, 5)

    def scaled_note(self) -> str:
        """Return a note that names the rows whose picture had to be scaled."""
        pictures = [f"{row}: {how}" for row, how in self.scaled.items()]
        return listed(f"pictures of more than 8 bits that use a part of their range: {len(pictures)}", pictures, 5)

    def notes(self) -> list[str]:
        """Return notes for readers of the results: the rows left out, and what is learned as well as tested."""
        notes = []
        if self.bad:
            notes.append(listed(f"rows left out (--skip-bad): {len(self.bad)} of {self.total}", self.bad, None))
        if shared := self.copies_between():
            notes.append(listed(f"pictures in more than one split, which flatters scores: {len(shared)}", shared, 5))
        if self.pages:
            notes.append(self.pages_note())
        if self.scaled:
            notes.append(self.scaled_note())
        return notes


def check_split(*splits: Split, skip_bad: int = 0, on_row: Callable[[], object] | None = None) -> Checkup:
    """Open every row of these splits: its target must be a JSON object, its picture must decode to the end.

    Up to `skip_bad` rows that are bad are left out. Raises one UserError that lists the bad rows where there are
    more, 20 at most and a count of the rest, and where a split has no row left. `on_row` is called after each row,
    for a progress bar. The embedded receipts are drawn by ourselves and passed over.
    """
    found = examine(splits, on_row)
    if len(found.bad) > skip_bad:
        raise bad_rows(found.bad, found.total)
    for name, split in found.splits.items():
        if len(split) == 0:
            raise UserError(listed(f"of split {name} no row can be used:", found.problems[name]))
    return found


def examine(splits: Iterable[Split], on_row: Callable[[], object] | None = None) -> Checkup:
    """Open every row of these splits, and return what is wrong, without a limit on bad rows."""
    splits = list(splits)
    stored = [split for split in splits if isinstance(split, StoredSplit)]
    positions = [(split, i) for split in stored for i in range(len(split))]
    bad: dict[str, dict[int, str]] = {split.name: {} for split in splits}
    alike: dict[bytes, list[tuple[StoredSplit, int]]] = defaultdict(list)
    same: dict[bytes, list[tuple[StoredSplit, int]]] = defaultdict(list)
    pages: dict[str, int] = {}
    scaled: dict[str, str] = {}
    # Pillow lets go of the interpreter while it decodes, so threads are enough.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for (split, i), outcome in zip(positions, pool.map(lambda each: _open(*each), positions)):
            if isinstance(outcome, str):
                bad[split.name][i] = outcome
            else:
                id = split.rows.id(split.chosen[i])
                alike[outcome.look].append((split, i))
                if outcome.pages > 1:
                    pages[id] = outcome.pages
                if outcome.note is not None:
                    scaled[id] = outcome.note
            if on_row is not None:
                on_row()
        # Hashing every pixel would make this half as slow again; few pictures are worth it, and opened twice.
        suspects = [each for group in alike.values() if group[1:] for each in group]
        for each, key in zip(suspects, pool.map(lambda each: _digest(each[0][each[1]].image), suspects)):
            same[key].append(each)
    return Checkup(
        {split.name: split for split in splits}
        | {split.name: split.without(bad[split.name]) for split in stored if bad[split.name]},
        {name: list(problems.values()) for name, problems in bad.items()},
        [[(split.name, split.rows.id(split.chosen[i])) for split, i in group] for group in same.values() if group[1:]],
        pages,
        scaled,
    )


class _Opened(NamedTuple):
    """What is known of a row's picture."""

    look: bytes  # tells it from nearly all others
    pages: int  # of its file
    note: str | None  # on how it was read


def _open(split: StoredSplit, i: int) -> _Opened | str:
    """Return what a row's picture looks like, or a line on what is wrong with the row."""
    try:
        picture = split[i].image
        pages = count_pages(split.rows.picture(split.chosen[i])[0])
    except UserError as error:
        return str(error)
    digest = repr(picture.size).encode() + _digest(picture.resize((64, 64), Image.Resampling.NEAREST))
    return _Opened(digest, pages, reading_note(picture))


def _digest(picture: Image.Image) -> bytes:
    """Return a digest that is equal for RGB pictures of equal pixels, whatever files they came from."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
