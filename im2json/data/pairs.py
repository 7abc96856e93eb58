"""Pictures with a .json of the same name each: beside each other, or in two trees of folders as in SROIE."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from im2json.data.listing import looks_like_document, names_document, suffix_of
from im2json.data.splitnames import folders_of, split_of
from im2json.data.stored import Line
from im2json.errors import UserError
from im2json.text import decode

_TREES = frozenset((
    "img", "imgs", "image", "images", "picture", "pictures", "scan", "scans", "document", "documents",
    "key", "keys", "json", "jsons", "label", "labels", "annotation", "annotations", "target", "targets", "gt",
))  # fmt: skip
"""Folders that tell pictures and targets apart, in lower case."""


def read_pairs(root: Path, files: Iterable[str]) -> list[Line]:
    """Return a line for each picture with its .json, among the files below a folder.

    A picture and a .json of the same name belong together in one folder; else where their paths are the same but for
    folders such as img/ and key/; else where one of two such trees has no folders for the splits.

    A picture without a .json, a .json without a picture, and files that share a name are kept as lines with a problem.
    A picture that only its content tells needs a .json to be one of the data set.
    """
    left = [name for name in files if _is_json(name) or looks_like_document(root / name)]
    lines: dict[str, Line] = {}
    for key in (_exact_path, _path, _without_trees, _without_splits):
        groups: dict[tuple[str, ...], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for name in left:
            groups[key(name)][_is_json(name)].append(name)
        left = []
        for pictures, targets in groups.values():
            if pictures and targets and (key is not _without_splits or not _split_by_both(pictures, targets)):
                lines[pictures[0]] = _pair(root, pictures, targets)
            else:
                left += [*pictures, *targets]
    lines |= {name: _single(root, name) for name in left if _is_json(name) or names_document(name)}
    return [lines[name] for name in sorted(lines, key=_order)]


def _is_json(name: str) -> bool:
    return suffix_of(name) == ".json"


def _exact_path(name: str) -> tuple[str, ...]:
    """Return the folders on the way to a file, and its name without its suffix."""
    return (*folders_of(name), PurePosixPath(name.replace("\\", "/")).stem)


def _path(name: str) -> tuple[str, ...]:
    return _exact_path(unicodedata.normalize("NFC", name))  # a picture and its .json may come from different systems


def _without_trees(name: str) -> tuple[str, ...]:
    *folders, stem = _path(name)
    return (*(folder for folder in folders if folder.lower() not in _TREES), stem)


def _without_splits(name: str) -> tuple[str, ...]:
    *folders, stem = _without_trees(name)
    return (*(folder for folder in folders if split_of([folder])[0] is None), stem)


def _split_by_both(pictures: list[str], targets: list[str]) -> bool:
    return all(any(split_of(folders_of(name))[0] for name in names) for names in (pictures, targets))


def _order(name: str) -> tuple[tuple[str, ...], str]:
    return tuple(part for part in _path(name) if part not in ("img", "key")), name


def _single(root: Path, name: str) -> Line:
    path = root / name
    if path.is_symlink() and not path.exists():
        problem = f"{path}: is a link to {os.readlink(path)}, which is not there"
    elif _is_json(name):
        problem = f"{path}: has no picture of that name beside it, or in img/ beside key/"
    else:
        problem = f"{path}: has no {path.stem}.json beside it, or in key/ beside img/"
    return Line(root, str(path), name, problem=problem)


def _pair(root: Path, pictures: list[str], targets: list[str]) -> Line:
    where = str(root / targets[-1])
    if len(pictures) > 1 or len(targets) > 1:
        both = ", ".join(str(root / name) for name in (*pictures, *targets))
        return Line(root, where, pictures[0], problem=f"{both}: share a name; one picture goes with one .json")
    try:
        return Line(root, where, pictures[0], decode((root / targets[0]).read_bytes(), where))
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{where}: cannot be read ({error.strerror or error})"
    return Line(root, where, pictures[0], problem=problem)
