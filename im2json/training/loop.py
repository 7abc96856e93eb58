"""The training loop: take a step, evaluate, keep the best adapter, save, and know when to end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from enum import Enum
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from im2json.data.loader import StepLoader
from im2json.errors import UserError
from im2json.options import TrainOptions
from im2json.progress import Bar, progress_bar
from im2json.scoring import METRICS
from im2json.training.checkpoint import Checkpoints
from im2json.training.optimizer import learning_rate, set_learning_rate
from im2json.training.state import TrainState
from im2json.training.stopping import StopRequest
from im2json.training.tracking import Tracker
from im2json.training.update import StepOutcome, Update, check_gradients, check_labels, seed_dropout

MAX_SKIPPED_RUNNING = 10  # fp16 overflows in a row after which the scale is not the problem


class Ending(Enum):
    """Why the loop ended."""

    DONE = "all steps were taken"
    PATIENCE = "--patience evaluations went by without a gain"
    ASKED = "Ctrl-C or SIGTERM asked for it"
    PAUSED = "--stop-after was reached before the last step"


def fit(
    update: Update,
    loader: StepLoader,
    evaluate: Callable[[int], dict[str, float]],
    options: TrainOptions,
    checkpoints: Checkpoints,
    tracker: Tracker,
    stop_after: int | None = None,
) -> Ending:
    """Train from where `checkpoints.state` stands, and leave the best adapter and the last checkpoints in the run
    folder.

    Args:
        evaluate: returns the metrics of the present adapter on the validation split, given the step. It is called on
            every process, every --eval-every steps and after the last one; never if that is 0.
        stop_after: the step after which to pause. The schedule stays that of the whole run.

    Raises:
        UserError: a loss or gradient is not finite, the first step shows that something is not learned, or the run has
            passed `stop_after`.
    """
    state, order, accelerator = checkpoints.state, loader.order, update.accelerator
    total = state.step if out_of_patience(state, options) else order.total(options)
    if stop_after is not None and stop_after <= state.step:
        raise UserError(f"--stop-after {stop_after}: this run has taken {state.step} steps already")

    ending = ending_of(state, total, options)
    if ending is Ending.DONE and evaluation_due(state.step, total, options) and not evaluated(checkpoints):
        keep_if_best(checkpoints, evaluate(state.step), options)  # resumed to end where it stands
    shown = accelerator.is_main_process
    with progress_bar(total, "training", "step", done=state.step, shown=shown) as bar, StopRequest() as stop:
        first, clock = True, time.perf_counter()
        for batches in loader.steps(state.step, total):
            examples, target_tokens = order.step(state.step), order.target_tokens(state.step)
            rate = learning_rate(state.step, total, options)
            set_learning_rate(update.optimizer, rate)
            seed_dropout(options.seed, state.step, accelerator.process_index)

            if first:
                check_labels(batches, loader.collator)
            inspect = partial(check_gradients, update.forward.model) if first else None
            outcome, first = update(batches, target_tokens, stop, inspect), False
            if outcome.non_finite:
                raise UserError(_non_finite_message(outcome, state.step, [loader.split.ids[i] for i in examples]))
            seconds = time.perf_counter() - clock  # waiting for data included
            advance(state, outcome, len(examples), target_tokens, seconds)
            if state.skipped_running >= MAX_SKIPPED_RUNNING:
                raise UserError(_overflow_message(state.step))
            report(tracker, bar, state, outcome, rate, target_tokens, seconds)

            if evaluation_due(state.step, total, options):
                update.forward.pause()
                keep_if_best(checkpoints, evaluate(state.step), options)
            ending = ending_of(state, total, options)
            if asked_to_stop(accelerator, outcome.stop or stop.made, outcome.stop, ending):
                ending = Ending.ASKED
            elif ending is None and state.step == stop_after:
                ending = Ending.PAUSED
            if save_due(state.step, ending, options):
                tracker.flush()
                checkpoints.save()
            if ending is not None:
                break
            clock = time.perf_counter()
    assert ending is not None
    if ending in (Ending.DONE, Ending.PATIENCE) and state.best_step is None:
        checkpoints.keep_adapter()
    # When one process exits, the launcher kills the others, which may still be writing.
    accelerator.wait_for_everyone()
    return ending


def ending_of(state: TrainState, total: int, options: TrainOptions) -> Ending | None:
    """Return why a run ends by itself after the present step, or None if it goes on."""
    if out_of_patience(state, options):
        return Ending.PATIENCE
    return Ending.DONE if state.step == total else None


def asked_to_stop(accelerator: Accelerator, made: bool, passed_on: bool, ending: Ending | None) -> bool:
    """Return whether any process was asked to stop, the same on all of them.

    Args:
        made: whether this process knows of a request.
        passed_on: whether the step has passed a request on to all processes. A request that came after the step waits
            for the next one; after the last step, the processes ask each other.
    """
    if ending is not None or accelerator.num_processes == 1:
        return any(gather_object([made]))
    return passed_on


def advance(state: TrainState, outcome: StepOutcome, examples: int, target_tokens: int, seconds: float) -> None:
    state.step += 1
    state.examples += examples
    state.target_tokens += target_tokens
    state.seconds += seconds
    state.skipped += outcome.skipped
    state.skipped_running = state.skipped_running + 1 if outcome.skipped else 0


def evaluation_due(step: int, total: int, options: TrainOptions) -> bool:
    return options.eval_every > 0 and (step % options.eval_every == 0 or step == total)


def evaluated(checkpoints: Checkpoints) -> bool:
    """Return whether the adapter has been evaluated as it is now, the same on all processes."""
    return any(gather_object([any(line.step == checkpoints.state.step for line in checkpoints.run.log("validation"))]))


def keep_if_best(checkpoints: Checkpoints, metrics: dict[str, float], options: TrainOptions) -> None:
    """Note an evaluation's result, and keep the adapter if it is better than all before. Of equals the first stays."""
    state, value = checkpoints.state, metrics[options.metric]
    gain = METRICS[options.metric].gain
    if state.best is not None and gain(value) <= gain(state.best):
        state.without_gain += 1
        return
    state.best, state.best_step, state.without_gain = value, state.step, 0
    state.validation = metrics
    checkpoints.keep_adapter()


