"""Pictures that nobody has labelled, read with an adapter, row by row into a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from im2json.cli import quick_start, quiet_libraries
from im2json.data.names import NameSet, Shard, read_names
from im2json.data.pictures import list_pictures
from im2json.errors import UserError
from im2json.report.table import counted
from im2json.runs import RunFolder


@dataclass(frozen=True)
class Selection:
    """The pictures that a job reads."""

    given: Sequence[str] = ()  # files, folders and patterns
    files_from: Path | None = None  # a list of files, which come after the given ones; "-" is the standard input
    null: bool = False  # whether the names in the list end with a NUL character
    shard: Shard = field(default_factory=Shard)

    def find(self, notes: list[str]) -> NameSet:
        """Return the pictures of all shards, each once. A line on what was passed over is appended to `notes`.

        Raises:
            UserError: if a folder, a pattern or the list has no picture, or the list is not text.
        """
        listed = NameSet(list_pictures(self.given, notes))
        if self.files_from is not None:
            where = f"--files-from {self.files_from}"
            with click.open_file(str(self.files_from), "rb") as file:
                listed.update(read_names(file, where, self.null))
            if not listed:
                raise UserError(f"{where}: names no picture")
        return listed


@dataclass(frozen=True)
class Missing:
    """The pictures that have no row yet, in order."""

    listed: NameSet
    numbers: range  # those of the job's shard
    read: NameSet

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.listed.among(self.numbers) if name not in self.read)


def extract(run: str, selection: Selection, out: Path | None, options: dict[str, Any]) -> tuple[int, int]:
    """Write the rows that are not in the file yet, and say on the standard error what was passed over.

    Args:
        run: a run folder, an adapter folder, or an adapter on the hub.
        out: the file, or None for the standard output.
        options: in place of the run's.

    Returns:
        The number of rows whose picture could not be read, and the number of all rows of the file.

    Raises:
        UserError: naming the option, file or row that is wrong.
    """
    quiet_libraries()
    from im2json.inference.rowfile import row_file
    from im2json.model.hub import adapter_path
    from im2json.resume import reading_config, reading_digest

    notes: list[str] = []
    listed = selection.find(notes)
    for note in notes:
        click.echo(note, err=True)
    config = reading_config(adapter_path(run), options)
    with row_file(out, reading_digest(config)) as rows:
        missing = Missing(listed, selection.shard.of(len(listed)), rows.ids)
        total, left = len(missing.numbers), len(missing)
        known = f", {total - left} of them read before" if left < total else ""
        click.echo(f"reading {counted(total, 'picture')} with {run}{known}", err=True)
        if RunFolder(Path(run)).config.is_file() and not RunFolder(Path(run)).done:
            click.echo(f"{run} has not finished: its best adapter so far is used, without calibration", err=True)
        if left:
            with quick_start():
                import torch
                from tqdm import tqdm

                from im2json.inference.extract import Extractor
                from im2json.progress import progress_bar

                if config.train.threads is not None:
                    torch.set_num_threads(config.train.threads)
                extractor = Extractor.from_config(config)
            with progress_bar(total, "extract", "pic", done=total - left) as bar:
                for row in extractor(missing):
                    rows.write(row)
                    if "pages" in row:
                        tqdm.write(f"{row['id']}: has {row['pages']} pages, of which the first was read", sys.stderr)
                    if "note" in row:
                        tqdm.write(f"{row['id']}: {row['note']}", sys.stderr)
                    bar.update()
        if out is not None:
            click.echo(f"{counted(len(rows.ids), 'row')} in {out}", err=True)
        return rows.errors, len(rows.ids)
