"""The end of a run: result.json, written last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object

from im2json.files import write_json
from im2json.model.lora import count_parameters
from im2json.runs import RunFolder
from im2json.training.loop import peak_memory_bytes
from im2json.training.state import TrainState
from im2json.training.tracking import Tracker


def known_before(run: RunFolder) -> Mapping[str, float] | None:
    """Return the base's test metrics, if this run had measured them when it was stopped."""
    return next((line.values for line in run.log("test", "before")), None)


def finish(
    run: RunFolder,
    model: Any,
    state: TrainState,
    before: dict[str, float] | None,
    after: dict[str, float] | None,
    tracker: Tracker,
) -> dict[str, Any]:
    """Write the HParams row and then result.json, whose presence says that the run is done."""
    trainable, total = count_parameters(model)
    result = {
        "step": state.step,
        "best_step": state.best_step,
        "validation": state.validation,
        "test": None if after is None else {"before": before, "after": after},
        "trainable": trainable,
        "total": total,
        "examples": state.examples,
        "target_tokens": state.target_tokens,
        "skipped_updates": state.skipped,
        "seconds": round(state.seconds, 3),
        "examples_per_second": round(state.examples / state.seconds, 3) if state.seconds else None,
        "peak_memory_bytes": max(gather_object([peak_memory_bytes()])),  # of the process that took the most
    }
    tracker.hyperparameters(state.validation, state.kept_step, after or ())
    tracker.close()
    if tracker.accelerator.is_main_process:
        write_json(run.result, result)
    return result
