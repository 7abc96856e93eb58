"""What train.py and evaluate.py do once their options are read: the rooms put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from accelerate.utils import broadcast_object_list
from PIL import Image

from im2json.cli import resumable, resume_advice
from im2json.data.doctor import diagnose
from im2json.inference.evaluate import Evaluation
from im2json.inference.workbench import Workbench, set_up, start_accelerator
from im2json.model.base import load_processor
from im2json.model.lora import read_adapter_weights
from im2json.options import TrainConfig
from im2json.report.run import write_report
from im2json.report.table import before_after_table
from im2json.runs import WEIGHTS, RunFolder, adapter_folder, claim, locked, new_run
from im2json.scoring.examples import calibrate, calibration_rows
from im2json.training.checkpoint import begin
from im2json.training.loop import fit
from im2json.training.plan import memory_report, size_report, time_report, time_steps
from im2json.training.result import finish, known_before
from im2json.training.state import TrainState
from im2json.training.stopping import watched_peers
from im2json.training.tracking import Tracker


def train(
    config: TrainConfig, stopped: RunFolder | None = None, stop_after: int | None = None
) -> dict[str, Any] | None:
    """A whole run: the base before, training with evaluations, the best adapter after.

    Returns what result.json holds; None where the run was left after `stop_after`.
    """
    accelerator, precision = start_accelerator(config)
    with watched_peers(accelerator, "no step was taken yet") as watched:
        # a run that began with --adapter goes on with its own, wherever that one is by now
        own_adapter = stopped.latest_checkpoint() if stopped and config.model.adapter else None
        own_schema = stopped.schema if stopped else None
        bench = set_up(config, accelerator, precision, adapter=own_adapter, schema=own_schema)
        (run,) = broadcast_object_list([stopped or (new_run(config) if accelerator.is_main_process else None)])
        watched.advice = f"what was saved is kept: {resume_advice(run.path)}"
        with resumable(run.path), locked(run, accelerator.is_main_process):
            if accelerator.is_main_process:
                fresh, processes = stopped is None, accelerator.num_processes
                if note := claim(run, config, fresh, data=bench.fingerprints(), processes=processes):
                    accelerator.print(note)
            accelerator.print(f"run folder: {run.path}   watch it: tensorboard --logdir {run.path.parent}")
            checkpoint = begin(run, bench.model, bench.collator.processor, bench.asked, bench.schema, accelerator)
            tracker = Tracker(run, config, accelerator, checkpoint)
            tracker.describe(bench.lengths)
            evaluation = bench.evaluation(run, tracker)

            before = known_before(run)
            if before is None and config.train.test:
                before = evaluation("test", 0, "before", adapter=False)
            tracker.flush()  # so that no thread draws while the loader forks
            state = fit(
                bench.forward(), bench.step_loader(), bench.lengths.by_split["train"], evaluation.validate,
                config=config, accelerator=accelerator, run=run, tracker=tracker, checkpoint=checkpoint,
                stop_after=stop_after,
            )  # fmt: skip
            if state is None:
                tracker.close()
                accelerator.print(f"left after step {stop_after}: {resume_advice(run.path)}")
                result = None
            else:
                result = conclude(run, bench, evaluation, state, before, tracker)
    if result is not None:
        accelerator.print(summary(run, result))
    accelerator.end_training()
    return result


def conclude(
    run: RunFolder,
    bench: Workbench,
    evaluation: Evaluation,
    state: TrainState,
    before: dict[str, float] | None,
    tracker: Tracker,
) -> dict[str, Any]:
    """After the last step: the adapter that is kept, tested; what result.json holds."""
    read_adapter_weights(bench.model, run.adapter / WEIGHTS)
    after = evaluation("test", state.kept_step, "after") if bench.config.train.test else None
    if bench.accelerator.is_main_process:
        calibrate(run, state.kept_step)
        if after is not None:
            write_report(run, "test", bench.pictures("test"), before)
    return finish(run, bench.model, state, before, after, tracker)


def summary(run: RunFolder, result: dict[str, Any]) -> str:
    """The closing words of a run: before and after, and where to look."""
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


def evaluate(
    run: RunFolder, config: TrainConfig, split: str, schema: Path | None
) -> dict[str, dict[str, float]] | None:
    """The metrics before and after; None on all processes but the main one. `config` is the run's with some options
    replaced, `schema` the file in place of --schema."""
    adapter = adapter_folder(run.path)
    accelerator, precision = start_accelerator(config)
    with watched_peers(accelerator, "evaluate once more"):
        bench = set_up(config, accelerator, precision, adapter=adapter, schema=schema)
        with locked(run, accelerator.is_main_process):
            evaluation = bench.evaluation(run, FirstPicture(run.path / f"{split}.png"))
            step = run.kept_step
            metrics = {
                "before": evaluation(split, 0, "before", adapter=False),
                "after": evaluation(split, step, "after"),
            }
            alike = [("constrained" in row) == (bench.grammar is not None) for row in calibration_rows(run, step)]
            (known,) = broadcast_object_list([run.done and bool(alike) and all(alike)])
            if not known:  # the run never validated this adapter in this way, or kept no confidence
                evaluation("validation", step, "after")
            if accelerator.is_main_process:
                calibrate(run, step)
                write_report(run, split, bench.pictures(split), metrics["before"])
    accelerator.end_training()
    return metrics if accelerator.is_main_process else None


class FirstPicture:
    """An evaluation's sink that keeps the first example with its text before and after."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def scalars(self, split: str, step: int, values: dict[str, float], **more: Any) -> None:
        """They are in the table."""

    def picture(self, tag: str, draw: Callable[[], Image.Image], step: int) -> None:
        if tag == f"{self.path.stem}_after/0":
            draw().save(self.path)


def plan(config: TrainConfig, price: float | None = None) -> None:
    """Print what a run would take; a few of its steps are taken and thrown away."""
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


def check(config: TrainConfig) -> bool:
    """Print what the data set holds and where it is bad, and write a page of its first examples to --output.

    Returns whether no more rows are bad than --skip-bad allows.
    """
    page = Path(config.train.output or f"runs/{Path(config.data.dataset).name}-check.html")
    return diagnose(config.data, lambda: load_processor(config.model.model), page, click.echo)
