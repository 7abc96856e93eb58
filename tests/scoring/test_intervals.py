import hashlib
import json
import math
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
from helpers import prediction
from oracles import random_pair

from im2json.catalogue import MIN_EXAMPLES
from im2json.records import Prediction
from im2json.scoring import METRICS, StreamingEvaluator, compare, compare_predictions
from im2json.scoring.bootstrap import REPLICATES, example_key, interval, poisson_weights

Example = tuple[str, dict[str, object], str | None]


def examples(count: int, ids: bool) -> list[Example]:
    rng = random.Random(19)
    pairs = [random_pair(rng) for _ in range(count)]
    return [(json.dumps(pair[0]), pair[1], f"page {i}" if ids else None) for i, pair in enumerate(pairs)]


def run(part: list[Example], seed: int = 0) -> StreamingEvaluator:
    evaluator = StreamingEvaluator(seed)
    for example in part:
        evaluator.update(*example)
    return evaluator


def test_weights_are_poisson_and_independent() -> None:
    weights = np.stack([poisson_weights(example_key(0, str(i), "")) for i in range(2000)]).astype(float)
    for count in range(5):
        assert np.mean(weights == count) == pytest.approx(math.exp(-1) / math.factorial(count), abs=0.002)
    assert weights.mean() == pytest.approx(1, abs=0.003)
    assert weights.var() == pytest.approx(1, abs=0.006)
    for axis in (0, 1):  # over examples as over replicates
        sums = weights.sum(axis=axis)
        assert sums.var() / sums.mean() == pytest.approx(1, abs=0.2)


def test_weights_are_the_same_everywhere() -> None:
    digest = hashlib.sha256(poisson_weights(example_key(0, "receipt-1", "")).tobytes()).hexdigest()
    assert digest.startswith("ee1a3b0a41b0a4e1")
    assert not np.array_equal(poisson_weights(example_key(0, "a", "")), poisson_weights(example_key(1, "a", "")))
    assert example_key(0, "a", "") != example_key(0, None, "a")
    assert example_key(0, "\ud800", "") != example_key(0, "\ud801", "")


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("parts", [2, 3, 60])
def test_intervals_do_not_depend_on_the_split(parts: int, ids: bool) -> None:
    whole = examples(60, ids)
    single = run(whole).intervals()
    shuffled = random.Random(parts).sample(whole, len(whole))
    merged = StreamingEvaluator()
    for part in range(parts):
        merged.merge(pickle.loads(pickle.dumps(run(shuffled[part::parts]))))
    assert list(single) == list(METRICS)
    for name, bounds in merged.intervals().items():
        assert bounds == pytest.approx(single[name], abs=1e-12, rel=0)


def test_merging_is_associative() -> None:
    def part(i: int) -> StreamingEvaluator:
        return run(examples(30, True)[10 * i : 10 * i + 10])

    left, right, tail = part(0), part(0), part(1)
    left.merge(part(1))
    left.merge(part(2))
    tail.merge(part(2))
    right.merge(tail)
    assert left.compute() == pytest.approx(right.compute(), abs=1e-12)
    assert left.intervals()["ted_accuracy"] == pytest.approx(right.intervals()["ted_accuracy"], abs=1e-12)


def test_intervals_hold_the_estimate_and_lie_within_bounds() -> None:
    evaluator = run(examples(100, True))
    values = evaluator.compute()
    for name, (low, high) in evaluator.intervals().items():
        assert 0 <= low <= values[name] <= high <= 1
        assert high - low < 0.4


def test_width_is_that_of_theory() -> None:
    evaluator = StreamingEvaluator()
    for i in range(400):
        evaluator.update('{"a":"x"}' if i % 10 < 7 else '{"a":"y"}', {"a": "x"}, str(i))
    low, high = evaluator.intervals()["exact_match"]
    half = 1.96 * math.sqrt(0.7 * 0.3 / 400)
    assert low == pytest.approx(0.7 - half, abs=half / 5)
    assert high == pytest.approx(0.7 + half, abs=half / 5)
    assert evaluator.intervals()["field_f1"] == pytest.approx((low, high))  # one field each: the same shares


