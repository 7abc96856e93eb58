"""Fine-tune PaliGemma with QLoRA to turn pictures of documents into JSON.

accelerate launch train.py --r 16          the embedded base and receipts, no network and no GPU needed
accelerate launch train.py --preset cord   PaliGemma-3B on CORD v2, one 16 GB GPU
python train.py --check --dataset FOLDER   look at the data first: bad rows, copies, lengths, keys, and a page of it
python train.py --plan --preset cord       what a run will take: steps, memory, time; nothing is kept
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from im2json.cli import (
    FloatRange,
    GroupedCommand,
    option_flags,
    preset_flag,
    quiet_libraries,
    resumable,
    resume_advice,
    user_errors,
)
from im2json.options import TrainConfig
from im2json.runs import WEIGHTS, RunFolder, check_output, claim, fresh_options, locked, new_run, resumed_config


@click.command(cls=GroupedCommand)
@preset_flag
@option_flags()
@click.option("--resume", metavar="RUN", help="go on with a stopped run, from its last checkpoint")
@click.option(
    "--stop-after",
    type=click.IntRange(1),
    metavar="STEP",
    help="leave the run after this step, with a checkpoint; the schedule stays that of the whole run",
)
@click.option("--check", "only_check", is_flag=True, help="look at the data without training, and write a page of it")
@click.option("--plan", "only_plan", is_flag=True, help="say what a run takes: steps, memory, time from a few steps")
@click.option(
    "--price-per-hour", type=FloatRange(0), metavar="PRICE", help="of the machine: --plan says what a run costs"
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
        if resume is not None:
            stopped = RunFolder(Path(resume))
            train(resumed_config(stopped, given, preset), stopped, stop_after)
        else:
            config = TrainConfig.resolve(fresh_options(given, preset), preset)
            if only_check:
                sys.exit(0 if check(config) else 1)
            if only_plan:
                plan(config, price_per_hour)
                return
            check_output(config.train.output)
            train(config, stop_after=stop_after)


def check(config: TrainConfig) -> bool:
    """Print what the data set holds and where it is bad, and write a page of its first examples to --output.

    Returns whether no more rows are bad than --skip-bad allows.
    """
    quiet_libraries()
    from im2json.data.doctor import diagnose
    from im2json.model.base import load_processor

    page = Path(config.train.output or f"runs/{Path(config.data.dataset).name}-check.html")
    return diagnose(config.data, lambda: load_processor(config.model.model), page, click.echo)


def plan(config: TrainConfig, price: float | None = None) -> None:
    """Print what a run would take; a few of its steps are taken and thrown away."""
    quiet_libraries()
    from im2json.inference.workbench import set_up, start_accelerator
    from im2json.training.plan import memory_report, size_report, time_report, time_steps

    accelerator, precision = start_accelerator(config)
    bench = set_up(config, accelerator, precision)
    loader = bench.step_loader(whole=False)
    parts = bench.forecast(bench.manner)
    sizes = size_report(bench.model, loader, bench.lengths, config)
    accelerator.print(f"{sizes}\n\n{memory_report(parts)}\n")
    timing = time_steps(bench.forward(), loader, bench.lengths.by_split["train"], config, accelerator)
    if timing.microbatch != loader.microbatch:
        parts = bench.forecast(dataclasses.replace(bench.manner, microbatch=timing.microbatch))
    accelerator.print(time_report(timing, parts, loader.order.total(config.train), price))
    accelerator.end_training()


def train(
    config: TrainConfig, stopped: RunFolder | None = None, stop_after: int | None = None
) -> dict[str, Any] | None:
    """A whole run: the base before, training with evaluations, the best adapter after.

    Returns what result.json holds; None where the run was left after `stop_after`.
    """
    quiet_libraries()
    from accelerate.utils import broadcast_object_list

    from im2json.inference.workbench import set_up, start_accelerator
    from im2json.model.lora import read_adapter_weights
    from im2json.report.run import write_report
    from im2json.scoring.examples import calibrate
    from im2json.training.checkpoint import begin
    from im2json.training.loop import fit
    from im2json.training.result import finish, known_before
    from im2json.training.stopping import watched_peers
    from im2json.training.tracking import Tracker

    accelerator, precision = start_accelerator(config)
    # a run that began with --adapter goes on with its own, wherever that one is by now
    own_adapter = stopped.latest_checkpoint() if stopped and config.model.adapter else None
    own_schema = stopped.schema if stopped else None
    bench = set_up(config, accelerator, precision, adapter=own_adapter, schema=own_schema)
    model = bench.model
    (run,) = broadcast_object_list([stopped or (new_run(config) if accelerator.is_main_process else None)])
    advice = f"what was saved is kept: {resume_advice(run.path)}"
    with resumable(run.path), watched_peers(accelerator, advice), locked(run, accelerator.is_main_process):
        if accelerator.is_main_process:
            fresh, processes = stopped is None, accelerator.num_processes
            if note := claim(run, config, fresh, data=bench.fingerprints(), processes=processes):
                accelerator.print(note)
        accelerator.print(f"run folder: {run.path}   watch it: tensorboard --logdir {run.path.parent}")
        checkpoint = begin(run, model, bench.collator.processor, bench.asked, bench.schema, accelerator)
        tracker = Tracker(run, config, accelerator, checkpoint)
        tracker.describe(bench.lengths)
        evaluation = bench.evaluation(run, tracker)

        before = known_before(run)
        if before is None and config.train.test:
            before = evaluation("test", 0, "before", adapter=False)
        state = fit(
            bench.forward(), bench.step_loader(), bench.lengths.by_split["train"], evaluation.validate,
            config=config, accelerator=accelerator, run=run, tracker=tracker, checkpoint=checkpoint,
            stop_after=stop_after,
        )  # fmt: skip
        if state is None:
            tracker.close()
            accelerator.print(f"left after step {stop_after}: {resume_advice(run.path)}")
            accelerator.end_training()
            return None
        read_adapter_weights(model, run.adapter / WEIGHTS)
        after = evaluation("test", state.kept_step, "after") if config.train.test else None
        if accelerator.is_main_process:
            calibrate(run, state.kept_step)
            if after is not None:
                write_report(run, "test", bench.pictures("test"), before)
        result = finish(run, model, state, before, after, tracker)
    accelerator.print(summary(run, result))
    accelerator.end_training()
    return result


def summary(run: RunFolder, result: dict[str, Any]) -> str:
    """The closing words of a run: before and after, and where to look."""
    from im2json.report.table import before_after_table

    kept = "the last adapter" if result["best_step"] is None else f"best adapter from step {result['best_step']}"
    lines = [f"{result['step']} steps in {result['seconds']:.0f} s, {kept}"]
    if result["test"] is not None:
        lines += [
            "",
            f"text generated for the {result['test']['after']['num']:.0f} examples of the test split:",
            before_after_table(result["test"]["before"], result["test"]["after"]),
        ]
    report = [f"report      {run.report}"] if run.report.exists() else []
    lines += ["", f"run folder  {run.path}", *report, f"evaluate    python evaluate.py {run.path}",
              f"curves      tensorboard --logdir {run.path.parent}"]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
