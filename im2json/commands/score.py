"""Predictions that are there already: scored, or compared with those of another run. Loads no torch."""

from __future__ import annotations

from pathlib import Path

import click

from im2json.report.comparison import comparison_report, scorecard_report
from im2json.runs import RunFolder
from im2json.scoring.examples import score_files


def score(predictions: Path, targets: Path | None, split: str, as_json: bool) -> bool:
    """Print the scores of a JSON-lines file of predictions, and an error for each row that cannot be scored.

    Args:
        targets: a file with the targets, if the predictions' file has none.
        split: which split to take if the file is that of a run.

    Returns:
        Whether every row could be scored.

    Raises:
        UserError: if no row can be scored.
    """
    scorecard, left_out = score_files(predictions, targets, split, lambda line: click.echo(f"Error: {line}", err=True))
    click.echo(scorecard_report(scorecard, as_json))
    return not left_out


def compare(run: RunFolder, against: RunFolder, split: str, as_json: bool) -> None:
    """Print how the answers that two runs kept of a split differ, example by example.

    Raises:
        UserError: if a run kept none, or the examples are not the same.
    """
    click.echo(comparison_report(run, against, split, as_json))
