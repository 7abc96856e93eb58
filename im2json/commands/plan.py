"""Print what a run takes: its size, its memory, and its time as measured on a few steps that are thrown away."""

from __future__ import annotations

import dataclasses

from im2json.options import TrainConfig
from im2json.training.plan import memory_report, size_report, time_report, time_steps
from im2json.training.strategy import choose_strategy, strategy_note
from im2json.training.update import Update
from im2json.workspace import open_workspace, start_accelerator


def plan(config: TrainConfig, price: float | None = None) -> None:
    """Run a few real steps, discard them, and print what a whole run would take.

    Args:
        price: of an hour, in any currency.

    Raises:
        UserError: naming the option, file or row that is wrong.
    """
    accelerator, precision = start_accelerator(config)
    workspace = open_workspace(config, accelerator, precision)
    work = workspace.workload()
    strategy = choose_strategy(work)
    if note := strategy_note(strategy, work):
        accelerator.print(note)
    loader, parts = workspace.step_loader(strategy), work.forecast(strategy)
    sizes = size_report(workspace.model, loader, workspace.lengths, config)
    accelerator.print(f"{sizes}\n\n{memory_report(parts)}\n")
    update = Update.of(workspace.forward(strategy, work), config.train, accelerator, loader.share.microbatch)
    timing = time_steps(update, loader, config.train)
    if timing.microbatch != loader.share.microbatch:
        parts = work.forecast(dataclasses.replace(strategy, microbatch=timing.microbatch))
    accelerator.print(time_report(timing, parts, loader.order.total(config.train), price))
    accelerator.end_training()
