"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from tqdm.auto import tqdm

from im2json.data.collate import IGNORE, Batch, Collator
from im2json.data.loader import StepLoader
from im2json.errors import UserError
from im2json.model.lora import trained
from im2json.model.loss import label_positions, loss_at
from im2json.model.replay import Forward
from im2json.options import TrainConfig, TrainOptions
from im2json.runs import RunFolder
from im2json.scoring import METRICS
from im2json.training.checkpoint import drop_old, load_checkpoint, save_checkpoint, write_adapter
from im2json.training.optimizer import flatten, learning_rate, make_optimizer, set_learning_rate
from im2json.training.state import TrainState
from im2json.training.stopping import StopRequest
from im2json.training.tracking import Tracker

MAX_SKIPPED_RUNNING = 10  # fp16 overflows in a row after which the scale is not the problem


class NonFiniteError(UserError):
    """A loss or gradient is NaN or infinite."""


@dataclass(frozen=True)
class StepOutcome:
    loss: float  # nats per target token, over all processes
    grad_norm: float  # of all LoRA gradients together, before clipping
    stop: bool  # some process was asked to stop
    non_finite: bool  # the loss or a gradient; the optimizer was not touched
    skipped: bool  # fp16 only: a gradient overflowed, the loss scale was halved and the update left out


@dataclass
class Microbatch:
    """How many examples go through the model at a time."""

    most: int  # examples

    def halve(self) -> None:
        self.most = (self.most + 1) // 2


def fit(
    forward: Forward,
    loader: StepLoader,
    target_lengths: Sequence[int],
    evaluate: Callable[[int], dict[str, float]],
    *,
    config: TrainConfig,
    accelerator: Accelerator,
    run: RunFolder,
    tracker: Tracker,
    checkpoint: Path | None = None,
    stop_after: int | None = None,
) -> TrainState | None:
    """Train the adapter and leave the best one in the run folder.

    Args:
        forward: of the model, see model.replay.make_forward.
        target_lengths: target tokens of each training example, EOS included.
        evaluate: metrics of the present adapter on the validation split, given the step; called every
            --eval-every steps and after the last one, on every process; never where that is 0.
        checkpoint: where to go on from.
        stop_after: the step after which to leave the run, with a checkpoint, where it is not over by then; the
            schedule is that of the whole run.

    Returns None where it was left.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
        UserError: the checkpoint cannot be read, the first step shows that something is not learned, or the run has
            passed `stop_after`.
        KeyboardInterrupt: Ctrl-C or SIGTERM asked for it; the step was finished and a checkpoint written.
    """
    options, model = config.train, forward.model
    parameters = [flatten(trained(model))]
    optimizer = accelerator.prepare(make_optimizer(parameters, options))
    state = load_checkpoint(checkpoint, run, model, optimizer, accelerator) if checkpoint else TrainState()
    if checkpoint is None and config.model.adapter and accelerator.is_main_process:
        save_checkpoint(run, model, optimizer, accelerator.scaler, state, options.keep)  # a resume needs that no more
    if checkpoint is not None and accelerator.is_main_process:
        drop_old(run, options.keep)  # where the run was stopped before it came to that
    total = loader.order.total(options)
    microbatch = Microbatch(loader.microbatch)
    if stop_after is not None and stop_after <= state.step:
        raise UserError(f"--stop-after {stop_after}: this run has taken {state.step} steps already")
    if out_of_patience(state, options):  # resumed after its last step
        total = state.step

    with progress_bar(state.step, total, accelerator) as bar, StopRequest() as stop:
        first, clock = True, time.perf_counter()
        for batches in loader.steps(state.step, total):
            indices = loader.order.step(state.step)
            target_tokens = sum(target_lengths[i] for i in indices)
            rate = learning_rate(state.step, total, options)
            set_learning_rate(optimizer, rate)
            seed_dropout(options.seed, state.step, accelerator.process_index)

            if first:
                check_labels(batches, loader.collator)
            outcome = train_step(
                forward, batches, target_tokens, parameters, optimizer, accelerator, options.max_grad_norm,
                microbatch=microbatch, stop=stop, inspect=partial(check_gradients, model) if first else None,
            )  # fmt: skip
            first = False
            if outcome.non_finite:
                ids = loader.split.ids
                raise NonFiniteError(_non_finite_message(outcome, state.step, [ids[i] for i in indices]))
            seconds = time.perf_counter() - clock  # waiting for data included
            advance(state, outcome, len(indices), target_tokens, seconds)
            if outcome.skipped and state.skipped_running >= MAX_SKIPPED_RUNNING:
                raise NonFiniteError(_overflow_message(state.step))
            report(tracker, bar, state, outcome, rate, target_tokens, seconds)

            last = state.step == total
            if options.eval_every and (state.step % options.eval_every == 0 or last):
                forward.pause()
                keep_if_best(state, evaluate(state.step), options, model, accelerator, run)
                last = last or out_of_patience(state, options)
            stopping = outcome.stop or (stop.made and (last or accelerator.num_processes == 1))
            leaving = state.step == stop_after and not last
            if (stopping or leaving or save_due(state.step, last, options)) and accelerator.is_main_process:
                tracker.flush()
                save_checkpoint(run, model, optimizer, accelerator.scaler, state, options.keep)
            if stopping or leaving:
                accelerator.wait_for_everyone()  # a launcher that sees a process end, ends the one that still writes
            if stopping:
                raise KeyboardInterrupt
            if leaving:
                return None
            if last:
                break
            clock = time.perf_counter()
    if state.best_step is None and accelerator.is_main_process:
        write_adapter(model, run)
    accelerator.wait_for_everyone()
    return state


