"""How a step is carried out, chosen from the options, the model's sizes and the memory that is free."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import COUNTS, reset_accelerate
from run_files import read_rows
from test_memory import paligemma, setting

from im2json.model.memory import MARGIN, Setting
from im2json.options import TrainConfig
from im2json.training.strategy import ENOUGH, RECORDED, Strategy, Workload, choose_strategy, strategy_note
from im2json.workspace import open_workspace, start_accelerator

GIB = 2**30
LENGTHS = [90, 120, 180, 180, 200, 240, 300, 400] * 20


def work(free_gib: float | None, **options: Any) -> Workload:
    """PaliGemma-3B at 224 px on rows of CORD's lengths."""
    config = TrainConfig.resolve({"model": "google/paligemma-3b-pt-224", **options})
    return Workload(
        config=config,
        sizes=paligemma(224),
        setting=setting(r=config.model.r),
        target_lengths=LENGTHS,
        longest_target=400,
        prefix=262,
        eval_batch=64,
        max_new_tokens=450,
        processes=1,
        steps=300,
        free_bytes=None if free_gib is None else free_gib * GIB,
    )


def needs(found: Workload, strategy: Strategy) -> float:
    """Bytes that a step of this strategy takes beside the model."""
    parts = found.forecast(strategy)
    return parts.lora + parts.step * (RECORDED if strategy.launch != "single" else 1.0)


def test_on_a_cpu_nothing_is_recorded_or_checkpointed_by_default():
    assert choose_strategy(work(None)) == Strategy("single", False, 4)
    assert choose_strategy(work(None, batch_size=3)) == Strategy("single", False, 3)
    given = {"microbatch": 2, "launch": "compiled", "gradient_checkpointing": "on"}
    assert choose_strategy(work(None, **given)) == Strategy("compiled", True, 2)
    assert strategy_note(Strategy("single", False, 2), work(None, microbatch=2)) is None
    assert "4 of a step's 16 examples" in (strategy_note(Strategy("single", False, 4), work(None)) or "")


def test_with_plenty_of_memory_a_gpu_gets_as_many_examples_as_keep_it_busy():
    assert choose_strategy(work(130.0, launch="single")) == Strategy("single", False, 16)
    # 7 keep it busy; of 16 that leaves parts of 6, 6 and 4
    assert 6 * (262 + 400) < ENOUGH <= 7 * (262 + 400)
    assert choose_strategy(work(130.0)) == Strategy("graphs", False, 6)


@pytest.mark.parametrize("gib", [60.0, 40.0, 24.0, 16.0, 12.0, 8.0])
@pytest.mark.parametrize("launch", ["single", "graphs"])
def test_what_is_chosen_fits_and_twice_as_much_would_not(gib, launch):
    found = work(gib, launch=launch)
    chosen = choose_strategy(found)
    assert needs(found, chosen) <= MARGIN * gib * GIB
    if chosen.microbatch < 6:  # fewer than keep a GPU busy, so memory decided
        larger = dataclasses.replace(chosen, microbatch=2 * chosen.microbatch)
        assert needs(found, larger) > MARGIN * gib * GIB


def test_gradients_are_checkpointed_only_if_a_single_example_has_no_room_otherwise():
    launches = {gib: choose_strategy(work(gib, launch="graphs")) for gib in (1.0, 2.0, 4.0, 8.0)}
    for gib, chosen in launches.items():
        one = needs(work(gib), Strategy("graphs", False, 1))
        assert chosen.checkpointing is (one > MARGIN * gib * GIB)
    assert {chosen.checkpointing for chosen in launches.values()} == {True, False}
    assert choose_strategy(work(1.0, launch="graphs")).launch == "single"  # which cannot be recorded then
    assert not choose_strategy(work(1.0, gradient_checkpointing="off")).checkpointing
    assert choose_strategy(work(130.0, gradient_checkpointing="on")).checkpointing


def test_a_long_run_of_a_large_model_is_compiled():
    long = dataclasses.replace(work(130.0), steps=512)
    assert choose_strategy(long).launch == "compiled"
    assert choose_strategy(dataclasses.replace(long, steps=511)).launch == "graphs"
    for hidden, launch in ((1023, "graphs"), (1024, "compiled")):
        sizes = dataclasses.replace(long.sizes, text=dataclasses.replace(long.sizes.text, hidden=hidden))
        assert choose_strategy(dataclasses.replace(long, sizes=sizes)).launch == launch


def test_a_pass_that_cannot_be_recorded_is_run_or_compiled():
    chat = dataclasses.replace(work(130.0, launch="graphs"), recordable=False)
    assert choose_strategy(chat).launch == "single"
    for steps, launch in ((127, "single"), (128, "compiled")):
        assert choose_strategy(dataclasses.replace(work(130.0), recordable=False, steps=steps)).launch == launch


def test_what_was_given_is_taken_and_processes_share_a_step():
    assert choose_strategy(work(130.0, microbatch=5, launch="graphs")) == Strategy("graphs", False, 5)
    four = dataclasses.replace(work(130.0, launch="single"), processes=4)
    assert choose_strategy(four).microbatch == 4
    assert "a step's 4 examples 4 at a time, no gradient checkpointing, launch single" in (
        strategy_note(choose_strategy(four), four) or ""
    )


@pytest.mark.parametrize(("batch_size", "eval_batch"), [(3, 3), (16, COUNTS["validation"])])
def test_a_workspace_knows_what_its_run_computes(small_model, dataset, batch_size, eval_batch):
    """The small model reads a token a byte, and one more ends a target; 4 image tokens and BOS begin the prefix."""
    given = {"model": small_model, "dataset": dataset, "quant": "none", "optimizer": "adamw", "r": 4, "threads": 1}
    given |= {"batch_size": 4, "epochs": 3, "eval_batch_size": batch_size, "max_new_tokens": 7, "prompt": "read."}
    config = TrainConfig.resolve({**given, "target_modules": "q_proj,down_proj"})
    reset_accelerate()
    space = open_workspace(config, *start_accelerator(config))
    work = space.workload()
    tokens = {split: target_tokens(Path(dataset, split, "metadata.jsonl")) for split in COUNTS}
    assert work.config == config
    assert (work.sizes.text.hidden, work.sizes.vision.hidden) == (64, 64)
    assert work.setting == Setting("fp32", "none", 4, True, 8, ("down_proj", "q_proj"), ("q_proj",))
    assert work.target_lengths == tokens["train"]
    assert work.longest_target == max(map(max, tokens.values()))
    assert work.prefix == 4 + 1 + len("read.\n")
    assert (work.eval_batch, work.max_new_tokens) == (eval_batch, 7)
    assert (work.processes, work.steps, work.free_bytes) == (1, 9, None)
    for checkpointing in (False, True):
        model = space.forward(Strategy("single", checkpointing, 2), work).model
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) is checkpointing


def target_tokens(metadata: Path) -> list[int]:
    targets = [json.loads(row["ground_truth"])["gt_parse"] for row in read_rows(metadata)]
    return [len(json.dumps(target, separators=(",", ":"))) + 1 for target in targets]
