"""A run folder: what lies in it, who may write to it, and what a run that stopped finds there.

runs/NAME/config.json        every resolved option, versions, git revision
          splits.json        which example was in which split when the run began (records.SplitRecord)
          schema.json        the JSON Schema of the training targets, or --schema; edit it as you like
          metrics.jsonl      a line per step or evaluation (records.LogLine)
          predictions.jsonl  a line per evaluated example (records.Prediction)
          checkpoints/step-N/
          adapter/           the best adapter in PEFT's format, with the processor
          calibration.json   how far confidence can be believed, as measured on validation
          report.html        the test split to look at: metrics, confidence, examples
          tb/                TensorBoard events
          result.json        written last: its presence means that the run is done (records.RunResult)
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from im2json.errors import UserError
from im2json.files import damage, did_you_mean, keep_lines, lock, not_ours, read_json, read_lines, write_json
from im2json.options import TrainConfig
from im2json.records import LogLine, Prediction, RunResult, SplitRecord
from im2json.text import command_line, is_utf8

HUB_NAME = r"(?!\.)[\w.-]+/[\w.-]+"  # owner/name, of a model or data set
WEIGHTS = "adapter_model.safetensors"  # PEFT's names
ADAPTER_CONFIG = "adapter_config.json"
USAGE = "im2json.json"  # beside them: prompt, form of the pictures and limits that the adapter was trained for
ADAPTER_COMPANIONS = ("calibration.json", "schema.json")  # of the run, copied with an adapter that leaves it
VERSIONED = ("im2json", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "rapidfuzz")
LONGER = {"steps", "epochs"}  # the options that make a finished run longer


T = TypeVar("T")


@dataclass(frozen=True)
class RunFolder:
    """The files of a run, and what they hold."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def schema(self) -> Path:
        return self.path / "schema.json"

    @property
    def splits(self) -> Path:
        return self.path / "splits.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def predictions_file(self) -> Path:
        return self.path / "predictions.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def calibration(self) -> Path:
        return self.path / "calibration.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def done(self) -> bool:
        return self.result.exists()

    def predictions(
        self, split: str | None = None, stage: str | None = None, step: int | None = None
    ) -> Iterator[Prediction]:
        """Yield the lines of predictions.jsonl of a split, a stage and a step; None stands for all.

        Raises:
            UserError: naming the line that is not a prediction.
        """
        wanted = {"split": split, "stage": stage, "step": step}
        return _records(self.predictions_file, Prediction.from_json, wanted)

    def log(self, split: str | None = None, stage: str | None = None) -> Iterator[LogLine]:
        """Yield the lines of metrics.jsonl of a split and a stage; None stands for all.

        Raises:
            UserError: naming the line that is not a log line.
        """
        return _records(self.metrics_file, LogLine.from_json, {"split": split, "stage": stage})

    def read_result(self) -> RunResult | None:
        """Return what result.json holds, or None if the run is not done.

        Raises:
            UserError: if result.json was not written by a run.
        """
        return RunResult.from_json(read_json(self.result), str(self.result)) if self.done else None

    def read_splits(self) -> SplitRecord | None:
        """Return what splits.json holds, or None if the run was begun by a version that did not write it.

        Raises:
            UserError: if splits.json was not written by a run.
        """
        return SplitRecord.from_json(read_json(self.splits), str(self.splits)) if self.splits.exists() else None

    @property
    def kept_step(self) -> int:
        """The step whose adapter a finished run has kept; 0 if it is not finished."""
        result = self.read_result()
        return 0 if result is None else result.kept_step

    def read_config(self) -> TrainConfig:
        """Return the options of this run.

        Raises:
            UserError: if the folder holds no run, or its config.json was not written by one.
        """
        return TrainConfig.from_values(self.read_stored()["options"])

    def missing(self) -> UserError:
        """Return the error that says that there is no run here."""
        if self.path.exists():
            return UserError(f"{self.path} is not a run folder: it has no config.json")
        return UserError(f"{self.path}: there is no such run folder{did_you_mean(self.path)}")

    def read_stored(self) -> dict[str, Any]:
        """Return all that config.json holds: options, versions, git, data, processes and changes.

        Raises:
            UserError: if the folder holds no run, or its config.json was not written by one.
        """
        if not self.config.is_file():
            raise self.missing()
        stored = read_json(self.config)
        if not isinstance(stored, dict) or not isinstance(stored.get("options"), dict):
            raise UserError(f"{self.config} does not hold a run's options")
        stored = {"versions": {}, "data": {}, "processes": None, "changes": [], **stored}
        kinds = {"versions": dict, "data": dict, "processes": int | None, "changes": list}
        for name, kind in kinds.items():
            if not isinstance(stored[name], kind):
                raise UserError(f"{self.config}: {name} is {stored[name]!r}, which no run writes")
        return stored

    def write_config(
        self,
        config: TrainConfig,
        changes: Sequence[dict[str, Any]] = (),
        data: dict[str, str] | None = None,
        processes: int | None = None,
    ) -> None:
        """Write config.json.

        Args:
            changes: what each --resume changed, {"step", "options": {name: {"from", "to"}}}.
            data: a digest of each split's examples.
            processes: how many the run was begun on.
        """
        versions = {name: _version(name) for name in VERSIONED} | {"python": sys.version.split()[0]}
        more = {"versions": versions, "git": _git_revision(), "data": data or {}, "processes": processes}
        write_json(self.config, {"options": config.flat(), **more, "changes": list(changes)})

    def latest_checkpoint(self) -> Path | None:
        """Return the undamaged checkpoint with the most steps, or None."""
        steps = reversed(complete_checkpoints(self.checkpoints))
        return next((path for path in steps if damage(path) is None), None)


