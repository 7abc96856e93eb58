"""Names of pictures by the million: read from a list, kept in order and each once, and shared out. No torch."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO

from im2json.errors import UserError
from im2json.text import decode

CACHE = 8 * 1024
"""KiB of a NameSet that may be in memory."""
BLOCK = 1 << 16
"""Bytes of a list that are read at once."""


class NameSet:
    """A set of names in the order in which they were added. It lies in a temporary file and takes little memory."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._file = sqlite3.connect("", isolation_level=None)
        self._file.execute(f"PRAGMA cache_size = -{CACHE}")
        self._file.execute("PRAGMA journal_mode = OFF")  # nobody needs the file after a crash
        self._file.execute("CREATE TABLE names (number INTEGER PRIMARY KEY, name BLOB UNIQUE)")
        self._file.execute("BEGIN")  # a transaction for each name would take twice as long
        self.update(names)

    def update(self, names: Iterable[str]) -> None:
        """Add the names that are not there yet.

        Raises:
            UserError: if the disk is full.
        """
        try:
            self._file.executemany("INSERT OR IGNORE INTO names (name) VALUES (?)", map(_key, names))
        except sqlite3.OperationalError as error:
            raise UserError(
                f"the temporary file of names cannot be written ({error}). Free some space, or set TMPDIR to a folder "
                "that has some."
            ) from error

    def __contains__(self, name: str) -> bool:
        return self._file.execute("SELECT 1 FROM names WHERE name = ?", _key(name)).fetchone() is not None

    def __len__(self) -> int:
        return self._file.execute("SELECT coalesce(max(number), 0) FROM names").fetchone()[0]

    def __iter__(self) -> Iterator[str]:
        return self.among(range(len(self)))

    def among(self, numbers: range) -> Iterator[str]:
        """Yield the names with these numbers, which count from 0 in the order of the set."""
        query = "SELECT name FROM names WHERE number > ? AND number <= ? ORDER BY number"
        for (name,) in self._file.execute(query, (numbers.start, numbers.stop)):
            yield name.decode("utf-8", "surrogatepass")


def _key(name: str) -> tuple[bytes]:
    return (name.encode("utf-8", "surrogatepass"),)  # SQLite's own text holds no lone surrogates


@dataclass(frozen=True)
class Shard:
    """One of several equal parts of a job, counted from 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that a text like 2/8 names.

        Raises:
            UserError: if it names none.
        """
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        shard = cls(*map(int, found.groups())) if found else cls(0)
        if not 1 <= shard.number <= shard.count:
            raise UserError(f"--shard {text}: expected I/N with 1 <= I <= N")
        return shard

    def of(self, total: int) -> range:
        """Return the numbers, counted from 0, that this shard has of `total`. Shards differ by one number at most."""
        return range(total * (self.number - 1) // self.count, total * self.number // self.count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def read_names(file: IO[bytes], where: str, null: bool = False) -> Iterator[str]:
    """Yield the names of a list, which has one on each line. Blank lines are skipped.

    Args:
        where: begins an error.
        null: a NUL character ends a name, as `find -print0` writes it, so that a name may hold a line break and need
            not be UTF-8.

    Raises:
        UserError: naming the line that is not UTF-8 or holds a NUL character.
    """
    for number, line in enumerate(_split(file, b"\0" if null else b"\n"), start=1):
        if null:
            name = os.fsdecode(line)
        else:
            name = decode(line.strip() and line.removesuffix(b"\r"), f"{where}:{number}")
            if "\0" in name:
                raise UserError(f"{where}:{number}: holds a NUL character. If one ends each name, add --null.")
        if name:
            yield name


def _split(file: IO[bytes], end: bytes) -> Iterator[bytes]:
    rest = b""
    while block := file.read(BLOCK):
        *whole, rest = (rest + block).split(end)
        yield from whole
    if rest:
        yield rest
