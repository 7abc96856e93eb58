"""The end of a sweep: the leaderboard on disk and on the terminal, and the one look at the test split."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from im2json.report.table import before_after_table, table
from im2json.runs import RunFolder, atomically, write_json
from im2json.sweep.grid import Plan
from im2json.sweep.halving import Dropped
from im2json.sweep.launch import Job
from im2json.sweep.leaderboard import Board, absent, make_board, markdown, rows
from im2json.sweep.page import sweep_page
from im2json.sweep.progress import duration

Score = Callable[[RunFolder, Path], tuple[int, str]]
"""evaluate.py --json on a run, its errors to a log: the exit status, and what it printed."""


def answer(
    plan: Plan, jobs: Sequence[Job], sweep: Path, dropped: Sequence[Dropped], score: Score | None = None
) -> None:
    """Write and print what the finished points say.

    Args:
        score: leaves the test split alone where it is None.

    Raises:
        ValueError: if the winner's test split could not be scored.
    """
    board = make_board(plan, jobs, dropped)
    if board is None:
        click.echo("no point has a result yet")
        return
    write_board(board, sweep, None)  # before what may take long, or fail
    click.echo(f"\n{text(board)}")
    if score is not None:
        test = score_test(board.settings[0].best_run(plan.metric), sweep, score)
        write_board(board, sweep, test)
        click.echo(f"\ntest split, the base before and {board.settings[0].name} ({test['point']}) after:")
        click.echo(before_after_table(test["before"], test["after"]))
    paths = f"leaderboard  {sweep / 'leaderboard.md'}\nreport       {sweep / 'report.html'}"
    click.echo(f"\n{paths}\ncurves       tensorboard --logdir {sweep / 'points'}")


def write_board(board: Board, sweep: Path, test: dict[str, Any] | None) -> None:
    """leaderboard.csv, leaderboard.md, report.html and summary.json, each whole or not at all."""
    table = rows(board)
    names = list(dict.fromkeys(name for row in table for name in row))
    with atomically(sweep / "leaderboard.csv") as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(table)
    texts = {"leaderboard.md": markdown(board), "report.html": sweep_page(board, sweep.resolve().name, test)}
    for name, written in texts.items():
        with atomically(sweep / name) as aside:
            aside.write_text(written, "utf-8")
    told = {"axes": board.axes, "missing": board.missing, "dropped": list(map(asdict, board.dropped)), "test": test}
    write_json(sweep / "summary.json", {"metric": board.metric, "settings": table, **told})


def text(board: Board) -> str:
    """The leaderboard for the terminal."""
    rows = []
    for setting in board.settings:
        low, high = setting.evaluator.intervals()[board.metric]
        seconds = sum(result["seconds"] for result in setting.results) / len(setting.results)
        rows.append([setting.name, len(setting.runs), setting.value(board.metric), low, high, duration(seconds)])
    lines = [table(rows, ["config", "runs", board.metric, "low", "high", "time"]), ""]
    lines += [axis["sentence"] for axis in board.axes]
    return "\n".join(lines + absent(board))


def score_test(winner: RunFolder, sweep: Path, score: Score) -> dict[str, Any]:
    """{"point", "before", "after"}: metrics of the base and of the winner, kept in test.json for the next call.

    Raises:
        ValueError: if evaluate.py fails, with the end of what it said.
    """
    kept = sweep / "test.json"
    if kept.exists():
        test = json.loads(kept.read_text("utf-8"))
        if test["point"] == winner.path.name:
            return test
    log = sweep / "test.log"
    status, printed = score(winner, log)
    if status != 0:
        last = log.read_text("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        raise ValueError(f"the test split of {winner.path} could not be scored: {last} ({log})")
    test = {"point": winner.path.name, **json.loads(printed)}
    write_json(kept, test)
    return test
