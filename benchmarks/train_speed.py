"""Training steps at a real size, of PaliGemma-3B or of a chat model: im2json's and TRL's SFTTrainer's, on one GPU.

Both train the same random weights (speed and memory do not depend on their values) in NF4 on the same rows of CORD's
lengths, with LoRA of rank 8 on the seven names of both towers, dropout .05, 16 examples a step. Each variant has a
process of its own, one after the other. Printed are medians over steps after the compilation, peak memory as torch
allocated and reserved it, the losses of the first steps, and ratios to TRL's. TRL is no dependency: `pip install trl`.

python benchmarks/train_speed.py --work /tmp/speed
python benchmarks/train_speed.py --work /tmp/speed --size qwen-4b
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from random_models import CHAT, SIZES, as_transformers, image_tokens, picture_size, save_random

EXAMPLES = 16  # a step
EPOCHS = 2  # so that a frozen tower's features are used again
OURS: dict[str, dict[str, Any]] = {
    "automatic": dict(),
    "compiled": dict(launch="compiled"),
    "compiled, no dropout": dict(launch="compiled", dropout=0.0),
    "compiled, language alone": dict(launch="compiled", target_modules="language"),
    "compiled, language alone, features anew": dict(launch="compiled", target_modules="language", cache_features=0.0),
    "compiled, 4 at a time": dict(launch="compiled", microbatch=4),
    "compiled, 4 at a time, NF4": dict(launch="compiled", microbatch=4, dequantize="off"),
    "compiled, 2 at a time, NF4": dict(launch="compiled", microbatch=2, dequantize="off"),
    "compiled, 1 at a time, NF4": dict(launch="compiled", microbatch=1, dequantize="off"),
    "graphs": dict(launch="graphs"),
    "single launches, 16 at a time": dict(launch="single", microbatch=16, gradient_checkpointing="off"),
    "checkpointing, NF4": dict(gradient_checkpointing="on", dequantize="off"),
    "checkpointing, NF4, 4 at a time": dict(gradient_checkpointing="on", dequantize="off", microbatch=4),
    "checkpointing, NF4, 2 at a time": dict(gradient_checkpointing="on", dequantize="off", microbatch=2),
}
TRL: dict[str, dict[str, Any]] = {
    "TRL 16 x 1": dict(microbatch=16, checkpointing=False),
    "TRL 16 x 1, checkpointing": dict(microbatch=16, checkpointing=True),
    "TRL 4 x 4, checkpointing (the seed's)": dict(microbatch=4, checkpointing=True),
}


# For chat models LoRA of rank 16 is on the language model alone.
LANGUAGE = dict(target_modules="language", r=16)
OURS_CHAT: dict[str, dict[str, Any]] = {
    "automatic": LANGUAGE,
    "compiled": LANGUAGE | dict(launch="compiled"),
    "compiled, 4 at a time": LANGUAGE | dict(launch="compiled", microbatch=4),
    "compiled, 4 at a time, NF4": LANGUAGE | dict(launch="compiled", microbatch=4, dequantize="off"),
    "compiled, 1 at a time, NF4": LANGUAGE | dict(launch="compiled", microbatch=1, dequantize="off"),
    "checkpointing, NF4": LANGUAGE | dict(gradient_checkpointing="on", dequantize="off"),
    "checkpointing, NF4, 4 at a time": LANGUAGE | dict(gradient_checkpointing="on", dequantize="off", microbatch=4),
    "checkpointing, NF4, compiled": LANGUAGE | dict(gradient_checkpointing="on", dequantize="off", launch="compiled"),
}
TRL_CHAT: dict[str, dict[str, Any]] = {
    "TRL 16 x 1, checkpointing": dict(microbatch=16, checkpointing=True),
    "TRL 8 x 2": dict(microbatch=8, checkpointing=False),
    "TRL 4 x 4": dict(microbatch=4, checkpointing=False),
}


def variants(size: str) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return ours and TRL's for a size."""
    return (OURS_CHAT, TRL_CHAT) if size in CHAT else (OURS, TRL)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for the model")
