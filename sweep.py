"""Run an ablation grid, and rank what it finds.

python sweep.py grid.json             every point of the grid, then the leaderboard, then the test split for the winner
python sweep.py grid.json --dry-run   the points, their commands, and what is done
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from im2json.catalogue import METRICS
from im2json.cli import user_errors
from im2json.commands.sweep import SweepOptions, list_points, sweep

HERE = Path(__file__).resolve().parent


@click.command()
@click.argument("grid", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder of the sweep; runs/NAME for NAME.json by default."
)
@click.option("--jobs", type=click.IntRange(1), help="Points at a time; 1 on a CPU, or as many as the GPUs allow.")
@click.option("--gpus-per-run", type=click.IntRange(1), help="GPUs for each point; 1 by default.")
@click.option(
    "--ray",
    metavar="HOST:PORT",
    help="Ray cluster that runs the points, or auto; its machines share the sweep's folder.",
)
@click.option(
    "--halve",
    metavar="METRIC",
    type=click.Choice(list(METRICS)),
    help="Metric of successive halving, which drops the worse half of the settings at each rung of validations.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="NAME=VALUE", help="Value that replaces one in the grid's base."
)
@click.option("--dry-run", is_flag=True, help="Only print the points, their states and their commands.")
@click.option("--list", "as_list", is_flag=True, help="Only print a command for each point that is not done.")
def main(dry_run: bool, as_list: bool, **flags: Any) -> None:
    """Run the points of GRID, rank them by the text that they generate, and score the winner on the test split.

    The same command continues a sweep: it keeps finished points, resumes stopped ones, and adds new ones.
    """
    options = SweepOptions(train=HERE / "train.py", evaluate=HERE / "evaluate.py", **flags)
    if options.halve is not None and (dry_run or as_list):
        raise click.UsageError("--halve decides while it runs which points go on: leave out --dry-run and --list")
    with user_errors("the same command goes on"):
        if dry_run or as_list:
            list_points(options, with_states=dry_run, elsewhere=as_list)
        elif not sweep(options):
            sys.exit(1)


if __name__ == "__main__":
    main()
