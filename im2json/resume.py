"""The options that a run, an adapter or a sweep's point goes on with, from what was given and what is stored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from im2json.errors import UserError
from im2json.files import read_json, sha256
from im2json.options import DECODERS, OPTIONS, PRESETS, TrainConfig, TrainOptions, flag_name, language_modules
from im2json.records import Content
from im2json.runs import (
    ADAPTER_CONFIG,
    WEIGHTS,
    RunFolder,
    adapter_folder,
    adapter_usage,
    check_folder,
    check_output,
    home_of,
    step_of,
)
from im2json.text import command_line

PATHS = {"model": "tiny", "dataset": "receipts", "adapter": None, "schema": None}
"""The options that may be paths, each with the one value that is none."""
WARM_START_OPTIONS = ("prompt", "letterbox", "trim", "image_tokens", "prefix_mask")
"""Options that are kept with the adapter, and taken from it unless they are given."""
SHOWN = 5
"""Examples that an error names."""
READING_OPTIONS = (
    "model", "quant", "precision", *WARM_START_OPTIONS, "max_new_tokens", "constrain", "check_sum",
)  # fmt: skip
"""The options that decide what is read in a picture, besides the adapter."""


EVALUATION_OPTIONS = ("precision", "constrain", "schema", "eval_batch_size", "check_sum", "threads")
"""What may differ from the run's own options when it is evaluated."""
EXTRACTION_OPTIONS = (
    "model",
    "quant",
    *WARM_START_OPTIONS,
    "max_new_tokens",
    *EVALUATION_OPTIONS,
)
"""What may differ from the run's own options when pictures are read with it."""


def training_config(stopped: RunFolder | None, given: dict[str, Any], preset: str | None = None) -> TrainConfig:
    """Return the options of a run to train: of a stopped one, or of a new one, whose folder must be free.

    Raises:
        UserError: naming the option that is wrong, or what is in the way.
    """
    if stopped is not None:
        return resumed_config(stopped, given, preset)
    config = TrainConfig.resolve(fresh_options(given, preset), preset)
    check_output(config.train.output)
    return config


def resumed_config(run: RunFolder, given: dict[str, Any], preset: str | None = None) -> TrainConfig:
    """Return a stopped run's options, with those that may change replaced by the given ones.

    Raises:
        UserError: if the run is finished and not made longer, or an option differs that may not change.
    """
    try:
        config = run.read_config()
    except UserError as error:
        raise UserError(f"--resume {error}") from error
    check_folder(run.path, "--resume")
    given = _absolute(given if preset is None else {**PRESETS[preset], **given})
    if given.get("output") not in (None, str(run.path)):
        raise UserError(f"--resume {run.path} goes on in that folder: leave --output out")
    stored = config.flat()
    differing = [
        name for name, value in given.items() if value != stored[name] and not OPTIONS[name].changeable_on_resume
    ]
    if differing:
        said = ", ".join(f"{flag_name(name)} was {stored[name]}, not {given[name]}" for name in differing)
        raise UserError(f"--resume {run.path} goes on with the options it began with: {said}; start a new run instead")
    resumed = config.replace(**given)
    _check_length(run, config, resumed)
    return resumed


def _check_length(run: RunFolder, before: TrainConfig, after: TrainConfig) -> None:
    """Refuse to resume a finished run that would not become longer, or any run to steps that it has passed.

    Raises:
        UserError: saying which value of --steps or --epochs would be right.
    """
    checkpoint = run.latest_checkpoint()
    done = step_of(checkpoint) if checkpoint else 0
    if run.done and checkpoint is None:
        raise UserError(
            f"--resume {run.path}: this run is finished. It has no complete checkpoint, so it cannot be trained longer."
        )
    finished = f"--resume {run.path}: this run is already finished. To train it longer, pass"
    if after.train.steps is None:
        if run.done and after.train.epochs <= before.train.epochs:
            raise UserError(f"{finished} --epochs above {before.train.epochs:g}.")
    elif after.train.steps <= done:
        if run.done:
            raise UserError(f"{finished} --steps above {done}.")
        check_end(run, after.train, after.train.steps)


def check_end(run: RunFolder, options: TrainOptions, total: int) -> None:
    """Refuse to resume a run to fewer steps than it has taken.

    Args:
        total: the steps that the run would have.

    Raises:
        UserError: if it has taken more.
    """
    checkpoint = run.latest_checkpoint()
    done = step_of(checkpoint) if checkpoint else 0
    if total < done:
        wanted = f"--epochs {options.epochs:g} ({total} steps)" if options.steps is None else f"--steps {total}"
        raise UserError(f"--resume {run.path}: {wanted} is less than the {done} steps that the run has taken")


def check_unchanged(run: RunFolder, dataset: str, lost: Mapping[str, Mapping[str, str]], total: int) -> None:
    """Refuse to resume a run whose examples are not what they were.

    Args:
        lost: by split, the id of each example that is gone or has changed, and what became of it.
        total: how many examples the run began with.

    Raises:
        UserError: naming the first of them.
    """
    fates = [f"{id} ({fate})" for split in lost.values() for id, fate in split.items()]
    if fates:
        more = f" and {len(fates) - SHOWN} more" if len(fates) > SHOWN else ""
        raise UserError(
            f"--resume {run.path}: its data changed since it began ({len(fates)} of {total} examples): "
            f"{', '.join(fates[:SHOWN])}{more}; put {dataset} back as it was, or start a new run "
            f"({command_line('--adapter', run.path)} goes on from its best)"
        )


