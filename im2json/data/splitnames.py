"""Which split a path names: by a folder on its way, whatever its case, depth and kind of slash."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

from im2json.data.stored import ALIASES, listed
from im2json.errors import UserError

Item = TypeVar("Item")

ROLES = {alias: role for role, aliases in ALIASES.items() for alias in aliases}
"""train, validation or test by each name that it goes by, in lower case."""

_NEUTRAL = frozenset((
    "set", "data", "dataset", "split", "part", "fold", "task", "img", "imgs", "image", "images", "pic", "pics",
    "picture", "pictures", "doc", "docs", "document", "documents", "file", "files", "scan", "scans", "json", "key",
    "keys", "label", "labels", "annotation", "annotations", "metadata", "gt", "of", "the", "new", "final",
))  # fmt: skip
"""Words that leave no doubt beside a split's name, as in test_set and Training Images."""

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


class SplitName(NamedTuple):
    """The split that a name stands for, and how surely."""

    role: str
    sureness: int
    """2: the very name, such as Val. 1: with neutral words, such as test_set. 0: with others, such as blood-test."""


def split_named(name: str) -> SplitName | None:
    """Return the split that the name of a folder or file (without its suffix) stands for, if it is one."""
    if name.strip().lower() in ROLES:
        return SplitName(ROLES[name.strip().lower()], 2)
    words = [word.lower() for word in _WORD.findall(name)]
    roles = {ROLES[word] for word in words if word in ROLES}
    if len(roles) != 1:
        return None
    sure = all(word in ROLES or word in _NEUTRAL or len(word) == 1 for word in words)
    return SplitName(roles.pop(), int(sure))


def folders_of(path: str) -> tuple[str, ...]:
    """Return the folders on the way to a file, whichever slash stands between them; none if it leads out of its own."""
    way = PurePosixPath(path.replace("\\", "/"))
    return () if way.is_absolute() or ".." in way.parts else way.parts[:-1]


class _Doubt(NamedTuple):
    folder: str
    reading: str


def split_of(folders: Iterable[str]) -> tuple[str | None, _Doubt | None]:
    """Return the split that folders name, and the doubt where they may or may not name one, or name two."""
    named = [(folder, found) for folder in folders if (found := split_named(folder)) is not None]
    if not named:
        return None, None
    best = max(found.sureness for _, found in named)
    chosen = {found.role: folder for folder, found in named if found.sureness == best}
    if len(chosen) > 1:
        return None, _Doubt("/".join(chosen.values()), " or ".join(chosen))
    role, folder = chosen.popitem()
    if best == 0:
        return None, None if role == "train" else _Doubt(folder, role)
    return role, None


def group_by_split(root: str, items: Iterable[tuple[Item, Sequence[str]]]) -> dict[str, list[Item]]:
    """Sort items into splits by the folders on the way to their files, below `root`. Those that name none are train.

    Raises:
        UserError: where folders may or may not name a split, or name two, with how to lay the files out.
    """
    groups: dict[str, list[Item]] = defaultdict(list)
    doubts: Counter[_Doubt] = Counter()
    for item, files in items:
        role, doubt = split_of(folder for file in files for folder in folders_of(file))
        if doubt is not None:
            doubts[doubt] += 1
        groups[role or "train"].append(item)
    if doubts:
        lines = [f"{doubt.folder} ({count} rows): {doubt.reading}?" for doubt, count in doubts.items()]
        raise UserError(
            listed(
                f"{root}: the names of these folders leave open whether their rows are for training. Rename each to "
                "the split that it holds (train, validation or test), or move it into a folder of that name",
                lines,
                5,
            )
        )
    return dict(groups)
