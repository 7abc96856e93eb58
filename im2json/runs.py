"""A run folder: where everything that a run leaves lies, and writing it so that a crash leaves it whole.

runs/NAME/config.json        every resolved option, versions, git revision
          schema.json        the JSON Schema of the training targets, or --schema; to be edited as one likes
          metrics.jsonl      a line per log or evaluation
          predictions.jsonl  a line per evaluated example; `confidence` is its object with a probability for each leaf,
                             and `cut` marks one that --constrain has ended at the length limit
          checkpoints/step-N/
          adapter/           the best adapter, in PEFT's format, with the processor
          calibration.json   how far these probabilities can be believed, as validation showed
          report.html        the test split to look at: metrics, confidence, examples
          tb/                TensorBoard events
          result.json        written last: its presence means that the run is done
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from im2json.options import FIELDS, LANGUAGE_MODULES, PRESETS, TrainConfig, flag_name

PATHS = {
    "model": "tiny",
    "dataset": "receipts",
    "adapter": None,
    "schema": None,
}  # options that may be paths, but for the embedded
HUB_NAME = r"(?!\.)[\w.-]+/[\w.-]+"  # owner/name, of a model or data set
WEIGHTS = "adapter_model.safetensors"  # PEFT's names
ADAPTER_CONFIG = "adapter_config.json"
CHECKSUMS = "checksums.json"  # in a checkpoint: {file: SHA-256}
LONGER = {"steps", "epochs"}  # the options that a finished run can be resumed with
ASKED = "im2json.json"  # beside them: the base, the question and the form of the picture that the adapter was made for
ADAPTER_COMPANIONS = ("calibration.json", "schema.json")  # of the run, beside an adapter that left it
WARM_START_OPTIONS = ("prompt", "letterbox")  # of what stands there, what --adapter takes
# what decides the row of a picture, besides the adapter
READING_OPTIONS = ("model", "quant", "precision", "prompt", "letterbox", "max_new_tokens", "constrain", "check_sum")
VERSIONED = (
    "im2json",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "rapidfuzz",
)


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def schema(self) -> Path:
        return self.path / "schema.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def predictions(self) -> Path:
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

    @property
    def kept_step(self) -> int:
        """The step whose adapter a finished run has kept; 0 where it is not finished."""
        if not self.done:
            return 0
        result = json.loads(self.result.read_text("utf-8"))
        return result["best_step"] or result["step"]

    def read_config(self) -> TrainConfig:
        """The options of this run.

        Raises:
            ValueError: if the folder holds no run, or its config.json is not one of ours.
        """
        if not self.config.is_file():
            raise ValueError(f"{self.path} is not a run folder: it has no config.json")
        try:
            return TrainConfig.resolve(json.loads(self.config.read_text("utf-8"))["options"], preset="tiny")
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.config} does not hold a run's options: {error}") from error

    def write_config(
        self,
        config: TrainConfig,
        changes: Sequence[dict[str, Any]] = (),
        data: dict[str, str] | None = None,
        processes: int | None = None,
    ) -> None:
        """`changes`: what each --resume made different, {"step", "options": {name: {"from", "to"}}}. `processes`: on
        how many the run was begun."""
        versions = {name: _version(name) for name in VERSIONED} | {"python": sys.version.split()[0]}
        more = {"versions": versions, "git": _git_revision(), "data": data or {}, "processes": processes}
        write_json(self.config, {"options": config.flat(), **more, "changes": list(changes)})

    def latest_checkpoint(self) -> Path | None:
        """The whole checkpoint with the most steps."""
        steps = reversed(complete_checkpoints(self.checkpoints))
        return next((path for path in steps if damage(path) is None), None)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in the order of their steps; one that was being written has another name until it is whole."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Updates done when a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def check_output(output: str | None) -> None:
    """Refuse an --output that holds a run already.

    Raises:
        ValueError: saying what to do instead.
    """
    if output is None:
        if os.path.lexists("runs") and not Path("runs").is_dir():
            raise ValueError("runs, where a fresh run's folder would be made, is a file here: give --output")
        return
    run = RunFolder(Path(output))
    check_folder(run.path)
    if run.done:
        raise ValueError(f"--output {output} holds a finished run: choose another folder, or see evaluate.py {output}")
    if run.config.exists():
        raise ValueError(f"--output {output} holds an unfinished run: go on with --resume {output}, or choose another")


def check_folder(output: Path) -> None:
    """Refuse an --output that is no folder to write to, and cannot become one.

    Raises:
        ValueError: saying why.
    """
    if os.path.lexists(output) and not output.is_dir():
        raise ValueError(f"--output {output} is no folder: name one, or what can become one")
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--output {output}: {there} is not a folder that can be written to: choose another")


def make_folder(output: Path) -> None:
    """Make an --output.

    Raises:
        ValueError: if the system refuses.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output} cannot be made: {error.strerror}; choose another") from error


