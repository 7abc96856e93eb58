"""Evaluation at a real size, of PaliGemma-3B or of a chat model, on one GPU: through evaluate_split, and by generate.

The same random weights in NF4 with LoRA of rank 8. Random weights never write EOS, so each answer is as long as its
row's target. First one token is written in each pass, as if no draft were ever right. What a good model gains is
simulated: after all that a model computes its target is written, drafted from a copy with one token in twenty replaced.
Metrics and loading of pictures are included; merging the adapter and recording graphs are told apart, and so is how
long the prefixes take alone (answers of one token). Beside it: `generate` on the 4-bit model with its adapter, 16
answers at a time, and one by one as the study did.

python benchmarks/eval_speed.py --work /tmp/speed
python benchmarks/eval_speed.py --work /tmp/speed --size qwen-4b --rows 256
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from random_models import SIZES, as_transformers, image_tokens, picture_size, save_random


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for the model")
@click.option("--resolution", default=224)
@click.option("--size", type=click.Choice(SIZES), default="3b", help="toy, qwen-toy: to try it on a CPU")
@click.option("--rows", "count", default=512)
@click.option("--slots", default=256)
@click.option("--right", default=0.95, help="share of the simulated drafts' tokens that are right")
def main(work: Path, resolution: int, size: str, count: int, slots: int, right: float) -> None:
    from im2json.cli import quiet_libraries

    quiet_libraries()
    import torch
    import torch.nn.functional as F
    from rows import Rows

    from im2json.families import open_collator
    from im2json.inference import decode, drafts
    from im2json.inference.decode import Answer, Decoder, Request
    from im2json.inference.evaluate import evaluate_split
    from im2json.inference.settings import DecodeSettings
    from im2json.inference.slots import Slots
    from im2json.model.base import DTYPES, load_base
    from im2json.model.lora import add_lora, merged_copy, trained
    from im2json.options import TrainConfig
    from im2json.records import EvaluationKey
    from im2json.workspace import start_accelerator

    model = work / f"model-{size}-{resolution}"
    if not model.exists():
        save_random(model, size, resolution)
    config = TrainConfig.resolve({"model": str(model), "r": 8, "alpha": 32.0})
    accelerator, precision = start_accelerator(config)
    lora = add_lora(load_base(str(model), precision, "nf4", accelerator.device), config.model, 0).eval()
    for parameter in trained(lora):
        torch.nn.init.normal_(parameter, std=0.01)
    collator = open_collator(str(model), config.data.prompt, image_tokens=image_tokens(size))

    class Draft(list):
        """A draft, and the text that it is a draft of."""

        def __init__(self, text: list[int]) -> None:
            drawn = random.Random(len(text))
            super().__init__(token if drawn.random() < right else drawn.randrange(1000) for token in text)
            self.text = text

    class Simulated(Slots):
        """Compute all that a model computes, and then write a given text."""

        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            self.texts = torch.zeros_like(self.written)

        def admit(self, slots: Any, pictures: Any, limits: Any, sources: Any) -> None:
            texts = [F.pad(torch.tensor(source.text), (0, self.texts.shape[1] - len(source))) for source in sources]
            self.texts.index_copy_(0, self._sent(torch.tensor(slots)), self._sent(torch.stack(texts)))
            super().admit(slots, pictures, limits, sources)

        def _likeliest(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
            _, logprobs = super()._likeliest(length)
            places = self.count[: self.used, None] + torch.arange(length, device=self.device)
            return self.texts[: self.used].gather(1, places), logprobs

    class Drafted(Decoder):
        """Draft from nearly what will be written."""

        def answers(self, requests: Iterable[Request], *given: Any) -> Iterator[tuple[int, Answer]]:
            return super().answers((each._replace(source=Draft(each.source)) for each in requests), *given)

    def evaluate(decoder: Decoder, rows: Rows, limits: list[int]) -> float:
        """Seconds of an evaluation."""
        start, settings = clock(), DecodeSettings(limits, batch_size=slots)
        evaluate_split(EvaluationKey(0, "test", "after"), lambda: decoder, collator, rows, accelerator, settings)
        return clock() - start

    shape = picture_size(size, resolution)
    many, hundred, speed, lengths = Rows(count, shape), Rows(min(100, count), shape), 0.0, drafts.LENGTHS
    for name, simulated in (("no draft right", False), (f"{right:.0%} of a draft right (simulated)", True)):
        drafts.LENGTHS = lengths if simulated else (1,)
        decode.Slots = Simulated if simulated else Slots  # type: ignore[misc]
        for rows in (hundred, many):
            start = clock()
            plain = merged_copy(lora, DTYPES[precision])
            decoder = (Drafted if simulated else Decoder)(plain, collator, slots=slots)
            merging = clock() - start
            first = evaluate(decoder, rows, rows.tokens)
            passes, recording = decoder.passes, decoder.seconds_recording
            again = evaluate(decoder, rows, rows.tokens)
            prefixes = evaluate(decoder, rows, [1] * len(rows))
            speed = sum(rows.tokens) / again
            print(  # on a line of its own, below the progress bar
                f"\n{name}, {len(rows)} answers of {sum(rows.tokens)} tokens: {merging + first:.2f} s with "
                f"{merging:.2f} s of merging and {recording:.2f} s of recording; again {again:.2f} s, {speed:.0f} "
                f"tokens/s; {passes} passes; prefixes alone {prefixes:.2f} s", flush=True,
            )  # fmt: skip
            del decoder, plain
    for batch, tokens in ((16, 32), (1, 16)):
        speed_4_bit = generate_speed(lora, collator, Rows(batch, shape), tokens, DTYPES[precision])
        print(f"transformers on the 4-bit model, {batch} at a time: {speed_4_bit:.1f} tokens/s; "
              f"ours is {speed / speed_4_bit:.0f} times as fast", flush=True)  # fmt: skip
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else "")


def clock() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def generate_speed(model: Any, collator: Any, rows: Any, tokens: int, dtype: Any) -> float:
    """Tokens per second of `generate` on the model in training; the first call is not timed."""
    import torch

    device = next(model.parameters()).device
    pictures = collator.pictures([rows[i].image for i in range(len(rows))])
    ids = torch.tensor(collator.prefixes(pictures))  # all pictures are of one size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    inputs = as_transformers(model, inputs | pictures)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)

    def write(count: int) -> None:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model.generate(**inputs, min_new_tokens=count, max_new_tokens=count, do_sample=False, use_cache=True)

    write(2)
    start = clock()
    write(tokens)
    return len(rows) * tokens / (clock() - start)


if __name__ == "__main__":
    main()
