"""Successive halving: the worse half of a sweep's settings is dropped at each rung, and the rest train on.

Jamieson & Talwalkar 2016 (https://arxiv.org/abs/1502.07943): with half as many settings and twice as many steps from
rung to rung, each rung costs about the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from im2json.errors import UserError
from im2json.scoring import METRICS
from im2json.sweep.grid import Point
from im2json.sweep.launch import Job


@dataclass(frozen=True)
class Dropped:
    """A setting that halving has stopped."""

    setting: str
    step: int  # the rung
    metric: str
    value: float  # of the metric there, the mean over the seeds


def check_rungs(points: Sequence[Point]) -> None:
    """Raises UserError where the points are not validated at the same steps, so that none could be a rung."""
    found = sorted({point.config.train.eval_every for point in points})
    if len(found) > 1:
        raise UserError(f"--halve compares validations at the same step, so eval_every may not differ: {found}")


def halve(jobs: Sequence[Job], metric: str, run: Callable[[], None], dropped: list[Dropped]) -> None:
    """Run all jobs to the first validation, the better half of the settings to twice that step, and so on; the one that
    is left, or all that are left when they are done, to the end.

    Args:
        run: brings every job that is "to do" or "stopped" to its `stop_after`, or to its end.
        dropped: gets what was dropped.

    Who is dropped follows from what the run folders hold, so a sweep that is called again comes to the same.
    """
    alive: dict[str, list[Job]] = {}
    for job in jobs:
        alive.setdefault(job.point.setting, []).append(job)
    rung = jobs[0].point.config.train.eval_every  # of all, see `check_rungs`
    while True:
        _aim(alive, rung if len(alive) > 1 else None)
        run()
        # points that failed are no setting's any more
        alive = {name: kept for name, all in alive.items() if (kept := [job for job in all if job.state != "failed"])}
        if all(job.state == "done" for kept in alive.values() for job in kept):
            return
        values = {name: fmean(value_at(job, metric, rung) for job in kept) for name, kept in alive.items()}
        order = sorted(alive, key=lambda name: -METRICS[metric].gain(values[name]))  # of equals the grid's first
        for name in order[math.ceil(len(order) / 2) :]:
            unfinished = [job for job in alive.pop(name) if job.state != "done"]
            for job in unfinished:
                job.state = "dropped"
            if unfinished:  # what was done before loses nothing, and is ranked
                dropped.append(Dropped(name, rung, metric, values[name]))
        rung *= 2


def _aim(alive: dict[str, list[Job]], stop_after: int | None) -> None:
    for job in (job for kept in alive.values() for job in kept):
        job.stop_after = stop_after
        if job.state != "failed":
            job.state = job.state_on_disk()


def value_at(job: Job, metric: str, step: int) -> float:
    """A validation metric at this step, or at the last validation before it."""
    return [line.values[metric] for line in job.run.log("validation") if line.step <= step][-1]