def new_run(config: TrainConfig) -> RunFolder:
    """Make the folder of a fresh run, at --output or under a new name in runs/."""
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


def claim(
    run: RunFolder, config: TrainConfig, fresh: bool, data: dict[str, str] | None = None, processes: int = 1
) -> str | None:
    """Look again, with the folder locked, whether it is free for a fresh run or still has one to go on with.

    A fresh run's config.json is written here, and what a resumed run changes is added to it. `data` tells by split
    which examples there are. Returns a line to say where the run was begun on another number of processes.

    Raises:
        ValueError: if another process was faster, or the data are not those that the run began with.
    """
    if fresh:
        check_output(str(run.path))
        run.write_config(config, data=data, processes=processes)
        return None
    stored = json.loads(run.config.read_text("utf-8"))
    other = [name for name, digest in (data or {}).items() if stored.get("data", {}).get(name, digest) != digest]
    if other:
        raise ValueError(
            f"--resume {run.path}: the examples or targets of {', '.join(other)} have changed since it began; put "
            f"{config.data.dataset} back as it was, or start a new run (--adapter {run.path} goes on from its best)"
        )
    before, after = run.read_config().flat(), config.flat()
    changed = {name: {"from": before[name], "to": value} for name, value in after.items() if before[name] != value}
    if run.done and not changed.keys() & LONGER:
        raise ValueError(f"--resume {run.path}: another process has finished this run meanwhile")
    run.result.unlink(missing_ok=True)
    if changed:
        checkpoint = run.latest_checkpoint()
        change = {"step": step_of(checkpoint) if checkpoint else 0, "options": changed}
        run.write_config(config, [*stored.get("changes", []), change], stored.get("data"), stored.get("processes"))
    begun = stored.get("processes") or processes
    if begun == processes:
        return None
    return (
        f"begun on {begun} process{'es' * (begun > 1)}, goes on with {processes}: {config.train.batch_size} examples a "
        "step, all processes together, as before"
    )


