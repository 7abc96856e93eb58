"""Where numbers and pictures go: metrics.jsonl, TensorBoard, and accelerate's other trackers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from im2json.data.lengths import TargetLengths
from im2json.files import append_lines
from im2json.options import OPTIONS, TrainConfig
from im2json.records import EvaluationKey, LogLine
from im2json.runs import RunFolder, step_of
from im2json.text import escape_surrogates

Scalars = dict[str, float]


class Tracker:
    """Writes what a run reports, on the main process; on the others it does nothing.

    One TensorBoard run a folder: hyperparameters go into the same event file as the curves, once, at the end, with
    the metrics they led to. `torch.utils.tensorboard`'s add_hparams and accelerate's own tracker would each open a
    second run for them.
    """

    def __init__(self, run: RunFolder, config: TrainConfig, accelerator: Accelerator, checkpoint: Path | None) -> None:
        self.run = run
        self.config = config
        self.accelerator = accelerator
        self.writer: SummaryWriter | None = None
        self.drawing = ThreadPoolExecutor(1)
        self.drawn: list[Future[None]] = []
        if accelerator.is_main_process:
            purge = (step_of(checkpoint) if checkpoint else 0) + 1  # what a stopped run logged after it is not shown
            self.writer = SummaryWriter(str(run.tensorboard), purge_step=purge, flush_secs=5)
        if config.train.track:
            accelerator.init_trackers("im2json", config={k: _plain(v) for k, v in config.flat().items()})

    def scalars(self, split: str, step: int, values: Scalars, stage: str | None = None) -> None:
        """Log values as `split/name`. The stage of an evaluation and num, its examples, go into metrics.jsonl only."""
        if self.writer is None:
            return
        append_lines(self.run.metrics_file, [LogLine(step, split, values, time.time(), stage).to_json()])
        curves = {f"{split}/{name}": value for name, value in values.items() if name != "num"}
        for name, value in curves.items():
            self.writer.add_scalar(name, value, step)
        if self.config.train.track:
            self.accelerator.log(curves, step=step)

    def describe(self, lengths: TargetLengths) -> None:
        """Log what is known before the first step: the options, and how long the targets are."""
        if self.writer is None:
            return
        options = "\n".join(f"    {name}: {_plain(value)}" for name, value in self.config.flat().items())
        self.writer.add_text("config", options, 0)
        self.writer.add_text("target_lengths", "\n".join(f"    {line}" for line in lengths.summary().splitlines()), 0)

    def picture(self, key: EvaluationKey, index: int, draw: Callable[[], Image.Image]) -> None:
        """Draw and log the picture of an evaluated example in a thread, so that no process waits for it.

        A later call raises what went wrong there.
        """
        if self.writer is not None:
            while self.drawn and self.drawn[0].done():
                self.drawn.pop(0).result()
            tag = f"pictures/{key.split}_{key.stage}/{index}"
            self.drawn.append(self.drawing.submit(self._picture, self.writer, tag, draw, key.step))

    def _picture(self, writer: SummaryWriter, tag: str, draw: Callable[[], Image.Image], step: int) -> None:
        picture, encoded = draw().convert("RGB"), BytesIO()
        picture.save(encoded, "PNG", compress_level=1)  # add_image: five times as long, by floats and zlib's default
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=encoded.getvalue()
        )
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def hyperparameters(self, best: Scalars, step: int, tested: Iterable[str]) -> None:
        """Log the row of the HParams view: the options that decide the result, the best validation metrics (logged here
        as `validation_best/name`), and the last value of each of the `tested` metrics."""
        if self.writer is None:
            return
        options = {n: _plain(v) for n, v in self.config.flat().items() if v is not None and OPTIONS[n].affects_result}
        metrics = {f"validation_best/{name}": value for name, value in best.items() if name != "num"}
        for summary in hparams(options, metrics | {f"test/{name}": 0.0 for name in tested if name != "num"}):
            self.writer._get_file_writer().add_summary(summary)
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Put on disk what a resumed run will not log again."""
        while self.drawn:
            self.drawn.pop(0).result()
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        self.flush()
        if self.writer is not None:
            self.writer.close()


def _plain(value: Any) -> bool | int | float | str:
    """HParams know no None, and hold UTF-8."""
    return "unset" if value is None else escape_surrogates(value) if isinstance(value, str) else value