def train_step(
    forward: Forward,
    batches: list[Batch],
    target_tokens: int,
    parameters: list[torch.nn.Parameter],
    optimizer: Any,
    accelerator: Accelerator,
    max_grad_norm: float,
    *,
    microbatch: Microbatch | None = None,
    stop: StopRequest | None = None,
    inspect: Callable[[], None] | None = None,
) -> StepOutcome:
    """One optimizer update from this process's microbatches, cut further where `microbatch` is less by now.

    `inspect` is called when the gradients are there, before they are clipped.

    Raises:
        RuntimeError: a process was lost. The adapter was not updated.
    """
    largest = max((len(batch.ids) for batch in batches), default=1)
    loss = add_gradients(forward, batches, target_tokens, parameters, accelerator, microbatch or Microbatch(largest))
    asked = float(stop is not None and stop.made)
    sums = sum_over_processes(torch.stack([loss, loss.new_full((), asked), loss.new_ones(())]), parameters, accelerator)
    if inspect is not None:
        inspect()
    grad_norm = accelerator.clip_grad_norm_(parameters, max_grad_norm)
    assert grad_norm is not None
    # the step's one wait for the device
    loss_value, asked, present, norm_value = torch.cat([sums, grad_norm.view(1)]).tolist()
    if present != accelerator.num_processes:  # NCCL may give a collective up without a word here
        raise RuntimeError(f"{present:g} of {accelerator.num_processes} processes took part in a step")
    scaled = accelerator.scaler is not None  # then an overflow of the scaled gradients is the scaler's to handle
    non_finite = not math.isfinite(loss_value) or not (math.isfinite(norm_value) or scaled)
    if not non_finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # they are views of one tensor, see optimizer.flatten
    return StepOutcome(loss_value, norm_value, asked > 0, non_finite, scaled and optimizer.step_was_skipped)


def add_gradients(
    forward: Forward,
    batches: list[Batch],
    target_tokens: int,
    parameters: list[torch.nn.Parameter],
    accelerator: Accelerator,
    microbatch: Microbatch,
) -> torch.Tensor:
    """The gradients of this process's share of a step, and its share of the loss.

    Where the GPU's memory runs out, the microbatch is halved for good and the step begun anew, with its dropout. No
    other process needs to know: they meet when the gradients are added up.

    Raises:
        torch.OutOfMemoryError: there is no room for a single example.
    """
    while True:
        try:
            return _backward(forward, batches, target_tokens, accelerator, microbatch)
        except torch.OutOfMemoryError:
            # the largest part that was tried may be less than what is allowed: a short step, or a small --batch-size
            microbatch.most = min(microbatch.most, max(len(batch.ids) for batch in batches))
            if microbatch.most == 1:
                raise
        # not in the `except`: until its end the error's traceback holds on to the activations
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        forward.forget()
        torch.cuda.empty_cache()
        torch.manual_seed(torch.initial_seed())  # as `seed_dropout` left it
        before = microbatch.most
        microbatch.halve()
        tqdm.write(
            f"process {accelerator.process_index}: out of memory with {before} examples at a time: begins the step "
            f"anew and goes on with --microbatch {microbatch.most}"
        )


