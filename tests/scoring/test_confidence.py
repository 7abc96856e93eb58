"""Confidence per leaf, against characters looked up one by one, and its calibration against slow definitions."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from helpers import prediction

from im2json.jsontext import canonical, leaf_spans, map_leaves, read
from im2json.scoring.confidence import (
    Calibration,
    area_under_risk_coverage,
    calibration_error,
    judge_leaves,
    kept,
    leaf_confidence,
    reliability,
    risk_coverage,
    threshold_for,
)
from im2json.scoring.metrics import matches
from im2json.scoring.normal import fields, normal_items


def a_document(rng: random.Random, depth: int = 3) -> Any:
    """Nested, with empty leaves, repeated values and characters that JSON escapes."""
    kind = rng.randrange(6) if depth else 5
    if kind < 2 or depth == 3:
        return {rng.choice("abcdé"): a_document(rng, depth - 1) for _ in range(rng.randrange(1, 4))}
    if kind < 4:
        return [a_document(rng, depth - 1) for _ in range(rng.randrange(4))]
    return rng.choice(["x", "", " ", "10,000", 'a "b" \\ {', "茶", 3, -2.5, True, None])


DOCUMENTS = [a_document(random.Random(seed)) for seed in range(200)]
TEXTS = [
    '{"a": "x", "b": [1, {"c": "d"}], "a": "y"}',
    'so: {"a": "x", "b": ["1", "cut sh',
    "{'a': True, 'b': None,}",
    '```json\n{"a": {"b": 1.5e3}}\n```',
    '{"a": "x", "b',
]


@pytest.mark.parametrize(
    "text", [*map(canonical, DOCUMENTS), *(json.dumps(d, indent=1) for d in DOCUMENTS[:20]), *TEXTS]
)
def test_every_leaf_is_found_where_it_stands(text):
    value, spans = read(text).value, leaf_spans(text)
    assert value is not None and spans is not None

    def said(span: tuple[int, int]) -> Any:
        return read('{"v":' + text[slice(*span)]).value["v"]  # type: ignore[index]

    assert map_leaves(spans, said) == value


@pytest.mark.parametrize("text", ["", "no", "[1]", "{]", '{"a": nil}'])
def test_what_is_no_object_has_no_leaves(text):
    assert leaf_spans(text) is None
    assert leaf_confidence(text, [], []) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_leaf_is_as_likely_as_the_tokens_since_the_leaf_before_it(seed):
    rng = random.Random(seed)
    text = canonical(DOCUMENTS[seed])
    starts = sorted([0, *rng.choices(range(len(text)), k=len(text) // 2)])  # some begin at the same place
    logprobs = [-(rng.random() ** 4) for _ in starts]

    wanted: list[Any] = []
    map_leaves(leaf_spans(text), wanted.append)

    def slowly(end_of_leaf: int) -> float:
        begin = max((end for _, end in wanted if end < end_of_leaf), default=0)
        product = 1.0
        for i, start in enumerate(starts):
            end = next((later for later in starts[i:] if later > start), len(text))
            product *= math.exp(logprobs[i]) if start < end_of_leaf and end > begin else 1.0
        return product

    flat: list[float] = []
    map_leaves(leaf_confidence(text, starts, logprobs), flat.append)
    assert flat == pytest.approx([slowly(end) for _, end in wanted], abs=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_leaves_are_right_as_often_as_field_f1_has_matches(seed):
    document, target = DOCUMENTS[seed], DOCUMENTS[-1 - seed % 7]
    text = canonical(document)
    row = {"id": "a", "text": text, "confidence": map_leaves(document, lambda _: 0.5), "target": target}
    leaves, pairs = judge_leaves(prediction(row)), fields(normal_items(document))
    assert sorted((leaf.path, leaf.value) for leaf in leaves) == sorted(pairs)
    assert sum(leaf.right for leaf in leaves) == matches(pairs, fields(normal_items(target)))


@pytest.mark.parametrize("before", ["so: ", '<think>{"a": "draft"}</think>', "[1] {x} "])
def test_what_precedes_the_answer_says_nothing_of_its_leaves(before):
    answer = "{'a': 1,500, \"b\": [NaN, 'x\ny']}"
    text = before + answer
    logprobs = [-9.0] * len(before) + [0.0] * len(answer)
    assert leaf_confidence(text, range(len(text)), logprobs) == {"a": 1.0, "b": [1.0, 1.0]}
    assert map_leaves(leaf_spans(text), lambda span: text[slice(*span)]) == {"a": "1,500", "b": ["NaN", "'x\ny'"]}


def test_a_key_with_a_dot_is_judged_by_itself():
    row = {"text": '{"a.b":"1","a":{"b":"2"}}', "confidence": {"a.b": 0.5, "a": {"b": 0.5}}, "target": {"a.b": "1"}}
    leaves = judge_leaves(prediction({**row, "id": "a"}))
    assert [(leaf.path, leaf.right) for leaf in leaves] == [('"a.b"', True), ("a.b", False)]


def test_a_row_without_confidence_is_named():
    with pytest.raises(ValueError, match="'x' has no confidence"):
        judge_leaves(prediction({"text": '{"a":["1","2"]}', "confidence": {"a": [0.5]}, "target": {}}))
    with pytest.raises(ValueError, match="'x' has no confidence"):
        judge_leaves(prediction({"text": '{"a":"1"}', "target": {}}))
    assert judge_leaves(prediction({"text": "nothing", "confidence": None, "target": {"a": "1"}})) == []


def drawn(count: int, slope: float, intercept: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and leaves that are right as often as the calibration of them says."""
    rng = np.random.default_rng(seed)
    sure = 1 / (1 + np.exp(-rng.normal(3, 2, count)))
    return sure, rng.random(count) < Calibration(slope, intercept)(sure)


