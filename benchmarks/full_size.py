"""The main job at PaliGemma-3B's real size on one GPU, without its weights: `--preset cord`, killed once and resumed.

Saves a PaliGemma of the real config with random weights and CORD-shaped rows (synthetic receipts with targets of CORD's
lengths as Parquet, in the hub's layout), trains on them through train.py, kills it with SIGKILL after its first
checkpoint, resumes, and prints loss, speed and memory. Speed and memory do not depend on the values of the weights;
accuracy means nothing here, and as such weights never end an answer, all are of the greatest length.

python benchmarks/full_size.py --work /tmp/full-size
python benchmarks/full_size.py --work /tmp/full-size --no-kill -- --steps 150 --eval-every 25 --eval-examples 100
"""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import click
from random_models import save_random_paligemma

REPOSITORY = Path(__file__).parent.parent


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for model, data and run")
@click.option("--steps", default=20)
@click.option("--size", type=click.Choice(["3b", "3b-2", "toy"]), default="3b", help="toy: to try it on a CPU")
@click.option("--resolution", default=224)
@click.option("--kill/--no-kill", default=True, help="kill it after its first checkpoint, and resume")
@click.argument("flags", nargs=-1)
def main(work: Path, steps: int, size: str, resolution: int, kill: bool, flags: tuple[str, ...]) -> None:
    """Run it all; FLAGS (after --) go to train.py."""
    model, rows, run = work / "model", work / "cord", work / "run"
    if not model.exists():
        save_random_paligemma(model, size, resolution)
    if not rows.exists():
        write_cord_rows(rows)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "train.py", "--preset", "cord", "--model", str(model),
        "--dataset", str(rows), "--steps", str(steps), "--eval-every", str(steps // 2), "--eval-examples", "16",
        "--no-test", *flags,
    ]  # fmt: skip
    memory = MemoryWatch()
    checkpoint = run / "checkpoints" / f"step-{steps // 2}" if kill else None
    first = run_until([*command, "--output", str(run)], checkpoint)
    second = run_until([*command, "--resume", str(run)], None) if kill else 0.0
    report(run, first, second, memory.stop())


def run_until(command: list[str], file: Path | None) -> float:
    """Seconds that a command took; it is killed with SIGKILL a step or so after `file` appears."""
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
    while child.poll() is None:
        time.sleep(0.5)
        if file is not None and file.exists():
            time.sleep(6)
            import os

            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start


class MemoryWatch:
    """The most memory that nvidia-smi showed as used on one of these GPUs, CUDA's own included."""

    def __init__(self, gpus: Sequence[str] = ("0",)) -> None:
        self.gpus = gpus
        self.peak_mib = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", ",".join(self.gpus)]
        while not self._stop.wait(0.5):
            try:
                out = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            except (OSError, subprocess.SubprocessError):
                return
            self.peak_mib = max(self.peak_mib, *map(int, re.findall(r"\d+", out)))

    def stop(self) -> float:
        self._stop.set()
        self._thread.join()
        return self.peak_mib / 1024


def report(run: Path, first: float, second: float, peak_gib: float) -> None:
    result = json.loads((run / "result.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["values"]["loss"] for row in rows if row["split"] == "train"}
    evaluations = [row["step"] for row in rows if row["split"] == "validation"]
    print(f"steps {len(losses)}, evaluations at {evaluations}; {first:.0f} s, and resumed for {second:.0f} s")
    if len(rows) > 1:  # after the first evaluation all is recorded and compiled
        times = [row["time"] for row in rows]
        print(f"{times[-1] - times[0]:.0f} s from the end of the first step to the end of the last evaluation")
    print("loss " + "  ".join(f"{step}: {loss:.4f}" for step, loss in losses.items()))
    print(f"examples/s {result['examples_per_second']}, trainable {result['trainable']:,} of {result['total']:,}")
    print(f"peak GiB: torch allocated {result['peak_memory_bytes'] / 2**30:.2f}, nvidia-smi {peak_gib:.2f}")
    config = json.loads((run / "config.json").read_text())
    print("versions", config["versions"])


CORD = {"train": 800, "validation": 100, "test": 100}


def write_cord_rows(folder: Path, counts: Mapping[str, int] = CORD) -> None:
    """Synthetic receipts in CORD v2's columns, of about its sizes and lengths, as Parquet in the hub's layout."""
    from datasets import Dataset, Features, Image, Value
    from rows import Rows

    features = Features({"image": Image(), "ground_truth": Value("string")})
    (folder / "data").mkdir(parents=True)
    for seed, (split, count) in enumerate(counts.items()):
        targets = Rows(count, (0, 0), seed).targets
        with ProcessPoolExecutor() as pool:
            pictures = list(pool.map(partial(_picture, split, count), range(count), chunksize=8))
        rows = [
            {"image": {"bytes": picture, "path": None}, "ground_truth": json.dumps({"gt_parse": target})}
            for picture, target in zip(pictures, targets)
        ]
        name = folder / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=features).to_parquet(str(name))


def _picture(split: str, count: int, place: int) -> bytes:
    from im2json.data.receipts import Receipts

    file = io.BytesIO()
    Receipts(split, count)[place].image.resize((864, 1296)).save(file, "JPEG")
    return file.getvalue()


if __name__ == "__main__":
    main()
