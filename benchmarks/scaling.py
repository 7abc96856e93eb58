"""Several GPUs at PaliGemma-3B's real size: what the second one, and the eighth, is worth.

Everything runs as a user runs it, by `accelerate launch` and sweep.py, on random weights of the real config (speed and
memory do not depend on their values) and rows of CORD's lengths. Each part prints a line for each number of GPUs as it
is measured:

train        examples/s at the same examples per GPU (median of the later half of the steps), against one GPU; the most
             memory on any of the GPUs as torch allocated it, and what nvidia-smi shows beyond that: what torch keeps
             in reserve, CUDA's context and NCCL's buffers, the last told apart by `collective`
collective   the all-reduce of a step in a process group of its own: bytes, milliseconds, the share of a step
evaluation   receipts/s of an evaluation during training, the median of three. Random weights never end an answer, so
             the limit does
same         loss and gradient norm on one GPU and on the most, of the same examples per step, without dropout, whose
             masks differ
sweep        a grid of small points of the embedded base, one of which fails: where and when each ran

python benchmarks/scaling.py --work /tmp/scaling                       # 1, 2, 4, ... GPUs up to what is there
python benchmarks/scaling.py --work /tmp/scaling --gpus 1 --gpus 2 --part train --part same -- --launch compiled
CUDA_VISIBLE_DEVICES= python benchmarks/scaling.py --work /tmp/scaling --size toy --gpus 1 --gpus 2 --examples 2 \\
    --steps 4 --receipts 8 -- --max-new-tokens 8
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from full_size import REPOSITORY, MemoryWatch, save_random_paligemma, write_cord_rows

from im2json.files import read_lines
from im2json.machine import visible_gpus
from im2json.runs import RunFolder

GIB = 2**30
COMPARED = 20  # steps at most
EVALUATIONS = 3
ROUNDS = 50  # of the all-reduce


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    work: Path
    counts: list[int]  # of GPUs, ascending
    gpus: list[str]  # none: processes on the CPU
    examples: int  # per GPU and step
    steps: int
    receipts: int
    points: int
    flags: tuple[str, ...]  # for train.py
    out: Path | None

    def environment(self, count: int) -> dict[str, str]:
        """In which there are so many GPUs."""
        path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[:count]), "PYTHONPATH": path}

    def launch(self, count: int, *program: object) -> str:
        """What a program prints, as `accelerate launch` starts it on so many GPUs."""
        several = ["--multi_gpu", "--main_process_port", "0"] if count > 1 else []
        command = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--num_processes", str(count), *several]
        done = subprocess.run(
            [*command, *map(str, program)], cwd=REPOSITORY, env=self.environment(count), capture_output=True, text=True
        )
        if done.returncode:
            raise click.ClickException(f"{program[0]} on {count} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def train(self, name: str, count: int, batch_size: int, steps: int, *flags: object) -> RunFolder:
        run = RunFolder(self.work / f"{name}-{count}")
        shutil.rmtree(run.path, ignore_errors=True)
        self.launch(
            count, "train.py", "--preset", "cord", "--model", self.work / "model", "--dataset", self.work / "cord",
            "--output", run.path, "--batch-size", batch_size, "--steps", steps, "--save-every", 0, "--no-test",
            *flags, *self.flags,
        )  # fmt: skip
        return run

    def tell(self, part: str, count: int, line: str, **values: Any) -> None:
        print(f"{part:<11}{count:>2} {'GPU' if self.gpus else 'CPU'}{'s' if count > 1 else ' '}  {line}", flush=True)
        if self.out is not None:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"part": part, "gpus": count, **values}) + "\n")


def training(bench: Bench) -> None:
    first = 0.0
    for count in bench.counts:
        memory = MemoryWatch(bench.gpus[:count])
        run = bench.train("train", count, bench.examples * count, bench.steps, "--eval-every", 0)
        used = memory.stop() * GIB
        seconds = seconds_a_step(run)
        speed, allocated = bench.examples * count / seconds, json.loads(run.result.read_text())["peak_memory_bytes"]
        first = first or speed / count  # where one GPU is left out, the fewest stand for it
        bench.tell(
            "train", count,
            f"{seconds:.4f} s a step  {speed:.1f} examples/s  {speed / first:.2f} x one ({speed / first / count:.0%})  "
            f"{allocated / GIB:.2f} GiB allocated, {max(0, used - allocated) / GIB:.2f} more in nvidia-smi",
            seconds_a_step=seconds, examples_per_second=speed, speed_up=speed / first, allocated_bytes=allocated,
            nvidia_smi_bytes=used,
        )  # fmt: skip


def seconds_a_step(run: RunFolder) -> float:
    """The median of the later half of the steps."""
    times = [row["time"] for row in read_lines(run.metrics_file)]
    return statistics.median(b - a for a, b in itertools.pairwise(times[len(times) // 2 - 1 :]))


def collective(bench: Bench) -> None:
    for count in (count for count in bench.counts if count > 1):
        run = RunFolder(bench.work / f"train-{count}")
        if not run.done:
            raise click.UsageError(f"--part collective needs what --part train leaves for {count} in --work")
        printed = bench.launch(count, Path(__file__).resolve(), "--work", bench.work, "--values",
                               json.loads(run.result.read_text())["trainable"])  # fmt: skip
        found = json.loads(printed.split("RESULT", 1)[1])
        step = seconds_a_step(run)
        sent = 2 * (count - 1) / count * found["payload_bytes"]  # a ring's
        bench.tell(
            "collective", count,
            f"{found['payload_bytes'] / 2**20:.1f} MiB a step, {sent / 2**20:.1f} sent by each in a ring  all-reduce "
            f"{found['all_reduce_ms']:.3f} ms ({sent / found['all_reduce_ms'] / 1e6:.1f} GB/s), as a step does it "
            f"{found['sum_ms']:.3f} ms: {found['sum_ms'] / 1e3 / step:.2%} of a step  "
            f"its buffers {found['buffer_bytes'] / GIB:.2f} GiB",
            **found, sent_bytes=sent, seconds_a_step=step,
        )  # fmt: skip


def all_reduce(values: int) -> None:
    """On each process: what a step sums over processes, timed alone."""
    import torch
    from accelerate import Accelerator

    from im2json.training.update import sum_over_processes

    cuda = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not cuda)
    parameter = torch.nn.Parameter(torch.zeros(values, device=accelerator.device))
    parameter.grad = torch.zeros_like(parameter)
    more, flat = torch.zeros(3, device=accelerator.device), torch.zeros(values + 3, device=accelerator.device)

    def free() -> int:
        return torch.cuda.mem_get_info()[0] if cuda else 0

    def milliseconds(call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(ROUNDS):
            accelerator.wait_for_everyone()
            if cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end))
            else:
                clock = time.perf_counter()
                call()
                taken.append(1e3 * (time.perf_counter() - clock))
        return statistics.median(taken)

    before = free()
    torch.distributed.all_reduce(flat)  # the first one has NCCL connect the GPUs and take its buffers
    if cuda:
        torch.cuda.synchronize()
    found = {
        "buffer_bytes": before - free(),
        "payload_bytes": flat.nbytes,
        "all_reduce_ms": milliseconds(lambda: torch.distributed.all_reduce(flat)),
        "sum_ms": milliseconds(lambda: sum_over_processes(more, [parameter], accelerator)),
    }
    accelerator.print("RESULT" + json.dumps(found))
    accelerator.end_training()


def evaluation(bench: Bench) -> None:
    first = 0.0
    for count in bench.counts:
        run = bench.train("evaluation", count, bench.counts[-1], 1 + EVALUATIONS, "--eval-every", 1)
        rows = list(read_lines(run.metrics_file))[2:]  # the first evaluation warms up
        took = [evaluated["time"] - trained["time"] for trained, evaluated in zip(rows[::2], rows[1::2], strict=True)]
        seconds, evaluated = statistics.median(took), rows[-1]
        ids = [row["id"] for row in read_lines(run.predictions_file) if row["step"] == 1 + EVALUATIONS]
        speed, values = len(ids) / seconds, evaluated["values"]
        first = first or speed / count
        bench.tell(
            "evaluation", count,
            f"{seconds:.2f} s  {speed:.2f} receipts/s  {speed / first:.2f} x one ({speed / first / count:.0%})  "
            f"{len(ids)} answers to {len(set(ids))} examples, edit distance {values['edit_distance']:.6f}",
            seconds=seconds, took=took, receipts_per_second=speed, speed_up=speed / first, rows=len(ids), values=values,
        )  # fmt: skip


def same(bench: Bench) -> None:
    most, steps = bench.counts[-1], min(bench.steps, COMPARED)
    found = []
    for count in (1, most):
        run = bench.train("same", count, bench.examples * most, steps, "--eval-every", 0, "--dropout", 0)
        found.append([row["values"] for row in read_lines(run.metrics_file)])
    for step, (one, many) in enumerate(zip(*found, strict=True), start=1):
        print(f"  step {step:>2}  " + "  ".join(f"{n} {one[n]:.5f} {many[n]:.5f}" for n in ("loss", "grad_norm")))
    largest = {
        name: max(abs(many[name] / one[name] - 1) for one, many in zip(*found, strict=True))
        for name in ("loss", "grad_norm")
    }
    told = "  ".join(f"{name} differs from one GPU's by {value:.2e} at most" for name, value in largest.items())
    bench.tell("same", most, told, steps=steps, largest=largest, one=found[0], most=found[1])


def sweep(bench: Bench) -> None:
    """The point that fails is the second to start, so that another one has to take its GPU."""
    grid = bench.work / "grid.json"
    rates = [round(1e-3 * (1.5 + place), 6) for place in range(bench.points - 2)]  # none of them the base's
    base = {"steps": 10, "eval_every": 10, "eval_examples": 4, "max_new_tokens": 16}
    grid.write_text(json.dumps({"base": base, "ablate": {"target_modules": ["nothing"], "lr": rates}}))
    for count in bench.counts:
        folder = bench.work / f"sweep-{count}"
        shutil.rmtree(folder, ignore_errors=True)
        jobs = [] if bench.gpus else ["--jobs", str(count)]
        command = [sys.executable, "sweep.py", str(grid), "--output", str(folder), *jobs]
        clock = time.perf_counter()
        with (bench.work / f"sweep-{count}.txt").open("w") as log:
            program = subprocess.Popen(command, cwd=REPOSITORY, env=bench.environment(count), stdout=log, stderr=log)
            ran: dict[str, list[Any]] = {}  # point -> its GPU, seconds from and to
            while program.poll() is None:
                for note in folder.glob("points/*.pid"):
                    lines = [*note.read_text().splitlines(), "", "", ""] if note.exists() else [""] * 3
                    now = time.perf_counter() - clock
                    ran.setdefault(note.stem, ["", now, now])[2] = now
                    ran[note.stem][0] = lines[2] or ran[note.stem][0]
                time.sleep(0.1)
        seconds = max(end for _, _, end in ran.values())  # what follows is the winner's score
        done = {point: RunFolder(folder / "points" / point).done for point in ran}
        for point, (gpu, start, end) in ran.items():
            print(
                f"  {start:6.1f} to {end:6.1f} s on {gpu or 'the CPU'}: {point} {'done' if done[point] else 'failed'}"
            )
        bench.tell("sweep", count, f"{len(done)} points, {sum(done.values())} of them done, in {seconds:.1f} s",
                   seconds=seconds, points=ran, done=done)  # fmt: skip


PARTS = {"train": training, "collective": collective, "evaluation": evaluation, "same": same, "sweep": sweep}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for model, data and runs")
@click.option("--gpus", "counts", multiple=True, type=click.IntRange(1), help="how many; powers of two unless given")
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="these parts alone")
@click.option("--size", type=click.Choice(["3b", "toy"]), default="3b", help="toy: try this script on a CPU")
@click.option("--resolution", default=224, help="px")
@click.option("--examples", default=16, help="per GPU and step")
@click.option("--steps", type=click.IntRange(4), default=40)
@click.option("--receipts", default=512, help="examples of an evaluation")
@click.option("--points", type=click.IntRange(3), help="of the sweep; twice the GPUs unless given")
@click.option("--out", type=click.Path(path_type=Path), help="add the results to this file too, as JSON lines")
@click.option("--values", type=int, hidden=True)
@click.argument("flags", nargs=-1)
def main(
    work: Path, counts: tuple[int, ...], parts: tuple[str, ...], size: str, resolution: int, examples: int, steps: int,
    receipts: int, points: int | None, out: Path | None, values: int | None, flags: tuple[str, ...],
) -> None:  # fmt: skip
    """Measure it all; FLAGS (after --) go to train.py."""
    if values is not None:  # one of the processes of `collective`
        all_reduce(values)
        return
    gpus = visible_gpus()
    chosen = sorted(set(counts)) or [2**k for k in range(len(gpus).bit_length())] or [1]
    if gpus and chosen[-1] > len(gpus):
        raise click.UsageError(f"--gpus {chosen[-1]}: {len(gpus)} were found here")
    # in a folder of its own for what decides the data: a step of the most GPUs is never a short one
    work = work.absolute() / f"{size}-{resolution}-{examples * chosen[-1]}-{receipts}"
    if not (work / "cord").exists():
        write_cord_rows(work / "cord", {"train": 6 * examples * chosen[-1], "validation": receipts, "test": 1})
    if not (work / "model").exists():  # by a process that then leaves the GPU alone
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(save_random_paligemma, work / "model", size, resolution).result()
    many = points or max(4, 2 * chosen[-1])
    bench = Bench(work, chosen, gpus, examples, steps, receipts, many, flags, out and out.absolute())
    for part, measure in PARTS.items():
        if part in parts or not parts:
            measure(bench)


if __name__ == "__main__":
    main()
