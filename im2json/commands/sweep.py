"""List the points of a grid, or run and rank them."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from im2json.catalogue import METRICS
from im2json.errors import UserError
from im2json.report.table import counted
from im2json.runs import RunFolder, check_folder, make_folder
from im2json.sweeps.grid import Plan, read_plan
from im2json.sweeps.jobs import Job, PointJob, make_jobs
from im2json.sweeps.local import Local, Shares, share_machine
from im2json.sweeps.processes import Output
from im2json.sweeps.scheduler import Backend, run_jobs


@dataclass(frozen=True)
class SweepOptions:
    """The options of a sweep, as its flags give them.

    Raises:
        UserError: naming the one that is wrong.
    """

    grid: Path
    output: Path | None = None  # the sweep's folder; None: runs/NAME for NAME.json
    jobs: int | None = None  # at a time
    gpus_per_run: int | None = None
    ray: str | None = None  # address of a Ray cluster; None: this machine
    halve: str | None = None  # metric of successive halving; None: train all points to their end
    overrides: Sequence[str] = ()  # NAME=VALUE

    def __post_init__(self) -> None:
        for name, number in {"jobs": self.jobs, "gpus_per_run": self.gpus_per_run}.items():
            if number is not None and number < 1:
                raise UserError(f"{name}: {number} is too few, at least 1")
        if self.halve is not None and self.halve not in METRICS:
            raise UserError(f"halve: {self.halve!r} is no metric; the metrics are {', '.join(METRICS)}")

    @property
    def folder(self) -> Path:
        """The sweep's folder. On a cluster it is absolute, because programs there start in another directory."""
        folder = self.output or Path("runs") / self.grid.stem
        return folder if self.ray is None else folder.absolute()

    def make_command(self, shares: Shares) -> Callable[[Job], list[str]]:
        """Return the function that makes the command of a job on this machine."""
        return lambda job: job.command(shares.processes, shares.threads)

    def shares(self, elsewhere: bool = False) -> Shares:
        """Return how jobs share this machine. A job that runs elsewhere takes no share of it.

        Raises:
            UserError: if this machine has fewer GPUs than one run takes.
        """
        if elsewhere or self.ray is not None:
            return Shares([], self.gpus_per_run or 1, None)
        return share_machine(self.jobs, self.gpus_per_run)


def list_points(options: SweepOptions, with_states: bool, elsewhere: bool) -> None:
    """Print a command for each point that is not done, and start nothing.

    Args:
        with_states: also print the name, the state and the run folder of every point.
        elsewhere: the commands are for other machines, for example an array job.

    Raises:
        UserError: if the grid is wrong, or this machine has too few GPUs.
    """
    jobs = make_jobs(read_plan(options.grid, options.overrides).points, options.folder)
    make_command = options.make_command(options.shares(elsewhere))
    for job in jobs:
        if with_states:
            click.echo(f"{job.point.name}: {job.state}, {job.run.path}")
        if job.state != "done":
            click.echo(("    " if with_states else "") + shlex.join(make_command(job)))


def check_sweep_folder(folder: Path) -> None:
    """Refuse a folder that cannot hold a sweep.

    Raises:
        UserError: if it is not a writable folder and cannot become one, or belongs to a run.
    """
    check_folder(folder)
    if RunFolder(folder).config.exists():
        raise UserError(f"--output {folder} is the folder of a run: choose another for the sweep")


def sweep(options: SweepOptions) -> bool:
    """Run the points of a grid, write and print the leaderboard, and score the winner's test split.

    Returns:
        Whether no point failed.

    Raises:
        UserError: if the grid is wrong, this machine has too few GPUs, or no cluster answers.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once all points have saved and ended and the leaderboard is written.
    """
    plan = read_plan(options.grid, options.overrides)
    jobs = make_jobs(plan.points, options.folder)
    shares = options.shares()
    # These load numpy, which a wrong grid need not wait for.
    from im2json.sweeps.answer import answer
    from im2json.sweeps.halving import Dropped, check_rungs

    if options.halve is not None:
        check_rungs(plan.points)
    check_sweep_folder(options.folder)
    backend = _connect(options, shares, len(jobs))
    make_folder(options.folder)
    done = sum(job.state == "done" for job in jobs)
    before = f", {done} of them done before" if done else ""
    click.echo(f"running {counted(len(jobs), 'point')} in {options.folder}{before}")
    dropped: list[Dropped] = []
    try:
        _run(options, plan, jobs, backend, dropped)
    except KeyboardInterrupt:
        answer(plan, jobs, options.folder, dropped)
        raise

    def score(winner: RunFolder, log: Path) -> Output:
        click.echo(f"scoring the base model and {winner.path} on the test split", err=True)
        return backend.run_python(["-m", "im2json", "evaluate", str(winner.path), "--json"], log)

    answer(plan, jobs, options.folder, dropped, score)
    failed = sum(job.state == "failed" for job in jobs)
    if failed:
        click.echo(f"{failed} of {len(jobs)} points failed; the same command tries them again", err=True)
    return not failed


def _connect(options: SweepOptions, shares: Shares, points: int) -> Backend:
    """Return the backend to run the points on."""
    if options.ray is None:
        return Local(shares.environments, options.make_command(shares))
    from im2json.sweeps.cluster import Cluster

    return Cluster(options.ray, options.jobs or points, options.gpus_per_run)


def _run(options: SweepOptions, plan: Plan, jobs: list[PointJob], backend: Backend, dropped: list) -> None:
    """Run the jobs to their end; with halving, add the settings that are dropped to `dropped`."""
    from im2json.sweeps.halving import halve
    from im2json.sweeps.progress import Progress

    run = functools.partial(run_jobs, jobs, backend, Progress(jobs, plan.metric))
    if options.halve is None:
        run()
    else:
        halve(jobs, options.halve, run, dropped)
