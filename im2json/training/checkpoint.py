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

from im2json.errors import UserError, WriteError, first_line
from im2json.files import atomically, damage, folder_atomically, write_json
from im2json.model.lora import read_adapter_weights, write_adapter_weights
from im2json.runs import USAGE, WEIGHTS, RunFolder, complete_checkpoints, rewind, step_of
from im2json.scoring.schema import Schema
from im2json.training.state import TrainState
from im2json.training.update import Update

BEST = "best.safetensors"
# Raised by JSON, pickle, safetensors and torch when a file was cut short, overwritten or mixed up.
_DAMAGED = (OSError, RuntimeError, TypeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError)


def begin(
    run: RunFolder,
    model: PeftModel,
    processor: Any,
    usage: dict[str, Any],
    schema: Schema | None,
    accelerator: Accelerator,
) -> Path | None:
    """Make the run folder ready for its next step, and return the last whole checkpoint, if there is one.

    adapter/ gets what stays the same for the whole run: PEFT's config, the processor, and in `usage` the prompt and
    form of pictures that the adapter is trained for. schema.json is written only if there is none, so that an edited
    one stays.
    """
    if accelerator.is_main_process:
        for path in complete_checkpoints(run.checkpoints):
            if problem := damage(path):
                put_aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(put_aside, ignore_errors=True)
                path.rename(put_aside)
                accelerator.print(f"{path} is damaged ({problem}): passed over, and kept as {put_aside.name}")
        whole = complete_checkpoints(run.checkpoints)  # those that are left
        if not whole and any(line.step for line in run.log()):
            accelerator.print("there is no whole checkpoint to go on from: this run begins anew")
        rewind(run, step_of(whole[-1]) if whole else 0)
        run.adapter.mkdir(exist_ok=True)
        with writing(run.adapter):
            processor.save_pretrained(run.adapter)
            model.peft_config["default"].save_pretrained(str(run.adapter))
        if schema is not None and not run.schema.exists():
            write_json(run.schema, schema)
        write_json(run.adapter / USAGE, usage)
    accelerator.wait_for_everyone()
    return next(reversed(complete_checkpoints(run.checkpoints)), None)


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


class Checkpoints:
    """Where a run stands, and how it gets on disk. On all processes but the main one, nothing is written.

    Args:
        update: what changes from step to step: the adapter's weights and the optimizer.
        keep: how many checkpoints to keep.
    """

    def __init__(self, run: RunFolder, update: Update, keep: int) -> None:
        self.run = run
        self.update = update
        self.keep = keep
        self.state = TrainState()

    def keep_adapter(self) -> None:
        """Make the present adapter the run's best: one file, replaced atomically."""
        if self.update.accelerator.is_main_process:
            weights = self.run.adapter / WEIGHTS
            with writing(weights), atomically(weights) as aside:
                write_adapter_weights(self.update.forward.model, aside)

    def save(self) -> None:
        """Write checkpoints/step-N and drop all but the last `keep`.

        It holds the best adapter so far as well: the run may have found a better one between this checkpoint and the
        moment it was stopped, which the resumed run has yet to find.
        """
        accelerator, model, state = self.update.accelerator, self.update.forward.model, self.state
        path = self.run.checkpoints / f"step-{state.step}"
        if path.exists() or not accelerator.is_main_process:
            return
        with writing(path), folder_atomically(path) as aside:
            write_adapter_weights(model, aside / WEIGHTS)
            model.peft_config["default"].save_pretrained(str(aside))
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            torch.save({"optimizer": self.update.optimizer.state_dict(), "scaler": scaler}, aside / "optimizer.pt")
            if state.best_step is not None:
                shutil.copyfile(self.run.adapter / WEIGHTS, aside / BEST)
            write_json(aside / "state.json", dataclasses.asdict(state))
        self.drop_old()

    def drop_old(self) -> None:
        """Remove all checkpoints but the last `keep`."""
        for old in complete_checkpoints(self.run.checkpoints)[: -self.keep]:
            dying = old.with_name(f".{old.name}.tmp")  # a kill in the middle leaves nothing that looks whole
            old.rename(dying)
            shutil.rmtree(dying)

    def restore(self, path: Path) -> None:
        """Put weights, optimizer, state and the best adapter back to what they were when this checkpoint was written.

        Raises:
            UserError: if a file of the checkpoint is missing or damaged.
        """
        accelerator, optimizer = self.update.accelerator, self.update.optimizer
        device = "cpu" if accelerator.device.type == "cpu" else accelerator.device  # torch.load knows no cpu:1
        try:
            self.state = TrainState(**json.loads((path / "state.json").read_text("utf-8")))
            read_adapter_weights(self.update.forward.model, path / WEIGHTS)
            stored = torch.load(path / "optimizer.pt", map_location=device, weights_only=True)
            optimizer.load_state_dict(stored["optimizer"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(stored["scaler"])
            best = (path / BEST).read_bytes() if self.state.best_step is not None else None
        except torch.OutOfMemoryError:
            raise
        except _DAMAGED as error:
            raise UserError(
                f"{path} cannot be read ({first_line(error)}): remove it to resume from the checkpoint before"
            ) from error
        restore_paging(optimizer.optimizer)
        if accelerator.is_main_process:
            if best is not None:
                with atomically(self.run.adapter / WEIGHTS) as aside:
                    aside.write_bytes(best)
            self.drop_old()  # if the run was stopped before it came to that
        accelerator.wait_for_everyone()


def restore_paging(optimizer: Any) -> None:
    """Put moments that were paged back into memory that can be paged.

    Loaded from a file they are plain tensors that are still marked as paged, and bitsandbytes (0.50) fails on them at
    the next update ("invalid argument" from its prefetch).
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if getattr(value, "is_paged", False):
                state[name] = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
