"""Splits whose rows lie on disk: lines of JSON or pairs of files that name their pictures, or an Arrow table.

Rows are counted from 0, as `datasets` does; lines of a JSON-lines file from 1, as editors do.
"""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from im2json.data.example import Example
from im2json.data.kinds import LFS_POINTER, NO_CONTENT
from im2json.data.pictures import decode_picture
from im2json.errors import UserError
from im2json.jsontext import kind_of, load_json, loads, number_text, parse_target
from im2json.text import is_path, refuse_utf16, shortened

IMAGE_COLUMNS = ("file_name", "image")
SPLIT_COLUMN = "split"
TARGET_COLUMNS = ("ground_truth", "target", "json")
ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # the names that `datasets` takes for the same splits
LONGEST_PATH = 4096
"""Characters. What is longer is no path but a picture in base64."""
Columns = tuple[str | None, str | None]
"""--image-column and --target-column, where they are given."""


class Rows(Protocol):
    """The rows of one split as they are stored; every method may raise UserError naming the row."""

    def __len__(self) -> int: ...

    def id(self, row: int) -> str: ...

    def target(self, row: int) -> dict[str, Any]: ...

    def picture(self, row: int) -> tuple[bytes, str]:
        """Return the bytes of the picture file and the name to use for it in errors."""

    def where(self, row: int) -> str:
        """Return where the target is, for errors: FILE:LINE, or the row of a table."""


