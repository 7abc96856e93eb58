import json
import math
import pickle
import random

import pytest
from oracles import random_pair

from im2json.scoring import METRICS, StreamingEvaluator


def examples(count: int) -> list[tuple[str, dict[str, object]]]:
    rng = random.Random(11)
    pairs = [random_pair(rng) for _ in range(count)]
    return [("broken {" if rng.random() < 0.1 else json.dumps(text), target) for text, target in pairs]


def run(part: list[tuple[str, dict[str, object]]]) -> StreamingEvaluator:
    evaluator = StreamingEvaluator()
    for prediction, target in part:
        evaluator.update(prediction, target)
    return evaluator


EXAMPLES = examples(120)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 120, 150])
def test_merged_parts_equal_a_single_pass(parts: int) -> None:
    whole = run(EXAMPLES).compute()
    merged = StreamingEvaluator()
    for part in range(parts):
        merged.merge(pickle.loads(pickle.dumps(run(EXAMPLES[part::parts]))))
    assert merged.compute() == pytest.approx(whole, abs=1e-12, rel=0)
    assert merged.compute()["num"] == len(EXAMPLES)


def test_merging_leaves_the_other_as_it_is() -> None:
    one, two = run(EXAMPLES[:10]), run(EXAMPLES[10:20])
    before = two.compute()
    one.merge(two)
    assert two.compute() == before
    assert one.compute()["num"] == 20


def test_means_and_ratios_of_sums() -> None:
    evaluator = StreamingEvaluator()
    first = evaluator.update('{"a":"x"}', {"a": "x"})
    second = evaluator.update('{"a":"y","b":"z"}', {"a": "x", "b": "z", "c": ["1", "2"]})
    got = evaluator.compute()
    for name in set(METRICS) - {"field_f1", "field_precision", "field_recall", "key_f1"}:
        assert got[name] == pytest.approx((first[name] + second[name]) / 2)
    assert got["field_precision"] == pytest.approx(2 / 3)
    assert got["field_recall"] == pytest.approx(2 / 5)
    assert got["field_f1"] == pytest.approx(4 / 8)
    assert got["key_f1"] == pytest.approx(6 / 8)


def test_no_examples() -> None:
    got = StreamingEvaluator().compute()
    assert got["num"] == 0
    assert all(math.isnan(got[name]) for name in METRICS)


def test_size_does_not_grow() -> None:
    assert len(pickle.dumps(run(EXAMPLES * 3))) <= len(pickle.dumps(run(EXAMPLES[:5]))) + 100
