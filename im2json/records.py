"""The typed lines of a run's files: predictions.jsonl, metrics.jsonl, splits.json and result.json."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from im2json.errors import UserError
from im2json.jsontext import Reading, read

SPLITS = ("train", "validation", "test")


class EvaluationKey(NamedTuple):
    """Which evaluation of a run a prediction is from."""

    step: int  # optimizer updates that the adapter had seen
    split: str
    stage: str  # of training: before (the base alone), during (every N steps) or after (the adapter that was kept)


def _check_types(row: Mapping[str, Any], **types: type) -> None:
    """Raise a KeyError or TypeError if a line lacks one of these keys, or holds a value of another type there."""
    for name, kind in types.items():
        if not isinstance(row[name], kind):
            raise TypeError(f"{name} is {row[name]!r}")


@dataclass(frozen=True)
class Prediction:
    """An evaluated example: a line of predictions.jsonl."""

    step: int
    split: str
    stage: str
    id: str
    text: str  # what the model wrote
    reading: Reading  # of the text, so that it is read only once
    target: dict[str, Any]
    confidence: dict[str, Any] | None = None  # the object in the text with a probability for each leaf
    has_confidence: bool = True  # False for lines of runs that did not keep it yet
    cut: bool = False  # --constrain ended the text at the length limit
    constrained: bool = False  # the text was held to a schema
    checks: Mapping[str, bool | None] = dataclasses.field(default_factory=dict)  # --check-sum: whether each holds
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)  # this example's own metrics

    @property
    def document(self) -> dict[str, Any]:
        """The object that the text was read as; empty if it is unreadable."""
        return self.reading.value or {}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Prediction:
        """Return the record of a line.

        Raises:
            KeyError, TypeError: if the line was not written by a run.
        """
        _check_types(row, step=int, split=str, stage=str, id=str, text=str, target=dict)
        stored = {field.name: row[field.name] for field in dataclasses.fields(cls) if field.name in row}
        return cls(**stored, reading=read(row["text"]), has_confidence="confidence" in row)

    def to_json(self) -> dict[str, Any]:
        """Return the line, in the order of keys that the file has always had."""
        reading = self.reading
        return {
            "step": self.step,
            "split": self.split,
            "stage": self.stage,
            **({"constrained": True} if self.constrained else {}),
            "id": self.id,
            "text": self.text,
            "parsed": reading.value if reading.how == "strict" else None,
            "confidence": self.confidence,
            **({"cut": True} if self.cut else {}),
            **({"checks": self.checks} if self.checks else {}),
            "target": self.target,
            "scores": self.scores,
        }


@dataclass(frozen=True)
class LogLine:
    """What was logged at a step: a line of metrics.jsonl."""

    step: int
    split: str
    values: Mapping[str, float]
    time: float  # seconds since the epoch
    stage: str | None = None  # of an evaluation; None for a training step

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> LogLine:
        """Return the record of a line.

        Raises:
            KeyError, TypeError: if the line was not written by a run.
        """
        _check_types(row, step=int, split=str, values=dict)
        return cls(row["step"], row["split"], row["values"], row.get("time", 0.0), row.get("stage"))

    def to_json(self) -> dict[str, Any]:
        """Return the line, in the order of keys that the file has always had."""
        stage = {} if self.stage is None else {"stage": self.stage}
        return {"step": self.step, "split": self.split, **stage, "values": self.values, "time": self.time}


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run leaves in result.json, in the order of keys that the file has always had."""

    step: int  # the last
    best_step: int | None  # None if the run was never validated
    validation: Mapping[str, float]  # metrics at the best step
    test: Mapping[str, Mapping[str, float]] | None = None  # before and after; None with --no-test
    trainable: int  # weights
    total: int = 0  # weights
    examples: int = 0  # seen in training
    target_tokens: int = 0  # seen in training
    skipped_updates: int = 0  # that fp16 left out because of an overflow
    seconds: float  # spent in steps
    examples_per_second: float | None = None
    peak_memory_bytes: int  # of the process that took the most

    @property
    def kept_step(self) -> int:
        """The step whose adapter was kept: the best, or the last if the run was never validated."""
        return self.best_step or self.step

    @classmethod
    def from_json(cls, stored: Any, where: str) -> RunResult:
        """Return the record of a result.json.

        Raises:
            UserError: if it was not written by a run; `where` begins the message.
        """
        try:
            return cls(**{field.name: stored[field.name] for field in dataclasses.fields(cls) if field.name in stored})
        except TypeError as error:
            raise UserError(f"{where} is not what a finished run writes ({error}). Remove it to run again.") from None


class Content(NamedTuple):
    """What an example holds, as digests: equal contents are the same example, whatever its name is."""

    picture: str  # of the bytes of the picture file
    target: str  # of the text to learn

    @classmethod
    def of(cls, picture: bytes, target: str) -> Content:
        """Return the first 16 digits of the SHA-256 of each."""
        return cls(*(hashlib.sha256(data).hexdigest()[:16] for data in (picture, target.encode())))


@dataclass(frozen=True)
class SplitRecord:
    """Which example was in which split when a run began, as splits.json has it."""

    splits: dict[str, dict[str, Content]]  # train, validation and test -> id -> content, in the splits' order
    left_out: dict[str, Content]  # examples of the test split that are trained on

    @classmethod
    def from_json(cls, stored: Any, where: str) -> SplitRecord:
        """Return the record of splits.json.

        Raises:
            UserError: if the file was not written by a run.
        """
        try:
            contents = {
                name: {id: Content(*digests.split()) for id, digests in stored[name].items()}
                for name in (*SPLITS, "left_out")
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{where} does not hold a run's splits ({error})") from error
        return cls({name: contents[name] for name in SPLITS}, contents["left_out"])

    def to_json(self) -> dict[str, dict[str, str]]:
        """Return the object that splits.json holds: the two digests of an example are one text."""
        parts = {**self.splits, "left_out": self.left_out}
        return {name: {id: " ".join(content) for id, content in part.items()} for name, part in parts.items()}
