"""Fine-tune PaliGemma with QLoRA to turn pictures of documents into JSON.

accelerate launch train.py --r 16          the embedded base and receipts, no network and no GPU needed
accelerate launch train.py --preset cord   PaliGemma-3B on CORD v2, one 16 GB GPU
python train.py --check --dataset FOLDER   look at the data first: bad rows, copies, lengths, keys, and a page of it
python train.py --plan --preset cord       what a run will take: steps, memory, time; nothing is kept
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from im2json.cli import (
    FloatRange,
    GroupedCommand,
    Interrupted,
    option_flags,
    preset_flag,
    quiet_libraries,
    resume_advice,
    user_errors,
)
from im2json.options import TrainConfig
from im2json.resume import fresh_options, resumed_config
from im2json.runs import RunFolder, check_output


@click.command(cls=GroupedCommand)
@preset_flag
@option_flags()
@click.option("--resume", metavar="PATH", help="Run folder of a stopped run to continue from its last checkpoint.")
@click.option(
    "--stop-after",
    type=click.IntRange(1),
    metavar="N",
    help="Stop after this step and keep a checkpoint. The learning rate follows the schedule of the whole run.",
)
@click.option(
    "--check", "only_check", is_flag=True, help="Check the data and write an HTML report on it, without training."
)
@click.option(
    "--plan", "only_plan", is_flag=True, help="Forecast the steps, memory and time of the run from a few steps."
)
@click.option(
    "--price-per-hour",
    type=FloatRange(0),
    metavar="FLOAT",
    help="Price of the machine for an hour. --plan then also says what the run costs.",
)
@click.pass_context
def main(
    context: click.Context,
    preset: str | None,
    resume: str | None,
    stop_after: int | None,
    only_check: bool,
    only_plan: bool,
    price_per_hour: float | None,
) -> None:
    """Fine-tune PaliGemma with QLoRA to turn pictures of documents into JSON."""
    given: dict[str, Any] = context.obj or {}
    if only_check and only_plan:
        raise click.UsageError("--check and --plan: give one of the two")
    if (only_check or only_plan) and (resume is not None or stop_after is not None):
        flag = "--check" if only_check else "--plan"
        raise click.UsageError(f"{flag} goes with the options of a fresh run, not with --resume or --stop-after")
    if price_per_hour is not None and not only_plan:
        raise click.UsageError("--price-per-hour goes with --plan")
    with user_errors("no step was taken yet"):
        stopped = None if resume is None else RunFolder(Path(resume))
        if stopped is not None:
            config = resumed_config(stopped, given, preset)
        else:
            config = TrainConfig.resolve(fresh_options(given, preset), preset)
            if not (only_check or only_plan):
                check_output(config.train.output)
        quiet_libraries()
        # each imports torch, which takes seconds
        if only_check:
            from im2json.commands.check import check

            sys.exit(0 if check(config) else 1)
        elif only_plan:
            from im2json.commands.plan import plan

            plan(config, price_per_hour)
        else:
            from im2json.commands.train import Ending, train

            ending, run = train(config, stopped, stop_after)
            if ending is Ending.ASKED:
                raise Interrupted(f"interrupted: {resume_advice(run.path)}")


if __name__ == "__main__":
    main()
