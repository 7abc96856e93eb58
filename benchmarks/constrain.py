"""What --constrain costs and changes: a run's best adapter writes the test split with and without it, by turns.

Only decoding is timed. The processor's time is told beside the clock's, as other work on the machine changes it less.

python benchmarks/constrain.py runs/NAME
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--rounds", default=3)
@click.option("--examples", default=100)
@click.option("--batch-size", default=50)
@click.option("--threads", default=1)
def main(folder: Path, rounds: int, examples: int, batch_size: int, threads: int) -> None:
    from im2json.cli import quiet_libraries

    quiet_libraries()
    from im2json.inference.decode import Decoder
    from im2json.model.lora import merged_copy
    from im2json.runs import RunFolder, adapter_folder
    from im2json.scoring import StreamingEvaluator
    from im2json.workspace import open_workspace, start_accelerator

    run = RunFolder(folder)
    config = run.read_config().replace(constrain=True, threads=threads)
    space = open_workspace(config, *start_accelerator(config), adapter=adapter_folder(folder), schema=run.schema)
    model, limit = merged_copy(space.model, space.settings.dtype), space.settings.max_new_tokens
    split = space.splits["test"]
    rows = [split[i] for i in range(min(examples, len(split)))]
    pictures = space.collator.pictures([row.image for row in rows])
    texts: dict[str, list[str]] = {}
    speeds: dict[str, list[tuple[float, float]]] = {"free": [], "constrained": []}
    for _ in range(rounds):
        for name, grammar in (("free", None), ("constrained", space.settings.grammar)):
            decoder = Decoder(model, space.collator, grammar, batch_size)
            start, busy = time.perf_counter(), time.process_time()
            answers = decoder(pictures, limit)
            seconds = time.perf_counter() - start, time.process_time() - busy
            speeds[name].append((decoder.tokens / seconds[0], decoder.tokens / seconds[1]))
            texts[name] = [answer.text for answer in answers]
    for name, written in texts.items():
        evaluator = StreamingEvaluator()
        for row, text in zip(rows, written):
            evaluator.update(text, row.target, id=row.id)
        metrics = evaluator.compute()
        clock, processor = (statistics.median(values) for values in zip(*speeds[name]))
        print(
            f"{name:<12} validity {metrics['json_validity']:.3f}  field_f1 {metrics['field_f1']:.4f}  "
            f"{clock:.0f} tokens/s, {processor:.0f} by the processor's time (medians of {rounds})", flush=True,
        )  # fmt: skip
    print(f"texts that differ: {sum(a != b for a, b in zip(*texts.values()))} of {len(rows)}")


if __name__ == "__main__":
    main()
