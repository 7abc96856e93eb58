"""Score generated text on a split: train.py calls this every N steps, evaluate.py repeats it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from PIL import Image
from tqdm.auto import tqdm

from im2json.data.collate import Collator
from im2json.data.example import Split
from im2json.data.loader import loading_threads
from im2json.inference.constrain import Grammar
from im2json.inference.decode import Answer, Decoder, generate
from im2json.model.lora import merged_copy
from im2json.report.picture import prediction_panel
from im2json.runs import RunFolder, append_lines, keep_lines, read_lines
from im2json.scoring import StreamingEvaluator
from im2json.scoring.checks import SumCheck, told
from im2json.scoring.confidence import leaf_confidence
from im2json.scoring.jsontext import read
from im2json.scoring.text import canonical, parse

Row = dict[str, Any]
Labelled = tuple[str, dict[str, Any]]
"""An example's id and target: all that is kept of it beside its pixels."""
Loading = tuple[list[int], Callable[[], tuple[list[Labelled], torch.Tensor]], bool]
"""A batch, what waits for its examples and pixels, and whether it is the last of its window."""
WINDOW = 16  # batches of each process that are sorted by length


def evaluate_split(
    make_decoder: Callable[[], Decoder],
    collator: Collator,
    split: Split,
    accelerator: Accelerator,
    *,
    max_new_tokens: int | Sequence[int],
    batch_size: int,
    count: int | None = None,
    description: str = "evaluating",
    on_rows: Callable[[int, list[Row]], None] | None = None,
    checks: Sequence[SumCheck] = (),
) -> dict[str, float]:
    """The metrics of generated text over a split (its first `count` examples), the same on every process.

    The processes share the examples out. Memory stays constant: sums are kept, and `on_rows` gets the rows of all
    processes on the main one as they come, in the split's order, with the place of the first.

    Args:
        make_decoder: called once, while the first pictures are being loaded.
        max_new_tokens: for all, or one for each example of the split.
        checks: told of in the rows.
    """
    evaluator = StreamingEvaluator()
    total = len(split) if count is None else min(count, len(split))
    bar = tqdm(total=total, desc=description, unit="ex", leave=False, disable=not accelerator.is_main_process)
    done, share = 0, _Share(total, batch_size, accelerator.process_index, accelerator.num_processes)
    rows: dict[int, Row] = {}  # of the present window
    with bar as progress, loading_threads(accelerator.device) as loading, ThreadPoolExecutor(1) as scoring:
        batches = _loading(loading, split, collator, share.batches(split.targets))
        coming: Loading | None = next(batches, None)
        written: tuple[list[int], list[Labelled], list[Answer]] | None = None
        scored: Future[dict[int, Row]] | None = None
        decoder = make_decoder()

        def meanwhile() -> None:
            """While the device writes a batch, the next one's pictures are loaded and the one before is scored."""
            nonlocal coming, scored
            coming = next(batches, None)
            scored = None if written is None else scoring.submit(_score, evaluator, *written, checks)

        while coming is not None:
            batch, wait, ends_window = coming
            limits = [max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[i] for i in batch]
            decoder.prepare(limits)
            examples, pixels = wait()
            answers = generate(decoder, pixels, limits, meanwhile)
            if scored is not None:
                rows.update(scored.result())
            written = batch, examples, answers
            progress.update(min(len(batch) * accelerator.num_processes, total - progress.n))
            if ends_window:
                rows.update(_score(evaluator, *written, checks))
                gathered = [row for _, row in sorted(gather_object(list(rows.items())))]
                if on_rows is not None and accelerator.is_main_process:
                    on_rows(done, gathered)
                done, written, rows = done + len(gathered), None, {}
    merged = StreamingEvaluator()
    for other in gather_object([evaluator]):
        merged.merge(other)
    return merged.compute()


def _score(
    evaluator: StreamingEvaluator,
    batch: Sequence[int],
    examples: Sequence[Labelled],
    answers: Sequence[Answer],
    checks: Sequence[SumCheck],
) -> dict[int, Row]:
    """A batch's rows by their places in the split."""
    return {
        i: prediction_row(id, target, answer, evaluator.update(answer.text, target, id=id), checks)
        for i, (id, target), answer in zip(batch, examples, answers)
    }


