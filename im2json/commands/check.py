"""A data set, looked at before training."""

from __future__ import annotations

from pathlib import Path

import click

from im2json.data.doctor import diagnose
from im2json.data.lengths import TargetMeter
from im2json.errors import UserError
from im2json.families import collator_of
from im2json.model.base import load_positions
from im2json.options import TrainConfig
from im2json.workspace import reading_line


def check(config: TrainConfig) -> bool:
    """Print what the data set holds and where it is bad, and write a page of its first examples to --output.

    Returns:
        Whether a run would take the rows, as far as --skip-bad goes.

    Raises:
        UserError: if the data set cannot be opened at all or cannot be split. If the model is out of reach, this is
            raised after all that can be said without it.
    """
    page = Path(config.train.output or f"runs/{Path(config.data.dataset).name}-check.html")
    click.echo(reading_line(config.data))
    try:
        collator = collator_of(config.model.model, config.data)
        meter = TargetMeter(collator, load_positions(config.model.model), config.data.max_target_tokens)
    except UserError:
        diagnose(config.data, None, page, click.echo)
        raise
    return diagnose(config.data, meter, page, click.echo)
