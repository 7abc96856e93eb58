"""Score generated text on a split: training calls this every N steps, `im2json evaluate` repeats it."""

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
from im2json.data.example import FirstExamples, Split
from im2json.data.loader import loading_threads
from im2json.files import append_lines, keep_lines
from im2json.inference.decode import Answer, Decoder, generate
from im2json.inference.settings import DecodeSettings
from im2json.jsontext import canonical, read
from im2json.model.lora import merged_copy
from im2json.progress import progress_bar
from im2json.records import EvaluationKey, Prediction
from im2json.report.picture import prediction_panel
from im2json.report.table import counted
from im2json.runs import RunFolder
from im2json.scoring import StreamingEvaluator
from im2json.scoring.checks import check_results
from im2json.scoring.confidence import leaf_confidence

Labelled = tuple[str, dict[str, Any]]
"""An example's id and target: all that is kept of it beside its pixels."""
Loading = tuple[list[int], Callable[[], tuple[list[Labelled], torch.Tensor]], bool]
"""A batch, a function that waits for its examples and pixels, and whether it is the last of its window."""
WINDOW = 16  # batches of each process that are sorted by length


def evaluate_split(
    key: EvaluationKey,
    make_decoder: Callable[[], Decoder],
    collator: Collator,
    split: Split,
    accelerator: Accelerator,
    settings: DecodeSettings,
    on_predictions: Callable[[int, list[Prediction]], None] | None = None,
) -> dict[str, float]:
    """Generate text for a split, and return its metrics, the same on every process.

    The processes share the examples out. Memory stays constant: only sums are kept.

    Args:
        make_decoder: called once, while the first pictures are being loaded.
        on_predictions: called on the main process with the predictions of all processes as they come, in the split's
            order, and the index of the first.
    """
    evaluator, total = StreamingEvaluator(), len(split)
    bar = progress_bar(total, f"{key.split} {key.stage}", "ex", shown=accelerator.is_main_process, keep=False)
    shared = _share_batches(split.targets, settings.batch_size, accelerator.process_index, accelerator.num_processes)
    done, limit = 0, settings.max_new_tokens
    predictions: dict[int, Prediction] = {}  # of the present window
    with bar as progress, loading_threads(accelerator.device) as loading, ThreadPoolExecutor(1) as scoring:
        batches = _loading(loading, split, collator, shared)
        coming: Loading | None = next(batches, None)
        written: tuple[list[int], list[Labelled], list[Answer]] | None = None
        scored: Future[dict[int, Prediction]] | None = None
        decoder = make_decoder()

        def meanwhile() -> None:
            """While the device writes a batch, load the next one's pictures and score the one before."""
            nonlocal coming, scored
            coming = next(batches, None)
            scored = None if written is None else scoring.submit(_score, evaluator, key, settings, *written)

        while coming is not None:
            batch, wait, ends_window = coming
            limits = [limit if isinstance(limit, int) else limit[i] for i in batch]
            decoder.prepare(limits)
            examples, pixels = wait()
            answers = generate(decoder, pixels, limits, meanwhile)
            if scored is not None:
                predictions.update(scored.result())
            written = batch, examples, answers
            progress.update(min(len(batch) * accelerator.num_processes, total - progress.n))
            if ends_window:
                predictions.update(_score(evaluator, key, settings, *written))
                gathered = [prediction for _, prediction in sorted(gather_object(list(predictions.items())))]
                if on_predictions is not None and accelerator.is_main_process:
                    on_predictions(done, gathered)
                done, written, predictions = done + len(gathered), None, {}
    merged = StreamingEvaluator()
    for other in gather_object([evaluator]):
        merged.merge(other)
    return merged.compute()


def _score(
    evaluator: StreamingEvaluator,
    key: EvaluationKey,
    settings: DecodeSettings,
    batch: Sequence[int],
    examples: Sequence[Labelled],
    answers: Sequence[Answer],
) -> dict[int, Prediction]:
    """Return a batch's predictions by their indices in the split."""
    return {
        i: score_answer(evaluator, key, settings, labelled, answer)
        for i, labelled, answer in zip(batch, examples, answers)
    }


def score_answer(
    evaluator: StreamingEvaluator, key: EvaluationKey, settings: DecodeSettings, labelled: Labelled, answer: Answer
) -> Prediction:
    """Score an answer, and return it with its scores, its confidence and what --check-sum finds."""
    (id, target), reading = labelled, read(answer.text)
    return Prediction(
        **key._asdict(),
        id=id,
        text=answer.text,
        reading=reading,
        target=target,
        confidence=leaf_confidence(answer.text, answer.starts, answer.logprobs, reading),
        cut=answer.cut,
        constrained=settings.grammar is not None,
        checks=check_results(settings.checks, reading.value),
        scores=evaluator.update(reading, target, id=id),
    )


class Sink(Protocol):
    """Where an evaluation reports to, such as training's Tracker."""

    def scalars(self, split: str, step: int, values: dict[str, float], stage: str | None = None) -> None: ...

    def picture(self, key: EvaluationKey, index: int, draw: Callable[[], Image.Image]) -> None: ...