def prediction_row(
    id: str, target: dict[str, Any], answer: Answer, scores: dict[str, float], checks: Sequence[SumCheck] = ()
) -> Row:
    """A line of predictions.jsonl, without the run's part (step, split, stage)."""
    text = answer.text
    confidence = leaf_confidence(text, answer.starts, answer.logprobs)
    return {
        "id": id,
        "text": text,
        "parsed": parse(text),
        "confidence": confidence,
        **({"cut": True} if answer.cut else {}),
        **({"checks": told(checks, read(text).value)} if checks else {}),
        "target": target,
        "scores": scores,
    }


class Sink(Protocol):
    """Where an evaluation reports to, such as training's Tracker."""

    def scalars(self, split: str, step: int, values: dict[str, float], **more: Any) -> None: ...

    def picture(self, tag: str, draw: Callable[[], Image.Image], step: int) -> None: ...


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
        grammar: Grammar | None = None,
        checks: Sequence[SumCheck] = (),
    ) -> None:
        self.model = model
        self.collator = collator
        self.splits = splits
        self.accelerator = accelerator
        self.run = run
        self.sink = sink
        self.dtype = dtype
        self.settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "checks": checks}
        self.count = count
        self.grammar = grammar

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
            held = {"constrained": True} if self.grammar else {}
            append_lines(aside, ({"step": step, "split": split, "stage": stage, **held, **row} for row in rows))
            for index, row in enumerate(rows[: max(0, self.PICTURES - first)], start=first):
                before = self._text_before(split, row["id"]) if stage == "after" else None
                image = self.splits[split][index].image
                draw = partial(prediction_panel, image, canonical(row["target"]), before, row["text"])
                self.sink.picture(f"{split}_{stage}/{index}", draw, step)

        def make_decoder() -> Decoder:
            return Decoder(merged_copy(self.model, self.dtype, adapter=adapter), self.collator, self.grammar)

        with torch.random.fork_rng():
            metrics = evaluate_split(
                make_decoder,
                self.collator,
                self.splits[split],
                self.accelerator,
                count=count,
                description=f"{split} {stage}",
                on_rows=on_rows,
                **self.settings,
            )
        if self.accelerator.is_main_process:
            if stage != "during":  # evaluate.py repeats these
                keep_lines(self.run.predictions, lambda row: (row["stage"], row["split"]) != (stage, split))
            with aside.open("rb") as rows, self.run.predictions.open("ab") as predictions:
                shutil.copyfileobj(rows, predictions)
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


@dataclass(frozen=True)
class _Share:
    """What of a split's first `total` examples one process writes."""

    total: int
    batch_size: int
    rank: int
    processes: int

    def batches(self, targets: Sequence[dict[str, Any]]) -> Iterator[tuple[list[int], bool]]:
        """Batches, and whether each is the last of its window, of which all processes have equally many.

        A window is what is held in memory until it is put into the split's order again. Within it, examples whose
        targets are equally long are written together, the longest first: a batch takes as long as its longest text,
        and what fits is known from the first batch on. They are dealt out in turn, so that all processes get some of
        each length and come to the window's end together.
        """
        window = WINDOW * self.batch_size * self.processes
        for start in range(0, self.total, window):
            end = min(start + window, self.total)
            order = sorted(range(start, end), key=lambda i: len(canonical(targets[i])), reverse=True)
            mine = order[self.rank :: self.processes]
            for first in range(0, max(1, len(mine)), self.batch_size):
                last = first + self.batch_size
                yield mine[first:last], last >= len(mine)


def _loading(
    pool: Executor, split: Split, collator: Collator, batches: Iterable[tuple[list[int], bool]]
) -> Iterator[Loading]:
    """The batches, their pixels B x 3 x H x W, each being loaded from when it is asked for; what goes wrong in that
    comes out when it is waited for."""

    def load(i: int) -> tuple[Labelled, torch.Tensor]:
        example = split[i]
        return (example.id, example.target), collator.pixels([example.image])

    def wait(coming: list[Future[tuple[Labelled, torch.Tensor]]]) -> tuple[list[Labelled], torch.Tensor]:
        loaded = [one.result() for one in coming]
        pixels = torch.cat([pixels for _, pixels in loaded]) if loaded else torch.empty(0)
        return [labelled for labelled, _ in loaded], pixels

    return ((batch, partial(wait, [pool.submit(load, i) for i in batch]), last) for batch, last in batches)
