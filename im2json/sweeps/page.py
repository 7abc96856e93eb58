"""The HTML page of a sweep: the leaderboard, a plot for each axis, the training curves, and the test split."""

from __future__ import annotations

import html

from im2json.catalogue import labelled
from im2json.report.page import html_page, html_table
from im2json.report.plot import Curve, Estimate, curve_plot, estimate_plot, legend, thinned
from im2json.report.table import BEFORE_AFTER, before_after_rows, cell_text
from im2json.scoring import METRICS
from im2json.sweeps.grid import Values, shown
from im2json.sweeps.leaderboard import AxisVerdict, Board, Cell, WinnerScores, absent, cells, note, rows, settings_along

_STYLE = """
h2, h3 { margin: 0 0 .5em; font-size: 1.15em }
p { margin: .5em 0 }
.muted, td small { color: var(--muted) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9em; font-variant-numeric: tabular-nums }
th, td { text-align: right; vertical-align: top; padding: .35em .45em; border-bottom: 1px solid var(--border) }
th { vertical-align: bottom; font-weight: 600 }
th:first-child, td:first-child { text-align: left; min-width: 9em; overflow-wrap: anywhere }
td small { display: block; white-space: nowrap }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 580px), 1fr)); gap: 1.5em }
.plots section { margin: 0; min-width: 0 }
.plots > .wide { min-width: 0 }
svg { max-width: none }
polyline:hover { stroke-width: 4 }
.legend { list-style: none; padding: 0; margin: 1em 0 0; display: flex; flex-wrap: wrap; gap: .3em 1.8em }
"""


def sweep_page(board: Board, name: str, test: WinnerScores | None) -> str:
    """Return one HTML file that needs no other. `test` is None if the test split was not scored."""
    table = rows(board)
    plots = "\n".join(_axis(board, axis, table) for axis in board.axes)
    parts = [
        _summary(board),
        f"<section><h2>Leaderboard</h2>\n{_leaderboard(board, table)}</section>",
        f'<div class="plots">\n{plots}\n</div>' if plots else "",
        _training(board),
        "" if test is None else _test(board, test),
    ]
    return html_page(f"Sweep {name}", _STYLE, "\n".join(filter(None, parts)))


def _summary(board: Board) -> str:
    done = sum(len(setting.runs) for setting in board.settings)
    settings = f", of {len(board.settings)} settings" if done > len(board.settings) else ""
    ranking = f"Ranked by <b>{labelled(board.metric)}</b>: {html.escape(METRICS[board.metric].help)}."
    counted = f"{done} of {board.points} points have a result{settings}."
    return f"<p>{ranking}</p>\n<p>{html.escape(' '.join([counted, *absent(board)]))}</p>"


def _leaderboard(board: Board, table: list[Values]) -> str:
    headers, lines = cells(board.metric, table)
    drawn = html_table(headers, ([_cell(cell) for cell in line] for line in lines))
    return f'{drawn}\n<p class="muted">{html.escape(note(board))}</p>'


def _cell(cell: Cell) -> str:
    text = f"<b>{html.escape(cell.text)}</b>" if cell.best else html.escape(cell.text)
    return text + "".join(f"<small>{html.escape(more)}</small>" for more in cell.more)


def _axis(board: Board, verdict: AxisVerdict, table: list[Values]) -> str:
    """Return the verdict on an axis, and a plot of the settings that it compares."""
    name, metric = verdict.axis, board.metric
    found = {setting.axis_values[name]: setting for setting in settings_along(name, board.centre, board.settings)}
    by_config = {row["config"]: row for row in table}
    estimates = []
    for value in board.order[name]:
        if value not in found:
            estimates.append(Estimate(shown(value), None))
            continue
        setting = found[value]
        row = by_config[setting.name]
        seeds = setting.values(metric) if len(setting.runs) > 1 else []
        estimates.append(Estimate(shown(value), row[metric], row[f"{metric}_low"], row[f"{metric}_high"], seeds))
    others = ", ".join(f"{other}={shown(value)}" for other, value in board.centre.items() if other != name)
    where = f'<p class="muted">At {html.escape(others)}.</p>' if others else ""
    plot = estimate_plot(estimates, name, labelled(metric))
    return (
        f"<section><h2>{html.escape(name)}</h2>\n<p>{html.escape(verdict.sentence)}</p>\n{where}"
        f'<div class="wide">{plot}</div></section>'
    )


def _training(board: Board) -> str:
    """Return plots of validation and loss of all runs; empty if no run logged any."""
    validation, losses = [], []
    for style, setting in enumerate(board.settings):
        for run, seed in zip(setting.runs, setting.examples):
            name = setting.name if len(setting.runs) == 1 else f"{setting.name} seed={seed}"
            scores = [(line.step, line.values[board.metric]) for line in run.log("validation")]
            loss = [(line.step, line.values["loss"]) for line in run.log("train")]
            validation.append(Curve(name, style, scores))
            losses.append(Curve(name, style, thinned(loss)))
    plots = [
        curve_plot(validation, "step", f"validation {labelled(board.metric)}"),
        curve_plot(losses, "step", "training loss, neighbouring steps averaged", log=True),
    ]
    drawn = "\n".join(f'<div class="wide">{plot}</div>' for plot in plots if plot)
    names = legend(setting.name for setting in board.settings)
    return f'<section><h2>Training</h2>\n<div class="plots">{drawn}</div>\n{names}</section>' if drawn else ""


def _test(board: Board, test: WinnerScores) -> str:
    winner = f"{board.settings[0].name} ({test.point})"
    examples = f"{test.after['num']:.0f} examples" if "num" in test.after else "Generated text"
    compared = before_after_rows(test.before, test.after)
    table = [[html.escape(cell_text(value)) for value in row] for row in compared]
    return (
        f"<section><h2>Test split</h2>\n<p>{examples}, the base before and {html.escape(winner)} after.</p>\n"
        f"{html_table(BEFORE_AFTER, table)}</section>"
    )
