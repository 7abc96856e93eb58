"""What a run leaves in its folder, read as anybody would: as JSON, as lines of JSON and as files of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def result(run: Path) -> dict[str, Any]:
    return read_json(run / "result.json")


def predictions(run: Path, split: str, stage: str, step: int | None = None) -> list[dict[str, Any]]:
    """The rows of predictions.jsonl of one split and stage, and of one step where that is given."""
    rows = read_rows(run / "predictions.jsonl")
    return [row for row in rows if (row["split"], row["stage"]) == (split, stage) and step in (None, row["step"])]


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def logged(run: Path, name: str) -> list[float]:
    """A number that metrics.jsonl has for each step of training."""
    return [row["values"][name] for row in read_rows(run / "metrics.jsonl") if row["split"] == "train"]


def checkpoints(run: Path) -> list[int]:
    """The steps that have a checkpoint."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def weights(folder: Path) -> bytes:
    """The adapter in a folder, to be compared to the bit."""
    return (folder / WEIGHTS).read_bytes()


def last_weights(run: Path) -> bytes:
    return weights(run / "checkpoints" / f"step-{checkpoints(run)[-1]}")


def lively(model: str, folder: Path, factor: float = 8) -> str:
    """A copy of a model with larger weights, so that each picture gets an answer of its own.

    The small model of the tests answers nearly the same whatever it is shown, and would hide most mistakes.
    """
    shutil.copytree(model, folder)
    stored = load_file(folder / "model.safetensors")
    larger = {
        name: weight * factor if weight.ndim > 1 and "embed_tokens" not in name else weight
        for name, weight in stored.items()
    }
    save_file(larger, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
