"""The files below folders that a user named, none left out in silence. Names are taken literally."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from im2json.data.kinds import DOCUMENT_SUFFIXES, is_avif, is_heic, suffixes

TEXT_SUFFIXES = frozenset((
    ".json", ".jsonl", ".txt", ".csv", ".tsv", ".xml", ".md", ".html", ".htm", ".py", ".yaml", ".yml", ".parquet",
    ".arrow",
))  # fmt: skip
"""Files of these suffixes are not opened to see whether they are pictures."""

SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini"))
"""Files of no interest, which the system writes by itself; their names in lower case."""

_BEGINNINGS = (
    b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"%PDF", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51",
)  # fmt: skip


@dataclass(frozen=True)
class Tree:
    """The files below a folder, by their names within it, in order."""

    files: tuple[str, ...]
    hidden: tuple[str, ...]
    """Files whose name, or that of a folder they are in, begins with a dot."""
    empty: tuple[str, ...]
    """Folders without anything in them."""
    unread: tuple[str, ...]
    """Folders that cannot be listed."""
    notes: tuple[str, ...]
    """A line for each folder that was not entered by this name."""


def list_tree(root: str | os.PathLike[str]) -> Tree:
    """Return all files below a folder, those in linked folders too.

    A folder that can be reached in several ways is entered once, by its own name before that of a link. A link to a
    folder that contains the named one is not followed.
    """
    base = os.fspath(root)
    above = {_identity(folder) for folder in Path(os.path.realpath(base)).parents}
    entered: dict[tuple[int, int], str] = {}
    files: list[str] = []
    empty: list[str] = []
    unread: list[str] = []
    notes: list[str] = []
    folders: list[str] = [""]
    links: list[str] = []
    while folders or links:
        linked = not folders
        name = links.pop(0) if linked else folders.pop()
        path = os.path.join(base, name) if name else base
        try:
            identity = _identity(path)
            if identity in entered:
                notes.append(f"{path}: its files are listed once, in {entered[identity]}")
                continue
            if linked and identity in above:
                notes.append(f"{path}: link not followed, as it leads to a folder that holds {base}")
                continue
            entered[identity] = path
            children = sorted(os.listdir(path))
        except OSError:
            unread.append(name)
            continue
        if not children:
            empty.append(name)
        for child in (os.path.join(name, each) for each in children):
            full = os.path.join(base, child)
            if not os.path.isdir(full):
                files.append(child)
            else:
                (links if os.path.islink(full) else folders).append(child)
    hidden = {file for file in files if _is_hidden(file)}
    return Tree(
        tuple(sorted(file for file in files if file not in hidden)),
        tuple(sorted(file for file in hidden if not _is_leftover(file))),
        tuple(sorted(empty)),
        tuple(sorted(unread)),
        tuple(notes),
    )


def _identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _is_leftover(name: str) -> bool:
    """Return whether a hidden file is what macOS keeps about another file."""
    return "__MACOSX" in name.split("/") or os.path.basename(name).startswith("._")


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case."""
    return os.path.splitext(name)[1].lower()


def names_document(name: str) -> bool:
    """Return whether a file's suffix is one that documents have."""
    return suffix_of(name) in suffixes() or suffix_of(name) in DOCUMENT_SUFFIXES


def looks_like_document(path: str | os.PathLike[str]) -> bool:
    """Return whether a file may be a document, by its suffix, or else by how it begins.

    What cannot be opened to find out, as a link that leads nowhere, may be one.
    """
    if names_document(os.fspath(path)):
        return True
    if suffix_of(os.fspath(path)) in TEXT_SUFFIXES or os.path.basename(path).lower() in SYSTEM_FILES:
        return False
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError:
        return True
    webp, bitmap = start[:4] == b"RIFF" and start[8:12] == b"WEBP", start[:2] == b"BM" and start[6:10] == bytes(4)
    return start.startswith(_BEGINNINGS) or webp or bitmap or is_heic(start) or is_avif(start)


def note_hidden(root: str | os.PathLike[str], tree: Tree, notes: list[str]) -> None:
    """Append a note on the hidden files below a folder that may be documents."""
    if hidden := [name for name in tree.hidden if looks_like_document(os.path.join(root, name))]:
        notes.append(f"{os.fspath(root)}: hidden files passed over: {by_suffix(hidden)}")


def by_suffix(names: Collection[str], shown: int = 3) -> str:
    """Return how many files there are of each suffix, and the first few of them: 3 (2 .txt, 1 .zip: a.txt, ...)."""
    counts = Counter(suffix_of(name) or "without suffix" for name in sorted(names))
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5))
    rest = ", ..." if len(counts) > 5 else ""
    first = ", ".join(sorted(names)[:shown]) + (", ..." if len(names) > shown else "")
    return f"{len(names)} ({kinds}{rest}: {first})"