def test_calibration_finds_the_parameters_and_lowers_the_error():
    sure, right = drawn(40_000, 0.5, -0.7)
    found = Calibration.fit(sure, right)
    assert found == pytest.approx((0.5, -0.7), abs=0.05)
    new, new_right = drawn(40_000, 0.5, -0.7, seed=1)
    assert calibration_error(found(new), new_right) < 0.01 < calibration_error(new, new_right)
    document = {"a": [float(new[0])], "b": float(new[1])}
    assert found.of(document) == {
        "a": [pytest.approx(found(new[0]), abs=1e-6)],
        "b": pytest.approx(found(new[1]), abs=1e-6),
    }


def test_what_the_model_did_not_write_stays_at_nothing():
    text = '{"a":"x","b":""}'
    confidence = leaf_confidence(text, [0, 8], [-0.1, -math.inf])
    assert confidence is not None and confidence["b"] == 0
    assert Calibration(0.0, 3.0).of(confidence) == {"a": pytest.approx(0.952574), "b": 0.0}


def test_calibration_of_few_leaves_stays_finite_and_keeps_the_order():
    for right in ([True] * 5, [False] * 5, [True], [True, False, True, True, False]):
        found = Calibration.fit([1.0, 0.9, 0.5, 0.0, 1e-9][: len(right)], right)
        values = found(np.linspace(0, 1, 50))
        assert np.isfinite(found).all() and (np.diff(values) >= -1e-12).all() and found.slope >= 0
    assert Calibration.fit([0.99, 0.98, 0.1, 0.2], [False, False, True, True]).slope == 0
    with pytest.raises(ValueError, match="no leaves"):
        Calibration.fit([], [])


def test_reliability_bins_hold_equally_many_leaves_and_make_up_the_error():
    sure, right = drawn(100, 1, 0)
    order = np.argsort(-sure)
    wanted = sum(abs(sure[part].mean() - right[part].mean()) * len(part) for part in np.array_split(order, 15)) / 100
    assert calibration_error(sure, right) == pytest.approx(wanted)
    bins = reliability(sure, right)
    assert [count for *_, count in bins] == [6] * 5 + [7] * 10 and bins == sorted(bins)
    assert calibration_error([1.0, 1.0], [True, True]) == 0
    assert calibration_error([1.0] * 4, [True, True, False, False]) == 0.5
    assert math.isnan(calibration_error([], []))


def test_risk_and_coverage():
    coverage, risk = risk_coverage([0.2, 0.9, 0.6, 0.8], [False, True, True, False])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    assert area_under_risk_coverage([0.2, 0.9, 0.6, 0.8], [False, True, True, False]) == pytest.approx(4 / 12)
    ties = [area_under_risk_coverage([0.5] * 4, right) for right in ([True, True, False, False], [False, True] * 2)]
    assert ties == [0.5, 0.5]


def test_a_threshold_is_the_least_that_keeps_the_precision():
    sure, right = drawn(2_000, 1, 0)
    for precision in (0.8, 0.95, 0.99):
        found = threshold_for(sure, right, precision)
        met = [t for t in sure if ((~right[sure >= t]).sum() + 1) / ((sure >= t).sum() + 1) <= 1 - precision]
        assert found == min(met)
        share, reached = kept(sure, right, found)
        assert reached >= precision and share == pytest.approx((sure >= found).mean())
    assert threshold_for([0.9] * 20, [True] * 20, 0.99) == math.inf  # too few to know
    assert kept([0.9], [True], math.inf) == pytest.approx((0, math.nan), nan_ok=True)
