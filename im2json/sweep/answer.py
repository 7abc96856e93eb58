"""The end of a sweep: the leaderboard on disk and on the terminal, and the one look at the test split."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from im2json.errors import UserError
from im2json.files import atomically, lock, read_json, write_json
from im2json.report.duration import clock_time
from im2json.report.table import before_after_table, table
from im2json.runs import RunFolder
from im2json.sweep.grid import Plan
from im2json.sweep.halving import Dropped
from im2json.sweep.launch import Job
from im2json.sweep.leaderboard import Board, absent, make_board, markdown, rows
from im2json.sweep.page import sweep_page

Score = Callable[[RunFolder, Path], tuple[int, str]]
"""evaluate.py --json on a run, its errors to a log: the exit status, and what it printed."""


def answer(
    plan: Plan, jobs: Sequence[Job], sweep: Path, dropped: Sequence[Dropped], score: Score | None = None
) -> None:
    """Write and print what the finished points say.

    Args:
        score: where it is None, no test split is scored, and only one that was is told.

    Raises:
        UserError: if the winner's test split could not be scored.
    """
    board = make_board(plan, jobs, dropped)
    if board is None:
        click.echo("no point has a result yet")
        return
    winner = board.settings[0].best_run(plan.metric)
    test = known_test(winner, sweep)
    write_board(board, sweep, test)  # before what may take long, or fail
    click.echo(f"\n{text(board)}")
    if test is None and score is not None:
        test = score_test(winner, sweep, score)
        write_board(board, sweep, test)
    if test is not None:
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
        seconds = sum(result.seconds for result in setting.results) / len(setting.results)
        rows.append([setting.name, len(setting.runs), setting.value(board.metric), low, high, clock_time(seconds)])
    lines = [table(rows, ["config", "runs", board.metric, "low", "high", "time"]), ""]
    lines += [axis["sentence"] for axis in board.axes]
    return "\n".join(lines + absent(board))


def known_test(winner: RunFolder, sweep: Path) -> dict[str, Any] | None:
    """What `score_test` has kept; None where that is not of this winner."""
    kept = sweep / "test.json"
    test = read_json(kept) if kept.exists() else None
    return test if isinstance(test, dict) and test.get("point") == winner.path.name else None


def score_test(winner: RunFolder, sweep: Path, score: Score) -> dict[str, Any]:
    """{"point", "before", "after"}: metrics of the base and of the winner, kept in test.json for the next call.

    Raises:
        UserError: if evaluate.py fails, with the end of what it said.
    """
    log = sweep / "test.log"
    with log.open("ab") as file:
        lock(file, wait=True)  # for a sweep beside this one, whose result is then taken
        return known_test(winner, sweep) or _scored(winner, sweep, score, log)


def _scored(winner: RunFolder, sweep: Path, score: Score, log: Path) -> dict[str, Any]:
    status, printed = score(winner, log)
    if status != 0:
        last = log.read_text("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        raise UserError(f"the test split of {winner.path} could not be scored: {last} ({log})")
    test = {"point": winner.path.name, **json.loads(printed)}
    write_json(sweep / "test.json", test)
    return test