class StoredSplit:
    """Some rows of a stored split, in order. Targets are parsed once and held; pictures stay on disk."""

    def __init__(self, name: str, rows: Rows, chosen: Sequence[int] | None = None) -> None:
        self.name = name
        self.rows = rows
        self.chosen: Sequence[int] = range(len(rows)) if chosen is None else chosen
        self._held: list[dict[str, Any] | str | None] = [None] * len(self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def ids(self) -> list[str]:
        return [self.rows.id(row) for row in self.chosen]

    def where(self, i: int) -> str:
        """Return where the target of a row is, for errors."""
        return self.rows.where(self.chosen[i])

    def _target(self, i: int) -> dict[str, Any] | str:
        """Return the target of a row, or what is wrong with it. It is parsed once."""
        held = self._held[i]
        if held is None:
            held = self._held[i] = _or_problem(self.rows.target, self.chosen[i])
        return held

    @property
    def targets(self) -> list[dict[str, Any]]:
        """Raises UserError listing the rows whose target is not a JSON object."""
        parsed = [self._target(i) for i in range(len(self))]
        targets = [target for target in parsed if isinstance(target, dict)]
        if len(targets) < len(self):
            raise bad_rows([problem for problem in parsed if isinstance(problem, str)], len(self))
        return targets

    def __getitem__(self, i: int) -> Example:
        """Decode a row. Raises UserError naming it if its target or picture is bad, IndexError past the end."""
        return self.read(i)[0]

    def read(self, i: int) -> tuple[Example, bytes]:
        """Decode a row as `self[i]` does, and return the bytes of its picture file as well."""
        row = self.chosen[i]
        target = self._target(i)
        problems = [] if isinstance(target, dict) else [target]
        try:
            data, name = self.rows.picture(row)
            image = decode_picture(data, name)
        except UserError as error:
            problems.append(str(error))
        if problems:
            raise UserError("; ".join(dict.fromkeys(problems)))
        assert isinstance(target, dict)
        return Example(self.rows.id(row), image, target), data

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


def _or_problem(read: Callable[[int], dict[str, Any]], row: int) -> dict[str, Any] | str:
    try:
        return read(row)
    except UserError as error:
        return str(error)


def bad_rows(problems: Sequence[str], total: int) -> UserError:
    """Return one error for all bad rows: how many of `total`, a line for each of the first 20, a count of the rest."""
    remedy = f"mend them, or leave them out with --skip-bad {len(problems)}"
    return UserError(listed(f"{len(problems)} of {total} rows cannot be used: {remedy}", problems))


def listed(title: str, lines: Sequence[str], shown: int | None = 20) -> str:
    """Return a title with the first lines below it (all if `shown` is None) and a count of the rest."""
    rest = [] if shown is None or len(lines) <= shown else [f"... and {len(lines) - shown} more"]
    return "\n  ".join([title, *lines[:shown], *rest])


def inside(folder: Path, name: str, where: str) -> Path:
    """Return `folder`/`name`. Raises UserError if the name leads out of the folder (a link in it may)."""
    refuse_inline(name, where)
    path = PurePosixPath(name.replace("\\", "/"))
    if not is_path(name):
        raise UserError(f"{where}: {shortened(name)!r} cannot be the name of a file")
    if path.is_absolute() or ".." in path.parts or Path(name).is_absolute():
        raise UserError(f"{where}: {shortened(name)!r} leads out of the data set's folder; give a path within it")
    literal = folder / name  # a ZIP archive from Windows may have left files with a backslash in their name
    return literal if "\\" in name and os.path.lexists(literal) else folder / path


def refuse_inline(name: str, where: str) -> None:
    """Refuse a picture, or its address on the network, where its path should be.

    Raises:
        UserError: beginning with `where`.
    """
    if re.match(r"(?i)https?://|s3://|gs://", name):
        raise UserError(f"{where}: {shortened(name)!r} is an address; download the picture and give its path")
    if name.startswith("data:") or len(name) > LONGEST_PATH:
        raise UserError(f"{where}: holds {shortened(name, 40)!r} in place of a path; store the picture as a file")


def read_file(path: Path, where: str) -> bytes:
    """Return the bytes of a file, or of the one whose name differs only in Unicode's normal form.

    Raises:
        UserError: if there is no file or it cannot be read.
    """
    path = _on_disk(path)
    try:
        if path.is_dir():
            os.listdir(path)  # says why a folder was not listed
        if path.exists() and not path.is_file():
            raise UserError(f"{where}: is not a file")
        return path.read_bytes()
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{where}: is a link to {os.readlink(path)}, which is not there") from None
        raise UserError(f"{where}: there is no such picture file") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None


def _on_disk(path: Path) -> Path:
    """Return the path that exists: macOS stores e and an accent where metadata written elsewhere has one character."""
    if str(path).isascii() or path == path.parent or os.path.lexists(path):
        return path
    folder, wanted = _on_disk(path.parent), unicodedata.normalize("NFC", path.name)
    try:
        return folder / _names(folder, folder.stat().st_mtime_ns).get(wanted, path.name)
    except OSError:  # read_file says what is wrong
        return path


@lru_cache(8)
def _names(folder: Path, changed: int) -> dict[str, str]:
    """Return the names in a folder by their normal form. `changed` is when the folder was."""
    return {unicodedata.normalize("NFC", name): name for name in sorted(os.listdir(folder), reverse=True)}


@dataclass(frozen=True)
class Line:
    """A line of a JSON-lines file, or a pair of files; `problem` is set where it does not even name its picture."""

    folder: Path  # of the JSON-lines file or of the pairs
    where: str  # FILE:LINE, or the .json of a pair
    file_name: str  # relative to the folder
    target: Any = None  # JSON text or a value
    problem: str | None = None
    split: str = ""  # what its column `split` holds

    def path_within(self, root: Path) -> str:
        """Return the picture's path within a data set."""
        return (self.folder.relative_to(root) / self.file_name).as_posix()


class FolderRows:
    """Rows of picture files with a line each, read without `datasets`: objects stay exactly as written."""

    def __init__(self, root: Path, lines: Sequence[Line]) -> None:
        self.lines = lines
        self._ids = _made_unique([line.path_within(root) for line in lines])

    def __len__(self) -> int:
        return len(self.lines)

    def id(self, row: int) -> str:
        """Return the picture's path within the data set, such as test/059.jpg."""
        return self._ids[row]

    def target(self, row: int) -> dict[str, Any]:
        line = self._line(row)
        return parse_target(line.target, line.where)

    def picture(self, row: int) -> tuple[bytes, str]:
        line = self._line(row)
        path = inside(line.folder, line.file_name, line.where)
        return read_file(path, f"{path} ({line.where})"), str(path)

    def where(self, row: int) -> str:
        return self.lines[row].where

    def _line(self, row: int) -> Line:
        line = self.lines[row]
        if line.problem is not None:
            raise UserError(line.problem)
        return line


def _made_unique(names: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    ids = []
    for name in names:
        seen[name] += 1
        ids.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return ids


def read_lines(path: Path, columns: Columns) -> list[Line]:
    """Return every row of a JSON-lines file. A bad row is kept with its problem, so that all are listed at once."""
    lines = []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if content.startswith(LFS_POINTER):
        raise UserError(f"{path}: is a {NO_CONTENT}")
    refuse_utf16(content, str(path))
    for number, data in enumerate(content.split(b"\n"), start=1):  # text has other line ends inside strings
        if not data.removeprefix(codecs.BOM_UTF8).strip():
            continue
        where = f"{path}:{number}"
        try:
            lines.append(_read_line(data, path.parent, where, columns))
        except UserError as error:
            lines.append(Line(path.parent, where, f"{path.name}:{number}", problem=str(error)))
    return lines


def _read_line(data: bytes, folder: Path, where: str, columns: Columns) -> Line:
    row = load_json(data, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, not {kind_of(row)}")
    given, target = columns
    image = given or next((name for name in IMAGE_COLUMNS if name in row), IMAGE_COLUMNS[0])
    if not isinstance(row.get(image), str) or not row[image]:
        raise UserError(f"{where}: names no picture; {image} must be its path within the folder")
    refuse_inline(row[image], where)
    split = row.get(SPLIT_COLUMN)
    return Line(
        folder, where, row[image], row[find_target(row, target, where)], split="" if split is None else str(split)
    )


def find_target(columns: Any, given: str | None, where: str) -> str:
    """Return the column that holds the target: the given one, or else the first of TARGET_COLUMNS that exists."""
    if given is not None and given not in columns:
        raise UserError(f"{where}: has no column {given!r}; it has {', '.join(columns)}")
    found = given or next((name for name in TARGET_COLUMNS if name in columns), None)
    if found is None:
        raise UserError(f"{where}: has no target ({', '.join(TARGET_COLUMNS)}); it has {', '.join(columns)}")
    return found


class ArrowRows:
    """Rows of a `datasets.Dataset`, read as they are stored: pictures undecoded, JSON columns as their text.

    A target column that is a struct has had missing keys filled with null by `datasets`; nulls are dropped
    there, as they cannot be told from the filling. Keep targets as JSON text to keep null.

    `folders` are those that a row without bytes may point into with its path.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        split: str,
        image_column: str,
        target_column: str,
        folders: Sequence[Path],
    ) -> None:
        raw = dataset.with_format("arrow")
        self._images = raw.select_columns([image_column])
        self._targets = raw.select_columns([target_column])
        self._where = f"of split {split} of {name}"
        self._prefix = f"{name.rstrip('/').rsplit('/', 1)[-1]}-{split}"
        self._folders = folders

    def __len__(self) -> int:
        return len(self._targets)

    def id(self, row: int) -> str:
        return f"{self._prefix}-{row}"

    def target(self, row: int) -> dict[str, Any]:
        where = self.where(row)
        return parse_target(_plain(*self._value(self._targets, row), where), where)

    def where(self, row: int) -> str:
        return f"row {row} {self._where}"

    def _value(self, table: Any, row: int) -> tuple[Any, Any]:
        """Return a value and its Arrow type."""
        scalar = table[row].column(0)[0]
        try:
            return scalar.as_py(), scalar.type
        except UnicodeDecodeError:
            raise UserError(f"{self.where(row)}: holds text that is not UTF-8") from None

    def picture(self, row: int) -> tuple[bytes, str]:
        where = self.where(row)
        value, _ = self._value(self._images, row)
        if value is None or (value["bytes"] is None and not value["path"]):
            raise UserError(f"{where}: has no picture")
        if value["bytes"] is not None:
            return value["bytes"], where
        path = self._file(value["path"], where)
        return read_file(path, f"{where}: {path}"), f"{where}: {path}"

    def _file(self, name: str, where: str) -> Path:
        """Return the file a row points to. A data set from elsewhere must not read this machine's other files."""
        if not Path(name).is_absolute():
            return inside(self._folders[0], name, where)
        for folder in self._folders:
            if Path(name).is_relative_to(folder) and ".." not in Path(name).parts:
                return Path(name)
        raise UserError(f"{where}: {name!r} leads out of the data set's folder; store the pictures in the rows")


def _plain(value: Any, kind: Any, where: str, path: str = "") -> Any:
    """Return an Arrow value as JSON has it: structs without nulls, numbers as the shortest decimal that names them.

    Python's float of a narrow one has digits that were never stored: 9.300000190734863 for 9.3. An exponent, which
    Python writes from 1e16 on and below 0.0001, is written out as `number_text` does.

    Raises:
        UserError: beginning with `where`, if the value at the path of a key is none that JSON has.
    """
    from pyarrow import types

    if value is None:
        return None
    if types.is_struct(kind):
        return {
            name: _plain(inner, kind.field(name).type, where, f"{path}.{name}" if path else name)
            for name, inner in value.items()
            if inner is not None
        }
    if isinstance(value, list) and not types.is_map(kind):
        return [_plain(item, kind.value_type, where, path) for item in value]
    if types.is_floating(kind):
        number = value if types.is_float64(kind) else float(str(kind.to_pandas_dtype()(value)))
        return loads(number_text(number)) if "e" in repr(number) else number
    if types.is_decimal(kind):
        return loads(f"{value:f}")
    if path and not isinstance(value, str | int | list):
        kept = f"holds a {type(value).__name__}, which JSON does not have"
        raise UserError(f"{where}: the key {path} {kept}; store the target as JSON text")
    return value