def out_of_patience(state: TrainState, options: TrainOptions) -> bool:
    return options.patience is not None and state.without_gain >= options.patience


def save_due(step: int, ending: Ending | None, options: TrainOptions) -> bool:
    """Return whether a checkpoint is to be written. One that stops or pauses the run is, even with --save-every 0."""
    if ending in (Ending.ASKED, Ending.PAUSED):
        return True
    every = options.eval_every if options.save_every is None else options.save_every
    return options.save_every != 0 and (ending is not None or (every > 0 and step % every == 0))


def report(
    tracker: Tracker,
    bar: Bar,
    state: TrainState,
    outcome: StepOutcome,
    rate: float,
    tokens: int,
    seconds: float,
) -> None:
    """Send the step's numbers to the trackers and the progress bar."""
    values = {
        "loss": outcome.loss,
        "lr": rate,
        "grad_norm": outcome.grad_norm,
        "target_tokens_per_second": tokens / seconds,
        "memory_gib": peak_memory_bytes() / 2**30,
    }
    if state.skipped:
        values["skipped_updates"] = state.skipped
    if outcome.skipped:
        del values["grad_norm"]  # infinite
    tracker.scalars("train", state.step, values)
    shown = {"loss": f"{outcome.loss:.4f}", "tok/s": f"{values['target_tokens_per_second']:.0f}"}
    if state.skipped:
        shown["skipped"] = str(state.skipped)
    bar.set_postfix(shown, refresh=False)
    bar.update()


def peak_memory_bytes() -> int:
    """Return the most memory that this process took: of the GPU if there is one, or else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _non_finite_message(outcome: StepOutcome, step: int, ids: list[str]) -> str:
    what = f"the gradient norm is {outcome.grad_norm} at a loss of {outcome.loss:.4g}"
    if not math.isfinite(outcome.loss):
        what = f"the loss is {outcome.loss}"
    return (
        f"step {step + 1}: {what}, with the examples {', '.join(ids)}. The adapter was not updated. "
        "Try a lower --lr, a longer --warmup, --precision fp32 or bf16, or look at these examples"
    )


def _overflow_message(step: int) -> str:
    return (
        f"step {step}: {MAX_SKIPPED_RUNNING} updates in a row overflowed in fp16, though each halved the loss scale. "
        "Use --precision bf16 or fp32, or a lower --lr"
    )