@dataclass(frozen=True)
class Evaluation:
    """Evaluates a model as it is at the moment of the call; leaves predictions in the run folder, the rest in a sink.

    Text is generated on a merged copy, so the model in training, the packing of its layers and its random numbers
    stay as they are.
    """

    PICTURES = 3  # of the first examples, shown with target and prediction

    model: PeftModel
    collator: Collator
    splits: Mapping[str, Split]
    accelerator: Accelerator
    settings: DecodeSettings
    run: RunFolder
    sink: Sink

    def __call__(
        self, split: str, step: int, stage: str, *, adapter: bool = True, count: int | None = None
    ) -> dict[str, float]:
        """Return the metrics on a split, or on its first `count` examples, with or without the adapter.

        Args:
            step: how many optimizer updates the adapter has seen.
            stage: of the run: before, during or after training.
        """
        key, run = EvaluationKey(step, split, stage), self.run
        examples = self.splits[split] if count is None else FirstExamples(self.splits[split], count)
        aside = run.path / f".{stage}-{split}.tmp-{os.getpid()}"  # an interrupted evaluation leaves no predictions
        aside.unlink(missing_ok=True)

        def on_predictions(first: int, predictions: list[Prediction]) -> None:
            append_lines(aside, (prediction.to_json() for prediction in predictions))
            for index, prediction in enumerate(predictions[: max(0, self.PICTURES - first)], start=first):
                before = self._text_before(split, prediction.id) if stage == "after" else None
                target = canonical(prediction.target)
                draw = partial(prediction_panel, examples[index].image, target, before, prediction.text)
                self.sink.picture(key, index, draw)

        def make_decoder() -> Decoder:
            copy = merged_copy(self.model, self.settings.dtype, adapter=adapter)
            return Decoder(copy, self.collator, self.settings.grammar)

        if stage != "during":
            scored = f"the adapter of step {step}" if adapter else "the base model"
            self.accelerator.print(f"scoring {scored} on {counted(len(examples), 'example')} of the {split} split")
        with torch.random.fork_rng():
            metrics = evaluate_split(
                key, make_decoder, self.collator, examples, self.accelerator, self.settings, on_predictions
            )
        if self.accelerator.is_main_process:
            if stage != "during":  # `im2json evaluate` repeats these
                keep_lines(run.predictions_file, lambda row: (row["stage"], row["split"]) != (stage, split))
            with aside.open("rb") as lines, run.predictions_file.open("ab") as predictions:
                shutil.copyfileobj(lines, predictions)
            aside.unlink()
        self.sink.scalars(split, step, metrics, stage)
        if self.accelerator.is_main_process:
            shown = ("field_f1", "ted_accuracy", "json_validity", "exact_match", "edit_distance")
            values = "  ".join(f"{name} {metrics[name]:.3f}" for name in shown)
            tqdm.write(f"step {step:>4}  {split} {stage:<7} {values}")
        return metrics

    def _text_before(self, split: str, id: str) -> str | None:
        return next((each.text for each in self.run.predictions(split, "before") if each.id == id), None)


def _share_batches(
    targets: Sequence[dict[str, Any]], batch_size: int, rank: int, processes: int
) -> Iterator[tuple[list[int], bool]]:
    """Yield the batches of a split that one process writes, and whether each is the last of its window, of which all
    processes have equally many.

    A window is held in memory until it can be put into the split's order again. Within it, examples whose targets are
    equally long are written together, the longest first: a batch takes as long as its longest text, and what fits is
    known from the first batch on. They are dealt out in turn, so that all processes get some of each length and come to
    the window's end together.
    """
    window = WINDOW * batch_size * processes
    for start in range(0, len(targets), window):
        end = min(start + window, len(targets))
        order = sorted(range(start, end), key=lambda i: len(canonical(targets[i])), reverse=True)
        mine = order[rank::processes]
        for first in range(0, max(1, len(mine)), batch_size):
            last = first + batch_size
            yield mine[first:last], last >= len(mine)


def _loading(
    pool: Executor, split: Split, collator: Collator, batches: Iterable[tuple[list[int], bool]]
) -> Iterator[Loading]:
    """Yield the batches with their pixels, B x 3 x H x W. Loading starts when a batch is requested; errors are raised
    when its result is awaited."""

    def load(i: int) -> tuple[Labelled, torch.Tensor]:
        example = split[i]
        return (example.id, example.target), collator.pixels([example.image])

    def wait(coming: list[Future[tuple[Labelled, torch.Tensor]]]) -> tuple[list[Labelled], torch.Tensor]:
        loaded = [one.result() for one in coming]
        pixels = torch.cat([pixels for _, pixels in loaded]) if loaded else torch.empty(0)
        return [labelled for labelled, _ in loaded], pixels

    return ((batch, partial(wait, [pool.submit(load, i) for i in batch]), last) for batch, last in batches)
