"""Pictures a second into the training loop: im2json's loader beside `datasets` with PaliGemmaProcessor.

    python benchmarks/loading.py
    python benchmarks/loading.py --workers 8 --width 1700 --height 2400

Writes JPEGs of receipts at the size of phone pictures with their targets as an imagefolder, and reads all of them in
batches through both, in turns, with no worker and with some. Both decode, convert, resize to 224 px, normalise and
tokenise; they have to agree on tokens, labels and pixels. Prints pictures/s (the best of three) and their ratio.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from im2json.cli import quiet_libraries

quiet_libraries()

import datasets  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import PaliGemmaProcessor  # noqa: E402

from im2json.data.loader import StepLoader  # noqa: E402
from im2json.data.order import Order, Share  # noqa: E402
from im2json.data.receipts import Receipts  # noqa: E402
from im2json.data.sources import load_splits  # noqa: E402
from im2json.families import open_collator  # noqa: E402
from im2json.jsontext import canonical  # noqa: E402
from im2json.model.base import locate  # noqa: E402

PROMPT = "extract JSON."
Tensors = dict[str, torch.Tensor]


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> None:
    (folder / "train").mkdir(parents=True)
    with (folder / "train" / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for example in (Receipts("train", count)[i] for i in range(count)):
            name = f"{example.id}.jpg"
            example.image.resize(size, Image.Resampling.BICUBIC).save(folder / "train" / name, quality=90)
            lines.write(json.dumps({"file_name": name, "ground_truth": canonical(example.target)}) + "\n")


def ours(folder: Path, batch: int, workers: int) -> Iterator[Tensors]:
    split = load_splits(str(folder))["train"]
    order = InOrder(len(split), batch, 0)
    loader = StepLoader(split, open_collator("tiny", PROMPT), order, Share(batch), workers=workers)
    for (read,) in loader.steps(0, order.steps_per_epoch):
        yield {**read.inputs, "labels": read.labels}


class InOrder(Order):
    """The rows as they come, so that both sides read the same batches."""

    def step(self, step: int) -> list[int]:
        return list(range(step * self.batch_size, min((step + 1) * self.batch_size, self.num_examples)))


def theirs(folder: Path, batch: int, workers: int) -> Iterator[Tensors]:
    rows: Any = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    kept = set(load_splits(str(folder))["train"].ids)  # validation and test are cut from it
    rows = rows.select([i for i, name in enumerate(names(folder)) if name in kept])
    processor = PaliGemmaProcessor.from_pretrained(locate("tiny"))

    def collate(examples: list[dict[str, Any]]) -> Tensors:
        return dict(processor(
            images=[example["image"].convert("RGB") for example in examples],
            text=[f"{processor.image_token}{PROMPT}"] * len(examples),
            suffix=[example["ground_truth"] for example in examples],
            padding=True, return_tensors="pt",
        ))  # fmt: skip

    yield from DataLoader(rows, batch_size=batch, collate_fn=collate, num_workers=workers)


def names(folder: Path) -> list[str]:
    lines = (folder / "train" / "metadata.jsonl").read_text("utf-8").splitlines()
    return [f"train/{json.loads(line)['file_name']}" for line in lines]


def assert_equal(one: Tensors, other: Tensors) -> None:
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(one[name], other[name]), name
    causal = [side["token_type_ids"] * side["attention_mask"] for side in (one, other)]  # padding is told by the mask
    assert torch.equal(*causal)
    assert (one["pixel_values"] - other["pixel_values"]).abs().max() < 0.05


def pictures_a_second(read: Callable[[], Iterator[Tensors]]) -> float:
    best = 0.0
    for _ in range(3):
        start, count = time.perf_counter(), 0
        for batch in read():
            count += len(batch["input_ids"])
        best = max(best, count / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--width", type=int, default=864, help="CORD's pictures have 864 x 1296 pixels, or so")
    parser.add_argument("--height", type=int, default=1296)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        write_pictures(folder, options.pictures, (options.width, options.height))
        for one, other in zip(ours(folder, options.batch, 0), theirs(folder, options.batch, 0), strict=True):
            assert_equal(one, other)
        print(f"{'workers':>7} {'im2json':>10} {'datasets + processor':>22} {'ratio':>6}   (pictures/s)")
        for workers in (0, options.workers):
            first, second = (
                pictures_a_second(functools.partial(side, folder, options.batch, workers)) for side in (ours, theirs)
            )
            print(f"{workers:>7} {first:>10.0f} {second:>22.0f} {first / second:>6.2f}")


if __name__ == "__main__":
    main()
