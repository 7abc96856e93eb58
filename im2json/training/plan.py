"""The report of im2json plan on a run that is not begun: its size, its memory, and from a few steps its time."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
from peft import PeftModel

from im2json.data.lengths import TargetLengths
from im2json.data.loader import StepLoader
from im2json.data.order import Order
from im2json.model.lora import count_parameters
from im2json.model.memory import Forecast
from im2json.options import TrainConfig, TrainOptions
from im2json.report.duration import duration
from im2json.report.table import counted, table
from im2json.training.loop import peak_memory_bytes
from im2json.training.update import Update, seed_dropout

TIMED = 3  # steps
ROUNDS = 3
FEW_STEPS = 50
GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """The time of a few real steps, with the longest example of an epoch in one of them."""

    seconds: float  # a step, the median
    peak: int | None  # bytes on the GPU; None on a CPU
    microbatch: int  # examples per forward and backward pass at the end: less than planned where memory ran out


def size_report(model: PeftModel, loader: StepLoader, lengths: TargetLengths, config: TrainConfig) -> str:
    """Return lines on weights, targets, steps and evaluations."""
    trainable, weights = count_parameters(model)
    options, order = config.train, loader.order
    steps = order.total(options)
    examples = sum(len(order.step(step)) for step in range(steps))
    evaluations = math.ceil(steps / options.eval_every) if options.eval_every else 0
    validated = len(lengths.by_split["validation"])
    if options.eval_examples is not None:
        validated = min(options.eval_examples, validated)
    tests = f", and {len(lengths.by_split['test'])} of the test split before and after" if options.test else ""
    warning = few_steps(options, order)
    return "\n".join([
        f"{'weights':<13}{trainable:,} trained of {weights:,} ({trainable / weights:.2%})",
        f"{'targets':<13}--max-target-tokens would refuse " + refusals(lengths),
        f"{'steps':<13}{steps:,} of {options.batch_size} examples: {examples:,} examples, "
        f"{examples / order.num_examples:.2f} epochs of {order.num_examples:,}",
        f"{'evaluations':<13}{evaluations} of {validated} validation examples{tests}",
        f"{'microbatch':<13}{loader.share.microbatch} examples per forward and backward pass"
        + (" (auto)" if options.microbatch == "auto" else ""),
        *([warning] if warning else []),
    ])  # fmt: skip


def few_steps(options: TrainOptions, order: Order) -> str:
    """Return a warning if the epochs make too few steps to learn from; nothing if --steps was chosen."""
    total = order.total(options)
    if options.steps is not None or total >= FEW_STEPS:
        return ""
    return (
        f"{counted(total, 'step')} may be too few to learn the form of the answers: "
        f"with {counted(order.num_examples, 'example')}, try --steps {3 * FEW_STEPS}"
    )


def refusals(lengths: TargetLengths) -> str:
    """Return how many targets each limit at a power of two would refuse, up to the first that refuses none."""
    limits = [2**power for power in range(3, 30)]
    enough = next(limit for limit in limits if limit >= lengths.longest)
    shown = [limit for limit in limits if enough // 8 <= limit <= enough]
    return ", ".join(f"{lengths.longer_than(limit)} at {limit}" for limit in shown)


def memory_report(parts: Forecast) -> str:
    """Return a table of the forecast, part by part, and its peak."""
    rows: list[tuple[str, float]] = [
        ("frozen weights", parts.weights),
        ("embedding, tied to the output layer", parts.embedding),
        ("LoRA: weights, gradients, moments", parts.lora),
        ("step: activations kept for the backward pass", parts.kept),
        ("step: a layer's backward pass, or", parts.passing),
        ("      logits of a chunk, the larger counts", parts.logits),
        ("evaluation: merged copy, key/value cache", parts.evaluation),
        ("peak of a step", parts.resident + parts.step),
        ("peak of the run", parts.total),
    ]
    return table([[name, value / GIB] for name, value in rows], ["forecast of memory on a GPU", "GiB"])


def time_steps(update: Update, loader: StepLoader, options: TrainOptions) -> Timing:
    """Take a few steps with the model in memory, three times, as passes are compiled at first and recorded when they
    come again; nothing of them is kept.

    The steps follow each other in the run's order, the one with the epoch's longest example first.
    """
    accelerator, order = update.accelerator, loader.order
    first = longest_step(order, order.total(options))
    seconds = []
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = [*loader.steps(first, first + TIMED)] * ROUNDS  # decoded before the clock runs, as workers do it
    clock = time.perf_counter()
    for i, batches in enumerate(steps):
        step = first + i % TIMED
        seed_dropout(options.seed, step, accelerator.process_index)
        update(batches, order.target_tokens(step))
        seconds.append(time.perf_counter() - clock)
        clock = time.perf_counter()
    peak = peak_memory_bytes() if accelerator.device.type == "cuda" else None
    return Timing(statistics.median(seconds[-TIMED:]), peak, update.microbatch)


def longest_step(order: Order, steps: int) -> int:
    """Return the first of the steps (of the first epoch, at most) that holds their longest target."""
    lengths = order.lengths
    assert lengths is not None
    within = range(min(steps, order.steps_per_epoch))
    return max(within, key=lambda step: max(lengths[i] for i in order.step(step)))


def time_report(timing: Timing, parts: Forecast, steps: int, price: float | None) -> str:
    """Return lines on what the steps took and what all of them will take. `price` is of an hour, in any currency."""
    lines = []
    if timing.peak is not None:
        expected = parts.resident + parts.step
        lines.append(
            f"{'measured':<13}{timing.peak / GIB:.2f} GiB at most in {ROUNDS * TIMED} steps; "
            f"{expected / GIB:.2f} were forecast ({expected / timing.peak - 1:+.0%})"
        )
    whole, before = steps * timing.seconds, (ROUNDS - 1) * TIMED
    lines.append(
        f"{'time':<13}{timing.seconds:.2f} s a step (median of {TIMED} after {before}): {duration(whole)} for "
        f"{steps:,} steps, evaluations left out"
    )
    if price is not None:
        lines.append(f"{'cost':<13}{whole / 3600 * price:.2f} at {price:g} an hour, evaluations left out")
    return "\n".join(lines)
