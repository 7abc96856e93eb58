"""Files that are whole whatever happens while they are written, JSON lines, checksums and locks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from im2json.errors import UserError
from im2json.jsontext import dumps, load_json, loads
from im2json.options import nearest
from im2json.text import escape_surrogates

CHECKSUMS = "checksums.json"
"""In a folder that `folder_atomically` wrote: {file: SHA-256}."""


def did_you_mean(path: Path) -> str:
    """Return a question in parentheses for the error about a path that does not exist: whether it was meant to be the
    one of a similar name in the same folder. Return nothing if there is none."""
    if os.path.lexists(path) or not path.parent.is_dir():
        return ""
    found = nearest(path.name, os.listdir(path.parent))
    return "" if found is None else f" (did you mean {path.parent / found}?)"


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a path to write to. It replaces `path`, whole and on disk, when the block ends without an error."""
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield aside
        _sync(aside)
        aside.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `path` when the block ends. `path` must not exist yet.

    The folder also gets checksums, so that `damage` can tell later whether it is still whole.
    """
    aside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # left by a run that was killed here
    aside.mkdir(parents=True)
    yield aside
    (aside / CHECKSUMS).write_text(json.dumps({file.name: sha256(file) for file in sorted(aside.iterdir())}, indent=2))
    for file in aside.rglob("*"):
        _sync(file)
    _sync(aside)
    os.rename(aside, path)
    _sync(path.parent)


@contextlib.contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `path` when the block ends without an error and is removed otherwise.

    Raises:
        UserError: if `path` exists.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists already. Choose another folder, or remove it.")
    aside = path.absolute().with_name(f".{path.absolute().name}.tmp-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
            _sync(file)
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a folder that `folder_atomically` wrote, or None if it is whole."""
    try:
        for name, digest in read_json(folder / CHECKSUMS).items():
            if sha256(folder / name) != digest:
                return f"{name} is not as it was written"
    except (OSError, UserError, AttributeError) as error:
        return str(error)
    return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        UserError: if the file is not JSON (see jsontext.load_json).
        OSError: if it cannot be read.
    """
    return load_json(path.read_bytes(), str(path))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    with atomically(path) as aside:
        aside.write_text(escape_surrogates(dumps(value, ensure_ascii=False, indent=2)) + "\n", "utf-8")


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json_line(row) + "\n" for row in rows)


def json_line(row: dict[str, Any]) -> str:
    """Return a row as one line of JSON, without the line break."""
    return escape_surrogates(dumps(row, ensure_ascii=False))  # a model or a file name may hold lone surrogates


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file of a run. A last line that a crash cut short is left out.

    Raises:
        UserError: naming the line that is not JSON.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield loads(line)
            except (ValueError, RecursionError):
                load_json(line, f"{path}:{number}")  # raises the same error in a form that names the line
                raise


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON-lines file with only those rows for which `keep` returns true.

    Raises:
        UserError: naming the line that `keep` cannot judge, because it was not written by a run.
    """

    def kept() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(read_lines(path), start=1):
            try:
                wanted = keep(row)
            except (AttributeError, KeyError, TypeError) as error:
                raise not_ours(path, number, error) from error
            if wanted:
                yield row

    if path.exists():
        with atomically(path) as aside:
            append_lines(aside, kept())


def not_ours(path: Path, line: int, error: Exception) -> UserError:
    """Return the error for a line that no run writes."""
    return UserError(f"{path}:{line}: is not a line that a run writes ({error})")


def lock(file: IO[Any], shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until this process and all that inherited it have closed it.

    Args:
        shared: allow other shared locks. This needs no right to write.
        wait: wait until the lock is free.

    Returns:
        Whether the file is locked now. False only if another process holds a lock and `wait` is False.
    """
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, how if wait else how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Return whether a process holds an exclusive lock on a file."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return not lock(file, shared=True)


def _sync(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
