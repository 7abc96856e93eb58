"""What only a GPU can show: bf16 and fp16 training, paging, and full runs through train.py there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.small_model import save_small_paligemma

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def run(tmp_path: Path, name: str, *flags: str) -> dict:
    """Train the small model on a few receipts; what result.json holds."""
    from train import main

    model = tmp_path / "model"
    if not model.exists():
        save_small_paligemma(model)
    main(
        ["--model", str(model), "--steps", "6", "--batch-size", "4", "--eval-every", "3", "--eval-examples", "4",
         "--max-new-tokens", "16", "--no-test", "--output", str(tmp_path / name), *flags],
        standalone_mode=False,
    )  # fmt: skip
    return json.loads((tmp_path / name / "result.json").read_text())


def losses(run_folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [row["values"]["loss"] for row in rows if row["split"] == "train"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_run_in_every_precision(tmp_path: Path, precision: str) -> None:
    result = run(tmp_path, "run", "--precision", precision, "--lr", "1e-2")
    values = losses(tmp_path / "run")
    assert result["step"] == 6
    assert values[-1] < values[0]
    assert result["peak_memory_bytes"] > 0


def test_auto_precision_is_bf16_where_the_gpu_has_it(tmp_path: Path) -> None:
    run(tmp_path, "auto")
    run(tmp_path, "bf16", "--precision", "bf16")
    assert losses(tmp_path / "auto") == losses(tmp_path / "bf16")


def test_fp16_overflow_halves_the_scale_and_leaves_the_update_out(tmp_path: Path) -> None:
    from im2json.inference.workbench import set_up, start_accelerator
    from im2json.model.lora import trained
    from im2json.options import TrainConfig
    from im2json.training.loop import train_step
    from im2json.training.optimizer import make_optimizer

    save_small_paligemma(tmp_path / "model")
    config = TrainConfig.resolve(
        {"model": str(tmp_path / "model"), "precision": "fp16", "batch_size": 2, "microbatch": 2, "workers": 0}
    )
    accelerator, precision = start_accelerator(config)
    bench = set_up(config, accelerator, precision)
    parameters = trained(bench.model)
    optimizer = accelerator.prepare(make_optimizer(parameters, config.train))
    (batches,) = bench.step_loader().steps(0, 1)
    tokens = sum(int((batch.labels != -100).sum()) for batch in batches)
    before = [parameter.detach().clone() for parameter in parameters]
    assert accelerator.scaler is not None
    accelerator.scaler.scale(torch.ones((), device="cuda"))  # it has no scale until it is first used
    accelerator.scaler.update(2.0**100)

    outcome = train_step(bench.model, batches, tokens, parameters, optimizer, accelerator, 1.0)

    assert outcome.skipped
    assert not outcome.non_finite
    assert accelerator.scaler.get_scale() == 2.0**99
    assert all(torch.equal(a, b) for a, b in zip(before, parameters))

    accelerator.scaler.update(2.0**10)
    outcome = train_step(bench.model, batches, tokens, parameters, optimizer, accelerator, 1.0)
    assert not outcome.skipped
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters))


def test_ten_overflows_running_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click import ClickException

    def stubborn(*args, **kwargs) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cuda", init_scale=2.0**110, backoff_factor=0.99)

    monkeypatch.setattr("accelerate.accelerator.get_grad_scaler", stubborn)
    with pytest.raises(ClickException, match="10 updates in a row overflowed"):
        run(tmp_path, "run", "--precision", "fp16", "--steps", "30", "--eval-every", "0")
    assert len(losses(tmp_path / "run")) == 9


def test_resuming_on_a_gpu_continues_the_same_run(tmp_path: Path) -> None:
    from train import main

    paged = ["--r", "2048", "--lr", "1e-4"]  # moments of at least 100,000 elements are paged
    run(tmp_path, "whole", *paged)
    run(tmp_path, "other", *paged)
    other = tmp_path / "other"
    (other / "result.json").unlink()
    import shutil

    shutil.rmtree(other / "checkpoints" / "step-6")
    main(["--resume", str(other)], standalone_mode=False)
    assert losses(other) == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_training_memory_does_not_grow_with_evaluations(tmp_path: Path) -> None:
    rare = run(tmp_path, "rare", "--eval-every", "6")
    torch.cuda.reset_peak_memory_stats()
    often = run(tmp_path, "often", "--eval-every", "1")
    assert often["peak_memory_bytes"] <= rare["peak_memory_bytes"] * 1.05
