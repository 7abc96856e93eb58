"""A data set, looked at before training."""

from __future__ import annotations

from pathlib import Path

import click

from im2json.data.doctor import diagnose
from im2json.model.base import load_processor
from im2json.options import TrainConfig


def check(config: TrainConfig) -> bool:
    """Print what the data set holds and where it is bad, and write a page of its first examples to --output.

    Returns:
        Whether a run would take the rows, as far as --skip-bad and --max-target-tokens go.

    Raises:
        UserError: if the data set or the processor cannot be opened at all.
    """
    page = Path(config.train.output or f"runs/{Path(config.data.dataset).name}-check.html")
    return diagnose(config.data, lambda: load_processor(config.model.model), page, click.echo)
