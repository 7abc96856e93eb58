"""What holds for any documents and any text, on examples that hypothesis looks for."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from im2json.jsontext import canonical, read
from im2json.scoring import METRICS, StreamingEvaluator
from im2json.scoring.tree import tree_edit_accuracy, tree_edit_distance

KEYS = st.sampled_from(["nm", "price", "sub", "a.b", "", "税"]) | st.text(max_size=3)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.sampled_from(["tea", "10,000", " 1 ", "\ud800"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)

few = settings(max_examples=60, deadline=None, derandomize=True)


def reordered(value: Any) -> Any:
    """The same value with the keys of every object the other way round."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def scored(text: str, target: dict[str, Any]) -> dict[str, float]:
    return StreamingEvaluator().update(text, target, "id")


@few
@given(DOCUMENTS)
def test_a_document_is_its_own_best_prediction(document: dict[str, Any]) -> None:
    assert tree_edit_distance(document, document) == 0
    got = scored(canonical(document), document)
    assert {name: value for name, value in got.items() if value != 1.0} == {"json_repaired": 0.0, "edit_distance": 0.0}


@few
@given(DOCUMENTS, DOCUMENTS, DOCUMENTS)
def test_the_tree_edit_distance_is_a_metric(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> None:
    assert tree_edit_distance(a, b) == tree_edit_distance(b, a) >= 0
    assert tree_edit_distance(a, c) <= tree_edit_distance(a, b) + tree_edit_distance(b, c)
    assert 0 <= tree_edit_accuracy(a, b) <= 1


@few
@given(DOCUMENTS, DOCUMENTS)
def test_scores_lie_in_0_to_1_and_the_order_of_keys_never_matters(a: dict[str, Any], b: dict[str, Any]) -> None:
    got = scored(canonical(a), b)
    assert got.keys() == METRICS.keys()
    assert all(0 <= value <= 1 for value in got.values())
    assert scored(canonical(reordered(a)), reordered(b)) == pytest.approx(got, abs=1e-12)


@settings(few, max_examples=20)  # each scores up to 6 documents, four times
@given(st.lists(st.tuples(DOCUMENTS | st.text(max_size=20), DOCUMENTS), max_size=6), st.data())
def test_merging_is_associative_and_commutative(examples: list[Any], data: st.DataObject) -> None:
    parts = [data.draw(st.integers(0, 2)) for _ in examples]

    def counted(*which: int) -> StreamingEvaluator:
        evaluator = StreamingEvaluator()
        for i, (prediction, target) in enumerate(examples):
            if parts[i] in which:
                evaluator.update(prediction if isinstance(prediction, str) else canonical(prediction), target, str(i))
        return evaluator

    def merged(first: StreamingEvaluator, second: StreamingEvaluator) -> StreamingEvaluator:
        first.merge(second)
        return first

    whole = counted(0, 1, 2)
    metrics, intervals = whole.compute(), whole.intervals()
    for other in (
        merged(merged(counted(0), counted(1)), counted(2)),
        merged(counted(0), merged(counted(1), counted(2))),
        merged(merged(counted(2), counted(0)), counted(1)),
    ):
        assert other.compute() == pytest.approx(metrics, abs=1e-12, nan_ok=True)
        found = other.intervals()
        assert found.keys() == intervals.keys()
        for name, bounds in intervals.items():
            assert found[name] == pytest.approx(bounds, abs=1e-12, nan_ok=True)


@few
@given(DOCUMENTS)
def test_strict_json_is_read_as_json_does(document: dict[str, Any]) -> None:
    reading = read(json.dumps(document))
    assert (reading.how, reading.truncated) == ("strict", False)
    assert reading.value == document


@few
@given(DOCUMENTS, st.data())
def test_a_text_that_is_cut_short_is_never_an_error(document: dict[str, Any], data: st.DataObject) -> None:
    text = canonical(document)
    reading = read(text[: data.draw(st.integers(0, len(text) - 1))])
    assert reading.how != "strict"
    assert (reading.value is None) == (reading.how == "unreadable")
    if reading.value is not None:
        assert reading.truncated
        longest = tree_edit_distance(document, {}) + 1  # without its exponent, 1.5e16 has a point
        assert tree_edit_distance(reading.value, {}) <= longest


@settings(few, max_examples=200)
@given(st.text(alphabet="{}[]\",:\\'01-.eEtrufalsNon \n", max_size=40) | st.text(max_size=40))
def test_any_text_is_scored(text: str) -> None:
    got = scored(text, {"menu": [{"nm": "tea", "price": 1}]})
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in got.values())
    assert got["json_validity"] + got["json_repaired"] <= 1
