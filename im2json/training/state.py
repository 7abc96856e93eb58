"""What a run knows about itself between two steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass
class TrainState:
    """Where training stands. Everything that the next step depends on, besides weights and optimizer, is here;
    order, dropout and learning rate are functions of the seed and `step`."""

    step: int = 0  # optimizer updates done, those that fp16 skipped included
    examples: int = 0  # examples seen
    target_tokens: int = 0  # target tokens seen, EOS included
    seconds: float = 0.0  # spent in steps, evaluations and checkpoints left out
    skipped: int = 0  # updates that fp16 skipped because a gradient overflowed
    skipped_running: int = 0  # of those, the latest in a row
    best: float | None = None  # value of --metric at the best evaluation
    best_step: int | None = None  # and its step
    without_gain: int = 0  # evaluations since then
    validation: dict[str, float] = dataclasses.field(default_factory=dict)  # metrics of the best evaluation

    @property
    def kept_step(self) -> int:
        """The step whose adapter is kept: the best evaluated, or the last."""
        return self.best_step or self.step
