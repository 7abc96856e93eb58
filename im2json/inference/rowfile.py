"""The JSON-lines file that an extraction writes row by row, and goes on with after it was stopped. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from im2json.data.names import NameSet
from im2json.errors import UserError
from im2json.files import json_line, lock

BEGINNING = b'{"id": "'
"""Of every row."""


class RowFile:
    """The output file of an extraction. Each row records in `by` the digest of the adapter and options."""

    def __init__(self, file: BinaryIO, by: str) -> None:
        self.file = file
        self.by = by
        self.ids = NameSet()
        self.errors = 0

    def write(self, row: dict[str, Any]) -> None:
        """Add a row, for others to see at once."""
        row = {**row, "by": self.by}
        self.file.write((json_line(row) + "\n").encode())
        self.file.flush()
        self._count(row)

    def copy(self, rows: Iterable[tuple[bytes, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        """Add the lines of rows whose pictures have none yet, and yield these rows. All are on disk at the end."""
        for line, row in rows:
            if row["id"] not in self.ids:
                self.file.write(line)
                self._count(row)
                yield row
        self.file.flush()
        os.fsync(self.file.fileno())

    def take_up(self, name: str) -> None:
        """Count the rows of the file, and drop a last one that was cut short when the job was stopped."""
        end = 0
        for line, row in whole_rows(self.file, f"--out {name}", self.by):
            self._count(row)
            end += len(line)
        self.file.truncate(end)

    def _count(self, row: dict[str, Any]) -> None:
        self.ids.update([row["id"]])
        self.errors += "error" in row


def whole_rows(file: BinaryIO, where: str, by: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the rows of a file and their lines, without a last one that has no line break.

    Raises:
        UserError: naming the line that is no row with the same `by`.
    """
    for number, line in enumerate(file, start=1):
        cut = not line.endswith(b"\n")
        if cut and _torn(line):
            return
        try:
            row = json.loads(line)
            read_by = row["by"]
            if not isinstance(row["id"], str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{where}:{number}: is not a row of an extraction; name another file") from None
        if read_by != by:
            raise UserError(
                f"{where}:{number}: was read with another adapter, base or option (by {read_by}, now {by}); "
                "name another file"
            )
        if cut:
            return
        yield line, row


def _torn(line: bytes) -> bool:
    """Return whether a line is a truncated row of ours rather than another file's content."""
    if not (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


@contextlib.contextmanager
def row_file(path: Path | None, by: str) -> Iterator[RowFile]:
    """Open a file to write rows to, which may hold some already. None stands for the standard output.

    Raises:
        UserError: if it cannot be opened, holds anything but rows with the same `by`, or another process writes to it.
    """
    if path is None:
        yield RowFile(sys.stdout.buffer, by)
        return
    try:
        opened = path.open("a+b")
    except OSError as error:
        raise UserError(
            f"--out {path} cannot be opened ({error.strerror}). Make its folder first, or name another file."
        ) from error
    with opened as file:
        if not lock(file):
            raise UserError(f"--out {path}: another process is writing to it: wait for it or stop it first")
        file.seek(0)
        rows = RowFile(file, by)
        rows.take_up(str(path))
        yield rows