def _backward(
    forward: Forward, batches: list[Batch], target_tokens: int, accelerator: Accelerator, microbatch: Microbatch
) -> torch.Tensor:
    """Forward and backward, microbatch by microbatch.

    Each one's loss is a sum, divided by the target tokens of the whole step: gradients add up to those of the mean
    over all target tokens, however the step was split.
    """
    loss = torch.zeros((), device=accelerator.device)
    for batch in batches:
        for part in batch.cut(microbatch.most):
            part = part.padded(forward.round_up)
            places, targets = label_positions(part.labels)  # on the CPU, where looking for them waits for nobody
            hidden = forward(part.to(accelerator.device).inputs)  # B x S x D
            summed = loss_at(forward.paligemma, hidden, places.to(accelerator.device), targets.to(accelerator.device))
            share = summed / target_tokens
            accelerator.backward(share)
            loss += share.detach()
    return loss


def sum_over_processes(
    values: torch.Tensor, parameters: list[torch.nn.Parameter], accelerator: Accelerator
) -> torch.Tensor:
    """Add up the gradients and a few values of all processes, in place. values: (n,)

    Nothing else goes over the wire. A process that a short last step left without examples takes part with zeros.
    """
    if accelerator.num_processes > 1:
        for parameter in parameters:
            torch.distributed.all_reduce(parameter.grad)
        torch.distributed.all_reduce(values)
    return values


def check_labels(batches: list[Batch], collator: Collator) -> None:
    """Hold a step's labels to what the loss is meant to be taken on: the whole target, EOS last, and nothing before.

    Raises:
        UserError: naming the first example where they are not.
    """
    start, eos = len(collator.prefix_ids), collator.processor.tokenizer.eos_token_id
    for batch in batches:
        causal = batch.inputs["token_type_ids"] * batch.inputs["attention_mask"]  # B x S: 1 on the suffix
        for id, labels, suffix in zip(batch.ids, batch.labels, causal):
            learned = labels != IGNORE  # S
            if learned[:start].any() or not torch.equal(learned.long(), suffix) or labels[learned][-1] != eos:
                raise UserError(f"example {id}: its labels are not exactly the target's tokens with EOS at their end")


def check_gradients(model: PeftModel) -> None:
    """See that the first step reaches every LoRA layer: what is not zero in a fresh adapter is the gradient of the
    second matrix of a pair, and of DoRA's magnitudes.

    Raises:
        UserError: naming the layers that none reaches, which would be saved as trained.
    """
    telling = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad and ".lora_A." not in name]
    missing = [name for name, gradient in telling if gradient is None or not gradient.any()]
    if missing:
        raise UserError(
            f"no gradient reaches {len(missing)} of {len(telling)} LoRA matrices, {missing[0]} among them: "
            "leave these layers out with --target-modules"
        )


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make the step's dropout a function of (seed, step, process): nothing that happens between two steps, such as an
    evaluation or a resume, can change it."""
    torch.manual_seed(hash((seed, step, rank)) & (2**63 - 1))


def advance(state: TrainState, outcome: StepOutcome, examples: int, target_tokens: int, seconds: float) -> None:
    state.step += 1
    state.examples += examples
    state.target_tokens += target_tokens
    state.seconds += seconds
    state.skipped += outcome.skipped
    state.skipped_running = state.skipped_running + 1 if outcome.skipped else 0


def keep_if_best(
    state: TrainState,
    metrics: dict[str, float],
    options: TrainOptions,
    model: PeftModel,
    accelerator: Accelerator,
    run: RunFolder,
) -> None:
    """Note an evaluation's result, and keep the adapter if it is better than all before; of equals the first stays."""
    value = metrics[options.metric]
    sign = 1 if METRICS[options.metric].higher_is_better else -1
    if state.best is not None and sign * value <= sign * state.best:
        state.without_gain += 1
        return
    state.best, state.best_step, state.without_gain = value, state.step, 0
    state.validation = metrics
    if accelerator.is_main_process:
        write_adapter(model, run)


def out_of_patience(state: TrainState, options: TrainOptions) -> bool:
    return options.patience is not None and state.without_gain >= options.patience


def save_due(step: int, last: bool, options: TrainOptions) -> bool:
    every = options.eval_every if options.save_every is None else options.save_every
    if options.save_every == 0:
        return False
    return last or (every > 0 and step % every == 0)


def report(
    tracker: Tracker,
    bar: tqdm,
    state: TrainState,
    outcome: StepOutcome,
    rate: float,
    tokens: int,
    seconds: float,
) -> None:
    """The step's numbers, to the trackers and the progress bar."""
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


def progress_bar(done: int, total: int, accelerator: Accelerator) -> tqdm:
    return tqdm(
        total=total, initial=done, desc="training", unit="step", disable=not accelerator.is_main_process,
        dynamic_ncols=True, smoothing=0.1,
    )  # fmt: skip


def peak_memory_bytes() -> int:
    """The most memory that this process took: of the GPU where there is one, else of the machine."""
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
