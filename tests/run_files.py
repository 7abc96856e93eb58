"""What a run leaves in its folder, read as anybody would: as JSON, as lines of JSON and as files of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from im2json.scoring import StreamingEvaluator

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


def figures(run: Path) -> dict[str, Any]:
    """All that a run's files say about how it went, but for times and memory."""
    found, rows = result(run), read_rows(run / "metrics.jsonl")
    lora = read_json(run / "adapter" / "adapter_config.json")
    return {
        "losses": logged(run, "loss"),
        "norms": logged(run, "grad_norm"),
        "rates": logged(run, "lr"),
        "counts": (found["examples"], found["target_tokens"]),
        "steps": [(row["split"], row.get("stage"), row["step"], row["values"].get("num")) for row in rows],
        "best_step": found["best_step"],
        "validation": found["validation"],
        "test": found["test"],
        **{stage: answers(run, stage) for stage in ("before", "during", "after")},
        "columns": {name for row in read_rows(run / "predictions.jsonl") for name in row},
        "last_weights": last_weights(run),
        "best_weights": weights(run / "adapter"),
        "checkpoints": checkpoints(run),
        "lora": {**lora, "base_model_name_or_path": None, "target_modules": sorted(lora["target_modules"])},
        "reading": read_json(run / "adapter" / "im2json.json"),
        "schema": read_json(run / "schema.json"),
    }


def answers(run: Path, stage: str) -> list[tuple[str, str]]:
    rows = read_rows(run / "predictions.jsonl")
    return [(row["id"], row["text"]) for row in rows if row["stage"] == stage]


def different(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The names of the figures that two runs do not share; losses and norms may differ by rounding."""
    tolerances = {"losses": {"abs": 1e-4}, "norms": {"rel": 1e-2}}
    wanted = {
        name: pytest.approx(value, **tolerances[name]) if name in tolerances else value for name, value in other.items()
    }
    return {name for name, value in one.items() if value != wanted[name]}


def scores(rows: list[dict[str, Any]]) -> Any:
    """The metrics of these predictions, to be compared up to the order in which they are added."""
    evaluator = StreamingEvaluator()
    for row in rows:
        evaluator.update(row["text"], row["target"], id=row["id"])
    return pytest.approx(evaluator.compute())


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


def one_field(values: list[str]) -> dict[str, Any]:
    """The JSON Schema of an object with one of these values in its only field."""
    properties = {"total": {"enum": values}}
    return {"type": "object", "properties": properties, "required": ["total"], "additionalProperties": False}
