"""Rank the settings of a sweep, and judge each axis: does its best value beat the runner-up by more than the noise?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from im2json.catalogue import labelled
from im2json.errors import UserError
from im2json.jsontext import scoring_text
from im2json.records import RunResult
from im2json.report.duration import clock_time
from im2json.runs import RunFolder
from im2json.scoring import METRICS, StreamingEvaluator, compare
from im2json.sweeps.grid import Plan, Values, shown
from im2json.sweeps.halving import Dropped
from im2json.sweeps.jobs import PointJob

OPTIONS = ("r", "alpha", "dropout", "lr")
"""Options with a column of their own, whether or not they are axes; `config` names the values of other axes."""
SHOWN = ("field_f1", "ted_accuracy", "exact_match", "json_validity", "edit_distance")
"""Metrics that people are shown; leaderboard.csv has all."""


@dataclass(frozen=True)
class Setting:
    """Finished points that differ only in their seed."""

    name: str
    axis_values: Values
    options: Values
    runs: list[RunFolder]
    results: list[RunResult]
    examples: dict[int, dict[str, str]]  # seed -> the id of each validation example -> its target
    evaluator: StreamingEvaluator  # has scored the validation answers of all runs at their best steps

    def values(self, metric: str) -> list[float]:
        """Return a validation metric for each seed."""
        return [result.validation[metric] for result in self.results]

    def value(self, metric: str) -> float:
        """Return a validation metric, as the mean over the seeds."""
        return sum(self.values(metric)) / len(self.results)

    def best_run(self, metric: str) -> RunFolder:
        """Return the run of the best seed."""
        values = [METRICS[metric].gain(value) for value in self.values(metric)]
        return self.runs[values.index(max(values))]


@dataclass(frozen=True)
class AxisVerdict:
    """Whether the best value of an axis beats the runner-up; a field is None if the results are too few to tell."""

    axis: str
    best: Any = None  # value
    runner_up: Any = None  # value
    difference: float | None = None  # best - runner-up
    low: float | None = None  # 95 % interval of the difference
    high: float | None = None
    exceeds_noise: bool | None = None
    sentence: str = ""


@dataclass(frozen=True)
class WinnerScores:
    """Metrics of the base and of the winner on the test split."""

    point: str  # the winner's id
    before: Mapping[str, float]
    after: Mapping[str, float]
    more: Mapping[str, Any] = field(default_factory=dict)  # all else that `im2json evaluate --json` prints

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> WinnerScores:
        """Return the scores in test.json."""
        more = {name: value for name, value in stored.items() if name not in ("point", "before", "after")}
        return cls(stored["point"], stored["before"], stored["after"], more)

    def to_json(self) -> dict[str, Any]:
        """Return the object that test.json holds."""
        return {"point": self.point, "before": self.before, "after": self.after, **self.more}


@dataclass(frozen=True)
class Board:
    """The leaderboard: the settings, the best first, and a verdict for each axis."""

    metric: str
    settings: list[Setting]
    axes: list[AxisVerdict]
    centre: Values  # axis -> the value of the other axes while an axis is judged
    order: dict[str, list[Any]]  # axis -> its values in the order of the grid
    points: int  # of the sweep
    missing: list[str]  # points without a result that were not dropped
    dropped: list[Dropped]


def make_board(plan: Plan, jobs: Sequence[PointJob], dropped: Sequence[Dropped] = ()) -> Board | None:
    """Return the leaderboard of the points that have a result, or None if none has.

    Raises:
        UserError: if the run folder of a finished point lacks validation answers.
    """
    grouped: dict[str, list[PointJob]] = {}
    for job in jobs:
        if job.state == "done":
            grouped.setdefault(job.point.setting, []).append(job)
    settings = [read_setting(group) for group in grouped.values()]
    if not settings:
        return None
    better = METRICS[plan.metric].gain
    settings.sort(key=lambda setting: -better(setting.value(plan.metric)))  # stable: of equals, the first in the grid
    centre = plan.base or settings[0].axis_values
    axes = [judge_axis(axis, centre, settings, plan.metric) for axis in plan.axes]
    missing = [job.point.name for job in jobs if job.state not in ("done", "dropped")]
    return Board(plan.metric, settings, axes, centre, plan.axes, len(jobs), missing, list(dropped))


def read_setting(jobs: Sequence[PointJob]) -> Setting:
    """Read the results of a setting's runs, and score their validation answers again for the bootstrap.

    Raises:
        UserError: if a run has no validation answers of its best step.
    """
    evaluator, results, examples = StreamingEvaluator(), [], {}
    for job in jobs:
        result = job.run.read_result()
        assert result is not None
        seen: dict[str, str] = {}
        for prediction in job.run.predictions("validation", "during", result.best_step):
            evaluator.update(prediction.reading, prediction.target, prediction.id)
            seen[prediction.id] = scoring_text(prediction.target)
        if not seen or result.best_step is None:
            raise UserError(f"{job.run.path} holds no validation answers of its best step: remove it to run it again")
        results.append(result)
        examples[job.point.config.train.seed] = seen
    point, runs = jobs[0].point, [job.run for job in jobs]
    return Setting(point.setting, point.axis_values, point.config.flat(), runs, results, examples, evaluator)


def settings_along(axis: str, centre: Values, settings: Sequence[Setting]) -> list[Setting]:
    """Return the settings that differ from `centre` in this axis alone, and `centre` itself, in the order given."""
    others = {name: value for name, value in centre.items() if name != axis}
    return [s for s in settings if {name: value for name, value in s.axis_values.items() if name != axis} == others]


def judge_axis(axis: str, centre: Values, settings: Sequence[Setting], metric: str) -> AxisVerdict:
    """Return whether the best value of an axis beats the runner-up by more than the noise, all else as in `centre`.

    The noise of the examples is measured by a paired bootstrap of both settings' answers (95 %). With several seeds,
    the values of the seeds must not overlap either.

    Args:
        settings: ranked, the best first.
    """
    line = settings_along(axis, centre, settings)
    if len(line) < 2:
        return AxisVerdict(axis, sentence=f"{axis}: fewer than two of its values have a result.")
    best, second = line[:2]
    difference = best.value(metric) - second.value(metric)
    found = AxisVerdict(axis, best.axis_values[axis], second.axis_values[axis], difference)
    if not difference:
        level = f"{shown(found.best)} and {shown(found.runner_up)} are level with {metric}"
        return replace(found, exceeds_noise=False, sentence=f"{axis}: {level} {best.value(metric):.3f}.")
    head = (
        f"{axis}: {shown(found.best)} is best with {metric} {best.value(metric):.3f}, "
        f"before {shown(found.runner_up)} with {second.value(metric):.3f}"
    )
    if best.examples != second.examples:
        differ = "they were not validated on the same examples and seeds, so nothing is said of noise"
        return replace(found, sentence=f"{head}; {differ}.")
    compared = compare(second.evaluator, best.evaluator)[metric]
    if math.isnan(compared.low):
        return replace(found, sentence=f"{head}; the examples are too few to tell this from noise.")
    exceeds = compared.exceeds_noise and not _overlap(best.values(metric), second.values(metric))
    noise = "noise" if len(best.runs) > 1 else "noise of the examples (that of seeds takes several to tell)"
    verdict = f"exceeds the {noise}" if exceeds else "is within the noise, so this grid does not tell them apart"
    bounds = f"[{compared.low:+.3f}, {compared.high:+.3f}]"
    sentence = f"{head}: the difference {difference:+.3f} {bounds} {verdict}."
    return replace(found, low=compared.low, high=compared.high, exceeds_noise=exceeds, sentence=sentence)


def _overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    return min(first) <= max(second) and min(second) <= max(first)


def rows(board: Board) -> list[dict[str, Any]]:
    """Return a flat row for each setting, as in leaderboard.csv.

    A metric is the mean over the seeds. `_low` and `_high` are its 95 % interval by bootstrap, None where the
    examples are too few; with several seeds, `_min` and `_max` are the least and the greatest of them. Time is the mean
    over the seeds, memory the maximum.
    """
    table = []
    names = list(dict.fromkeys([*OPTIONS, *board.settings[0].axis_values]))
    for rank, setting in enumerate(board.settings, start=1):
        row: dict[str, Any] = {"rank": rank, "config": setting.name}
        row |= {name: setting.options[name] for name in names}
        row |= {"runs": len(setting.runs), "trainable": setting.results[0].trainable}
        bounds = setting.evaluator.intervals()
        for name in METRICS:
            low, high = bounds[name] or (None, None)
            row |= {name: setting.value(name), f"{name}_low": low, f"{name}_high": high}
            if len(setting.runs) > 1:
                row |= {f"{name}_min": min(setting.values(name)), f"{name}_max": max(setting.values(name))}
        row["seconds"] = sum(result.seconds for result in setting.results) / len(setting.results)
        row["peak_memory_bytes"] = max(result.peak_memory_bytes for result in setting.results)
        table.append(row)
    return table


@dataclass(frozen=True)
class Cell:
    """A cell of the leaderboard for people."""

    text: str
    more: Sequence[str] = ()  # the interval, and with several seeds the least and the greatest of them
    best: bool = False  # in its column


def cells(metric: str, table: Sequence[Values]) -> tuple[list[str], list[list[Cell]]]:
    """Return headers and cells for people: of the metrics in `rows`, the one that ranks and SHOWN."""
    names = list(dict.fromkeys([metric, *SHOWN]))
    best = {name: max(METRICS[name].gain(row[name]) for row in table) for name in names}
    lines = []
    for row in table:
        left = [Cell(f"{row[name]:g}" if isinstance(row[name], float) else str(row[name])) for name in OPTIONS]
        metrics = [_metric_cell(row, name, METRICS[name].gain(row[name]) == best[name]) for name in names]
        used = [Cell(clock_time(row["seconds"])), Cell(f"{row['peak_memory_bytes'] / 2**30:.2f} GiB")]
        config = Cell(row["config"], best=row["rank"] == 1)
        lines.append([config, *left, Cell(f"{row['trainable']:,}"), *metrics, *used])
    return ["config", *OPTIONS, "trainable", *map(labelled, names), "time", "memory"], lines


def _metric_cell(row: Values, name: str, best: bool) -> Cell:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    more = [f"[{low:.3f}, {high:.3f}]"] if low is not None else []
    if f"{name}_min" in row:
        more.append(f"({row[f'{name}_min']:.3f} to {row[f'{name}_max']:.3f})")
    return Cell(f"{row[name]:.3f}", more, best)


def markdown(board: Board) -> str:
    """Return the table in Markdown, with the best of each metric in bold and a sentence for each axis."""
    headers, table = cells(board.metric, rows(board))
    lines = [headers, ["---"] * len(headers)]
    for row in table:
        lines.append([" ".join([f"**{cell.text}**" if cell.best else cell.text, *cell.more]) for cell in row])
    body = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
    sentences = [f"- {axis.sentence}" for axis in board.axes]
    return "\n".join([body, "", *sentences, "", note(board), *absent(board)]) + "\n"


def absent(board: Board) -> list[str]:
    """Return sentences on the points that the table does not hold."""
    dropped = ", ".join(
        f"{found.setting} after step {found.step} ({found.metric} {found.value:.3f})" for found in board.dropped
    )
    found = {"Without a result": ", ".join(board.missing), "Dropped by halving": dropped}
    return [f"{why}: {names}." for why, names in found.items() if names]


def note(board: Board) -> str:
    """Return what the numbers in the table mean."""
    seeds = any(len(setting.runs) > 1 for setting in board.settings)
    meaning = "Validation split, generated text. [low, high]: 95 % by bootstrap over the examples"
    return meaning + ("; (least to most): over the seeds." if seeds else ".")
