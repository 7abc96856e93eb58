"""Evaluation at PaliGemma-3B's real size on one GPU: through evaluate_split, and as transformers generates.

The same random weights in NF4 with LoRA of rank 8. Random weights never write EOS, so each answer is as long as its
row's target. First one token is written in each pass, as if no draft were ever right. What a good model gains is
simulated: drafts are then the model's own answers with one token in twenty replaced. Metrics and loading of pictures are included, merging the
adapter and recording graphs are told apart, and so is how long the prefixes take alone (answers of one token). Beside
it: `generate` on the 4-bit model with its adapter, 16 answers at a time, and one by one as the study did.

python benchmarks/eval_speed.py --work /tmp/speed
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for the model")
@click.option("--resolution", default=224)
@click.option("--size", type=click.Choice(["3b", "3b-2", "toy"]), default="3b", help="toy: to try it on a CPU")
@click.option("--rows", "count", default=512)
@click.option("--slots", default=256)
@click.option("--right", default=0.95, help="share of the simulated drafts' tokens that are right")
def main(work: Path, resolution: int, size: str, count: int, slots: int, right: float) -> None:
    from im2json.cli import quiet_libraries

    quiet_libraries()
    import torch
    from full_size import save_random_paligemma
    from rows import Rows

    from im2json.data.collate import Collator
    from im2json.inference import drafts as drafting
    from im2json.inference.decode import Answer, Decoder, Request
    from im2json.inference.evaluate import evaluate_split
    from im2json.inference.settings import DecodeSettings
    from im2json.model.base import DTYPES, load_base, load_processor
    from im2json.model.lora import add_lora, merged_copy, trained
    from im2json.options import TrainConfig
    from im2json.records import EvaluationKey
    from im2json.workspace import start_accelerator

    model = work / f"model-{size}-{resolution}"
    if not model.exists():
        save_random_paligemma(model, size, resolution)
    config = TrainConfig.resolve({"model": str(model), "r": 8, "alpha": 32.0})
    accelerator, precision = start_accelerator(config)
    lora = add_lora(load_base(str(model), precision, "nf4", accelerator.device), config.model, 0).eval()
    for parameter in trained(lora):
        torch.nn.init.normal_(parameter, std=0.01)
    collator = Collator(load_processor(str(model)), config.data.prompt)

    class Simulated(Decoder):
        """Drafts from given texts in place of the targets."""

        drafts: dict[int, list[int]] | None = None
        texts: dict[int, list[int]]

        def answers(self, requests: Iterable[Request], *given: Any) -> Iterator[tuple[int, Answer]]:
            if self.drafts is not None:
                requests = (each._replace(source=self.drafts[i]) for i, each in enumerate(requests))
            self.texts = {}
            for number, answer in super().answers(requests, *given):
                self.texts[number] = answer.tokens
                yield number, answer

    def changed(tokens: list[int]) -> list[int]:
        drawn = random.Random(len(tokens))
        return [token if drawn.random() < right else drawn.randrange(collator.prefix_ids[0]) for token in tokens]

    def evaluate(decoder: Simulated, rows: Rows, limits: list[int]) -> float:
        """Seconds of an evaluation."""
        start, settings = clock(), DecodeSettings(limits, batch_size=slots)
        evaluate_split(EvaluationKey(0, "test", "after"), lambda: decoder, collator, rows, accelerator, settings)
        return clock() - start

    def new_decoder(drafts: dict[int, list[int]] | None) -> Simulated:
        decoder = Simulated(merged_copy(lora, DTYPES[precision]), collator, slots=slots)
        decoder.drafts = drafts
        return decoder

    many, hundred, speed = Rows(count, resolution), Rows(min(100, count), resolution), 0.0
    lengths = drafting.LENGTHS
    drafts: dict[int, dict[int, list[int]] | None] = dict.fromkeys((len(many), len(hundred)))
    for name in ("no draft right", f"{right:.0%} of a draft right (simulated)"):
        for rows in (hundred, many):
            start = clock()
            decoder = new_decoder(drafts[len(rows)])
            drafting.LENGTHS = (1,) if decoder.drafts is None else lengths
            merging = clock() - start
            first = evaluate(decoder, rows, rows.tokens)
            texts, passes, recording = decoder.texts, decoder.passes, decoder.seconds_recording
            again = evaluate(decoder, rows, rows.tokens)
            prefixes = evaluate(decoder, rows, [1] * len(rows))
            speed = sum(rows.tokens) / again
            print(  # on a line of its own, below the progress bar
                f"\n{name}, {len(rows)} answers of {sum(rows.tokens)} tokens: {merging + first:.2f} s with "
                f"{merging:.2f} s of merging and {recording:.2f} s of recording; again {again:.2f} s, {speed:.0f} "
                f"tokens/s; {passes} passes; prefixes alone {prefixes:.2f} s", flush=True,
            )  # fmt: skip
            drafts[len(rows)] = {number: changed(tokens) for number, tokens in texts.items()}
            del decoder
    for batch, tokens in ((16, 32), (1, 16)):
        speed_4_bit = as_transformers(lora, collator, Rows(batch, resolution), tokens, DTYPES[precision])
        print(f"transformers on the 4-bit model, {batch} at a time: {speed_4_bit:.1f} tokens/s; "
              f"ours is {speed / speed_4_bit:.0f} times as fast", flush=True)  # fmt: skip
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else "")


def clock() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def as_transformers(model: Any, collator: Any, rows: Any, tokens: int, dtype: Any) -> float:
    """Tokens per second of `generate` on the model in training; the first call is not timed."""
    import torch

    device = next(model.parameters()).device
    pixels = collator.pixels([rows[i].image for i in range(len(rows))])
    inputs = {name: value.to(device) for name, value in collator.prefixes(pixels.to(dtype)).items()}

    def write(count: int) -> None:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model.generate(**inputs, min_new_tokens=count, max_new_tokens=count, do_sample=False, use_cache=True)

    write(2)
    start = clock()
    write(tokens)
    return len(rows) * tokens / (clock() - start)


if __name__ == "__main__":
    main()
