"""What train.py --plan says of a run that is not begun: its size, its memory, and from a few steps its time."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from peft import PeftModel

from im2json.data.lengths import TargetLengths
from im2json.data.loader import StepLoader
from im2json.model.lora import count_parameters, trained
from im2json.model.memory import Forecast
from im2json.model.replay import Forward
from im2json.options import TrainConfig
from im2json.report.table import table
from im2json.training.loop import Microbatch, peak_memory_bytes, seed_dropout, train_step
from im2json.training.optimizer import flatten, make_optimizer

TIMED = 3  # steps
ROUNDS = 3
GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """Of a few real steps, the longest example of an epoch in one of them."""

    seconds: float  # a step, the median
    peak: int | None  # bytes on the GPU; None on a CPU
    microbatch: int  # examples per forward and backward pass at the end: less than planned where memory ran out


def size_report(model: PeftModel, loader: StepLoader, lengths: TargetLengths, config: TrainConfig) -> str:
    """Weights, targets, steps and evaluations."""
    trainable, weights = count_parameters(model)
    options, order = config.train, loader.order
    steps = order.total(options)
    examples = sum(len(order.step(step)) for step in range(steps))
    evaluations = math.ceil(steps / options.eval_every) if options.eval_every else 0
    validated = len(lengths.by_split["validation"])
    if options.eval_examples is not None:
        validated = min(options.eval_examples, validated)
    tests = f", and {len(lengths.by_split['test'])} of the test split before and after" if options.test else ""
    return "\n".join([
        f"{'weights':<13}{trainable:,} trained of {weights:,} ({trainable / weights:.2%})",
        f"{'targets':<13}--max-target-tokens would refuse " + refusals(lengths),
        f"{'steps':<13}{steps:,} of {options.batch_size} examples: {examples:,} examples, "
        f"{examples / order.num_examples:.2f} epochs of {order.num_examples:,}",
        f"{'evaluations':<13}{evaluations} of {validated} validation examples{tests}",
        f"{'microbatch':<13}{loader.microbatch} examples per forward and backward pass"
        + (" (auto)" if options.microbatch == "auto" else ""),
    ])  # fmt: skip


def refusals(lengths: TargetLengths) -> str:
    """How many targets limits at powers of two would refuse, up to the first that refuses none."""
    limits = [2**power for power in range(3, 30)]
    enough = next(limit for limit in limits if limit >= lengths.longest)
    shown = [limit for limit in limits if enough // 8 <= limit <= enough]
    return ", ".join(f"{lengths.longer_than(limit)} at {limit}" for limit in shown)


def memory_report(parts: Forecast) -> str:
    """The forecast, part by part, and its peak."""
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


def time_steps(
    forward: Forward, loader: StepLoader, target_lengths: list[int], config: TrainConfig, accelerator: Accelerator
) -> Timing:
    """Take a few steps with the model in memory, three times, as passes are compiled at first and recorded when they
    come again; nothing of them is kept.

    The steps stand together in the run's order, the one with the epoch's longest example first.
    """
    parameters = [flatten(trained(forward.model))]
    optimizer = accelerator.prepare(make_optimizer(parameters, config.train))
    microbatch = Microbatch(loader.microbatch)
    first = longest_step(loader, target_lengths, loader.order.total(config.train))
    seconds = []
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = [*loader.steps(first, first + TIMED)] * ROUNDS  # decoded before the clock runs, as workers do it
    clock = time.perf_counter()
    for place, batches in enumerate(steps):
        step = first + place % TIMED
        target_tokens = sum(target_lengths[i] for i in loader.order.step(step))
        seed_dropout(config.train.seed, step, accelerator.process_index)
        train_step(
            forward, batches, target_tokens, parameters, optimizer, accelerator, config.train.max_grad_norm,
            microbatch=microbatch,
        )  # fmt: skip
        seconds.append(time.perf_counter() - clock)
        clock = time.perf_counter()
    peak = peak_memory_bytes() if accelerator.device.type == "cuda" else None
    return Timing(statistics.median(seconds[-TIMED:]), peak, microbatch.most)


def longest_step(loader: StepLoader, target_lengths: list[int], steps: int) -> int:
    """The first of the steps (of the first epoch, at most) that holds their longest target."""
    within = range(min(steps, loader.order.steps_per_epoch))
    return max(within, key=lambda step: max(target_lengths[i] for i in loader.order.step(step)))


def time_report(timing: Timing, parts: Forecast, steps: int, price: float | None) -> str:
    """What the steps took, and what all of them will; `price` is of an hour, in any currency."""
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


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
