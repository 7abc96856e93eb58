"""Show how far a running sweep is: a table that is redrawn on a terminal, or a line for each change in a log file."""

from __future__ import annotations

import re
import shutil
import sys
import time

import click

from im2json.files import is_locked
from im2json.report.duration import clock_time
from im2json.report.table import table
from im2json.sweeps.jobs import PointJob

HEADERS = ["point", "state", "step", "of", "metric", "left"]


class Progress:
    """Show the jobs at each call; a terminal is redrawn once per second at most."""

    def __init__(self, jobs: list[PointJob], metric: str) -> None:
        self.jobs = jobs
        self.metric = metric
        self.on_terminal = sys.stdout.isatty()
        self.shown: dict[str, tuple] = {job.point.id: (job.state, None) for job in jobs}  # last state and metric
        self.done: dict[str, list[str]] = {}  # the rows of finished points, which no longer change
        self.failed: set[str] = set()  # points whose failure was shown
        self.drawn_at, self.lines = 0.0, 0

    def __call__(self) -> None:
        last = not any(job.state == "running" for job in self.jobs)
        if self.on_terminal and not last and time.monotonic() - self.drawn_at < 1:
            return
        self.drawn_at = time.monotonic()
        rows = [self.done.get(job.point.id) or self._row(job) for job in self.jobs]
        self.done |= {job.point.id: row for job, row in zip(self.jobs, rows) if job.state == "done"}
        if self.on_terminal:
            self._draw(rows)
        for job, (name, state, step, total, value, left) in zip(self.jobs, rows):
            if self.shown[job.point.id] == (state, value):
                continue
            self.shown[job.point.id] = (state, value)
            if not self.on_terminal:
                known = [f"step {step} of {total}" if step else "", value and f"{self.metric} {value}", left]
                click.echo(f"{name}: {', '.join(filter(None, [state, *known]))}")
            if state == "failed" and not self.on_terminal:
                click.echo(failure(job))
        if last and self.on_terminal:
            for job in self.jobs:
                if job.state == "failed" and job.point.id not in self.failed:
                    self.failed.add(job.point.id)
                    click.echo(f"{job.point.name}: failed\n{failure(job)}")
            self.lines = 0  # keep the last table, and print what follows below it

    def _draw(self, rows: list[list[str]]) -> None:
        """Draw over the last table. If the screen is too small for all points, show only those that run."""
        width, height = shutil.get_terminal_size()
        shown, states = rows, [state for _, state, *_ in rows]
        if len(rows) > height - 4:
            shown = [row for row in rows if row[1] == "running"][: height - 5]
        lines = table(shown, [*HEADERS[:4], self.metric, HEADERS[5]]).splitlines()
        if shown is not rows:
            lines.append(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
        up = f"\x1b[{self.lines}F\x1b[J" if self.lines else ""
        self.lines = len(lines)
        click.echo(up + "\n".join(line[: width - 1] for line in lines))

    def _row(self, job: PointJob) -> list[str]:
        """Return the cells under HEADERS."""
        lines = list(job.run.log()) if job.state != "to do" else []
        steps = [line for line in lines if line.split == "train"]
        values = [line.values[self.metric] for line in lines if line.split == "validation"]
        step, total = (steps[-1].step if steps else 0), total_steps(job)
        left = ""
        # A job that another sweep started may have paused, so its lines say nothing about its pace.
        recent = [line for line in steps if line.time >= job.started] if job.started else []
        if job.state == "running" and total and len(recent) > 1:
            pace = (recent[-1].time - recent[0].time) / (recent[-1].step - recent[0].step)
            end = total if job.stop_after is None else min(job.stop_after, total)
            left = f"{clock_time(pace * max(0, end - step))} left"
        value = f"{values[-1]:.3f}" if values else ""
        state = "queued" if job.state == "running" and not is_locked(job.log) else job.state  # by Ray
        return [job.point.name, state, str(step or ""), str(total or ""), value, left]


def failure(job: PointJob) -> str:
    """Return the end of a failed point's log, and where the rest is."""
    return f"{job.log_tail()}\n    (the end of {job.log})"


def total_steps(job: PointJob) -> int | None:
    """Return the steps that a point will take: from its options, or else from its log."""
    if job.point.config.train.steps is not None:
        return job.point.config.train.steps
    if not job.log.exists():
        return None
    with job.log.open("rb") as file:
        file.seek(max(0, job.log.stat().st_size - 4096))
        found = re.findall(rb"training:.*?\d+/(\d+) \[", file.read())
    return int(found[-1]) if found else None
