"""Pictures that nobody has labelled, read with an adapter, row by row into a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from im2json.cli import quick_start, quiet_libraries
from im2json.data.pictures import list_pictures
from im2json.report.table import counted
from im2json.runs import RunFolder


def extract(run: str, pictures: tuple[str, ...], out: Path | None, options: dict[str, Any]) -> tuple[int, int]:
    """Write the rows that are not in the file yet, and say on the standard error what was passed over.

    Args:
        run: a run folder, an adapter folder, or an adapter on the hub.
        pictures: files, folders and patterns.
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
    listed = list_pictures(pictures, notes)
    for note in notes:
        click.echo(note, err=True)
    config = reading_config(adapter_path(run), options)
    with row_file(out, reading_digest(config)) as rows:
        missing = [picture for picture in listed if picture not in rows.ids]
        known = f", {len(listed) - len(missing)} of them read before" if len(missing) < len(listed) else ""
        click.echo(f"reading {counted(len(listed), 'picture')} with {run}{known}", err=True)
        if RunFolder(Path(run)).config.is_file() and not RunFolder(Path(run)).done:
            click.echo(f"{run} has not finished: its best adapter so far is used, without calibration", err=True)
        if missing:
            with quick_start():
                import torch
                from tqdm import tqdm

                from im2json.inference.extract import Extractor
                from im2json.progress import progress_bar

                if config.train.threads is not None:
                    torch.set_num_threads(config.train.threads)
                extractor = Extractor.from_config(config)
            done = len(listed) - len(missing)
            with progress_bar(len(listed), "extract", "pic", done=done) as bar:
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
