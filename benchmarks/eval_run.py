"""Answers of a finished run to its test split: drafted from the targets, without drafts, and by transformers' generate.

All three write with the merged weights of the run's adapter, so they should write the same tokens. For each: seconds,
tokens/s, passes, and how many answers differ from those of generate, which is the slow reference. It runs on the
machine's GPU, or on the CPU if there is none.

python benchmarks/eval_run.py runs/NAME
"""

from __future__ import annotations

import time
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--batch", default=64, help="Answers that generate writes at a time.")
@click.option("--repeat", default=2, help="Rounds of all three; the last is printed.")
def main(folder: Path, batch: int, repeat: int) -> None:
    from im2json.cli import quiet_libraries

    quiet_libraries()
    import torch

    from im2json.inference.decode import Decoder, Request
    from im2json.model.lora import merged_copy
    from im2json.runs import RunFolder, adapter_folder
    from im2json.workspace import open_workspace, start_accelerator

    run = RunFolder(folder)
    config = run.read_config()
    workspace = open_workspace(config, *start_accelerator(config), adapter=adapter_folder(folder), evaluated=run)
    model, collator = merged_copy(workspace.model, workspace.settings.dtype), workspace.collator
    split, limit = workspace.splits["test"], workspace.settings.max_new_tokens
    assert isinstance(limit, int)
    pixels = collator.pictures([split[i].image for i in range(len(split))])["pixel_values"]
    drafts = [collator.target_ids(target) for target in split.targets]

    def by_slots(sources: list[list[int]]) -> tuple[list[list[int]], int]:
        """Return the tokens of each answer, and the passes that they took."""
        decoder = Decoder(model, collator)
        requests = [
            Request(lambda one=one: {"pixel_values": one[None]}, limit, source)  # type: ignore[misc]
            for one, source in zip(pixels, sources)
        ]
        found = dict(decoder.answers(requests, limit, max(map(len, sources)), len(requests)))
        return [found[number].tokens for number in range(len(requests))], decoder.passes

    def by_generate() -> tuple[list[list[int]], int]:
        written, passes, eos = [], 0, collator.processor.tokenizer.eos_token_id
        for part in pixels.split(batch):
            ids = torch.tensor(collator.prefixes({"pixel_values": part}))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            inputs["pixel_values"] = part.to(model.device, model.dtype)
            with torch.no_grad():
                texts = model.generate(**inputs, max_new_tokens=limit, do_sample=False)  # type: ignore[operator]
            rows = texts[:, collator.longest_prefix :].tolist()
            passes += len(rows[0])
            written += [row[: row.index(eos) + 1] if eos in row else row for row in rows]
        return written, passes

    ways = {
        "drafted from the targets": lambda: by_slots(drafts),
        "no draft": lambda: by_slots([[] for _ in drafts]),
        "generate": by_generate,
    }
    for _ in range(repeat):
        found = {}
        for name, way in ways.items():
            start = time.perf_counter()
            answers, passes = way()
            found[name] = answers, passes, time.perf_counter() - start
    reference, _, slowest = found["generate"]
    tokens = sum(map(len, reference))
    print(f"{len(reference)} answers of {tokens:,} tokens on {model.device}")
    for name, (answers, passes, seconds) in found.items():
        differ = sum(one != other for one, other in zip(answers, reference))
        print(
            f"{name:<26}{seconds:7.2f} s {tokens / seconds:9,.0f} tokens/s {passes:6,} passes   {differ} answers "
            f"differ   {slowest / seconds:.1f} times as fast as generate"
        )


if __name__ == "__main__":
    main()
