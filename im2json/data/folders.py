"""A folder of examples in one of several forms, opened by what lies in it. What is not used is named."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from im2json.data.listing import (
    SYSTEM_FILES,
    Tree,
    by_suffix,
    list_tree,
    names_document,
    note_hidden,
    suffix_of,
)
from im2json.data.pairs import read_pairs
from im2json.data.splitnames import folders_of, group_by_split, note_unnamed, split_named, split_of
from im2json.data.stored import Columns, FolderRows, Line, Rows, listed, read_lines
from im2json.data.tables import load_parquet, load_saved, open_tables
from im2json.errors import UserError
from im2json.options import flag_name

COLUMN_OPTIONS = ("image_column", "target_column")
METADATA = "metadata.jsonl"
_ROW = '{"file_name": "001.jpg", "ground_truth": {"total": "9.30"}}'

_COMPANIONS = ("readme", "license", "licence", "citation", "dataset_infos", "changelog", "copying", "notice")
"""Beginnings of the names of files that come with a data set, and that nobody misses among its rows."""


def open_folder(root: Path, given: Mapping[str, str | None], columns: Columns, notes: list[str]) -> dict[str, Rows]:
    """Return the rows of each split of a folder, in the first of these forms that it has: metadata.jsonl files, what
    save_to_disk wrote, Parquet files, other JSON-lines files named by split, pairs of pictures and .json.

    Args:
        given: options that some forms have: dataset_config, revision, image_column, target_column.
        notes: receives a line for each kind of file, folder and row that is not used, with the reason.

    Raises:
        UserError: where the folder has none of these forms, leaves a split open, or has no use for an option.
    """
    tree = list_tree(root)
    if "" in tree.unread:
        raise UserError(f"{root}: the folder cannot be listed; check its permissions")
    notes += tree.notes
    if tree.unread:
        notes.append(listed(f"{root}: folders that cannot be listed: {len(tree.unread)}", tree.unread, 5))
    named = [name for name in tree.files if _is_named_by_split(name)]
    parquet = [name for name in tree.files if suffix_of(name) == ".parquet"]
    whole = root.resolve()
    used: set[str] = set()
    if metadata := {name for name in tree.files if os.path.basename(name).lower() == METADATA}:
        refuse_all_but(COLUMN_OPTIONS, given, str(root))
        opened = _open_imagefolder(root, tree, sorted(metadata | set(named)), columns, notes, used)
    elif "dataset_dict.json" in tree.files or "state.json" in tree.files:
        refuse_all_but(COLUMN_OPTIONS, given, str(root))
        used |= {name for name in tree.files if suffix_of(name) in (".arrow", ".json")}
        opened = open_tables(load_saved(root), whole.name, columns, [whole], notes)
    elif parquet:
        refuse_all_but(("dataset_config", *COLUMN_OPTIONS), given, str(root))
        loaded = load_parquet(root, parquet, given["dataset_config"], used)
        opened = open_tables(loaded, whole.name, columns, [whole], notes)
    elif named:
        refuse_all_but(COLUMN_OPTIONS, given, str(root))
        opened = _open_imagefolder(root, tree, named, columns, notes, used)
    else:
        opened = _open_pairs(root, tree, given, notes, used)
    _note_unused(root, tree, used, notes)
    return opened


def open_lines(path: Path, columns: Columns, notes: list[str]) -> dict[str, Rows]:
    """Return the rows of each split of one JSON-lines file, divided by the folders of the pictures."""
    beside = [name for name in os.listdir(path.parent) if name != path.name and _is_named_by_split(name)]
    if beside:
        called = "" if _is_named_by_split(path.name) else f", if {path.name} is called train.jsonl"
        others = ", ".join(sorted(beside))
        notes.append(f"{path}: read alone; --dataset {path.parent} reads {others} as splits, too{called}")
    lines = read_lines(path, columns)
    groups = group_by_split(str(path), ((line, _picture(line), _below(line, "")) for line in lines), notes)
    note_unnamed(str(path), (line.split for line in lines), notes)
    return {name: FolderRows(path.parent, group) for name, group in (groups or {"train": []}).items()}


def refuse_all_but(known: Sequence[str], given: Mapping[str, str | None], where: str) -> None:
    """Refuse options that a form of data does not have.

    Raises:
        UserError: naming the first.
    """
    for name, value in given.items():
        if value is not None and name not in known:
            raise UserError(f"{flag_name(name)} {value}: {where} is of a form that has none; leave the option out")


def _is_named_by_split(name: str) -> bool:
    """Return whether a file is one of JSON lines whose name says a split, such as test.jsonl or metadata_test.jsonl."""
    path = PurePosixPath(name)
    found = split_named(path.stem)
    return path.suffix.lower() == ".jsonl" and found is not None and found.certainty > 0


# --- JSON lines


def _open_imagefolder(
    root: Path, tree: Tree, files: Sequence[str], columns: Columns, notes: list[str], used: set[str]
) -> dict[str, Rows]:
    """Return the rows of JSON-lines files. A file in a folder that names no split is a split of the folder's name."""
    by_file = _nearest_lines(root, {name: read_lines(root / name, columns) for name in files}, notes)
    groups: dict[str, list[Line]] = {}
    by_path: list[tuple[Line, str | None, str]] = []
    for name, lines in by_file.items():
        folder, stem = os.path.dirname(name), os.path.splitext(name)[0]
        note_unnamed(str(root / name), (line.split for line in lines), notes)
        named = split_of(PurePosixPath(stem).parts)[0]  # the file's own name says a split as a folder's does
        groups.setdefault(named or folder or "train", [])
        for line in lines:
            used |= {os.path.join(folder, line.file_name), _path_of(folder, line)}
            if named or not folder or split_of([*folders_of(line.file_name), line.split])[0]:
                by_path.append((line, _picture(line), _below(line, f"{stem}/{METADATA}")))
            else:
                groups[folder].append(line)
    used |= set(files)
    for split, lines in group_by_split(str(root), by_path, notes).items():
        groups.setdefault(split, []).extend(lines)
    if any(os.path.dirname(name) for name in files):
        _refuse_folders_without_rows(root, tree, used)
    return {name: FolderRows(root, lines) for name, lines in groups.items()}


