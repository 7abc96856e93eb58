"""The streaming evaluator: documents a second, part by part, and the memory that many documents take.

    python benchmarks/evaluator.py                      # 1,000 documents, then 100,000 for the memory: some minutes
    python benchmarks/evaluator.py --documents 0        # the speed alone

CORD-like documents of 1 to 8 items, one process. A prediction is the text of its target with a fifth of the values
misread and, in a third, a row missing, doubled or renamed; for the memory one in ten also has a key of its own and one
in ten is cut short. Prints CPU seconds as documents a second, and what the resident memory grew by after the first
thousand documents.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tree_edit import Document, make_pairs, prediction, receipt

from im2json.jsontext import canonical
from im2json.scoring import StreamingEvaluator
from im2json.scoring.metrics import score
from im2json.scoring.scorecard import Scorecard
from im2json.scoring.tree import tree_edit_accuracy

ITEMS = [1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 8]


def cpu_seconds(job: Callable[[], object], times: int = 3) -> float:
    """The least of a few tries."""
    spent = []
    for _ in range(times):
        start = time.process_time()
        job()
        spent.append(time.process_time() - start)
    return min(spent)


def speed(rng: random.Random) -> None:
    pairs = make_pairs(rng, rng.choices(ITEMS, k=1000))
    rows = [(canonical(predicted), target, str(i)) for i, (predicted, target) in enumerate(pairs)]

    def all_rows(update: Callable[[str, Document, str], object]) -> None:
        for row in rows:
            update(*row)

    tree = cpu_seconds(lambda: [tree_edit_accuracy(*pair) for pair in pairs])
    metrics = cpu_seconds(lambda: all_rows(lambda text, target, _: score(text, target)))
    evaluator = cpu_seconds(lambda: all_rows(StreamingEvaluator().update))
    everything = cpu_seconds(lambda: all_rows(Scorecard().update))
    for name, seconds in (
        ("all metrics but tree edit", metrics - tree),
        ("tree-edit accuracy alone", tree),
        ("all metrics", metrics),
        ("with 1,000 bootstrap replicates (StreamingEvaluator)", evaluator),
        ("with fields and error classes too (Scorecard)", everything),
    ):
        print(f"{name:53} {len(rows) / seconds:7,.0f} documents/s")


def resident_bytes() -> int:
    """Of this process, now (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


def memory(rng: random.Random, documents: int) -> None:
    card, start = Scorecard(), 0
    for i in range(documents):
        target = receipt(rng, rng.choice(ITEMS))
        predicted = prediction(rng, target)
        if i % 10 == 0:
            predicted[f"key {i}"] = "of its own"
        text = canonical(predicted)
        card.update(text[: len(text) // 2] if i % 10 == 5 else text, target, str(i))
        if i == 999:
            start = resident_bytes()
    grown = (resident_bytes() - start) / 2**20
    print(f"resident memory grew by {grown:.1f} MiB from document 1,000 to {documents:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=100_000, help="for the memory; 0 leaves it out")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    speed(rng)
    if options.documents > 1000:
        if sys.platform != "linux":
            parser.error("resident memory is read from Linux's /proc: --documents 0 leaves it out")
        memory(rng, options.documents)


if __name__ == "__main__":
    main()