def trained_contents(adapter: Path, notes: list[str]) -> set[Content]:
    """Return what an adapter was trained on, by its run and by those whose adapters it began with.

    Where the folder of one of these runs is not at hand, or keeps no splits.json, `notes` gets a line that says so.
    """
    contents: set[Content] = set()
    seen: list[Path] = []
    following: Path | None = adapter
    while following is not None and following not in seen:
        seen.append(following)
        folders = (following, following.parent, following.parent.parent)  # RUN, RUN/adapter, RUN/checkpoints/step-N
        run = next((run for run in map(RunFolder, folders) if run.splits.is_file()), None)
        record = None if run is None else run.read_splits()
        if run is None or record is None:
            notes.append(
                f"--adapter {following}: no splits.json says what it was trained on, so rows that this run is tested "
                "on may be among that"
            )
            break
        contents.update(record.splits["train"].values())
        before = run.read_config().model.adapter
        following = None if before is None else Path(before)
    return contents


def fresh_options(given: dict[str, Any], preset: str | None = None) -> dict[str, Any]:
    """Return the options of a new run: the given ones, and those that --adapter settles.

    An adapter settles the shape of LoRA, and the base, the prompt and how pictures are seen unless they are given (or,
    for the base, a preset names one). Folders are made absolute, so that the run can be resumed from any directory.

    Raises:
        UserError: if --adapter holds no LoRA adapter, or an option given contradicts it.
    """
    given = _absolute(given)
    if given.get("adapter") is None:
        return given
    try:
        shape, more = _adapter_options(adapter_folder(Path(given["adapter"])))
    except UserError as error:
        raise UserError(f"--adapter {error}") from error
    if preset is not None and "model" in PRESETS.get(preset, {}):
        more.pop("model", None)
    for name, value in shape.items():
        if name in given and given[name] != value and name != "target_modules":
            raise UserError(f"{flag_name(name)} {given[name]}: --adapter {given['adapter']} was made with {value}")
    modules = given.get("target_modules", shape["target_modules"])
    if _names(modules) != _names(shape["target_modules"]):
        raise UserError(
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
    """Return the shape of an adapter's LoRA, and its base, prompt and way of seeing pictures as far as they are named.

    Raises:
        UserError: if its files do not describe a LoRA adapter.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    try:
        if config["peft_type"] != "LORA":
            raise UserError(f"{path} describes no LoRA adapter: its peft_type is {config['peft_type']}, not LORA")
        modules = config["target_modules"]
        shape = {
            "r": int(config["r"]),
            "alpha": float(config["lora_alpha"]),
            "dropout": float(config["lora_dropout"]),
            "rslora": bool(config.get("use_rslora")),
            "dora": bool(config.get("use_dora")),
            "target_modules": modules if isinstance(modules, str) else ",".join(sorted(modules)),
        }
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} describes no LoRA adapter: {error}") from error
    if modules in map(language_modules, DECODERS):
        shape["target_modules"] = "language"
    base = {"model": config["base_model_name_or_path"]} if config.get("base_model_name_or_path") else {}
    usage = adapter_usage(folder) or {}
    return shape, base | {name: usage[name] for name in WARM_START_OPTIONS if name in usage}


def evaluated_config(run: RunFolder, given: dict[str, Any]) -> TrainConfig:
    """Return a run's options for evaluating it; the given ones win.

    The longest answer is that of training, whatever the longest target is by now.

    Raises:
        UserError: if the folder holds no run, or an option is wrong.
    """
    _check_names(given, EVALUATION_OPTIONS)
    config = run.read_config().replace(**given)
    usage = adapter_usage(run.adapter) or {}
    if config.decode.max_new_tokens is None and "max_new_tokens" in usage:
        config = config.replace(max_new_tokens=usage["max_new_tokens"])
    _check_schema(given, config)
    return config


def _check_names(given: dict[str, Any], allowed: Sequence[str]) -> None:
    for name in given:
        if name not in allowed:
            raise UserError(
                f"{name}: leave it out, the run's own value counts; the options here are {', '.join(allowed)}"
            )


def _check_schema(given: dict[str, Any], config: TrainConfig) -> None:
    if "schema" in given and not config.decode.constrain:
        raise UserError("--schema goes with --constrain")


def reading_config(path: Path, given: dict[str, Any]) -> TrainConfig:
    """Return the options for reading pictures with the adapter of a run or of an adapter folder; the given ones win.

    An adapter that was made elsewhere is used on the unquantised base and with the default prompt, unless the given
    options say otherwise.

    Raises:
        UserError: if there is no LoRA adapter, or it does not say for which base.
    """
    _check_names(given, EXTRACTION_OPTIONS)
    folder = adapter_folder(path)
    shape, more = _adapter_options(folder)
    usage = adapter_usage(folder)
    known = {"quant": "none"} if usage is None else {name: usage[name] for name in READING_OPTIONS if name in usage}
    run = RunFolder(path)
    if folder == run.adapter and run.config.is_file():
        more = run.read_config().flat()
    values = {**more, **shape, **known, "schema": str(home_of(folder).schema), **given, "adapter": str(folder)}
    if "model" not in values:
        raise UserError(f"{folder / ADAPTER_CONFIG} names no base model: give --model")
    config = TrainConfig.from_values(values)
    _check_schema(given, config)
    return config


def reading_digest(config: TrainConfig) -> str:
    """Return 12 hexadecimal digits that differ where the adapter, its calibration, its base or an option that decides
    what is read differs."""
    assert config.model.adapter is not None
    adapter = Path(config.model.adapter)
    decisive = [adapter / WEIGHTS, home_of(adapter).calibration]
    if config.decode.constrain:
        decisive.append(Path(config.decode.schema or ""))
    files = [sha256(path) for path in decisive if path.is_file()]
    decides = config.identity(READING_OPTIONS)
    return hashlib.sha256(json.dumps([files, decides], sort_keys=True).encode()).hexdigest()[:12]