def _nearest_lines(root: Path, by_file: Mapping[str, list[Line]], notes: list[str]) -> dict[str, list[Line]]:
    """Leave out lines whose picture a JSON-lines file in a folder nearer to it names, too, and note them."""
    depth: dict[str, int] = defaultdict(int)
    for name, lines in by_file.items():
        for line in lines:
            path = _path_of(os.path.dirname(name), line)
            depth[path] = max(depth[path], name.count("/"))
    nearest = {}
    for name, lines in by_file.items():
        nearest[name] = [line for line in lines if depth[_path_of(os.path.dirname(name), line)] == name.count("/")]
        kept = set(map(id, nearest[name]))
        if farther := [line.where for line in lines if id(line) not in kept]:
            of_all = f"{len(farther)} of {len(lines)} rows are not used"
            notes.append(listed(f"{root / name}: {of_all}, as a file nearer to their pictures has them", farther, 3))
    return nearest


def _picture(line: Line) -> str | None:
    return line.file_name if line.problem is None else None


def _below(line: Line, file: str) -> str:
    """Return the path of a line's file, below a folder of the split that the line itself names, if it names one."""
    return f"{line.split.replace('/', '-')}/{file or METADATA}" if line.split else file


def _path_of(folder: str, line: Line) -> str:
    return (PurePosixPath(folder) / line.file_name.replace("\\", "/")).as_posix()


def _refuse_folders_without_rows(root: Path, tree: Tree, used: set[str]) -> None:
    pictures = [name for name in tree.files if names_document(name)]
    folders = {str(parent) for name in pictures for parent in PurePosixPath(name).parents} | set(tree.empty)
    filled = {str(parent) for name in used for parent in PurePosixPath(name).parents}
    for folder in sorted(folders - filled):
        found = split_named(PurePosixPath(folder).name)
        if found is not None and found.certainty == 2 and split_of(PurePosixPath(folder).parts[:-1])[0] is None:
            raise UserError(f"{root / folder}: has no {METADATA}. Write one with a line like {_ROW} for each picture.")


# --- pairs


def _open_pairs(
    root: Path, tree: Tree, given: Mapping[str, str | None], notes: list[str], used: set[str]
) -> dict[str, Rows]:
    lines = read_pairs(root, tree.files)
    if all(line.problem for line in lines):
        held = f" Files there: {by_suffix(tree.files)}." if tree.files else ""
        rows = next((name for name in tree.files if suffix_of(name) == ".jsonl"), None)
        remedy = (
            f"Write a {METADATA} with a line like {_ROW} for each picture, or put a .json of its name beside each."
            if rows is None
            else f"To read {rows}, pass --dataset {root / rows}."
        )
        raise UserError(f"{root}: holds no {METADATA}, Parquet files or pictures with a .json each.{held} {remedy}")
    refuse_all_but((), given, str(root))
    used |= {name for name in tree.files if suffix_of(name) == ".json" or names_document(name)}
    used |= {line.file_name for line in lines}
    groups = group_by_split(
        str(root), ((line, line.file_name, os.path.relpath(line.where, root)) for line in lines), notes
    )
    return {name: FolderRows(root, group) for name, group in groups.items()}


# --- what is not used


def _note_unused(root: Path, tree: Tree, used: set[str], notes: list[str]) -> None:
    known = {unicodedata.normalize("NFC", name) for name in used}
    unused = [
        name
        for name in tree.files
        if unicodedata.normalize("NFC", name) not in known
        and not os.path.basename(name).lower().startswith((*SYSTEM_FILES, *_COMPANIONS))
    ]
    broken = [name for name in unused if not os.path.exists(root / name)]
    if broken:
        notes.append(f"{root}: links that lead nowhere: {by_suffix(broken)}")
    if lines := [name for name in unused if suffix_of(name) == ".jsonl" and name not in broken]:
        call = "call them train.jsonl, validation.jsonl or test.jsonl"
        notes.append(f"{root}: JSON-lines files not used, as their names say no split ({call}): {by_suffix(lines)}")
    if left := set(unused) - {*broken, *lines}:
        notes.append(f"{root}: files not used, as no row names them: {by_suffix(left)}")
    if empty := [name for name in tree.empty if split_named(PurePosixPath(name).name) is not None]:
        notes.append(listed(f"{root}: empty folders that are called as a split is: {len(empty)}", empty, 5))
    note_hidden(root, tree, notes)
