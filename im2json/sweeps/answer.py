"""End a sweep: write and print the leaderboard, and score the test split once, for the winner."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from im2json.errors import UserError
from im2json.files import atomically, lock, read_json, write_json
from im2json.report.duration import clock_time
from im2json.report.table import before_after_table, table
from im2json.runs import RunFolder
from im2json.sweeps.grid import Plan
from im2json.sweeps.halving import Dropped
from im2json.sweeps.jobs import PointJob
from im2json.sweeps.leaderboard import Board, WinnerScores, absent, make_board, markdown, rows
from im2json.sweeps.page import sweep_page
from im2json.sweeps.processes import Output
from im2json.text import command_line, escape_surrogates

Score = Callable[[RunFolder, Path], Output]
"""Runs `im2json evaluate --json` on a run, with its errors going to a log file."""


def answer(
    plan: Plan, jobs: Sequence[PointJob], sweep: Path, dropped: Sequence[Dropped], score: Score | None = None
) -> None:
    """Write and print the leaderboard of the finished points.

    Args:
        score: scores the winner's test split unless that was done before; None leaves it unscored.

    Raises:
        UserError: if the winner's test split could not be scored.
    """
    board = make_board(plan, jobs, dropped)
    if board is None:
        click.echo("no point has a result yet")
        return
    winner = board.settings[0].best_run(plan.metric)
    test = known_test(winner, sweep)
    write_board(board, sweep, test)  # before scoring, which may take long or fail
    click.echo(f"\n{text(board)}")
    if test is None and score is not None:
        test = score_test(winner, sweep, score)
        write_board(board, sweep, test)
    if test is not None:
        click.echo(f"\ntest split, the base before and {board.settings[0].name} ({test.point}) after:")
        click.echo(before_after_table(test.before, test.after))
    paths = f"leaderboard  {sweep / 'leaderboard.md'}\nreport       {sweep / 'report.html'}"
    click.echo(f"\n{paths}\ncurves       {command_line('tensorboard', '--logdir', sweep / 'points')}")


def write_board(board: Board, sweep: Path, test: WinnerScores | None) -> None:
    """Write leaderboard.csv, leaderboard.md, report.html and summary.json, each atomically."""
    settings = rows(board)
    names = list(dict.fromkeys(name for row in settings for name in row))
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, names)
    writer.writeheader()
    writer.writerows(settings)
    texts = {
        "leaderboard.csv": lines.getvalue(),
        "leaderboard.md": markdown(board),
        "report.html": sweep_page(board, sweep.resolve().name, test),
    }
    for name, written in texts.items():
        with atomically(sweep / name) as aside:
            aside.write_text(escape_surrogates(written), "utf-8", newline="")
    write_json(sweep / "summary.json", {
        "metric": board.metric,
        "settings": settings,
        "axes": list(map(asdict, board.axes)),
        "missing": board.missing,
        "dropped": list(map(asdict, board.dropped)),
        "test": test and test.to_json(),
    })  # fmt: skip


def text(board: Board) -> str:
    """Return the leaderboard for the terminal."""
    lines = []
    for setting in board.settings:
        low, high = setting.evaluator.intervals()[board.metric] or (None, None)
        seconds = sum(result.seconds for result in setting.results) / len(setting.results)
        lines.append([setting.name, len(setting.runs), setting.value(board.metric), low, high, clock_time(seconds)])
    headers = ["config", "runs", board.metric, "low", "high", "time"]
    return "\n".join([table(lines, headers), "", *(axis.sentence for axis in board.axes), *absent(board)])


def known_test(winner: RunFolder, sweep: Path) -> WinnerScores | None:
    """Return what `score_test` stored, or None if it did not score this winner."""
    path = sweep / "test.json"
    stored = read_json(path) if path.exists() else None
    if not isinstance(stored, dict) or not {"point", "before", "after"} <= stored.keys():
        return None
    test = WinnerScores.from_json(stored)
    return test if test.point == winner.path.name else None


def score_test(winner: RunFolder, sweep: Path, score: Score) -> WinnerScores:
    """Score the base and the winner on the test split, and store the metrics in test.json for the next call.

    Raises:
        UserError: if the evaluation fails, with its last line.
    """
    log = sweep / "test.log"
    with log.open("ab") as file:
        lock(file, wait=True)  # another sweep may be scoring the same test split; take its result
        return known_test(winner, sweep) or _score_now(winner, sweep, score, log)


def _score_now(winner: RunFolder, sweep: Path, score: Score, log: Path) -> WinnerScores:
    output = score(winner, log)
    if output.status != 0:
        last = log.read_text("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        raise UserError(f"the test split of {winner.path} could not be scored: {last} ({log})")
    test = WinnerScores.from_json({"point": winner.path.name, **json.loads(output.text)})
    write_json(sweep / "test.json", test.to_json())
    return test
