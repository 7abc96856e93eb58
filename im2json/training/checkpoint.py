"""Checkpoints: complete or absent, and enough to go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PaliGemmaProcessor

from im2json.errors import UserError, WriteError, first_line
from im2json.files import atomically, damage, folder_atomically, write_json
from im2json.model.lora import read_adapter_weights, write_adapter_weights
from im2json.runs import USAGE, WEIGHTS, RunFolder, complete_checkpoints, rewind, step_of
from im2json.scoring.schema import Schema
from im2json.training.state import TrainState

BEST = "best.safetensors"
# What reading a file that was cut short, overwritten or mixed up raises, from JSON, pickle, safetensors and torch.
_DAMAGED = (OSError, RuntimeError, TypeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError)


def begin(
    run: RunFolder,
    model: PeftModel,
    processor: PaliGemmaProcessor,
    asked: dict[str, Any],
    schema: Schema,
    accelerator: Accelerator,
) -> Path | None:
    """Make the run folder ready for its next step; the last whole checkpoint to go on from, if there is one.

    adapter/ gets what stays the same for the whole run: PEFT's config, the processor, and in `asked` what the adapter
    wants to be asked and shown (see Workbench.asked). schema.json is written where there is none, so that it stays as
    it was edited.
    """
    if accelerator.is_main_process:
        for path in complete_checkpoints(run.checkpoints):
            if problem := damage(path):
                put_aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(put_aside, ignore_errors=True)
                path.rename(put_aside)
                accelerator.print(f"{path} is damaged ({problem}): passed over, and kept as {put_aside.name}")
        whole = complete_checkpoints(run.checkpoints)  # what is left of them
        if not whole and any(line.step for line in run.log()):
            accelerator.print("there is no whole checkpoint to go on from: this run begins anew")
        rewind(run, step_of(whole[-1]) if whole else 0)
        run.adapter.mkdir(exist_ok=True)
        with writing(run.adapter):
            processor.save_pretrained(run.adapter)
            model.peft_config["default"].save_pretrained(str(run.adapter))
        if not run.schema.exists():
            write_json(run.schema, schema)
        write_json(run.adapter / USAGE, asked)
    accelerator.wait_for_everyone()
    return next(reversed(complete_checkpoints(run.checkpoints)), None)


def write_adapter(model: PeftModel, run: RunFolder) -> None:
    """Make the present adapter the run's best: one file, replaced atomically."""
    with writing(run.adapter / WEIGHTS), atomically(run.adapter / WEIGHTS) as aside:
        write_adapter_weights(model, aside)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report a file that a library could not write as a WriteError.

    On a full disk torch raises a RuntimeError, safetensors an error of its own, and tokenizers a bare Exception.
    """
    try:
        yield
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, RuntimeError | SafetensorError):
            raise
        raise WriteError(f"{path} cannot be written: {first_line(error)}") from error


def save_checkpoint(
    run: RunFolder, model: PeftModel, optimizer: Any, scaler: Any, state: TrainState, keep: int
) -> None:
    """Write checkpoints/step-N and drop all but the last `keep`.

    It holds the best adapter so far as well: the run may have found a better one between this checkpoint and the
    moment it was stopped, which the resumed run has yet to find.
    """
    path = run.checkpoints / f"step-{state.step}"
    if path.exists():
        return
    with writing(path), folder_atomically(path) as aside:
        write_adapter_weights(model, aside / WEIGHTS)
        model.peft_config["default"].save_pretrained(str(aside))
        torch.save(
            {
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
            aside / "optimizer.pt",
        )
        if state.best_step is not None:
            shutil.copyfile(run.adapter / WEIGHTS, aside / BEST)
        write_json(aside / "state.json", dataclasses.asdict(state))
    drop_old(run, keep)


def drop_old(run: RunFolder, keep: int) -> None:
    """Remove all checkpoints but the last `keep`."""
    for old in complete_checkpoints(run.checkpoints)[:-keep]:
        dying = old.with_name(f".{old.name}.tmp")  # a kill in the middle leaves nothing that looks whole
        old.rename(dying)
        shutil.rmtree(dying)


def restore_paging(optimizer: Any) -> None:
    """Put moments that were paged back into memory that can be paged.

    Loaded from a file they are plain tensors that still say they are paged, and bitsandbytes (0.50) fails on them
    at the next update ("invalid argument" from its prefetch).
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if getattr(value, "is_paged", False):
                state[name] = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)


def load_checkpoint(
    path: Path, run: RunFolder, model: PeftModel, optimizer: Any, accelerator: Accelerator
) -> TrainState:
    """Put weights, optimizer and the best adapter back to what they were when this checkpoint was written.

    Raises:
        UserError: if a file of the checkpoint is missing or damaged.
    """
    device = "cpu" if accelerator.device.type == "cpu" else accelerator.device  # torch.load knows no cpu:1
    try:
        state = TrainState(**json.loads((path / "state.json").read_text("utf-8")))
        read_adapter_weights(model, path / WEIGHTS)
        stored = torch.load(path / "optimizer.pt", map_location=device, weights_only=True)
        optimizer.load_state_dict(stored["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(stored["scaler"])
        if accelerator.is_main_process and state.best_step is not None:
            with atomically(run.adapter / WEIGHTS) as aside:
                shutil.copyfile(path / BEST, aside)
    except _DAMAGED as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}): remove it to resume from the checkpoint before"
        ) from error
    restore_paging(optimizer.optimizer)
    accelerator.wait_for_everyone()
    return state
