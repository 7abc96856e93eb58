"""train.py --plan."""

from __future__ import annotations

import re

import pytest
from helpers import clear_error
from test_loop import out_of_memory

from im2json.data.lengths import TargetLengths
from im2json.data.order import Order
from im2json.model.memory import Forecast
from im2json.options import TrainConfig
from im2json.report.duration import duration
from im2json.training.plan import Timing, few_steps, refusals, time_report


def test_a_plan_says_what_a_run_takes_and_leaves_nothing(cli, base_args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--steps", 5, "--microbatch", "auto", "--price-per-hour", 3)
    result = cli("train", *base_args, *flags, "--plan", "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []
    lines = result.output.splitlines()
    assert "--microbatch auto: 4 of a step's 4 examples a process, on a CPU" in lines
    (steps,) = (line for line in lines if line.startswith("steps "))
    assert steps.split(None, 1)[1] == "5 of 4 examples: 18 examples, 1.80 epochs of 10"
    (evaluations,) = (line for line in lines if line.startswith("evaluations "))
    assert evaluations.split(None, 1)[1] == "3 of 4 validation examples, and 3 of the test split before and after"
    assert any(re.fullmatch(r"weights +[\d,]+ trained of [\d,]+ \([\d.]+%\)", line) for line in lines)
    assert any(re.fullmatch(r"peak of the run +[\d.]+", line) for line in lines)
    assert any(re.match(r"time +[\d.]+ s a step \(median of 3 after 6\): \d+ s for 5 steps", line) for line in lines)
    assert any(re.match(r"cost +0\.\d\d at 3 an hour", line) for line in lines)


def test_a_plan_measures_against_the_forecast_of_the_microbatch_that_had_room(cli, base_args, monkeypatch):
    forecasts: list[Forecast] = []

    def report(timing: Timing, parts: Forecast, steps: int, price: float | None) -> str:
        forecasts.append(parts)
        return ""

    monkeypatch.setattr("im2json.commands.plan.time_report", report)
    for microbatch in (2, 4):
        assert cli("train", "--plan", *base_args, "--microbatch", microbatch).exit_code == 0
    out_of_memory(monkeypatch, lambda call, examples: examples <= 2)
    assert cli("train", "--plan", *base_args, "--microbatch", 4).exit_code == 0
    two, four, halved = forecasts
    assert halved == two != four


def test_a_plan_is_of_a_fresh_run(cli):
    for flags, word in ((["--plan", "--resume", "somewhere"], "fresh run"), (["--plan", "--check"], "one of the two")):
        result = cli("train", *flags)
        assert result.exit_code == 2 and word in result.output


def test_epochs_that_make_few_steps_are_warned_of():
    order = Order(num_examples=10, batch_size=4, seed=0)
    said = "6 steps may be too few to learn the form of the answers: with 10 examples, try --steps 150"
    assert few_steps(TrainConfig.from_values({"epochs": 2}).train, order) == said
    assert not few_steps(TrainConfig.from_values({"epochs": 20}).train, order)
    assert not few_steps(TrainConfig.from_values({"steps": 6}).train, order)  # as wanted


def test_a_plan_names_what_is_wrong(cli, tmp_path):
    assert "nowhere" in clear_error(cli("train", "--plan", "--dataset", tmp_path / "nowhere"))


def test_what_limits_would_refuse():
    lengths = TargetLengths({"train": [10, 30, 40, 70], "test": [100]})
    assert refusals(lengths) == "4 of 5 at 16, 3 of 5 at 32, 2 of 5 at 64, 0 of 5 at 128"
    assert refusals(TargetLengths({"train": [64]})) == "1 of 1 at 8, 1 of 1 at 16, 1 of 1 at 32, 0 of 1 at 64"


def test_measured_beside_the_forecast_and_the_cost():
    parts = Forecast(1e9, 1e9, 1e8, kept=3e9, passing=1e9, logits=2e9, evaluation=5e9)
    assert (parts.resident, parts.step, parts.total) == (2.1e9, 5e9, 7.1e9)
    text = time_report(Timing(2.0, 8 * 10**9, 4), parts, 1800, 2.5)
    assert text.splitlines() == [
        "measured     7.45 GiB at most in 9 steps; 6.61 were forecast (-11%)",
        "time         2.00 s a step (median of 3 after 6): 1 h 0 min for 1,800 steps, evaluations left out",
        "cost         2.50 at 2.5 an hour, evaluations left out",
    ]
    assert "measured" not in time_report(Timing(2.0, None, 4), parts, 1800, None)


@pytest.mark.parametrize(("seconds", "words"), [(4.4, "4 s"), (3599.7, "1 h 0 min"), (90061, "25 h 1 min")])
def test_durations(seconds, words):
    assert duration(seconds) == words