@click.option("--resolution", default=224)
@click.option("--steps", default=14)
@click.option("--size", type=click.Choice(SIZES), default="3b", help="toy, qwen-toy: to try it on a CPU")
@click.option("--only", multiple=True, help="these variants alone")
@click.option("--cap-gib", type=float, help="hold each process to so much memory")
@click.option("--one", hidden=True)
def main(
    work: Path, resolution: int, steps: int, size: str, only: tuple[str, ...], cap_gib: float | None, one: str | None
) -> None:
    model = work / f"model-{size}-{resolution}"
    if one == "save":
        save_random(model, size, resolution)
        return
    if one is not None:
        ours_, trl_ = variants(size)
        measure = ours if one in ours_ else trl
        shape, limit = picture_size(size, resolution), image_tokens(size)
        print("RESULT" + json.dumps(measure(model, shape, limit, steps, cap_gib, **(ours_ | trl_)[one])))
        return
    if not model.exists():  # by a process that then leaves the GPU alone
        subprocess.run([sys.executable, __file__, "--one", "save", *sys.argv[1:]], check=True, capture_output=True)
    found = {}
    for name in only or [name for some in variants(size)[::-1] for name in some]:
        command = [sys.executable, __file__, "--one", name, *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        if not lines:
            print(f"{name:<38} failed:\n{done.stderr.strip()[-2000:]}", flush=True)
            continue
        found[name] = json.loads(lines[0].removeprefix("RESULT"))
        print(line_of(name, found), flush=True)


def line_of(name: str, found: dict[str, dict[str, Any]]) -> str:
    result = found[name]
    best = max((other["examples_per_second"] for key, other in found.items() if key.startswith("TRL")), default=None)
    ratio = (
        f"  {result['examples_per_second'] / best:5.2f} x TRL's best so far"
        if best and not name.startswith("TRL")
        else ""
    )
    losses = " ".join(f"{loss:.3f}" for loss in result["losses"][:3])
    return (
        f"{name:<38} {result['examples_per_second']:6.1f} examples/s  {result['peak_gib']:6.2f} GiB allocated, "
        f"{result['reserved_gib']:.1f} reserved  "
        f"first step {result['first']:5.1f} s  loss {losses}{ratio}"
    )


def summary(times: list[float], losses: list[float], started: float) -> dict[str, Any]:
    """From the clock at the end of each step: the median of the later half, when what is compiled has been."""
    import torch

    durations = sorted(b - a for a, b in itertools.pairwise(times[len(times) // 2 :]))
    cuda = torch.cuda.is_available()
    return {
        "examples_per_second": EXAMPLES / durations[len(durations) // 2],
        "first": times[0] - started,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
        "losses": losses,
    }


def cap(gib: float | None) -> None:
    import torch

    if gib is not None:
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)


def ours(
    model: Path, size: tuple[int, int], limit: int | None, steps: int, cap_gib: float | None, **changes: Any
) -> dict[str, Any]:
    """Steps through im2json's own parts, as fit() takes them."""
    from im2json.cli import quiet_libraries

    quiet_libraries()
    from rows import Rows

    from im2json.data.check import examine
    from im2json.data.example import RunSplit
    from im2json.data.lengths import TargetMeter
    from im2json.data.splits import RunSplits
    from im2json.families import family_of, open_collator
    from im2json.inference.settings import DecodeSettings
    from im2json.model.base import load_positions
    from im2json.model.loading import load_adapted
    from im2json.options import SEVEN, TrainConfig
    from im2json.training.strategy import choose_strategy, strategy_note
    from im2json.training.update import Update, seed_dropout
    from im2json.workspace import Workspace, start_accelerator

    cap(cap_gib)
    defaults: dict[str, Any] = dict(
        r=8, alpha=32.0, dropout=0.05, steps=steps, target_modules=SEVEN, image_tokens=limit
    )
    config = TrainConfig.resolve({"model": str(model), **defaults, **changes})
    accelerator, precision = start_accelerator(config)
    rows: Any = Rows(EXAMPLES * steps // EPOCHS, size)
    collator = open_collator(str(model), config.data.prompt, image_tokens=config.data.image_tokens)
    checkup = examine([rows], TargetMeter(collator, load_positions(str(model))))
    data = RunSplits({name: RunSplit(name, checkup.rows["train"]) for name in ("train", "validation")}, checkup)
    lora = load_adapted(config.model, precision, accelerator.device, 0)
    settings = DecodeSettings(data.lengths.new_token_limit(None), config.decode.eval_batch_size)
    space = Workspace(config, accelerator, precision, data, collator, family_of(lora.config), lora, settings, {})
    work = space.workload()
    strategy = choose_strategy(work)
    print(strategy_note(strategy, work))
    loader = space.step_loader(strategy)
    update = Update.of(space.forward(strategy, work), config.train, accelerator, loader.share.microbatch)
    times, losses, started = [], [], time.perf_counter()
    for step, batches in enumerate(loader.steps(0, steps)):
        seed_dropout(0, step, 0)
        losses.append(update(batches, loader.order.target_tokens(step)).loss)
        times.append(time.perf_counter())
    return summary(times, losses, started)


def trl(
    model: Path, size: tuple[int, int], limit: int | None, steps: int, cap_gib: float | None, microbatch: int,
    checkpointing: bool,
) -> dict[str, Any]:  # fmt: skip
    """The study's recipe: SFTTrainer, bitsandbytes and PEFT as their documentation has it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from rows import Rows
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from im2json.data.order import Order
    from im2json.families import open_collator
    from im2json.model.lora import decoder_name
    from im2json.options import SEVEN, language_modules

    cap(cap_gib)
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    base: Any = AutoModelForImageTextToText.from_pretrained(
        model, quantization_config=bits, device_map={"": 0}, dtype=torch.bfloat16
    )
    chat = base.config.model_type != "paligemma"
    names: Any = language_modules(decoder_name(base)) if chat else SEVEN.split(",")
    lora = get_peft_model(
        base,
        LoraConfig(r=16 if chat else 8, lora_alpha=32, lora_dropout=0.05, target_modules=names, task_type="CAUSAL_LM"),
    )
    rows = Rows(EXAMPLES * steps // EPOCHS, size)
    collator = open_collator(str(model), "extract JSON.", image_tokens=limit)
    order = Order(len(rows), EXAMPLES, 0)
    placed = [rows[i] for step in range(steps) for i in order.step(step)]  # the same examples in the same steps
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **more: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    def collate(chosen: list[dict[str, int]]) -> dict[str, Any]:
        batch = collator([placed[row["place"]] for row in chosen])
        return {**as_transformers(base, batch.inputs), "labels": batch.labels}

    from datasets import Dataset

    settings = SFTConfig(
        output_dir="/tmp/trl", max_steps=steps, per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=EXAMPLES // microbatch, gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False}, optim="adamw_torch_fused", bf16=True,
        learning_rate=2e-4, max_grad_norm=0.3, report_to="none", save_strategy="no", logging_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, dataloader_num_workers=4,
        eos_token=None, pad_token=None,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=lora, args=settings, train_dataset=Dataset.from_dict({"place": list(range(len(placed)))}),
        data_collator=collate, processing_class=collator.processor.tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    trainer._get_train_sampler = lambda *args: None  # in the order given
    started = time.perf_counter()
    trainer.train()
    return summary(times, losses, started)


if __name__ == "__main__":
    main()
