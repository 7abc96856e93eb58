"""Which example is in which split: cut when a run begins, and read from its splits.json from then on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from im2json.catalogue import MIN_EXAMPLES
from im2json.data.check import Checkup
from im2json.data.example import Row, RunSplit
from im2json.data.lengths import TargetLengths
from im2json.data.stored import listed
from im2json.errors import UserError
from im2json.records import SPLITS, Content, SplitRecord

SHOWN = 5
"""Rows that a note names."""


@dataclass(frozen=True)
class RunSplits:
    """The splits of a run, and what became of the rows that are in none of them."""

    splits: dict[str, RunSplit]  # train, validation and test
    checkup: Checkup
    left_out: dict[str, Content] = field(default_factory=dict)  # rows of the test split that are trained on, by id
    lost: dict[str, dict[str, str]] = field(default_factory=dict)  # by split: id -> what became of the example
    added: int = 0  # rows that the run did not begin with

    @property
    def record(self) -> SplitRecord:
        """What splits.json is to hold."""
        contents = {
            name: {id: row.content for id, row in zip(split.ids, split.rows)} for name, split in self.splits.items()
        }
        return SplitRecord(contents, self.left_out)

    @property
    def begun_with(self) -> int:
        """How many examples the run began with."""
        return sum(map(len, self.splits.values())) + sum(map(len, self.lost.values()))

    @property
    def lengths(self) -> TargetLengths:
        return TargetLengths({name: [row.tokens for row in split.rows] for name, split in self.splits.items()})

    def notes(self) -> list[str]:
        """Return what readers of the results should know: rows that are left out, and what flatters scores."""
        gone = [f"{id}: {fate}" for fates in self.lost.values() for id, fate in fates.items()]
        said = {fate for fates in self.lost.values() for fate in fates.values()}
        bad = [problem for problem in self.checkup.bad if problem not in said]
        shared = self.checkup.copies_between(self.splits)
        notes = [
            _counted("rows left out, because they are bad", bad, None, self.checkup.total),
            _counted("examples left out, because they changed or are gone since the run began", gone, SHOWN),
            _counted("pictures in more than one split, which flatters scores", shared, SHOWN),
            *self.warnings(),
            f"rows ignored, because they were added since the run began: {self.added}" if self.added else "",
        ]
        return [note for note in notes if note]

    def warnings(self) -> list[str]:
        """Return what to know of pictures and targets, and of rows of the test split that are not tested on."""
        rows = [row for split in self.splits.values() for row in split.rows]
        altered = [row.altered for row in rows if row.altered is not None]
        pages = [f"{row.id}: {row.pages} pages" for row in rows if row.pages > 1]
        scaled = [f"{row.id}: {row.scaled}" for row in rows if row.scaled is not None]
        scored = [split for name, split in self.splits.items() if name != "train"]
        small = ", ".join(f"{len(split)} in {split.name}" for split in scored if 0 < len(split) < MIN_EXAMPLES)
        several = [id for split in self.splits.values() for id in _with_several_targets(split)]
        warnings = [
            _counted("rows left out of the test split, because they are trained on", list(self.left_out), SHOWN),
            _counted("targets that the tokenizer cannot write back", altered, SHOWN),
            _counted("rows of one split with the same picture and different targets", several, SHOWN),
            _counted("files with several pages, of which the first is read", pages, SHOWN),
            _counted("pictures of more than 8 bits that use a part of their range", scaled, SHOWN),
            f"too few rows for scores that say much about others: {small}" if small else "",
        ]
        return [warning for warning in warnings if warning]


def _with_several_targets(split: RunSplit) -> list[str]:
    """Return the names of the rows of a split whose picture other rows of it have with another target, side by side."""
    rows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # by picture and target
    for id, row in zip(split.ids, split.rows):
        rows[row.content.picture][row.content.target].append(id)
    return [id for targets in rows.values() if len(targets) > 1 for ids in targets.values() for id in ids]


def _counted(title: str, lines: Sequence[str], shown: int | None, total: int | None = None) -> str:
    """Return a title with a count, and the first lines below it; nothing if there is no line."""
    of = "" if total is None else f" of {total}"
    return listed(f"{title}: {len(lines)}{of}", lines, shown) if lines else ""


def cut(pictures: Sequence[str], there: Collection[str], dataset: str, notes: list[str]) -> dict[str, list[int]]:
    """Cut the splits that a data set does not have from its train rows.

    Of the different pictures in the order of their digests, test is the first tenth and validation the last, so that
    one cut does not depend on the other, a few new rows move few old ones, and equal pictures are on the same side.

    Args:
        pictures: a digest of the picture of each row.
        there: the splits that the data set has.

    Returns:
        The rows of train, and of each missing split.

    Raises:
        UserError: if there are too few pictures.
    """
    missing = [name for name in ("validation", "test") if name not in there]
    groups: dict[str, list[int]] = defaultdict(list)
    for row, digest in enumerate(pictures):
        groups[digest].append(row)
    order = sorted(groups)
    tenth = max(1, round(len(order) / 10))
    if missing and len(order) < len(missing) + 1:
        raise UserError(
            f"--dataset {dataset}: has no {' and no '.join(missing)} split, and the {len(order)} different "
            f"usable pictures of train are too few to cut it from; at least {len(missing) + 1} are needed"
        )
    chosen = {"test": order[:tenth], "validation": order[-tenth:]}
    parts = {name: sorted(row for digest in chosen[name] for row in groups[digest]) for name in missing}
    taken = {row for part in parts.values() for row in part}
    for name, part in parts.items():
        notes.append(
            f"{dataset} has no {name} split: {len(part)} of the {len(pictures)} rows of train are kept for it, chosen "
            "by a hash of the picture"
        )
    return {"train": [row for row in range(len(pictures)) if row not in taken], **parts}


def divide(checkup: Checkup, dataset: str, notes: list[str], learned: Collection[Content] = ()) -> RunSplits:
    """Divide the rows of a data set among the splits of a run that begins.

    No row is tested on whose picture and target are also trained on.

    Args:
        learned: what the adapter that the run begins with was trained on.

    Raises:
        UserError: if there are too few pictures to cut a missing split from.
    """
    train = checkup.rows["train"]
    parts = cut([row.content.picture for row in train], checkup.rows, dataset, notes)
    rows = {**checkup.rows, **{name: [train[i] for i in part] for name, part in parts.items()}}
    trained = {row.content for row in rows["train"]} | set(learned)
    left_out = {row.id: row.content for row in rows["test"] if row.content in trained}
    rows["test"] = [row for row in rows["test"] if row.content not in trained]
    if flattered := sum(row.content in learned for row in rows["validation"]):
        notes.append(f"validation examples that --adapter was trained on, which flatters scores: {flattered}")
    return RunSplits({name: RunSplit(name, rows[name]) for name in SPLITS}, checkup, left_out)


def restore(record: SplitRecord, checkup: Checkup) -> RunSplits:
    """Find the examples of a run that has begun among the rows of its data set, by their contents.

    Rows may have been added, renamed or put into another order since then, and moved to another split.
    """
    present = {row.content: row for rows in checkup.rows.values() for row in rows}
    by_id = {row.id: row for rows in checkup.rows.values() for row in rows}
    problems = {id: problem for found in checkup.problems.values() for id, problem in found.items()}
    splits, lost = {}, {}
    for name, contents in record.splits.items():
        kept = {id: present[content] for id, content in contents.items() if content in present}
        splits[name] = RunSplit(name, list(kept.values()), list(kept))
        lost[name] = {
            id: problems.get(id) or _fate(content, by_id.get(id))
            for id, content in contents.items()
            if content not in present
        }
    known = {content for contents in [*record.splits.values(), record.left_out] for content in contents.values()}
    added = sum(row.content not in known for row in by_id.values())
    return RunSplits(splits, checkup, record.left_out, lost, added)


def _fate(content: Content, row: Row | None) -> str:
    """Return what became of an example whose content is gone, from the row that has its name now."""
    if row is None:
        return "is gone"
    changed = [what for what, was, now in zip(Content._fields, content, row.content) if was != now]
    return f"its {' and '.join(changed)} changed"
