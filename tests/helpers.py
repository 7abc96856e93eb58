"""What tests import: a data set to write, runs to compare, and scripts to start. Fixtures are in conftest.py."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from forks import Process
from PIL import Image
from safetensors.torch import load_file

from im2json.data.collate import Batch
from im2json.families import family_of
from im2json.files import read_lines
from im2json.model.loss import summed_loss
from im2json.records import Prediction
from im2json.runs import RunFolder, complete_checkpoints

ROOT = Path(__file__).parents[1]


def slow(*cases: Any) -> list[Any]:
    """Return the cases of a parametrised test as ones that the fast suite leaves out."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


COUNTS = {"train": 10, "validation": 4, "test": 3}


def write_dataset(folder: Path, **counts: int) -> Path:
    """Write an imagefolder of small pictures of noise whose targets differ in length."""
    rng = np.random.default_rng(0)
    for split, count in (COUNTS | counts).items():
        (folder / split).mkdir(parents=True)
        rows = []
        for i in range(count):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
            target = {"total": str(i * 37), "menu": [{"nm": "abc"[: 1 + i % 3] * (1 + i % 4)}]}
            rows.append({"file_name": f"{i}.png", "ground_truth": json.dumps({"gt_parse": target})})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / split / "metadata.jsonl").write_text(lines, "utf-8")
    return folder


def lock_folder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let no folder of this name be listed: a test may run as root, whom no permission stops."""
    listdir = os.listdir

    def refuse(path: str) -> list[str]:
        if os.path.basename(path) == name:
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)


def reset_accelerate() -> None:
    """Let the next run in this process choose device and precision afresh, as a new process would."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


# --- runs, and what is the same in two of them


MEASURED = {"target_tokens_per_second", "memory_gib"}
QLORA = ("--quant", "nf4", "--optimizer", "paged_adamw_8bit", "--r", 64, "--dropout", 0.2)  # matrices of 4,096: 8 bits
RESUMED = (*QLORA, "--steps", 6, "--save-every", 1, "--eval-batch-size", 2, "--metric", "edit_distance", "--keep", 3)


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the times, which differ between two equal runs."""
    return [
        {**row, "time": None, "values": {k: v for k, v in row["values"].items() if k not in MEASURED}}
        for row in read_lines(run.metrics_file)
    ]


def assert_same(one: Any, other: Any, *, equal: bool = True) -> None:
    """Assert that two values, tensors included, are equal to the bit (or, with `equal=False`, that they are not)."""
    assert same(one, other) is equal


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def dtypes(value: Any) -> set[torch.dtype]:
    """Return the dtypes of all tensors inside a value."""
    if isinstance(value, torch.Tensor):
        return {value.dtype}
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return {dtype for item in values for dtype in dtypes(item)}


def checkpoint(run: RunFolder, step: int) -> dict[str, Any]:
    """Return all parts of a checkpoint, without the times."""
    folder = run.checkpoints / f"step-{step}"
    state = json.loads((folder / "state.json").read_text())
    state.pop("seconds")
    best = folder / "best.safetensors"
    return {
        "adapter": load_file(folder / "adapter_model.safetensors"),
        "config": adapter_config(folder),
        "best": load_file(best) if best.exists() else None,
        "optimizer": torch.load(folder / "optimizer.pt", weights_only=True),
        "state": state,
    }


def adapter_config(folder: Path) -> dict[str, Any]:
    stored = json.loads((folder / "adapter_config.json").read_text())
    return {**stored, "target_modules": sorted(stored["target_modules"])}  # PEFT holds a set


def leftovers(run: RunFolder) -> dict[str, Any]:
    """Return everything that a run leaves, without the times."""
    result = json.loads(run.result.read_text())
    for name in ("seconds", "examples_per_second", "peak_memory_bytes"):
        del result[name]
    steps = [int(path.name.removeprefix("step-")) for path in complete_checkpoints(run.checkpoints)]
    return {
        "metrics": metrics(run),
        "predictions": list(read_lines(run.predictions_file)),
        "result": result,
        "adapter": load_file(run.adapter / "adapter_model.safetensors"),
        "adapter config": adapter_config(run.adapter),
        "checkpoints": {step: checkpoint(run, step) for step in steps},
    }


def assert_same_runs(one: RunFolder, other: RunFolder) -> None:
    """Assert that two runs left the same to the bit."""
    first, second = leftovers(one), leftovers(other)
    for name in first:
        assert_same(first[name], second[name])


def prediction(row: dict[str, Any]) -> Prediction:
    """Return the record of a row of id, text and target, with what it leaves out filled in."""
    return Prediction.from_json({"step": 1, "split": "test", "stage": "after", "id": "x", **row})


# --- models


def summed_loss_of(model: Any, batch: Batch) -> torch.Tensor:
    """Return the summed loss of a model, with or without LoRA, on a batch, as a training step takes it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return summed_loss(base, family_of(base.config).hidden_states(base, batch.inputs), batch.labels)


def prefix_inputs(collator: Any, pictures: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what transformers' PaliGemma generates from for these pictures."""
    ids = torch.tensor(collator.prefixes(pictures))  # B x P: all prefixes are equally long
    types = torch.zeros_like(ids)
    if collator.both_ways is not None:
        types[:, collator.both_ways :] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, **pictures}


# --- work, which no other process on the machine changes


def calls_of(function: Callable[..., Any], *given: Any) -> int:
    """Return how many functions, of Python and built in, one call calls."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function(*given)
    finally:
        sys.setprofile(None)
    return count


# --- scripts, in this process and in others


def clear_error(result: Result) -> str:
    """Return the one line that a script stopped with."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.startswith("Error: "))
    assert lines[first + 1 :] == []
    return lines[first].removeprefix("Error: ")


# Runs a script in several processes as torchrun does, but through its Python API: they are forked, so that they share
# what was imported.
SEVERAL = """
import importlib, sys
from accelerate import PartialState
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def main(script, *flags):
    importlib.import_module(script).main(flags, standalone_mode=False)
    sys.stdout.write(f"one of {PartialState().num_processes}\\n")  # at once, as the others write there too

processes, *arguments = sys.argv[1:]
config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=int(processes), rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    run_id="test", max_restarts=0, start_method="fork",
)
elastic_launch(config, main)(*arguments)
"""
TORCHRUN = "import runpy; runpy.run_module('torch.distributed.run', run_name='__main__', alter_sys=True)"


def environment() -> dict[str, str]:
    """Return the environment of the tests without the variables that make a process one of several."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD", "LOCAL_"))}


def torchrun(processes: int, program: str, *flags: object) -> Process:
    """Start a program in several processes with torchrun, each of them a Python that imports for itself.

    `accelerate launch` calls torchrun too where there are GPUs; with --cpu it would start a single process.
    """
    command = ["--standalone", "--nproc_per_node", str(processes), "--no-python", "--", sys.executable, "-c", program]
    return Process(TORCHRUN, *command, *map(str, flags), env=environment())


def launch(script: str, *flags: object, processes: int = 2, before: str = "") -> str:
    """Run a script in several processes, each after the code in `before`.

    Returns:
        What the processes print on both streams.

    Raises:
        AssertionError: if the script fails.
    """
    process = Process(before + SEVERAL, str(processes), script, *map(str, flags), env=environment())
    printed = "".join(process.communicate(timeout=240))
    assert process.returncode == 0, printed
    assert printed.count(f"one of {processes}") == processes
    return printed


def wait_for(happened: Callable[[], Any], process: Process | None = None, seconds: float = 120) -> None:
    """Wait until something has happened, and fail where it takes too long or the process that does it has ended."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.01)
