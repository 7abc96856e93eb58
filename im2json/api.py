"""im2json from Python: the commands as functions, whose keyword arguments are the options.

    import im2json

    run = im2json.train(dataset="receipts", r=16, steps=100)
    run.metrics["test"]["after"]["field_f1"]
    [row["json"] for row in run.extractor()(["receipt.jpg"])]

The functions print what the commands print, and work in a notebook. A mistake raises im2json.UserError with the line
that the command would print.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from im2json.cli import quiet_libraries, resume_advice
from im2json.errors import UserError
from im2json.files import read_json, write_json
from im2json.records import SPLITS, LogLine, Prediction
from im2json.resume import evaluated_config, training_config
from im2json.runs import RunFolder, make_folder

if TYPE_CHECKING:
    from im2json.inference.extract import Extractor

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Run:
    """A run and what it has found out so far. It is a path, too: that of its folder, which is read at each access.

    Raises:
        UserError: if the folder is not that of a run.
    """

    path: Path
    _evaluated: dict[str, Any] | None = field(compare=False, repr=False)  # the metrics that `evaluate` found

    def __init__(self, path: AnyPath, _evaluated: dict[str, Any] | None = None) -> None:
        object.__setattr__(self, "path", Path(path))
        object.__setattr__(self, "_evaluated", _evaluated)
        RunFolder(self.path).read_config()

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def done(self) -> bool:
        """Return whether the run is finished. If it is not, `im2json.train(resume=run)` goes on with it."""
        return RunFolder(self.path).done

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of a finished run, or of the evaluation that returned it.

        Of a run: {"validation": {name: value}} at the step whose adapter was kept, and, unless the run had test=False,
        {"test": {"before": {name: value}, "after": {name: value}}}. Empty as long as the run is not finished.
        Of an evaluation: see `im2json.evaluate`.
        """
        if self._evaluated is not None:
            return self._evaluated
        result = RunFolder(self.path).read_result()
        if result is None:
            return {}
        return {"validation": result.validation} | ({} if result.test is None else {"test": result.test})

    @property
    def log(self) -> list[LogLine]:
        """The values that were logged at each step and evaluation."""
        return list(RunFolder(self.path).log())

    def predictions(
        self, split: str | None = None, stage: str | None = None, step: int | None = None
    ) -> list[Prediction]:
        """Return the evaluated examples of a split, a stage (before, during or after) and a step; None means all."""
        return list(RunFolder(self.path).predictions(split, stage, step))

    def extractor(self, **options: Any) -> Extractor:
        """Load the best adapter to read new pictures; see `im2json.Extractor.from_run`."""
        quiet_libraries()
        from im2json.inference.extract import Extractor

        return Extractor.from_run(self.path, **options)


@dataclass(frozen=True)
class Sweep:
    """A sweep that was run to its end. Its folder has leaderboard.md, leaderboard.csv and report.html to look at."""

    path: Path

    @property
    def leaderboard(self) -> list[dict[str, Any]]:
        """The rows of leaderboard.csv, the best setting first."""
        return read_json(self.path / "summary.json")["settings"]

    @property
    def winner(self) -> Run:
        """The best run of the best setting, which is the one that was scored on the test split."""
        return Run(self.path / "points" / read_json(self.path / "summary.json")["test"]["point"])


def train(
    preset: str | None = None, *, resume: AnyPath | None = None, stop_after: int | None = None, **options: Any
) -> Run:
    """Fine-tune a model, as `im2json train` does.

    Args:
        preset: a named recipe, which the options override.
        resume: a stopped run to go on with.
        stop_after: the step after which to stop and keep a checkpoint.
        options: those of the command, with underscores: dataset, model, r, lr, steps, output, ...

    Raises:
        UserError: naming the option, file or row that is wrong.
        KeyboardInterrupt: after an interruption, once a checkpoint is written. The message says how to go on.
    """
    if stop_after is not None and stop_after < 1:
        raise UserError(f"stop_after: {stop_after} is not a step; the first is 1")
    stopped = None if resume is None else RunFolder(Path(resume))
    config = training_config(stopped, _plain(options), preset)
    with _one_accelerator():
        from im2json.commands.train import Ending
        from im2json.commands.train import train as train_run

        ending, run = train_run(config, stopped, stop_after)
    if ending is Ending.ASKED:
        raise KeyboardInterrupt(resume_advice(run.path))
    return Run(run.path)


def evaluate(run: AnyPath, split: str = "test", **options: Any) -> Run:
    """Score the base model and the best adapter of a run on a split, as `im2json evaluate` does.

    Args:
        split: train, validation or test.
        options: in place of the run's: precision, constrain, schema, eval_batch_size, check_sum, threads.

    Returns:
        The run, with the metrics of this evaluation: {split: {"before": {name: value}, "after": {name: value}}}, and
        {} on all processes but the main one. Its folder has the predictions of this evaluation.

    Raises:
        UserError: naming the option, file or row that is wrong.
    """
    if split not in SPLITS:
        raise UserError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    folder, given = RunFolder(Path(run)), _plain(options)
    config = evaluated_config(folder, given)
    with _one_accelerator():
        from im2json.commands.evaluate import evaluate as evaluate_run

        metrics = evaluate_run(folder, config, split, None if "schema" in given else folder.schema)
    return Run(folder.path, {} if metrics is None else {split: metrics})


def sweep(grid: AnyPath | Mapping[str, Any], *, output: AnyPath | None = None, **options: Any) -> Sweep:
    """Run the points of an ablation grid and rank them, as `im2json sweep` does. The same call continues a sweep.

    Args:
        grid: a JSON file, or what the file would hold, which is then kept as grid.json in `output`.
        output: the folder of the sweep; runs/NAME for NAME.json by default.
        options: jobs, gpus_per_run, ray, halve.

    Raises:
        UserError: if the grid is wrong, or points failed; the others are kept.
        KeyboardInterrupt: after an interruption, once all points have saved. The message says how to go on.
    """
    from im2json.commands.sweep import SweepOptions, check_sweep_folder
    from im2json.commands.sweep import sweep as run_sweep
    from im2json.sweeps.grid import make_plan

    known = [each.name for each in fields(SweepOptions) if each.name not in ("grid", "output", "overrides")]
    for name in options:
        if name not in known:
            raise UserError(f"{name}: a sweep has the options {', '.join(known)}; others go into the grid")
    if not isinstance(grid, Mapping):
        settled = SweepOptions(Path(grid), output=None if output is None else Path(output), **options)
    elif output is None:
        raise UserError("output: a grid that is not a file needs a folder, like output='runs/rank'")
    else:
        settled = SweepOptions(Path(output) / "grid.json", output=Path(output), **options)
        make_plan(grid, {})  # so that a mistake leaves no folder behind
        check_sweep_folder(settled.folder)
        make_folder(settled.folder)
        write_json(settled.grid, dict(grid))
    try:
        done = run_sweep(settled)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what {settled.folder} holds is kept; the same call goes on") from None
    if not done:
        raise UserError(f"points of {settled.folder} failed, as printed above. The same call tries them again.")
    return Sweep(settled.folder)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with paths as text, as flags give them."""
    return {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in options.items()}


@contextmanager
def _one_accelerator() -> Iterator[None]:
    """Let the call choose its device and precision, whatever an earlier call in this process has chosen.

    Accelerate keeps both in a state that lasts as long as the process.
    """
    quiet_libraries()
    from accelerate.state import AcceleratorState, PartialState

    if PartialState._shared_state and PartialState().num_processes > 1:
        yield  # a launcher has set the processes up
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