def _records(
    path: Path, from_json: Callable[[dict[str, Any]], T], wanted: Mapping[str, str | int | None]
) -> Iterator[T]:
    """Yield the records of the lines whose fields are as `wanted`, where that is not None."""
    given = {name: value for name, value in wanted.items() if value is not None}
    for number, row in enumerate(read_lines(path), start=1):
        try:
            if all(row.get(name) == value for name, value in given.items()):
                yield from_json(row)
        except (AttributeError, KeyError, TypeError) as error:
            raise not_ours(path, number, error) from error


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in the order of their steps. One that is being written has another name."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint: the optimizer updates done when it was written."""
    return int(checkpoint.name.removeprefix("step-"))


def check_output(output: str | None) -> None:
    """Refuse an --output that holds a run already.

    Raises:
        UserError: saying what to do instead.
    """
    if output is None:
        if os.path.lexists("runs") and not Path("runs").is_dir():
            raise UserError("runs, where a fresh run's folder would be made, is a file here: give --output")
        return
    run = RunFolder(Path(output))
    check_folder(run.path)
    if run.done:
        look = command_line("im2json", "evaluate", output)
        raise UserError(f"--output {output} holds a finished run: choose another folder, or see {look}")
    if run.config.exists():
        more = command_line("--resume", output)
        raise UserError(f"--output {output} holds an unfinished run: go on with {more}, or choose another")


def check_folder(output: Path, flag: str = "--output") -> None:
    """Refuse a folder to write to that is not a writable one and cannot become one.

    Raises:
        UserError: saying why.
    """
    if not is_utf8(str(output.absolute())):  # the library of tokenizers could not write there
        raise UserError(f"{flag} {output}: {output.absolute()} is not UTF-8; choose a folder whose whole path is")
    if os.path.lexists(output) and not output.is_dir():
        raise UserError(f"{flag} {output} is not a folder. Name one; it is created if it does not exist.")
    nearest = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {output}: {nearest} is not a folder that can be written to: choose another")