def test_too_few_examples_have_no_interval() -> None:
    evaluator = StreamingEvaluator()
    for i in range(MIN_EXAMPLES):
        assert evaluator.intervals() == dict.fromkeys(METRICS)
        evaluator.update('{"a":"x"}', {"a": "y"}, str(i))
    assert evaluator.intervals()["field_f1"] == (0.0, 0.0)
    assert evaluator.intervals()["json_validity"] == (1.0, 1.0)
    assert interval(np.array([np.nan, 1.0])) == (1.0, 1.0)


def test_seeds_differ_and_do_not_mix() -> None:
    part = examples(40, True)
    assert run(part, 1).intervals()["field_f1"] != run(part, 2).intervals()["field_f1"]
    assert run(part, 1).compute() == run(part, 2).compute()
    with pytest.raises(ValueError, match="seeds 1 and 2"):
        run(part, 1).merge(run(part, 2))


def pages(count: int, correct: float, seed: int) -> list[Prediction]:
    """Predictions whose value is read correctly by a share of runs, page by page from hopeless to easy."""
    rng = random.Random(seed)
    rows: list[Prediction] = []
    for i in range(count):
        target = {"a": f"value {i}", "b": [str(n) for n in range(i % 7)]}
        easy = i % 2 == 0 or rng.random() < correct
        text = json.dumps(target if easy else {"a": "?"})
        rows.append(prediction({"id": f"page {i}", "text": text, "target": target}))
    return rows


def test_a_run_against_itself_differs_in_nothing() -> None:
    rows = pages(50, 0.5, 1)
    for found in compare_predictions(rows, rows[::-1]).values():
        assert (found.difference, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-12)
        assert found.first == pytest.approx(found.second, abs=1e-12)
    assert not compare_predictions(rows, rows)["field_f1"].exceeds_noise


def test_a_better_run_is_told_from_noise() -> None:
    worse, better, alike = pages(200, 0.3, 1), pages(200, 0.8, 2), pages(200, 0.3, 3)
    found = compare_predictions(worse, better)["field_f1"]
    assert found.exceeds_noise
    assert found.low < found.difference < found.high
    assert found.difference == pytest.approx(found.second - found.first)
    edit = compare_predictions(worse, better)["edit_distance"]
    assert edit.exceeds_noise
    assert edit.high < 0
    assert not compare_predictions(worse, alike)["field_f1"].exceeds_noise


def test_pairing_narrows_the_interval() -> None:
    rows = pages(200, 0.3, 1)
    changed = list(rows)
    for i in range(1, 40, 2):
        right = {"id": rows[i].id, "text": json.dumps(rows[i].target), "target": rows[i].target}
        changed[i] = prediction(right)
    found = compare_predictions(rows, changed)["exact_match"]
    evaluator = StreamingEvaluator()
    for row in rows:
        evaluator.update(row.text, row.target, row.id)
    low, high = evaluator.intervals()["exact_match"]
    assert found.high - found.low < 0.6 * (high - low) * math.sqrt(2)


def test_only_the_same_examples_compare() -> None:
    rows = pages(20, 0.5, 1)
    with pytest.raises(ValueError, match="1 examples are not the same on both sides, the first 'page 19'"):
        compare_predictions(rows, rows[:-1])
    with pytest.raises(ValueError, match="twice"):
        compare_predictions(rows, [*rows, rows[0]])
    with pytest.raises(ValueError, match="'page 3'"):
        compare_predictions(rows, [replace(row, target={}) if row.id == "page 3" else row for row in rows])
    one, other = StreamingEvaluator(), StreamingEvaluator()
    one.update("{}", {}, "1")
    other.update("{}", {}, "2")
    with pytest.raises(ValueError, match="same examples"):
        compare(one, other)


def test_examples_without_ids_pair_by_target() -> None:
    one, other = StreamingEvaluator(), StreamingEvaluator()
    for i in range(30):
        one.update("{}", {"a": str(i)})
        other.update(json.dumps({"a": str(i % 25)}), {"a": str(i)})
    assert compare(one, other)["field_f1"].exceeds_noise


def test_replicates() -> None:
    assert len(poisson_weights(b"key")) == REPLICATES
