"""Which split a path names: by a folder on its way, whatever its case, depth and kind of slash."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

from im2json.data.stored import ALIASES, SPLIT_COLUMN, listed
from im2json.errors import UserError
from im2json.text import shortened

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

_ROLE = "|".join(sorted(ROLES, key=len, reverse=True))
_PART = "|".join(sorted({*ROLES, *_NEUTRAL, "s"}, key=len, reverse=True))
_GLUED = re.compile(rf"(?:{_PART})*?(?:{_ROLE})(?:{_PART})*")
"""Matches a split's name without anything between it and neutral words: testset, valimages, traintest."""

_HELD_OUT = re.compile(rf"\b(?:(?:hold|held) ?out|unseen)(?:{_PART})?\b")
"""Matches words for a split that is not for training, but do not say whether it is validation or test."""

_BEGINNING = re.compile(rf"({_ROLE})(?=[-_ ]*\d|[-_])", re.IGNORECASE)
"""Matches the beginning of a picture's name that says its split: test_001.png, but not test.png."""

_END = re.compile(rf"(?:\d[-_ ]*|[-_])({_ROLE})$", re.IGNORECASE)
"""Matches the end of such a name without its suffix: 001_test, but not latest."""


class SplitName(NamedTuple):
    """The split that a name stands for, and how surely."""

    role: str
    certainty: int
    """2: the very name, such as Val. 1: with neutral words, such as test_set. 0: with others, such as blood-test.

    At 0, the role may also be several ones, such as "train or test" for train_test.
    """


@lru_cache(4096)  # the rows of a data set share few folders
def split_named(name: str) -> SplitName | None:
    """Return the split that the name of a folder or file (without its suffix) stands for, if it is one.

    Only whole words count, and those that consist of a split's name and neutral words: testset, but not latest.
    """
    if name.strip().lower() in ROLES:
        return SplitName(ROLES[name.strip().lower()], 2)
    words = [part for run in re.findall(r"[A-Za-z]+", name) for part in _parts(run)]
    roles = {ROLES[word] for word in words if word in ROLES}
    if held_out := _HELD_OUT.search(" ".join(words)):
        roles |= {"validation", "test"}
    if roles == {"train", "validation"} and held_out is None:
        return SplitName("train", 0)  # as trainval is used: all but test
    if not roles:
        return SplitName("validation", 0) if "validate" in words else None
    sure = len(roles) == 1 and all(word in ROLES or word in _NEUTRAL or len(word) == 1 for word in words)
    return SplitName(" or ".join(role for role in ALIASES if role in roles), int(sure))


def _parts(run: str) -> list[str]:
    """Return the words of a run of letters, in lower case: those that are glued together, or else as capitals show."""
    if _GLUED.fullmatch(run.lower()):
        return re.findall(_PART, run.lower())
    words = [word.lower() for word in _WORD.findall(run)]
    return [part for word in words for part in (re.findall(_PART, word) if _GLUED.fullmatch(word) else [word])]


def folders_of(path: str) -> tuple[str, ...]:
    """Return the folders on the way to a file, whichever slash stands between them; none if it leads out of its own."""
    way = PurePosixPath(path.replace("\\", "/"))
    return () if way.is_absolute() or ".." in way.parts else way.parts[:-1]


class _Doubt(NamedTuple):
    """A folder, or several, whose name leaves open what its rows are for."""

    folder: str
    reading: str
    """The split or splits that the name may stand for."""


def split_of(folders: Iterable[str]) -> tuple[str | None, _Doubt | None]:
    """Return the split that folders name, or the doubt if it is not clear that they name one, or if they name two."""
    named = [(folder, found) for folder in folders if (found := split_named(folder)) is not None]
    if not named:
        return None, None
    best = max(found.certainty for _, found in named)
    chosen = {found.role: folder for folder, found in named if found.certainty == best}
    if len(chosen) > 1:
        return None, _Doubt("/".join(chosen.values()), " or ".join(chosen))
    role, folder = chosen.popitem()
    if best == 0:
        return None, None if role == "train" else _Doubt(folder, role)
    return role, None


def group_by_split(root: str, items: Iterable[tuple[Item, str | None, str]], notes: list[str]) -> dict[str, list[Item]]:
    """Sort items into splits by the folders on the way to their files, below `root`. Those that name none are train.

    If the pictures of all rows in no split's folder have names like test_001.png or 001_test.png, these names decide.

    Args:
        items: each with its picture, if that is known, and with another file, such as the one that names the picture.
        notes: receives a line on names of pictures that say another split.

    Raises:
        UserError: where names may or may not say a split, or say two, with how to lay the files out.
    """
    items = list(items)
    doubts: Counter[_Doubt] = Counter()
    roles: list[str | None] = []
    for _, picture, other in items:
        role, doubt = split_of((*folders_of(picture or ""), *folders_of(other)))
        roles.append(role)
        if doubt is not None:
            doubts[doubt] += 1
    if doubts:
        lines = [f"{doubt.folder} ({count} rows): {doubt.reading}?" for doubt, count in doubts.items()]
        title = (
            f"{root}: these names of folders, or in the column {SPLIT_COLUMN}, leave open whether their rows are for "
            "training. Rename each to the split that it holds (train, validation or test), or move it into a folder "
            "of that name"
        )
        raise UserError(listed(title, lines, 5))
    flat = [picture for (_, picture, _), role in zip(items, roles) if role is None and picture is not None]
    begun = _by_name(root, flat, set(roles), notes)
    groups: dict[str, list[Item]] = defaultdict(list)
    for (item, picture, _), role in zip(items, roles):
        groups[role or begun.get(picture or "", "train")].append(item)
    return dict(groups)


def note_unnamed(where: str, values: Iterable[str], notes: list[str]) -> None:
    """Append a note on the rows whose column `split` holds text that names no split."""
    unnamed = [value for value in values if value and split_of([value]) == (None, None)]
    if unnamed:
        shown = ", ".join(dict.fromkeys(map(shortened, unnamed[:100])))
        notes.append(
            f"{where}: {len(unnamed)} rows have a column {SPLIT_COLUMN} that names no split ({shortened(shown)}) "
            "and has no effect; train, validation and test would have one"
        )


def _by_name(root: str, pictures: Sequence[str], others: set[str | None], notes: list[str]) -> dict[str, str]:
    """Return the splits of pictures that are in no split's folder, if all their names say one, and not all the same.

    Args:
        others: splits that folders name.
        notes: receives a line if names say validation or test, but do not decide.

    Raises:
        UserError: where several names say validation or test, and others say train or nothing.
    """
    stems = {picture: PurePosixPath(picture.replace("\\", "/")).stem for picture in pictures}
    found = {picture: _BEGINNING.match(stem) or _END.search(stem) for picture, stem in stems.items()}
    named = {picture: ROLES[match[1].lower()] for picture, match in found.items() if match is not None}
    held_out = [picture for picture, role in named.items() if role != "train"]
    several = len({*named.values(), *others} - {None}) > 1
    if len(named) == len(found) and several:
        return named
    if len(held_out) > 1 and len(held_out) < len(found):
        raise UserError(
            f"{root}: {len(named)} of {len(found)} pictures begin or end with the name of a split, such as "
            f"{held_out[0]}, and others do not. Move those of each split into a folder train, validation or test. If "
            "none is meant, move all into a folder train"
        )
    if held_out:
        title = f"{root}: pictures that count as train, although their names begin or end with another split"
        notes.append(listed(f"{title}: {len(held_out)}", held_out, 3))
    return {}