def make_folder(output: Path) -> None:
    """Make the folder of --output.

    Raises:
        UserError: if the system refuses.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made: {error.strerror}; choose another") from error


def new_run(config: TrainConfig) -> RunFolder:
    """Make the folder of a new run, at --output or under a new name in runs/."""
    if config.train.output is not None:
        path = Path(config.train.output)
        make_folder(path)
    else:
        name = f"{Path(config.model.model).name}-r{config.model.r}-{time.strftime('%Y%m%d-%H%M%S')}"
        Path("runs").mkdir(exist_ok=True)
        for attempt in itertools.count(1):
            path = Path("runs") / (name if attempt == 1 else f"{name}-{attempt}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
    return RunFolder(path)


def claim_new(
    run: RunFolder, config: TrainConfig, splits: SplitRecord, data: dict[str, str], processes: int = 1
) -> None:
    """Begin a new run: write its splits.json and config.json, with the folder locked.

    Args:
        data: a digest of each split's examples.

    Raises:
        UserError: if another process has begun a run in this folder.
    """
    check_output(str(run.path))
    write_json(run.splits, splits.to_json())
    run.write_config(config, data=data, processes=processes)


def claim_stopped(run: RunFolder, config: TrainConfig, data: dict[str, str], processes: int = 1) -> str | None:
    """Go on with a stopped run: note in its config.json what changes, with the folder locked.

    Returns:
        A line to print if the run was begun on another number of processes.

    Raises:
        UserError: if another process has finished it, or the data are not those that the run began with.
    """
    stored = run.read_stored()
    other = [name for name, digest in data.items() if stored["data"].get(name, digest) != digest]
    if other:
        raise UserError(
            f"--resume {run.path}: the examples or targets of {', '.join(other)} have changed since it began; put "
            f"{config.data.dataset} back as it was, or start a new run ({command_line('--adapter', run.path)} goes on "
            "from its best)"
        )
    before, after = run.read_config().flat(), config.flat()
    changed = {name: {"from": before[name], "to": value} for name, value in after.items() if before[name] != value}
    if run.done and not changed.keys() & LONGER:
        raise UserError(f"--resume {run.path}: another process has finished this run meanwhile")
    run.result.unlink(missing_ok=True)
    if changed:
        checkpoint = run.latest_checkpoint()
        change = {"step": step_of(checkpoint) if checkpoint else 0, "options": changed}
        run.write_config(config, [*stored["changes"], change], stored["data"], stored["processes"])
    begun = stored["processes"] or processes
    if begun == processes:
        return None
    return (
        f"begun on {begun} process{'es' * (begun > 1)}, goes on with {processes}: {config.train.batch_size} examples a "
        "step, all processes together, as before"
    )


@contextlib.contextmanager
def locked(run: RunFolder, main_process: bool) -> Iterator[None]:
    """Hold the folder's lock, on the main process of a run. The system releases it however that process ends.

    Raises:
        UserError: if another process holds the lock.
    """
    if not main_process:
        yield
        return
    with (run.path / ".lock").open("w") as file:
        if not lock(file):
            raise UserError(f"another process is working on {run.path}: wait for it or stop it first")
        yield


def rewind(run: RunFolder, step: int) -> None:
    """Set a stopped run's folder back to `step`: drop later lines, and files that were being written."""
    for path in run.checkpoints.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in run.path.rglob(".*.tmp-*"):
        path.unlink()
    for file in (run.metrics_file, run.predictions_file):
        keep_lines(file, lambda row: row["step"] <= step and row.get("stage") != "after")


def home_of(adapter: Path) -> RunFolder:
    """Return the folder with an adapter's calibration and schema: its run, or the adapter's own folder."""
    run = RunFolder(adapter.parent)
    return run if adapter.name == run.adapter.name and run.config.is_file() else RunFolder(adapter)


def adapter_folder(path: Path) -> Path:
    """Return the adapter in a run folder, or the adapter folder itself.

    Raises:
        UserError: if there is no adapter.
    """
    for folder in (path / "adapter", path):
        if (folder / WEIGHTS).is_file() and (folder / ADAPTER_CONFIG).is_file():
            return folder
    if not path.exists():
        raise UserError(f"{path}: there is no such folder{did_you_mean(path)}")
    if (path / USAGE).is_file():
        raise UserError(f"{path} holds merged weights and no adapter: read it with transformers, as its README.md says")
    raise UserError(f"{path} holds no adapter: expected {WEIGHTS} and {ADAPTER_CONFIG} in it or in its adapter/")


def adapter_usage(folder: Path) -> dict[str, Any] | None:
    """Return how an adapter of ours is to be used, such as prompt and max_new_tokens. None if it is not ours.

    Raises:
        UserError: if the file does not hold an object.
    """
    path = folder / USAGE
    if not path.is_file():
        return None
    usage = read_json(path)
    if not isinstance(usage, dict):
        raise UserError(f"{path} does not hold an object")
    return usage


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache  # what was imported does not change with the files
def _git_revision() -> str | None:
    """Return the revision of this code, with a + if it was changed since, or None outside a repository."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
