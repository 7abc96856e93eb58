"""Evaluation at PaliGemma-3B's real size on one GPU: through evaluate_split, and as transformers generates.

The same random weights in NF4 with LoRA of rank 8. Random weights never write EOS, so each answer is as long as its
row's target. Ours merges the adapter into plain weights and decodes with a recorded step, 64 answers at a time, metrics
and loading of pictures included; its merging and recording are told apart. Beside it: `generate` on the 4-bit model
with its adapter, 16 answers at a time, and one by one as the study did.

python benchmarks/eval_speed.py --work /tmp/speed
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for the model")
@click.option("--resolution", default=224)
@click.option("--size", type=click.Choice(["3b", "3b-2", "toy"]), default="3b", help="toy: to try it on a CPU")
@click.option("--rows", "count", default=256)
def main(work: Path, resolution: int, size: str, count: int) -> None:
    from im2json.cli import quiet_libraries

    quiet_libraries()
    import torch
    from full_size import save_random_paligemma
    from rows import Rows

    from im2json.data.collate import Collator
    from im2json.inference.decode import Decoder
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

    def ours() -> float:
        start = clock()
        plain = merged_copy(lora, DTYPES[precision])
        print(f"merging {clock() - start:.1f} s", flush=True)
        decoder, speed = Decoder(plain, collator), 0.0
        for examples in (64, count, 100):
            rows = Rows(examples, resolution)
            before, captured = decoder.tokens, decoder.seconds_capturing
            decoder.prepare([max(rows.tokens)] * min(64, examples))
            recording, start = decoder.seconds_capturing - captured, clock()
            key, settings = EvaluationKey(0, "test", "after"), DecodeSettings(rows.tokens, batch_size=64)
            evaluate_split(key, lambda: decoder, collator, rows, accelerator, settings)
            seconds = clock() - start
            speed = (decoder.tokens - before) / seconds
            print(  # on a line of its own, below the progress bar
                f"\nours, 64 at a time: {examples} examples in {seconds:.2f} s after {recording:.2f} s of recording; "
                f"{speed:.0f} tokens/s", flush=True,
            )  # fmt: skip
        return speed

    speed = ours()
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
