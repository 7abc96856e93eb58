"""Score predictions: those in JSON-lines files, wherever they were made, and those that runs kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from im2json.errors import UserError
from im2json.files import read_json, write_json
from im2json.jsontext import dumps, load_json, parse_target
from im2json.records import Prediction
from im2json.runs import RunFolder
from im2json.scoring.confidence import Calibration, calibration_error, judge_leaves
from im2json.scoring.scorecard import Scorecard
from im2json.text import command_line, refuse_utf16

Row = dict[str, Any]
Problem = Callable[[str], None]
"""Called with a line of text for each row that cannot be scored."""


class _Problems:
    """Shows the first MAX_SHOWN problems, and in the end how many more there were."""

    MAX_SHOWN = 20

    def __init__(self, show: Problem) -> None:
        self.show = show
        self.count = 0

    def __call__(self, line: str) -> None:
        self.count += 1
        if self.count <= self.MAX_SHOWN:
            self.show(line)

    def __enter__(self) -> _Problems:
        return self

    def __exit__(self, *error: object) -> None:
        if self.count > self.MAX_SHOWN:
            self.show(f"and {self.count - self.MAX_SHOWN} more such rows")


class _Position(NamedTuple):
    """The line of a row in its file."""

    line: int  # from 1
    offset: int  # bytes before the line


def score_files(predictions: Path, targets: Path | None, split: str, show: Problem) -> tuple[Scorecard, int]:
    """Score the rows of a file, or of two files joined by id. Memory grows with the ids alone.

    A row has `prediction` (or `text`), which is a text, an object, or null for no prediction; `target`, which is an
    object or the text of one, and is unwrapped as in training; and `id`, a text or a whole number, which may be missing
    if the targets are in the same file. In a run's own predictions.jsonl only the rows of `split` after training count.

    Args:
        show: called for each row that cannot be scored, which is left out.

    Returns:
        The scores, and how many rows were left out.

    Raises:
        UserError: if no row can be scored.
    """
    scorecard = Scorecard()
    with _Problems(show) as problem:
        index = None if targets is None else _index(targets, problem)
        seen: set[str] = set()
        for where, row in _rows(predictions, problem):
            try:
                if not _other_stage(row, split):
                    _count(scorecard, row, targets, index, seen)
            except UserError as error:
                problem(f"{where}: {error}")
        for id in index or ():
            if id not in seen:
                problem(f"{predictions}: no prediction for id {id!r} of {targets}")
    if not scorecard.metrics.compute()["num"]:
        raise UserError(f"{predictions} holds no example that can be scored")
    return scorecard, problem.count


def _count(
    scorecard: Scorecard, row: Row, targets: Path | None, index: dict[str, _Position] | None, seen: set[str]
) -> None:
    id = _id(row, needed=index is not None)
    if id is not None:
        if id in seen:
            raise UserError(f"id {id!r} comes twice")
        seen.add(id)
    if targets is not None and index is not None and id is not None:
        scorecard.update(_prediction(row), _target(_target_row(targets, index, id)), id)
    else:
        scorecard.update(_prediction(row), _target(row), id)


def kept_predictions(run: RunFolder, split: str, stage: str = "after") -> list[Prediction]:
    """Return the predictions that a run kept of a split.

    Raises:
        UserError: if it kept none, with the command that makes them.
    """
    kept = list(run.predictions(split, stage))
    if not run.config.exists() and not kept:
        raise run.missing()
    if not kept:
        raise UserError(
            f"{run.path} holds no predictions of the {split} split {stage} training: "
            f"`{command_line('im2json', 'evaluate', run.path, '--split', split)}` makes them"
        )
    return kept


def score_predictions(predictions: Iterable[Prediction]) -> Scorecard:
    """Score predictions that a run kept."""
    scorecard = Scorecard()
    for prediction in predictions:
        scorecard.update(prediction.reading, prediction.target, prediction.id)
    return scorecard


def calibrate(run: RunFolder, step: int) -> Calibration | None:
    """Fit the confidence of a run's leaves to its answers on the validation split at `step`, and write
    calibration.json.

    Returns None, and writes nothing, if the run kept no leaves with a confidence.
    """
    predictions = calibration_predictions(run, step)
    leaves = [leaf for prediction in predictions for leaf in judge_leaves(prediction)]
    if not leaves:
        return None
    confidence, right = [leaf.confidence for leaf in leaves], [leaf.right for leaf in leaves]
    calibration = Calibration.fit(confidence, right)
    errors = calibration_error(confidence, right), calibration_error(calibration(confidence), right)
    write_json(run.calibration, {
        "method": "1 / (1 + exp(-(slope * log(p / (1 - p)) + intercept))), p as in predictions.jsonl; 0 stays 0",
        **calibration._asdict(),
        "fitted_on": {"split": "validation", "step": step, "examples": len(predictions), "leaves": len(leaves),
                      "wrong": right.count(False)},
        "calibration_error": {"before": errors[0], "after": errors[1]},
    })  # fmt: skip
    return calibration


def calibration_predictions(run: RunFolder, step: int) -> list[Prediction]:
    """Return the validation predictions of `step` that have a confidence.

    They are those of `im2json evaluate` or, if it was not run on that split, of training.
    """
    kept = [prediction for prediction in run.predictions("validation", step=step) if prediction.has_confidence]
    return [prediction for prediction in kept if prediction.stage == "after"] or kept


def read_calibration(run: RunFolder) -> tuple[Calibration, int] | None:
    """Return what `calibrate` wrote, and the step that it was fitted at; None if it wrote nothing.

    Raises:
        UserError: if calibration.json was not written by `calibrate`.
    """
    if not run.calibration.exists():
        return None
    stored = read_json(run.calibration)
    try:
        return Calibration(float(stored["slope"]), float(stored["intercept"])), int(stored["fitted_on"]["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.calibration} does not hold a calibration: `im2json evaluate` writes it") from error


def _rows(path: Path, problem: Problem) -> Iterator[tuple[str, Row]]:
    """Yield the rows that are JSON objects, each with its file and line; blank lines are skipped."""
    for position, line in _lines(path):
        where = f"{path}:{position.line}"
        try:
            if line.strip():
                yield where, _row(line, where)
        except UserError as error:
            problem(str(error))


def _lines(path: Path) -> Iterator[tuple[_Position, bytes]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                refuse_utf16(line, str(path))
            yield _Position(number, offset), line
            offset += len(line)


def _row(line: bytes, where: str) -> Row:
    row = load_json(line, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is a JSON object")
    return row


def _index(path: Path, problem: Problem) -> dict[str, _Position]:
    """Return where the row of each id is; the targets themselves stay on disk."""
    found: dict[str, _Position] = {}
    for position, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{position.line}"
        try:
            row = _row(line, where)
        except UserError as error:
            problem(str(error))
            continue
        try:
            id = _id(row, needed=True)
            assert id is not None
            if id in found:
                raise UserError(f"id {id!r} comes twice, first in line {found[id].line}")
            _target(row)
            found[id] = position
        except UserError as error:
            problem(f"{where}: {error}")
    return found


def _target_row(path: Path, index: dict[str, _Position], id: str) -> Row:
    if id not in index:
        raise UserError(f"{path} has no target for id {id!r}")
    with path.open("rb") as file:
        file.seek(index[id].offset)
        return _row(file.readline(), f"{path}:{index[id].line}")


def _id(row: Row, needed: bool) -> str | None:
    id = row.get("id")
    if id is None:
        if needed:
            raise UserError("no id to join it by")
        return None
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise UserError("an id is a text or a whole number")
    return str(id)


def _prediction(row: Row) -> str:
    if "prediction" not in row and "text" not in row:
        raise UserError("neither prediction nor text")
    value = row["prediction"] if "prediction" in row else row["text"]
    if value is None:
        return ""
    if not isinstance(value, str | dict):
        raise UserError("a prediction is a text, an object or null")
    return value if isinstance(value, str) else dumps(value)


def _target(row: Row) -> dict[str, Any]:
    if "target" not in row:
        raise UserError("no target")
    return parse_target(row["target"], "a target is a JSON object, or the text of one")


def _other_stage(row: Row, split: str) -> bool:
    """Return whether a row is a line of a run's predictions.jsonl that belongs to another split or stage."""
    return {"step", "split", "stage"} <= row.keys() and (row["split"], row["stage"]) != (split, "after")
