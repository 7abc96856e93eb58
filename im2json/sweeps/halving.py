"""Successive halving: drop the worse half of a sweep's settings at each rung, and train the others further.

From rung to rung there are half as many settings and twice as many steps, so each rung costs about the same (Jamieson &
Talwalkar 2016, https://arxiv.org/abs/1502.07943).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from im2json.errors import UserError
from im2json.scoring import METRICS
from im2json.sweeps.grid import Point
from im2json.sweeps.jobs import PointJob


@dataclass(frozen=True)
class Dropped:
    """A setting that halving has dropped."""

    setting: str
    step: int  # the rung
    metric: str
    value: float  # of the metric at that step, the mean over the seeds


def check_rungs(points: Sequence[Point]) -> None:
    """Check that all points are validated at the same steps, so that these can be rungs.

    Raises:
        UserError: if they are not.
    """
    found = sorted({point.config.train.eval_every for point in points})
    if len(found) > 1:
        raise UserError(f"--halve compares validations at the same step, so eval_every may not differ: {found}")


def halve(jobs: Sequence[PointJob], metric: str, run: Callable[[], None], dropped: list[Dropped]) -> None:
    """Run all jobs to the first validation, the better half of the settings to twice that step, and so on.

    The last setting runs to its end. The run folders alone determine which settings are dropped, so the same sweep
    called again drops the same.

    Args:
        run: runs every job that is "to do" or "stopped" to its `stop_after`, or to its end.
        dropped: the list to add the dropped settings to.
    """
    alive: dict[str, list[PointJob]] = {}  # setting -> its jobs
    for job in jobs:
        alive.setdefault(job.point.setting, []).append(job)
    rung = jobs[0].point.config.train.eval_every  # the same for all, see `check_rungs`
    while True:
        _set_target(alive, rung if len(alive) > 1 else None)
        run()
        alive = _without_failures(alive)
        if all(job.state == "done" for group in alive.values() for job in group):
            return
        values = {name: fmean(value_at(job, metric, rung) for job in group) for name, group in alive.items()}
        # Of equal settings, the first in the grid ranks higher.
        ranked = sorted(alive, key=lambda name: -METRICS[metric].gain(values[name]))
        for name in ranked[math.ceil(len(ranked) / 2) :]:
            unfinished = [job for job in alive.pop(name) if job.state != "done"]
            for job in unfinished:
                job.state = "dropped"
            if unfinished:  # a setting that was done before is not dropped, and is ranked
                dropped.append(Dropped(name, rung, metric, values[name]))
        rung *= 2


def _set_target(alive: dict[str, list[PointJob]], stop_after: int | None) -> None:
    """Set the step to stop after, and the state that follows from it."""
    for job in (job for group in alive.values() for job in group):
        job.stop_after = stop_after
        if job.state != "failed":
            job.state = job.state_on_disk()


def _without_failures(alive: dict[str, list[PointJob]]) -> dict[str, list[PointJob]]:
    """Return the settings without their failed jobs, and without settings of which no job is left."""
    left = {name: [job for job in group if job.state != "failed"] for name, group in alive.items()}
    return {name: group for name, group in left.items() if group}


def value_at(job: PointJob, metric: str, step: int) -> float:
    """Return a validation metric at this step, or at the last validation before it."""
    return [line.values[metric] for line in job.run.log("validation") if line.step <= step][-1]
