"""Workers that share an extraction: each is a process that reads one shard of the pictures into a file of its own."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click
from tqdm import tqdm

from im2json.data.names import Shard
from im2json.errors import UserError
from im2json.files import read_json, write_json
from im2json.progress import Bar, progress_bar
from im2json.sweeps.grid import as_flag
from im2json.sweeps.jobs import Job, State
from im2json.sweeps.local import Local, share_machine
from im2json.sweeps.scheduler import Backend, run_jobs

if TYPE_CHECKING:
    from im2json.inference.rowfile import RowFile

RETRIES = 3
"""Limit on the times that a killed worker is started again."""
NOTICE = "stopping the workers: their rows so far are kept; once more kills them"
BLOCK = 1 << 20
"""Bytes of a part that are counted at once."""


@dataclass(frozen=True)
class Reader:
    """The adapter and options that all workers read with."""

    run: str
    options: dict[str, Any]  # in place of the run's
    threads: int | None  # of the options or the run


@dataclass
class ShardJob(Job):
    """A shard of the pictures, and the worker that reads it."""

    kind: ClassVar[str] = "shard"
    parts: Path
    shard: Shard
    pictures: int  # of this shard
    reader: Reader
    retries: int = 0  # so far

    @property
    def id(self) -> str:
        return str(self.shard.number)

    @property
    def stem(self) -> Path:
        return self.parts / self.id

    @property
    def threads(self) -> int | None:
        return self.reader.threads

    @property
    def rows(self) -> Path:
        """The rows that the worker has written."""
        return self.parts / f"{self.id}.jsonl"

    def state_at_rest(self) -> State:
        return "done" if count_lines(self.rows, 0)[0] >= self.pictures else "to do"

    def command(self, processes: int, threads: int | None) -> list[str]:
        flags = [flag for name, value in self.reader.options.items() for flag in as_flag(name, value)]
        if threads is not None and self.threads is None:
            flags += ["--threads", str(threads)]
        return [
            sys.executable, "-m", "im2json", "extract", "--null", "--files-from", str(self.parts / "pictures"),
            "--shard", str(self.shard), "--out", str(self.rows), "--jobs", "1", *flags, "--", self.reader.run,
        ]  # fmt: skip

    def retry(self) -> bool:
        """Count one more failure, and return whether to start the worker again: not after a mistake of the user."""
        end = self.log_tail().lstrip()
        if self.retries == RETRIES or (end.startswith("Error: ") and not end.startswith("Error: interrupted")):
            return False
        self.retries += 1
        return True


def count_lines(path: Path, start: int) -> tuple[int, int]:
    """Return the number of line breaks in a file from a byte on, and the byte where the file ends."""
    if not path.exists():
        return 0, start
    with path.open("rb") as file:
        file.seek(start)
        count = sum(block.count(b"\n") for block in iter(partial(file.read, BLOCK), b""))
        return count, file.tell()


class Team:
    """The workers that can read at the same time, on this machine or on a Ray cluster."""

    def __init__(self, jobs: int | None, ray: str | None) -> None:
        """Count the GPUs of this machine, or connect to a cluster.

        Args:
            jobs: workers at a time; None means one per GPU, or 1 without a GPU.
            ray: address of a Ray cluster; None means this machine.

        Raises:
            UserError: if no cluster answers.
        """
        self.on_cluster = ray is not None
        self.backend: Backend
        if ray is not None:
            from im2json.sweeps.cluster import Cluster

            cluster = Cluster(ray, jobs, None)
            self.backend, self.size = cluster, cluster.capacity
        else:
            shares = share_machine(jobs, None)
            self.backend = Local(shares.environments, lambda job: job.command(1, shares.threads))
            self.size = len(shares.environments)

    def shards(self, pictures: int) -> int:
        """Return how many workers should share this many pictures. 0 means that this process reads them."""
        count = min(self.size, pictures)
        return count if count > 1 or self.on_cluster else 0


@dataclass(frozen=True)
class Parts:
    """The folder of a job that several workers share: their pictures and their rows."""

    path: Path
    by: str  # digest of the adapter and the options (see resume.reading_digest)

    @property
    def _record(self) -> Path:
        return self.path / "job.json"

    def begun(self) -> bool:
        """Return whether the folder holds a job that is not finished yet.

        Raises:
            UserError: if it holds one with another adapter or other options.
        """
        if not self._record.exists():
            return False
        by = read_json(self._record)["by"]
        if by != self.by:
            raise UserError(
                f"{self.path}: was begun with another adapter, base or option (by {by}, now {self.by}). Finish it with "
                "the command that began it, or remove the folder."
            )
        return True

    def begin(self, pictures: Iterable[str], count: int, shards: int) -> None:
        """Make the folder of a new job.

        Args:
            count: of the pictures.

        Raises:
            UserError: if the folder holds other files.
        """
        if self.path.exists():  # a job was stopped while it made or removed the folder
            self._check_names()
            self._remove()
        self.path.mkdir(exist_ok=True)
        with (self.path / "pictures").open("wb") as file:
            file.writelines(os.fsencode(name) + b"\0" for name in pictures)
        write_json(self._record, {"by": self.by, "shards": shards, "pictures": count})

    def _check_names(self) -> None:
        ours = r"pictures|[0-9]+\.(jsonl|log|pid)|\.job\.json\.tmp-[0-9]+|\.nfs.*"  # NFS keeps open files as .nfs*
        for name in os.listdir(self.path):
            if not re.fullmatch(ours, name):
                raise UserError(
                    f"{self.path}: holds {name}, which no job wrote. Move the folder, or name another file."
                )

    def _remove(self) -> None:
        self._record.unlink(missing_ok=True)  # first, because without it the rest is known to be of no use
        shutil.rmtree(self.path, ignore_errors=True)

    def finish(self, team: Team, reader: Reader, rows: RowFile, tell: Callable[[dict[str, Any]], None]) -> None:
        """Have the workers read what is left, add their rows to `rows`, and remove the folder.

        Args:
            tell: called with each row that is added.

        Raises:
            UserError: if a worker fails.
            KeyboardInterrupt: after Ctrl-C or SIGTERM, once all workers have ended.
        """
        from im2json.inference.rowfile import whole_rows

        jobs = self._jobs(reader)
        progress = _Progress(jobs)
        with progress_bar(sum(job.pictures for job in jobs), "extract", "pic", done=progress.new_rows()) as bar:
            run_jobs(jobs, team.backend, lambda: progress.show(bar), NOTICE)
        for job in jobs:
            if job.state == "failed":
                click.echo(job.log_tail(), err=True)
                raise UserError(
                    f"worker {job.shard} failed{f' {job.retries + 1} times' if job.retries else ''}; the end of its "
                    f"log {job.log} is above. The rows so far are kept; the same command goes on."
                )
        for job in jobs:
            with job.rows.open("rb") as file:
                for row in rows.copy(whole_rows(file, str(job.rows), self.by)):
                    tell(row)
        self._remove()

    def _jobs(self, reader: Reader) -> list[ShardJob]:
        record = read_json(self._record)
        shards = [Shard(number, record["shards"]) for number in range(1, record["shards"] + 1)]
        jobs = [
            ShardJob(self.path, shard, len(shard.of(record["pictures"])), reader, folder=Path.cwd()) for shard in shards
        ]
        for job in jobs:
            job.state = job.state_on_disk()
            if job.state != "running":
                job.log.unlink(missing_ok=True)  # what an earlier command wrote says nothing about this one's workers
        return jobs


class _Progress:
    """Say how many rows the workers have written, and which of them are started again."""

    def __init__(self, jobs: Sequence[ShardJob]) -> None:
        self.jobs = jobs
        self.counted = [0] * len(jobs)  # bytes of each worker's rows
        self.retries = [0] * len(jobs)

    def new_rows(self) -> int:
        """Return how many rows were written since the last call."""
        total = 0
        for i, job in enumerate(self.jobs):
            count, self.counted[i] = count_lines(job.rows, self.counted[i])
            total += count
        return total

    def show(self, bar: Bar) -> None:
        bar.update(self.new_rows())
        for i, job in enumerate(self.jobs):
            if job.retries > self.retries[i]:
                tqdm.write(f"worker {job.shard} was killed or crashed, and is started again", sys.stderr)
                self.retries[i] = job.retries
