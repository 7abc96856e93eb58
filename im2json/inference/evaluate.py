"""Score generated text on a split: train.py calls this every N steps, evaluate.py repeats it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from PIL import Image
from tqdm.auto import tqdm
from transformers import PaliGemmaForConditionalGeneration

from im2json.data.collate import Collator
from im2json.data.example import Example, Split
from im2json.inference.decode import Decoder, generate
from im2json.model.lora import merged_copy
from im2json.report.picture import prediction_panel
from im2json.runs import RunFolder, append_lines, keep_lines, read_lines
from im2json.scoring import StreamingEvaluator
from im2json.scoring.text import canonical, parse

Row = dict[str, Any]


def evaluate_split(
    model: PaliGemmaForConditionalGeneration,
    collator: Collator,
    split: Split,
    accelerator: Accelerator,
    *,
    max_new_tokens: int,
    batch_size: int,
    count: int | None = None,
    description: str = "evaluating",
    on_rows: Callable[[int, list[Row]], None] | None = None,
) -> dict[str, float]:
    """The metrics of generated text over a split (its first `count` examples), the same on every process.

    The processes share the examples out. Memory stays constant: sums are kept, and `on_rows` gets the rows of all
    processes on the main one as they come, in the split's order, with the place of the first.
    """
    evaluator, decoder = StreamingEvaluator(), Decoder(model, collator)
    total = len(split) if count is None else min(count, len(split))
    progress = tqdm(total=total, desc=description, unit="ex", leave=False, disable=not accelerator.is_main_process)
    done = 0
    for indices in _shares(total, batch_size, accelerator.process_index, accelerator.num_processes):
        examples = [split[i] for i in indices]
        rows = []
        pixels = collator.pixels([example.image for example in examples]) if examples else None
        texts = generate(decoder, pixels, max_new_tokens) if pixels is not None else []
        for example, text in zip(examples, texts):
            rows.append(prediction_row(example, text, evaluator.update(text, example.target, id=example.id)))
        rows = gather_object(rows)  # process by process, which is the split's order
        if on_rows is not None and accelerator.is_main_process:
            on_rows(done, rows)
        done += len(rows)
        progress.update(len(rows))
    progress.close()
    merged = StreamingEvaluator()
    for other in gather_object([evaluator]):
        merged.merge(other)
    return merged.compute()


def prediction_row(example: Example, text: str, scores: dict[str, float]) -> Row:
    """A line of predictions.jsonl, without the run's part (step, split, stage)."""
    return {"id": example.id, "text": text, "parsed": parse(text), "target": example.target, "scores": scores}


class Sink(Protocol):
    """Where an evaluation reports to, such as training's Tracker."""

    def scalars(self, split: str, step: int, values: dict[str, float], **more: Any) -> None: ...

    def picture(self, tag: str, picture: Image.Image, step: int) -> None: ...


class Evaluation:
    """Evaluates a model as it is at the moment of the call; leaves predictions in the run folder, the rest in a sink.

    Text is generated on a merged copy, so the model in training, the packing of its layers and its random numbers
    stay as they are.
    """

    PICTURES = 3  # of the first examples, shown with target and prediction

    def __init__(
        self,
        model: PeftModel,
        collator: Collator,
        splits: Mapping[str, Split],
        accelerator: Accelerator,
        run: RunFolder,
        sink: Sink,
        *,
        dtype: torch.dtype,
        max_new_tokens: int,
        batch_size: int,
        count: int | None,
    ) -> None:
        self.model = model
        self.collator = collator
        self.splits = splits
        self.accelerator = accelerator
        self.run = run
        self.sink = sink
        self.dtype = dtype
        self.limits = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        self.count = count

    def validate(self, step: int) -> dict[str, float]:
        """Metrics of the present adapter on the validation split, or its first --eval-examples."""
        return self("validation", step, "during", count=self.count)

    def __call__(
        self, split: str, step: int, stage: str, *, adapter: bool = True, count: int | None = None
    ) -> dict[str, float]:
        """Metrics on a split at a stage (before, during, after) of the run, with or without the adapter."""
        aside = self.run.path / f".{stage}-{split}.tmp-{os.getpid()}"  # an interrupted evaluation leaves no rows
        aside.unlink(missing_ok=True)

        def on_rows(first: int, rows: list[Row]) -> None:
            append_lines(aside, ({"step": step, "split": split, "stage": stage, **row} for row in rows))
            for index, row in enumerate(rows[: max(0, self.PICTURES - first)], start=first):
                before = self._text_before(split, row["id"]) if stage == "after" else None
                image = self.splits[split][index].image
                panel = prediction_panel(image, canonical(row["target"]), before, row["text"])
                self.sink.picture(f"{split}_{stage}/{index}", panel, step)

        with torch.random.fork_rng():
            metrics = evaluate_split(
                merged_copy(self.model, self.dtype, adapter=adapter),
                self.collator,
                self.splits[split],
                self.accelerator,
                count=count,
                description=f"{split} {stage}",
                on_rows=on_rows,
                **self.limits,
            )
        if self.accelerator.is_main_process:
            if stage != "during":  # evaluate.py repeats these
                keep_lines(self.run.predictions, lambda row: (row["stage"], row["split"]) != (stage, split))
            append_lines(self.run.predictions, read_lines(aside))
            aside.unlink()
        self.sink.scalars(split, step, metrics, stage=stage)
        if self.accelerator.is_main_process:
            shown = ("field_f1", "ted_accuracy", "json_validity", "exact_match", "edit_distance")
            values = "  ".join(f"{name} {metrics[name]:.3f}" for name in shown)
            tqdm.write(f"step {step:>4}  {split} {stage:<7} {values}")
        return metrics

    def _text_before(self, split: str, id: str) -> str | None:
        rows = (row for row in read_lines(self.run.predictions) if row["stage"] == "before" and row["split"] == split)
        return next((row["text"] for row in rows if row["id"] == id), None)


def _shares(total: int, batch_size: int, rank: int, processes: int) -> Iterator[Sequence[int]]:
    """This process's batches; all processes get equally many, the last ones perhaps empty."""
    window = batch_size * processes
    for start in range(0, total, window):
        yield range(min(start + rank * batch_size, total), min(start + (rank + 1) * batch_size, total))
