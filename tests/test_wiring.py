"""Every option reaches what it is for: which figures of a run it changes, and which it leaves alone.

Two kinds of runs show that. A training run has a learning rate of nearly 0: its losses tell which examples each step
had and its gradient norms how LoRA was set up, while its weights still tell what the optimizer did. A reading run
learns so fast that every adapter answers differently.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import datasets
import pytest
import torch
from helpers import clear_error, write_dataset
from PIL import Image
from run_files import different, figures, lively, one_field, read_rows, result

from im2json.options import OPTIONS, SEVEN, flag_name

pytest_plugins = ["wiring_runs"]


@dataclass(frozen=True)
class Effect:
    """How a run differs from one without these flags."""

    flags: str
    changes: str  # figures that are different
    may_change: str = ""  # figures that may follow; all the others are the same
    on: str = ""  # flags that both runs have
    slow: bool = False


BASE = (
    "--model {model} --dataset {dataset} --precision fp32 --quant none --r 4 --optimizer adamw --threads 1 "
    f"--batch-size 4 --microbatch 4 --max-new-tokens 6 --target-modules {SEVEN}"
)
TRAINING = "--lr 1e-6 --epochs 1 --eval-every 0 --no-test"
READING = "--lr 0.1 --steps 2 --eval-every 1 --max-new-tokens 6"
CONSTRAINED = "--constrain --schema {digits} --max-new-tokens 16"
ADAPTER = "last_weights best_weights"
LEARNED = f"norms {ADAPTER}"
INPUTS = f"losses {LEARNED}"
LENGTH = f"{INPUTS} counts steps rates checkpoints"
ANSWERS = "before during after"
SCORES = "validation test"
SPLITS = ("train", "validation", "test")

TRAINING_EFFECTS = {
    # the examples
    "dataset": Effect("--dataset {other_dataset}", f"{INPUTS} counts", slow=True),
    "train_split": Effect("--train-split more", f"{LENGTH} schema"),
    "image_column": Effect("--image-column second", INPUTS, slow=True),
    "target_column": Effect("--target-column note", f"{INPUTS} counts schema", slow=True),
    "letterbox": Effect("--letterbox", f"{INPUTS} reading"),
    "prefix_mask": Effect("--prefix-mask picture", f"{INPUTS} reading"),
    "prompt": Effect("--prompt read.", f"{INPUTS} reading"),
    "batch_size": Effect("--batch-size 5", f"{INPUTS} steps rates checkpoints"),
    "seed": Effect("--seed 1", INPUTS),
    # the model
    "model": Effect("--model {other_model}", INPUTS, slow=True),
    "r": Effect("--r 8", f"{LEARNED} lora", slow=True),
    "alpha": Effect("--alpha 32", f"{LEARNED} lora"),
    "dropout": Effect("--dropout 0.5", f"{LEARNED} lora"),
    "target_modules": Effect("--target-modules q_proj", f"{LEARNED} lora"),
    "rslora": Effect("--rslora", f"{LEARNED} lora"),
    "dora": Effect("--dora", f"{LEARNED} lora"),
    "quant": Effect("--quant nf4", f"{INPUTS} reading", slow=True),
    "precision": Effect("--precision bf16", f"losses {ADAPTER}", "norms", slow=True),
    # the optimizer
    "lr": Effect("--lr 2e-6", f"rates {ADAPTER}"),
    "schedule": Effect("--schedule constant", f"rates {ADAPTER}"),
    "warmup": Effect("--warmup 0.7", f"rates {ADAPTER}"),
    "weight_decay": Effect("--weight-decay 1000", ADAPTER),
    "max_grad_norm": Effect("--max-grad-norm 0.01", ADAPTER),
    "optimizer": Effect("--optimizer paged_adamw_8bit", ADAPTER),
    "epochs": Effect("--epochs 2", LENGTH, slow=True),
    "steps": Effect("--steps 2", LENGTH, slow=True),
    # how the work is done: at most the last bits of the weights change
    "microbatch": Effect("--microbatch 3", "", ADAPTER, slow=True),
    "threads": Effect("--threads 2", "", ADAPTER, slow=True),
    "workers": Effect("--workers 1", "", slow=True),
    "gradient_checkpointing": Effect("--gradient-checkpointing on", "", slow=True),
    "cache_features": Effect("--cache-features 0", "", on="--target-modules language --epochs 2", slow=True),
    "dequantize": Effect("--dequantize on", "", on="--quant nf4", slow=True),
    "save_every": Effect("--save-every 1", "checkpoints", slow=True),
    "keep": Effect("--keep 1", "checkpoints", on="--save-every 1", slow=True),
}

READING_EFFECTS = {
    "letterbox": Effect("--letterbox", f"{INPUTS} {ANSWERS} reading", SCORES, slow=True),
    "prompt": Effect("--prompt read.", f"{INPUTS} {ANSWERS} reading", SCORES, slow=True),
    "quant": Effect("--quant nf4", f"{INPUTS} {ANSWERS} reading", SCORES, slow=True),
    "max_new_tokens": Effect("--max-new-tokens 4", f"{ANSWERS} reading", SCORES, slow=True),
    "constrain": Effect(CONSTRAINED, f"{ANSWERS} {SCORES} schema columns", on="--max-new-tokens 16", slow=True),
    "schema": Effect("--schema {letters}", f"{ANSWERS} {SCORES} schema", on=CONSTRAINED, slow=True),
    "eval_batch_size": Effect("--eval-batch-size 1", "", slow=True),
    "check_sum": Effect("--check-sum total=total", "columns"),
    "eval_every": Effect("--eval-every 3", "during after steps best_step best_weights checkpoints", SCORES),
    "eval_examples": Effect("--eval-examples 2", "during steps validation", slow=True),
    "metric": Effect(
        "--metric edit_distance",
        f"best_step best_weights after {SCORES} steps",
        on=f"{CONSTRAINED} --lr 0.03",
        slow=True,
    ),
    "patience": Effect(
        "--patience 1", "losses norms last_weights counts steps rates checkpoints during", on="--steps 3", slow=True
    ),
    "test": Effect("--no-test", "before after test steps", slow=True),
}
ELSEWHERE = {  # tests of this file that need more than two runs
    "skip_bad": "test_bad_rows_are_left_out_and_nothing_else_changes",
    "max_target_tokens": "test_targets_that_are_too_long_are_refused",
    "dataset_config": "test_a_data_set_on_the_hub_is_read_in_the_configuration_and_revision_given",
    "revision": "test_a_data_set_on_the_hub_is_read_in_the_configuration_and_revision_given",
}
NOT_HERE = {
    "adapter": "changes where training begins: see test_wiring_resume.py",
    "output": "names the run folder: every run of these tests has one",
    "trim": "needs scans with blank paper around their print: see test_trim.py",
    "image_tokens": "needs a model that reads pictures at their own resolution: see test_families.py",
    "launch": "needs a GPU: see test_gpu.py",
    "track": "needs a tracker other than TensorBoard, and none is installed",
}
MAY_CHANGE_ON_RESUME = {
    *("epochs", "steps", "eval_every", "patience", "test", "constrain"),  # with another result from there on
    *("microbatch", "threads", "workers", "gradient_checkpointing", "cache_features", "dequantize", "launch"),
    *("save_every", "keep", "eval_batch_size", "check_sum", "track", "output"),
}


def test_every_option_is_tried():
    tried = TRAINING_EFFECTS.keys() | READING_EFFECTS.keys()
    assert tried | ELSEWHERE.keys() | NOT_HERE.keys() == OPTIONS.keys()
    assert not tried & (ELSEWHERE.keys() | NOT_HERE.keys())
    assert all(name in globals() for name in ELSEWHERE.values())


@pytest.fixture(scope="module")
def paths(small_model, tmp_path_factory) -> dict[str, str]:
    """What the flags of the tables name: models, data sets and schemas."""
    folder = tmp_path_factory.mktemp("wiring")
    schemas = {"digits": [f"{i:02}" for i in range(100)], "letters": ["aa", "b", "cccc"]}
    for name, values in schemas.items():
        (folder / name).write_text(json.dumps(one_field(values)))
    two_columns(write_dataset(folder / "dataset", more=8))
    two_columns(write_dataset(folder / "other_dataset", train=9))
    return {
        "model": lively(small_model, folder / "model"),
        "other_model": lively(small_model, folder / "other_model", 9),
        **{name: str(folder / name) for name in ("dataset", "other_dataset", *schemas)},
    }


def two_columns(dataset: Path) -> Path:
    """Give every example of a data set a second picture and a second target, and the split `more` another field."""
    for file in dataset.glob("*/metadata.jsonl"):
        rows = read_rows(file)
        for row, other in zip(rows, rows[1:] + rows[:1]):
            row |= {"second": other["file_name"], "note": '{"x": 1}'}
            if file.parent.name == "more":
                row["ground_truth"] = json.dumps({"gt_parse": {"field": "1"}})
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return dataset


@pytest.fixture(scope="module")
def run_with(train, paths, tmp_path_factory) -> Callable[[str], Path]:
    """`run_with(flags)` makes a run, once for the same flags."""
    runs: dict[str, Path] = {}

    def run(flags: str) -> Path:
        flags = " ".join(flags.split())
        if flags not in runs:
            given = [flag.format(**paths) for flag in f"{BASE} {flags}".split()]
            runs[flags] = train(tmp_path_factory.mktemp("runs") / "run", base=given).path
        return runs[flags]

    return run


def cases() -> list[Any]:
    tables = (("training", TRAINING, TRAINING_EFFECTS), ("reading", READING, READING_EFFECTS))
    return [
        pytest.param(f"{base} {effect.on}", effect, id=f"{option}-{kind}", marks=[pytest.mark.slow] * effect.slow)
        for kind, base, effects in tables
        for option, effect in effects.items()
    ]


@pytest.mark.parametrize(("flags", "effect"), cases())
def test_an_option_changes_what_it_should_and_nothing_else(run_with, flags, effect):
    one, other = figures(run_with(flags)), figures(run_with(f"{flags} {effect.flags}"))
    changes, may_change = set(effect.changes.split()), set(effect.may_change.split())
    assert changes <= one.keys() and may_change <= one.keys()
    found = different(one, other)
    assert changes - found == set(), "these should have changed"
    assert found - changes - may_change == set(), "these should not have changed"


def test_the_last_step_is_validated_however_seldom_others_are(run_with):
    steps = figures(run_with(f"{READING} --eval-every 3"))["steps"]
    assert [step for split, _, step, _ in steps if split == "validation"] == [2]


def test_all_other_options_are_refused_on_resume(train, paths, cli, tmp_path):
    given = f"{BASE} {TRAINING} --stop-after 1".format(**paths).split()
    run = train(tmp_path / "run", base=given).path
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    flags = {option: effect.flags for option, effect in (TRAINING_EFFECTS | READING_EFFECTS).items()}
    flags |= {"skip_bad": "--skip-bad 1", "max_target_tokens": "--max-target-tokens 99", "adapter": "--adapter {model}"}
    flags |= {
        "trim": "--trim crop",
        "image_tokens": "--image-tokens 64",
        "dataset_config": "--dataset-config small",
        "revision": "--revision v2",
        "schema": "--schema {letters}",
    }
    assert flags.keys() | MAY_CHANGE_ON_RESUME == OPTIONS.keys()
    for option in flags.keys() - MAY_CHANGE_ON_RESUME:
        error = clear_error(cli("train", "--resume", run, *flags[option].format(**paths).split()))
        assert f"{flag_name(option)} was " in error, option
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept


@pytest.mark.slow
def test_bad_rows_are_left_out_and_nothing_else_changes(run_with, paths, tmp_path):
    folder = Path(shutil.copytree(paths["dataset"], tmp_path / "dataset"))
    with (folder / "train" / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "nowhere.png", "ground_truth": "{}"}\n')
    flags = f"{TRAINING} --dataset {folder}"
    with pytest.raises(click.ClickException, match="1 of 18 rows cannot be used"):
        run_with(flags)
    assert different(figures(run_with(f"{flags} --skip-bad 1")), figures(run_with(TRAINING))) == set()


@pytest.mark.slow
def test_targets_that_are_too_long_are_refused(run_with, paths):
    """The small model reads a token a byte, and one more ends the target."""
    rows = [row for split in SPLITS for row in read_rows(Path(paths["dataset"], split, "metadata.jsonl"))]
    targets = [json.loads(row["ground_truth"])["gt_parse"] for row in rows]
    longest = 1 + max(len(json.dumps(target, separators=(",", ":"))) for target in targets)
    fitting = run_with(f"{TRAINING} --max-target-tokens {longest}")
    assert different(figures(fitting), figures(run_with(TRAINING))) == set()
    with pytest.raises(click.ClickException, match="--max-target-tokens"):
        run_with(f"{TRAINING} --max-target-tokens {longest - 1}")


@pytest.mark.slow
def test_a_data_set_on_the_hub_is_read_in_the_configuration_and_revision_given(run_with, monkeypatch):
    wanted = []

    def load(path: str, name: str | None = None, revision: str | None = None) -> datasets.DatasetDict:
        wanted.append((path, name, revision))
        pictures = [Image.new("RGB", (20, 24), color) for color in ("red", "green", "blue")]
        table = datasets.Dataset.from_dict({"image": pictures, "ground_truth": ['{"total": "1"}'] * 3})
        return datasets.DatasetDict(dict.fromkeys(SPLITS, table))

    monkeypatch.setattr(datasets, "load_dataset", load)
    run = run_with(f"{TRAINING} --dataset some/hub --dataset-config small --revision v2")
    assert set(wanted) == {("some/hub", "small", "v2")}
    assert result(run)["examples"] == 3


@pytest.mark.slow
@pytest.mark.usefixtures("own_threads")
def test_a_run_takes_the_threads_it_is_given(run_with):
    for threads in (1, 2):
        run_with(f"{TRAINING} --steps 1 --threads {threads}")
        assert torch.get_num_threads() == threads
