"""Score generated text on a split: training calls this every N steps, `im2json evaluate` repeats it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from PIL import Image
from tqdm.auto import tqdm

from im2json.data.collate import Collator, Pictures
from im2json.data.example import FirstExamples, Split
from im2json.data.loader import AHEAD, load_ahead, loading_threads
from im2json.files import append_lines, keep_lines
from im2json.inference.decode import Answer, Decoder, Request
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

WINDOW = 1024  # examples of each process that are sorted by length

Labelled = tuple[str, dict[str, Any]]
"""An example's id and target."""


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

    The processes share the examples out. Each answer is drafted from its target, which does not change it. Memory stays
    constant: only sums and the predictions of a window are kept.

    Args:
        make_decoder: called once, while the first pictures are being loaded.
        on_predictions: called on the main process with the predictions of all processes as they come, in the split's
            order, and the index of the first.
    """
    evaluator, total = StreamingEvaluator(), len(split)
    bar = progress_bar(total, f"{key.split} {key.stage}", "ex", shown=accelerator.is_main_process, keep=False)
    windows = list(_windows(split.targets, accelerator.process_index, accelerator.num_processes))
    order = [i for window in windows for i in window]
    limit = settings.max_new_tokens
    limits = [limit if isinstance(limit, int) else limit[i] for i in order]
    predictions: dict[int, Prediction] = {}  # by index in the split
    handed_out = 0

    def hand_out() -> None:
        """Pass on the predictions of all complete windows. All processes have as many windows, so they gather alike."""
        nonlocal handed_out
        while windows and all(i in predictions for i in windows[0]):
            mine = [(i, predictions.pop(i)) for i in windows.pop(0)]
            gathered = [prediction for _, prediction in sorted(gather_object(mine))]
            if on_predictions is not None and accelerator.is_main_process:
                on_predictions(handed_out, gathered)
            handed_out += len(gathered)

    with bar as progress, loading_threads(accelerator.device) as pool:
        loaded = load_ahead(pool, partial(_load, split, collator), order, AHEAD)
        decoder = make_decoder()
        labelled: dict[int, Future[tuple[Labelled, Pictures]]] = {}

        def requests() -> Iterator[Request]:
            for number, future in enumerate(loaded):
                labelled[number] = future
                draft = collator.target_ids(split.targets[order[number]])
                yield Request(lambda future=future: future.result()[1], limits[number], draft)  # type: ignore[misc]

        longest = max(limits, default=1)
        for number, answer in decoder.answers(requests(), longest, longest, len(order)):
            example, _ = labelled.pop(number).result()
            predictions[order[number]] = score_answer(evaluator, key, settings, example, answer)
            progress.update(min(accelerator.num_processes, total - progress.n))
            hand_out()
    hand_out()
    merged = StreamingEvaluator()
    for other in gather_object([evaluator]):
        merged.merge(other)
    return merged.compute()


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
            return Decoder(copy, self.collator, self.settings.grammar, self.settings.batch_size)

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


def _windows(targets: Sequence[dict[str, Any]], rank: int, processes: int) -> Iterator[list[int]]:
    """Yield the examples of a split that one process writes, window by window, of which all processes have equally
    many.

    The predictions of a window are held in memory until they can be put into the split's order again. Within it, the
    longest are begun first: then the last to be finished are short. They are dealt out in turn, so that all processes
    get some of each length and come to the window's end together.
    """
    size = WINDOW * processes
    for start in range(0, len(targets), size):
        window = range(start, min(start + size, len(targets)))
        yield sorted(window, key=lambda i: len(canonical(targets[i])), reverse=True)[rank::processes]


def _load(split: Split, collator: Collator, i: int) -> tuple[Labelled, Pictures]:
    """Return an example's id and target, and what the model gets of its picture."""
    example = split[i]
    return (example.id, example.target), collator.pictures([example.image])
