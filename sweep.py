"""Ablations that finish, resume and decide.

python sweep.py grid.json             every point of the grid, then the leaderboard, then the test split for the winner
python sweep.py grid.json --dry-run   the points, their commands, and what is done
"""

from __future__ import annotations

import functools
import shlex
import sys
from pathlib import Path

import click

from im2json.catalogue import METRICS
from im2json.cli import user_errors
from im2json.runs import RunFolder, check_folder, make_folder
from im2json.sweep.grid import read_plan
from im2json.sweep.launch import Here, Job, Place, command, make_jobs, make_slots, run_jobs

HERE = Path(__file__).resolve().parent


@click.command()
@click.argument("grid", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="the sweep's folder; runs/NAME for NAME.json")
@click.option("--jobs", type=click.IntRange(1), help="points at a time; 1 on a CPU, else as many as the GPUs take")
@click.option("--gpus-per-run", type=click.IntRange(1), help="GPUs for each point; 1 unless given")
@click.option(
    "--ray", metavar="HOST:PORT", help="run the points on this Ray cluster, or `auto`; it shares the sweep's folder"
)
@click.option(
    "--halve",
    "halving",
    metavar="METRIC",
    type=click.Choice(list(METRICS)),
    help="drop the worse half of the settings, by this metric, at each rung of validations (successive halving)",
)
@click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE", help="replace an option of the grid's base")
@click.option("--dry-run", is_flag=True, help="only show the points, their commands, and what is done")
@click.option("--list", "as_list", is_flag=True, help="only print a command for every point that is not done")
def main(
    grid: Path, output: Path | None, jobs: int | None, gpus_per_run: int | None, ray: str | None, halving: str | None,
    overrides: tuple[str, ...], dry_run: bool, as_list: bool,
) -> None:  # fmt: skip
    """Run the points of GRID, rank them by what they generate, and score the winner's test split.

    The same command again goes on: finished points are kept, stopped ones resumed, and new ones added.
    """
    if halving is not None and (dry_run or as_list):
        raise click.UsageError("--halve finds out while it runs which points go on: leave out --dry-run and --list")
    with user_errors("the same command goes on"):
        plan = read_plan(grid, overrides)
        sweep = output or Path("runs") / grid.stem
        sweep = sweep.absolute() if ray is not None else sweep  # the cluster's programs start somewhere else
        points = make_jobs(plan.points, sweep)
        elsewhere = as_list or ray is not None  # on machines that need not have what this one has
        slots, processes, threads = ([], gpus_per_run or 1, None) if elsewhere else make_slots(jobs, gpus_per_run)

        def make_command(job: Job) -> list[str]:
            return command(job, HERE / "train.py", processes, threads)

        if dry_run or as_list:
            for job in points:
                if dry_run:
                    click.echo(f"{job.point.name}: {job.state}, {job.run.path}")
                if job.state != "done":
                    click.echo(("    " if dry_run else "") + shlex.join(make_command(job)))
            return
        from im2json.sweep.answer import answer
        from im2json.sweep.cluster import Cluster
        from im2json.sweep.halving import Dropped, check_rungs, halve
        from im2json.sweep.progress import Progress

        if halving is not None:
            check_rungs(plan.points)
        check_folder(sweep)
        place: Place
        if ray is None:
            place = Here(slots, make_command)
        else:
            place = Cluster(ray, HERE / "train.py", jobs or len(points), gpus_per_run)
        make_folder(sweep)
        run = functools.partial(run_jobs, points, place, Progress(points, plan.metric))
        dropped: list[Dropped] = []
        try:
            if halving is None:
                run()
            else:
                halve(points, halving, run, dropped)
        except KeyboardInterrupt:
            answer(plan, points, sweep, dropped)
            raise

        def score(winner: RunFolder, log: Path) -> tuple[int, str]:
            return place.output_of([str(HERE / "evaluate.py"), str(winner.path), "--json"], log)

        answer(plan, points, sweep, dropped, score)
        failed = sum(job.state == "failed" for job in points)
        if failed:
            click.echo(f"{failed} of {len(points)} points failed; the same command tries them again", err=True)
        sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
