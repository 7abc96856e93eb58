"""A training run from its options to result.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object

from im2json.cli import resumable, resume_advice
from im2json.files import write_json
from im2json.model.lora import count_parameters, read_adapter_weights
from im2json.options import TrainConfig
from im2json.records import RunResult
from im2json.report.run import write_report
from im2json.report.table import before_after_table, counted
from im2json.runs import WEIGHTS, RunFolder, claim_new, claim_stopped, locked, new_run
from im2json.scoring.examples import calibrate
from im2json.text import command_line
from im2json.training.checkpoint import Checkpoints, begin
from im2json.training.loop import Ending, fit, peak_memory_bytes
from im2json.training.plan import few_steps
from im2json.training.state import TrainState
from im2json.training.stopping import watched_peers
from im2json.training.strategy import choose_strategy, strategy_note
from im2json.training.tracking import Tracker
from im2json.training.update import Update
from im2json.workspace import Workspace, open_workspace, start_accelerator


def train(
    config: TrainConfig, stopped: RunFolder | None = None, stop_after: int | None = None
) -> tuple[Ending, RunFolder]:
    """Run a whole training: the base before, training with evaluations, the best adapter after.

    Args:
        stopped: the run to resume.
        stop_after: the step after which to pause.

    Returns:
        How the run ended, and its folder, which holds a result.json unless it was stopped or paused.

    Raises:
        UserError: naming the option, file or row that is wrong.
    """
    accelerator, precision = start_accelerator(config)
    with watched_peers(accelerator, "no step was taken yet") as watched:
        # A run that began with --adapter resumes from its own checkpoint; the original adapter may be gone.
        own_adapter = stopped.latest_checkpoint() if stopped and config.model.adapter else None
        own_schema = stopped.schema if stopped else None
        workspace = open_workspace(
            config, accelerator, precision, adapter=own_adapter, schema=own_schema, resumed=stopped
        )
        (run,) = broadcast_object_list([stopped or (new_run(config) if accelerator.is_main_process else None)])
        watched.advice = f"what was saved is kept: {resume_advice(run.path)}"
        with resumable(run.path), locked(run, accelerator.is_main_process):
            claim(run, workspace, fresh=stopped is None)
            accelerator.print(f"run folder: {run.path}   watch it: {_curves(run)}")
            checkpoint = begin(
                run, workspace.model, workspace.collator.processor, workspace.usage, workspace.schema, accelerator
            )
            tracker = Tracker(run, config, accelerator, checkpoint)
            tracker.describe(workspace.lengths)
            evaluation = workspace.evaluation(run, tracker)
            before = next((line.values for line in run.log("test", "before")), None)
            if before is None and config.train.test:
                before = evaluation("test", 0, "before", adapter=False)
            tracker.flush()  # so that no thread draws while the loader forks

            def validate(step: int) -> dict[str, float]:
                return evaluation("validation", step, "during", count=config.train.eval_examples)

            ending, state = _fit(workspace, run, tracker, checkpoint, validate, stop_after)
            result = None
            if ending in (Ending.DONE, Ending.PATIENCE):
                read_adapter_weights(workspace.model, run.adapter / WEIGHTS)
                after = evaluation("test", state.kept_step, "after") if config.train.test else None
                result = conclude(run, workspace, tracker, state, before, after)
            tracker.close()
    if ending is Ending.PAUSED:
        accelerator.print(f"stopped after step {stop_after} as asked: {resume_advice(run.path)}")
    if result is not None:
        accelerator.print(summary(run, result))
    accelerator.end_training()
    return ending, run


def claim(run: RunFolder, workspace: Workspace, fresh: bool) -> None:
    """Begin a new run or go on with a stopped one, on the main process."""
    accelerator = workspace.accelerator
    if not accelerator.is_main_process:
        return
    data, processes = workspace.fingerprints(), accelerator.num_processes
    if fresh:
        claim_new(run, workspace.config, workspace.data.record, data, processes)
    elif note := claim_stopped(run, workspace.config, data, processes):
        accelerator.print(note)


def _fit(
    workspace: Workspace,
    run: RunFolder,
    tracker: Tracker,
    checkpoint: Path | None,
    validate: Callable[[int], dict[str, float]],
    stop_after: int | None,
) -> tuple[Ending, TrainState]:
    """Choose how steps are carried out, go on from the checkpoint, and train."""
    options, accelerator, work = workspace.config.train, workspace.accelerator, workspace.workload()
    strategy = choose_strategy(work)
    if note := strategy_note(strategy, work):
        accelerator.print(note)
    forward = workspace.forward(strategy, work)
    features, note = workspace.compute_features()
    if note:
        accelerator.print(note)
    loader = workspace.step_loader(strategy, features)
    update = Update.of(forward, options, accelerator, loader.share.microbatch)
    checkpoints = Checkpoints(run, update, options.keep)
    if checkpoint is not None:
        checkpoints.restore(checkpoint)
    elif workspace.config.model.adapter:
        checkpoints.save()  # so that a resume does not need --adapter any more
    if warning := few_steps(options, loader.order):
        accelerator.print(warning)
    accelerator.print(training_note(workspace, checkpoints.state.step))
    ending = fit(update, loader, validate, options, checkpoints, tracker, stop_after)
    return ending, checkpoints.state


def training_note(workspace: Workspace, done: int) -> str:
    """Return the line that says what training does now, after the steps that are done."""
    options, validation = workspace.config.train, len(workspace.splits["validation"])
    more = "more " if done else ""
    total = workspace.order.total(options)
    note = f"training for {counted(total - done, f'{more}step')} of {counted(options.batch_size, 'example')}"
    if not options.eval_every:
        return f"{note}, without scoring the validation split"
    scored = counted(min(validation, options.eval_examples or validation), "example")
    when = f"every {counted(options.eval_every, 'step')}" if options.eval_every < total else "at the end"
    return f"{note}, scoring {scored} of the validation split {when}"


def conclude(
    run: RunFolder,
    workspace: Workspace,
    tracker: Tracker,
    state: TrainState,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
) -> RunResult:
    """Write calibration, report, the HParams row and at last result.json, whose presence says that the run is done."""
    main_process = workspace.accelerator.is_main_process
    if main_process:
        calibrate(run, state.kept_step)
        if after is not None:
            write_report(run, "test", workspace.pictures("test"), before)
    trainable, total = count_parameters(workspace.model)
    result = RunResult(
        step=state.step,
        best_step=state.best_step,
        validation=state.validation,
        test=None if after is None or before is None else {"before": before, "after": after},
        trainable=trainable,
        total=total,
        examples=state.examples,
        target_tokens=state.target_tokens,
        skipped_updates=state.skipped,
        seconds=round(state.seconds, 3),
        examples_per_second=round(state.examples / state.seconds, 3),
        peak_memory_bytes=max(gather_object([peak_memory_bytes()])),
    )
    tracker.hyperparameters(state.validation, state.kept_step, after or ())
    tracker.flush()
    if main_process:
        write_json(run.result, dataclasses.asdict(result))
    return result


def summary(run: RunFolder, result: RunResult) -> str:
    """Return the closing words of a run: before and after, and where to look."""
    kept = "the last adapter" if result.best_step is None else f"best adapter from step {result.best_step}"
    lines = [f"{counted(result.step, 'step')} in {result.seconds:.0f} s without the evaluations, {kept}"]
    if result.test is not None:
        lines += [
            "",
            f"text generated for the {counted(int(result.test['after']['num']), 'example')} of the test split:",
            before_after_table(result.test["before"], result.test["after"]),
        ]
    report = run.report if run.report.exists() else command_line("im2json", "evaluate", run.path)
    lines += [
        "",
        f"look at the answers    {report}",
        f"look at the curves     {_curves(run)}",
        f"read new pictures      {command_line('im2json', 'extract', run.path)} PICTURES",
    ]
    return "\n".join(lines)


def _curves(run: RunFolder) -> str:
    return command_line("tensorboard", "--logdir", run.path.parent)
