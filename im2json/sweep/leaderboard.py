"""What a sweep says in the end: the settings ranked, and axis by axis whether the best value is more than luck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from im2json.errors import UserError
from im2json.jsontext import scoring_text
from im2json.records import RunResult
from im2json.report.duration import clock_time
from im2json.runs import RunFolder
from im2json.scoring import METRICS, StreamingEvaluator, compare
from im2json.scoring.catalogue import labelled
from im2json.sweep.grid import Plan, Values, shown
from im2json.sweep.halving import Dropped
from im2json.sweep.launch import Job

OPTIONS = ("r", "alpha", "dropout", "lr")  # shown whether they are axes or not; `config` tells of other axes
SHOWN = ("field_f1", "ted_accuracy", "exact_match", "json_validity", "edit_distance")  # of the metrics, in Markdown


@dataclass(frozen=True)
class Setting:
    """The finished points that differ in nothing but their seed."""

    name: str
    place: Values
    options: Values
    runs: list[RunFolder]
    results: list[RunResult]
    examples: dict[int, dict[str, str]]  # seed -> the id of each validation example -> its target
    evaluator: StreamingEvaluator  # of the validation answers that all runs kept from their best steps

    def values(self, metric: str) -> list[float]:
        """A validation metric, seed by seed."""
        return [result.validation[metric] for result in self.results]

    def value(self, metric: str) -> float:
        return sum(self.values(metric)) / len(self.results)

    def best_run(self, metric: str) -> RunFolder:
        values = [METRICS[metric].gain(value) for value in self.values(metric)]
        return self.runs[values.index(max(values))]


@dataclass(frozen=True)
class Board:
    """Settings, the best first, and the metric that says so."""

    metric: str
    settings: list[Setting]
    axes: list[dict[str, Any]]  # see `judge_axis`
    around: Values  # the place that the axes are judged around
    order: dict[str, list[Any]]  # axis -> its values as the grid has them
    points: int  # in all
    missing: list[str]  # points without a result, for no such reason:
    dropped: list[Dropped]


def make_board(plan: Plan, jobs: Sequence[Job], dropped: Sequence[Dropped] = ()) -> Board | None:
    """The leaderboard of the points that have a result; None where none has.

    Raises:
        UserError: if a run folder does not hold what a finished run leaves.
    """
    grouped: dict[str, list[Job]] = {}
    for job in jobs:
        if job.state == "done":
            grouped.setdefault(job.point.setting, []).append(job)
    settings = [read_setting(group) for group in grouped.values()]
    if not settings:
        return None
    better = METRICS[plan.metric].gain
    settings.sort(key=lambda setting: -better(setting.value(plan.metric)))  # of equals the grid's first
    around = plan.base or settings[0].place
    axes = [judge_axis(axis, around, settings, plan.metric) for axis in plan.axes]
    missing = [job.point.name for job in jobs if job.state not in ("done", "dropped")]
    return Board(plan.metric, settings, axes, around, plan.axes, len(jobs), missing, list(dropped))


def read_setting(jobs: Sequence[Job]) -> Setting:
    """What the runs of a setting left, its validation answers scored anew for the bootstrap."""
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
    point = jobs[0].point
    return Setting(
        point.setting, point.place, point.config.flat(), [job.run for job in jobs], results, examples, evaluator
    )


def axis_line(axis: str, around: Values, settings: Sequence[Setting]) -> list[Setting]:
    """The settings that are as `around` in all but the axis, in the order given."""
    others = {name: value for name, value in around.items() if name != axis}
    return [s for s in settings if {name: value for name, value in s.place.items() if name != axis} == others]


def judge_axis(axis: str, around: Values, settings: Sequence[Setting], metric: str) -> dict[str, Any]:
    """Whether the best value of an axis, all else as in `around`, beats the runner-up by more than the noise.

    {"axis", "best", "runner_up", "difference" (best - runner-up), "low", "high", "exceeds_noise", "sentence"}; None
    for what there is too little to say. Noise is that of the examples, by the paired bootstrap of both settings'
    answers (95 %), and with several seeds that of the seeds, whose values must not overlap either.
    """
    line = axis_line(axis, around, settings)
    found: dict[str, Any] = dict(axis=axis, best=None, runner_up=None, difference=None, low=None, high=None)
    if len(line) < 2:
        return found | {"exceeds_noise": None, "sentence": f"{axis}: fewer than two of its values have a result."}
    best, second = line[:2]  # settings are ranked
    found |= {"best": best.place[axis], "runner_up": second.place[axis]}
    found["difference"] = best.value(metric) - second.value(metric)
    if not found["difference"]:
        level = f"{shown(found['best'])} and {shown(found['runner_up'])} are level with {metric}"
        return found | {"exceeds_noise": False, "sentence": f"{axis}: {level} {best.value(metric):.3f}."}
    head = (
        f"{axis}: {shown(found['best'])} is best with {metric} {best.value(metric):.3f}, "
        f"before {shown(found['runner_up'])} with {second.value(metric):.3f}"
    )
    if best.examples != second.examples:
        return found | {
            "exceeds_noise": None,
            "sentence": f"{head}; they were not validated on the same examples and seeds, so nothing is said of noise.",
        }
    compared = compare(second.evaluator, best.evaluator)[metric]
    exceeds = compared.exceeds_noise and not _overlap(best.values(metric), second.values(metric))
    noise = "noise" if len(best.runs) > 1 else "noise of the examples (that of seeds takes several to tell)"
    verdict = f"exceeds the {noise}" if exceeds else "is within the noise, so this grid does not tell them apart"
    bounds = f"[{compared.low:+.3f}, {compared.high:+.3f}]"
    sentence = f"{head}: the difference {found['difference']:+.3f} {bounds} {verdict}."
    return found | {"low": compared.low, "high": compared.high, "exceeds_noise": exceeds, "sentence": sentence}


def _overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    return min(first) <= max(second) and min(second) <= max(first)


def rows(board: Board) -> list[dict[str, Any]]:
    """A flat row a setting, as in leaderboard.csv.

    A metric is the mean over the seeds, with the bootstrap's 95 % interval as `_low` and `_high`, and with several
    seeds the least and most of them as `_min` and `_max`. Time is the mean, memory the most of all seeds.
    """
    table = []
    names = list(dict.fromkeys([*OPTIONS, *board.settings[0].place]))
    for rank, setting in enumerate(board.settings, start=1):
        row: dict[str, Any] = {"rank": rank, "config": setting.name}
        row |= {name: setting.options[name] for name in names}
        row |= {"runs": len(setting.runs), "trainable": setting.results[0].trainable}
        bounds = setting.evaluator.intervals()
        for name in METRICS:
            row |= {name: setting.value(name), f"{name}_low": bounds[name][0], f"{name}_high": bounds[name][1]}
            if len(setting.runs) > 1:
                row |= {f"{name}_min": min(setting.values(name)), f"{name}_max": max(setting.values(name))}
        row["seconds"] = sum(result.seconds for result in setting.results) / len(setting.results)
        row["peak_memory_bytes"] = max(result.peak_memory_bytes for result in setting.results)
        table.append(row)
    return table


@dataclass(frozen=True)
class Cell:
    """A cell of the leaderboard as people see it."""

    text: str
    more: Sequence[str] = ()  # the interval, and with several seeds the least and most of them
    best: bool = False  # of its column


def cells(metric: str, table: Sequence[Values]) -> tuple[list[str], list[list[Cell]]]:
    """Headers, and under them what is shown of `rows`: the metric that ranks before the others."""
    names = list(dict.fromkeys([metric, *SHOWN]))
    best = {name: max(METRICS[name].gain(row[name]) for row in table) for name in names}
    arrows = [labelled(name) for name in names]
    lines = []
    for row in table:
        left = [Cell(f"{row[name]:g}" if isinstance(row[name], float) else str(row[name])) for name in OPTIONS]
        metrics = [_metric_cell(row, name, METRICS[name].gain(row[name]) == best[name]) for name in names]
        used = [Cell(clock_time(row["seconds"])), Cell(f"{row['peak_memory_bytes'] / 2**30:.2f} GiB")]
        config = Cell(row["config"], best=row["rank"] == 1)
        lines.append([config, *left, Cell(f"{row['trainable']:,}"), *metrics, *used])
    return ["config", *OPTIONS, "trainable", *arrows, "time", "memory"], lines


def _metric_cell(row: Values, name: str, best: bool) -> Cell:
    more = [f"[{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"]
    if f"{name}_min" in row:
        more.append(f"({row[f'{name}_min']:.3f} to {row[f'{name}_max']:.3f})")
    return Cell(f"{row[name]:.3f}", more, best)


def markdown(board: Board) -> str:
    """The table with the best of each metric in bold, and a sentence an axis."""
    headers, table = cells(board.metric, rows(board))
    lines = [headers, ["---"] * len(headers)]
    for row in table:
        lines.append([" ".join([f"**{cell.text}**" if cell.best else cell.text, *cell.more]) for cell in row])
    body = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
    sentences = [f"- {axis['sentence']}" for axis in board.axes]
    return "\n".join([body, "", *sentences, "", note(board), *absent(board)]) + "\n"


def absent(board: Board) -> list[str]:
    """A sentence each on what the table does not hold."""
    dropped = ", ".join(
        f"{found.setting} after step {found.step} ({found.metric} {found.value:.3f})" for found in board.dropped
    )
    found = {"Without a result": ", ".join(board.missing), "Dropped by halving": dropped}
    return [f"{why}: {names}." for why, names in found.items() if names]


def note(board: Board) -> str:
    """What the numbers of the table are."""
    seeds = any(len(setting.runs) > 1 for setting in board.settings)
    told = "Validation split, generated text. [low, high]: 95 % by bootstrap over the examples"
    return told + ("; (least to most): over the seeds." if seeds else ".")