@contextlib.contextmanager
def locked(run: RunFolder, main_process: bool) -> Iterator[None]:
    """Keep other runs from writing to this folder; the system lets go of it however this process ends. Of a run on
    several processes the main one holds it.

    Raises:
        ValueError: if another process holds it.
    """
    if not main_process:
        yield
        return
    with (run.path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is working on {run.path}: wait for it or stop it first") from None
        yield


def rewind(run: RunFolder, step: int) -> None:
    """Make a stopped run's folder what it was at `step`: drop later lines, and what was being written at the end."""
    for path in run.checkpoints.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in run.path.rglob(".*.tmp-*"):
        path.unlink()
    for file in (run.metrics, run.predictions):
        keep_lines(file, lambda row: row["step"] <= step and row.get("stage") != "after")


def resumed_config(run: RunFolder, given: dict[str, Any], preset: str | None = None) -> TrainConfig:
    """A stopped run's options, with those that may change replaced by what was given now.

    Raises:
        ValueError: if the run is finished and not made longer, or an option differs that may not change.
    """
    try:
        config = run.read_config()
    except ValueError as error:
        raise ValueError(f"--resume {error}") from error
    given = _absolute(given if preset is None else {**PRESETS[preset], **given})
    if given.get("output") not in (None, str(run.path)):
        raise ValueError(f"--resume {run.path} goes on in that folder: leave --output out")
    stored = config.flat()
    fixed = {name for name, field in FIELDS.items() if not (field.metadata["free"] or field.metadata["later"])}
    differing = [name for name, value in given.items() if value != stored[name] and name in fixed]
    if differing:
        said = ", ".join(f"{flag_name(name)} was {stored[name]}, not {given[name]}" for name in differing)
        raise ValueError(f"--resume {run.path} goes on with the options it began with: {said}; start a new run instead")
    resumed = config.replace(**given)
    _check_length(run, config, resumed)
    return resumed


def _check_length(run: RunFolder, before: TrainConfig, after: TrainConfig) -> None:
    """Raises ValueError where a run would be resumed to an end that it has passed."""
    checkpoint = run.latest_checkpoint()
    done = step_of(checkpoint) if checkpoint else 0
    by_epochs = after.train.steps is None
    longer = after.train.epochs > before.train.epochs if by_epochs else after.train.steps > done  # type: ignore[operator]
    if run.done and (checkpoint is None or not longer):
        advice = f"--steps above {done}" if not by_epochs else f"--epochs above {before.train.epochs:g}"
        if checkpoint is None:
            advice = "a whole checkpoint, which it has not,"
        raise ValueError(f"--resume {run.path}: this run is finished; {advice} would make it longer")
    if not by_epochs and not longer and after.train.steps != done:
        raise ValueError(f"--resume {run.path}: --steps {after.train.steps} is less than the {done} that it has taken")


def fresh_options(given: dict[str, Any], preset: str | None = None) -> dict[str, Any]:
    """The options given for a fresh run, with those that --adapter has settled.

    These are LoRA's shape, and base, prompt and letterboxing unless given otherwise (the base by a preset, too).
    Folders are made absolute, so that the run can be gone on with from anywhere.

    Raises:
        ValueError: if --adapter holds no LoRA adapter, or an option given contradicts it.
    """
    given = _absolute(given)
    if given.get("adapter") is None:
        return given
    try:
        shape, more = _adapter_options(adapter_folder(Path(given["adapter"])))
    except ValueError as error:
        raise ValueError(f"--adapter {error}") from error
    if preset is not None and "model" in PRESETS.get(preset, {}):
        more.pop("model", None)
    for name, value in shape.items():
        if name in given and given[name] != value and name != "target_modules":
            raise ValueError(f"{flag_name(name)} {given[name]}: --adapter {given['adapter']} was made with {value}")
    modules = given.get("target_modules", shape["target_modules"])
    if _names(modules) != _names(shape["target_modules"]):
        raise ValueError(
            f"--target-modules {modules}: --adapter {given['adapter']} was made with {shape['target_modules']}"
        )
    return {**more, **given, **shape}


def _names(modules: str) -> list[str]:
    return sorted(name.strip() for name in modules.split(","))


def _absolute(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: os.path.abspath(value)
        if name in PATHS and value not in (None, PATHS[name]) and Path(value).exists()
        else value
        for name, value in given.items()
    }


def _adapter_options(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an adapter says of itself: LoRA's shape, and base and prompt as far as they are known."""
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
        if config["peft_type"] != "LORA":
            raise ValueError(f"its peft_type is {config['peft_type']}, not LORA")
        modules = config["target_modules"]
        shape = {
            "r": int(config["r"]),
            "alpha": float(config["lora_alpha"]),
            "dropout": float(config["lora_dropout"]),
            "rslora": bool(config.get("use_rslora")),
            "dora": bool(config.get("use_dora")),
            "target_modules": ",".join(sorted(modules)) if isinstance(modules, list) else modules,
        }
        if modules == LANGUAGE_MODULES:
            shape["target_modules"] = "language"
        more = {"model": config["base_model_name_or_path"]} if config.get("base_model_name_or_path") else {}
        asked = _asked(folder) or {}
        return shape, more | {name: asked[name] for name in WARM_START_OPTIONS if name in asked}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a LoRA adapter: {error}") from error


def _asked(folder: Path) -> dict[str, Any] | None:
    """What an adapter of ours says of how it is to be used; None beside one from elsewhere."""
    path = folder / ASKED
    asked = json.loads(path.read_text("utf-8")) if path.is_file() else None
    if not isinstance(asked, dict | None):
        raise ValueError(f"{path} does not hold an object")
    return asked


def reading_config(path: Path, given: dict[str, Any]) -> TrainConfig:
    """The options that pictures are read with by the adapter of a run, or by an adapter folder, but for those given.

    An adapter that was made elsewhere is read on the base as it is, and asked the usual prompt, unless told otherwise.

    Raises:
        ValueError: if there is no LoRA adapter, or it does not say for which base.
    """
    folder = adapter_folder(path)
    shape, more = _adapter_options(folder)
    asked = _asked(folder)
    known = {"quant": "none"} if asked is None else {name: asked[name] for name in READING_OPTIONS if name in asked}
    run = RunFolder(path)
    if folder == run.adapter and run.config.is_file():
        more = run.read_config().flat()
    values = {**more, **shape, **known, "schema": str(home_of(folder).schema), **given, "adapter": str(folder)}
    if "model" not in values:
        raise ValueError(f"{folder / ADAPTER_CONFIG} names no base model: give --model")
    config = TrainConfig.resolve(values, preset="tiny")
    if "schema" in given and not config.decode.constrain:
        raise ValueError("--schema goes with --constrain")
    return config


def reading_digest(config: TrainConfig) -> str:
    """What tells the adapter, its calibration, base and options that pictures are read with from others; 12 hexadecimal
    digits."""
    assert config.model.adapter is not None
    adapter = Path(config.model.adapter)
    decisive = [adapter / WEIGHTS, home_of(adapter).calibration]
    if config.decode.constrain:
        decisive.append(Path(config.decode.schema or ""))
    files = [_sha256(path) for path in decisive if path.is_file()]
    decides = {name: config.flat()[name] for name in READING_OPTIONS}
    return hashlib.sha256(json.dumps([files, decides], sort_keys=True).encode()).hexdigest()[:12]


def home_of(adapter: Path) -> RunFolder:
    """The folder with an adapter's calibration: its run, or itself where it is alone."""
    run = RunFolder(adapter.parent)
    return run if adapter.name == run.adapter.name and run.config.is_file() else RunFolder(adapter)


def adapter_folder(path: Path) -> Path:
    """The adapter in a run folder, or the adapter folder itself.

    Raises:
        ValueError: if there is no adapter.
    """
    for folder in (path / "adapter", path):
        if (folder / WEIGHTS).is_file() and (folder / ADAPTER_CONFIG).is_file():
            return folder
    raise ValueError(f"{path} holds no adapter: expected {WEIGHTS} and {ADAPTER_CONFIG} in it or in its adapter/")


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A path to write aside; it takes `path`'s place, whole and on disk, when the block ends without an error."""
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield aside
        _sync(aside)
        aside.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """The same for a folder, which must not exist yet; it gets checksums, by which `damage` tells."""
    aside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # left by a run that was killed here
    aside.mkdir(parents=True)
    yield aside
    (aside / CHECKSUMS).write_text(json.dumps({file.name: _sha256(file) for file in sorted(aside.iterdir())}, indent=2))
    for file in aside.rglob("*"):
        _sync(file)
    _sync(aside)
    os.rename(aside, path)
    _sync(path.parent)


@contextlib.contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """A folder to fill aside; it takes `path`'s place when the block ends without an error, and is gone otherwise.

    Raises:
        ValueError: if `path` is there already.
    """
    if os.path.lexists(path):
        raise ValueError(f"{path} is there already: choose another folder, or remove it")
    aside = path.absolute().with_name(f".{path.absolute().name}.tmp-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
            _sync(file)
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `folder_atomically` wrote; None where it is whole."""
    try:
        for name, digest in json.loads((folder / CHECKSUMS).read_text("utf-8")).items():
            if _sha256(folder / name) != digest:
                return f"{name} is not as it was written"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    with atomically(path) as aside:
        aside.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json_line(row) + "\n" for row in rows)


def json_line(row: dict[str, Any]) -> str:
    """A row as it stands in a JSON-lines file."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which a model or a file name may hold and no UTF-8 file can
        return json.dumps(row)
    return text


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a JSON-lines file; a last line that a crash cut short is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON-lines file with the rows for which `keep` holds."""
    if path.exists():
        with atomically(path) as aside:
            append_lines(aside, filter(keep, read_lines(path)))


def _sync(path: Path) -> None:
    """Have the system put a file or a folder's entries on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the code that runs, with a + if it was changed since; None outside a repository."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
