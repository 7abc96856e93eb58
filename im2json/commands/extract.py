"""Pictures that nobody has labelled, read with an adapter, row by row into a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from im2json.cli import quick_start, quiet_libraries
from im2json.commands.workers import Parts, Reader, Team
from im2json.data.names import NameSet, Shard, read_names
from im2json.data.pictures import list_pictures
from im2json.errors import UserError
from im2json.options import TrainConfig
from im2json.progress import progress_bar
from im2json.report.table import counted
from im2json.runs import RunFolder

if TYPE_CHECKING:
    from im2json.inference.extract import Extractor
    from im2json.inference.rowfile import RowFile


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


def extract(
    run: str, selection: Selection, out: Path | None, options: dict[str, Any], jobs: int | None = None,
    ray: str | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Write the rows that are not in the file yet, and say on the standard error what was passed over.

    Args:
        run: a run folder, an adapter folder, or an adapter on the hub.
        out: the file, or None for the standard output.
        options: in place of the run's.
        jobs: workers at a time, more than 1 only with `out`; None means one per GPU, or 1 without a GPU.
        ray: address of a Ray cluster that runs the workers, only with `out`; None means this machine.

    Returns:
        The number of rows whose picture could not be read, and the number of all rows of the file.

    Raises:
        UserError: naming the option, file or row that is wrong.
    """
    quiet_libraries()
    from im2json.inference.rowfile import row_file
    from im2json.model.hub import adapter_path
    from im2json.resume import reading_config, reading_digest

    team = None if out is None else Team(jobs, ray)
    notes: list[str] = []
    listed = selection.find(notes)
    for note in notes:
        click.echo(note, err=True)
    config = reading_config(adapter_path(run), options)
    by, reader = reading_digest(config), Reader(run, options, config.train.threads)
    parts = Parts(Path(f"{out}.parts").absolute(), by)  # only several workers use it
    with row_file(out, by) as rows:
        if team is not None and parts.begun():
            click.echo(f"finishing the job in {parts.path} first", err=True)
            parts.finish(team, reader, rows, _tell)
        missing = Missing(listed, selection.shard.of(len(listed)), rows.ids)
        total, left = len(missing.numbers), len(missing)
        known = f", {total - left} of them read before" if left < total else ""
        click.echo(f"reading {counted(total, 'picture')} with {run}{known}", err=True)
        if RunFolder(Path(run)).config.is_file() and not RunFolder(Path(run)).done:
            click.echo(f"{run} has not finished: its best adapter so far is used, without calibration", err=True)
        if team is not None and (shards := team.shards(left)):
            parts.begin(missing, left, shards)
            parts.finish(team, reader, rows, _tell)
        elif left:
            _read(missing, rows, config, total, total - left)
        if out is not None:
            click.echo(f"{counted(len(rows.ids), 'row')} in {out}", err=True)
        return rows.errors, len(rows.ids)


def _read(missing: Missing, rows: RowFile, config: TrainConfig, total: int, done: int) -> None:
    """Read the pictures in this process."""
    with quick_start():
        extractor = load_extractor(config)
    with progress_bar(total, "extract", "pic", done=done) as bar:
        for row in extractor(missing):
            rows.write(row)
            _tell(row)
            bar.update()


def load_extractor(config: TrainConfig) -> Extractor:
    """Load the adapter of settled options, and set the CPU threads that they say.

    Raises:
        UserError: as Extractor.from_config.
    """
    import torch

    from im2json.inference.extract import Extractor

    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    return Extractor.from_config(config)


def _tell(row: dict[str, Any]) -> None:
    """Say what is special about how a picture was read."""
    if "pages" in row:
        tqdm.write(f"{row['id']}: has {row['pages']} pages, of which the first was read", sys.stderr)
    if "note" in row:
        tqdm.write(f"{row['id']}: {row['note']}", sys.stderr)
