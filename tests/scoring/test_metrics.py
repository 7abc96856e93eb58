import json
import random
import subprocess
import sys

import pytest
from helpers import calls_of
from oracles import donut_counts, edited, random_object, random_pair, random_receipt

from im2json.jsontext import loads
from im2json.scoring import METRICS, StreamingEvaluator


def scores(prediction: object, target: dict[str, object]) -> dict[str, float]:
    text = prediction if isinstance(prediction, str) else json.dumps(prediction)
    return StreamingEvaluator().update(text, target)


def test_names_are_those_of_the_catalogue() -> None:
    assert list(scores({}, {})) == list(METRICS)
    lower_is_better = [name for name, metric in METRICS.items() if not metric.higher_is_better]
    assert lower_is_better == ["json_repaired", "edit_distance"]
    assert list(StreamingEvaluator().compute()) == [*METRICS, "num"]


def test_the_catalogue_is_cheap_to_import() -> None:
    heavy = "{'numpy', 'rapidfuzz', 'torch'}"
    code = f"import sys; from im2json.scoring import METRICS; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_perfect_prediction() -> None:
    rng = random.Random(1)
    for _ in range(50):
        target = random_receipt(rng, rng.randrange(1, 5))
        shuffled = dict(rng.sample(list(target.items()), len(target)))
        perfect = {name: float(metric.higher_is_better) for name, metric in METRICS.items()}
        assert scores(shuffled, target) == perfect


TARGET = {
    "menu": [{"nm": "tea", "price": "5.00"}, {"nm": "pie", "price": "7.00"}],
    "total": {"total_price": 12},
}
ONE_ROW = {"menu": {"nm": "tea", "price": "5.10"}, "total": {"total_price": 12.0, "cash": "20"}}


def test_field_metrics_by_hand() -> None:
    got = scores(ONE_ROW, TARGET)  # hits: menu.nm tea and 12.0, which is the number 12
    assert got["field_precision"] == pytest.approx(2 / 4)
    assert got["field_recall"] == pytest.approx(2 / 5)
    assert got["field_f1"] == pytest.approx(4 / 9)
    assert got["key_f1"] == pytest.approx(2 * 3 / 9)  # nm, price and total_price of 4 and 5


def test_rows_in_another_order_are_the_same_fields() -> None:
    got = scores({"menu": TARGET["menu"][::-1], "total": TARGET["total"]}, TARGET)
    assert got["field_f1"] == 1.0
    assert got["exact_match"] == 0.0
    assert got["value_accuracy"] == pytest.approx(1 / 5)


def test_keys_alone_are_key_f1() -> None:
    wrong = {"menu": [{"nm": "x", "price": "y"}, {"nm": "z", "price": "w"}], "total": {"total_price": "v"}}
    got = scores(wrong, TARGET)
    assert got["key_f1"] == got["structure_similarity"] == 1.0
    assert got["field_f1"] == got["value_accuracy"] == 0.0


def test_structure_similarity_by_hand() -> None:
    # menu, menu.nm, menu.price, total, total.total_price, and total.cash in one alone
    assert scores(ONE_ROW, TARGET)["structure_similarity"] == pytest.approx(5 / 6)


def test_value_metrics_by_hand() -> None:
    got = scores(ONE_ROW, TARGET)  # shared: row 0's nm and price, total_price; 12.0 is the number 12
    assert got["value_accuracy"] == pytest.approx(2 / 3)
    assert got["value_similarity"] == pytest.approx((1 + 3 / 4 + 1) / 3)
    numbers = scores({"a": 9, "b": "x", "c": True}, {"a": 10, "b": 1, "c": 1})
    assert numbers["value_accuracy"] == 0.0
    assert numbers["value_similarity"] == pytest.approx((0.9 + 0 + 0) / 3)
    assert scores({"a": [[1, 2], 3]}, {"a": [[1, 5], 3, 4]})["value_accuracy"] == pytest.approx(2 / 3)
    assert scores({"a": 10**400}, {"a": 1.5})["value_similarity"] == 0.0
    assert scores({"b": 1}, {"a": 1})["value_accuracy"] == 0.0


@pytest.mark.parametrize(
    ("predicted", "wanted", "similarity"),
    [
        ("1e-400", "0", 0), ("1e-400", "1e-401", 0.1), ("-1e-400", "1e-400", 0), ("1e-400", "10e-401", 1),
        ("1e-999999999999999999999", "2e-999999999999999999999", 0), ("1e-400", "1e308", 0), ("1e308", "-1e308", 0),
        ("1" + "0" * 400, "2" + "0" * 400, 0.5), ("1" + "0" * 309, "1e308", 0.1), ("-9.5", "-10", 0.95), ("0", "-3", 0),
    ],
)  # fmt: skip
def test_numbers_beyond_floats_are_compared_as_decimals(predicted: str, wanted: str, similarity: float) -> None:
    for text, other in ((predicted, wanted), (wanted, predicted)):
        target = loads(f'{{"a":{other}}}')
        got = scores(f'{{"a":{text}}}', target)
        assert got["value_similarity"] == pytest.approx(similarity)


def test_edit_distance_by_hand() -> None:
    assert scores({"b": 1, "a": "xy"}, {"a": "xz", "b": 1})["edit_distance"] == pytest.approx(1 / 16)
    assert scores("{}", {"a": "b"})["edit_distance"] == pytest.approx(7 / 9)


def test_exact_match_compares_parsed_values() -> None:
    assert scores('{ "b": 1.0, "a": [true] }', {"a": [True], "b": 1})["exact_match"] == 1.0
    assert scores({"a": [1]}, {"a": [True]})["exact_match"] == 0.0
    assert scores({"a": {"b": 1}}, {"a": [{"b": 1}]})["exact_match"] == 0.0


@pytest.mark.parametrize("text", ["", "no", '{"menu" [', "[]", "NaN", "[" * 100_000])
def test_what_cannot_be_read_is_scored_as_empty(text: str) -> None:
    got, empty = scores(text, TARGET), scores("{}", TARGET)
    assert got["json_validity"] == 0.0
    assert empty["json_validity"] == 1.0
    assert got | {"json_validity": 1.0} == empty


WORST = {name: 0.0 if metric.higher_is_better else 1.0 for name, metric in METRICS.items()} | {"json_repaired": 0.0}


@pytest.mark.parametrize("target", [{}, {"total": None}, {"menu": [], "total": ""}])
def test_only_an_empty_object_is_right_for_a_target_without_values(target: dict[str, object]) -> None:
    for text in ("", "Rp1, _ ] oops", "[]", "null", "<think>{}"):
        assert scores(text, target) == WORST
    for text in ("{", '{"total": '):  # what is cut off is no empty object
        assert scores(text, target) == WORST | {"json_repaired": 1.0}
    assert scores('{"a": 1}', target)["field_f1"] == scores('{"a": 1}', target)["ted_accuracy"] == 0.0
    for text in ("{}", '{"total": null}', "There is nothing: {}."):
        assert scores(text, target)["field_f1"] == scores(text, target)["ted_accuracy"] == 1.0
    assert scores(json.dumps(target), target)["exact_match"] == 1.0


def test_blank_targets_do_not_hide_answers_that_cannot_be_read() -> None:
    evaluator = StreamingEvaluator()
    for text in ("{}", "oops", '{"a": "x"}'):
        evaluator.update(text, {"a": "x"} if "x" in text else {})
    got = evaluator.compute()
    assert got["ted_accuracy"] == pytest.approx(2 / 3)
    assert got["field_f1"] == pytest.approx(2 / 3)  # of the text that is no object, one field counts as wrong
    assert (got["field_precision"], got["field_recall"]) == (0.5, 1.0)


def test_a_key_with_a_dot_is_another_than_keys_within_keys_except_for_donuts_f1() -> None:
    got = scores({"a.b": "x"}, {"a": {"b": "x"}})
    assert got["field_f1"] == got["field_precision"] == got["field_recall"] == 1.0
    assert got["key_f1"] == got["structure_similarity"] == got["value_accuracy"] == got["exact_match"] == 0.0
    assert got["ted_accuracy"] < 1
    for other in ({"": {"a": {"b": "x"}}}, {'"a': {'b"': "x"}}, {"a\0b": "x"}, {"a": {"": {"b": "x"}}}):
        got = scores(other, {"a": {"b": "x"}})
        assert got["key_f1"] == got["value_accuracy"] == 0.0


@pytest.mark.parametrize(
    "text", ['{"menu": {"nm": "tea"', '```json\n{"menu": {"nm": "tea"}}\n```', "Here: {'menu': {'nm': 'tea'}}"]
)
def test_what_can_be_repaired_is_scored_as_repaired_and_counted(text: str) -> None:
    target = {"menu": [{"nm": "tea"}]}
    got, strict = scores(text, target), scores('{"menu": {"nm": "tea"}}', target)
    assert (got["json_validity"], got["json_repaired"]) == (0.0, 1.0)
    assert (strict["json_validity"], strict["json_repaired"]) == (1.0, 0.0)
    assert got | {"json_validity": 1.0, "json_repaired": 0.0} == strict
    assert scores(text, {"menu": {"nm": "tea"}})["exact_match"] == 0.0  # of strict JSON alone


def test_field_f1_equals_donuts_cal_f1() -> None:
    rng = random.Random(3)
    evaluator = StreamingEvaluator()
    hits = misses = 0
    for _ in range(1000):
        prediction, target = random_pair(rng)
        got = evaluator.update(json.dumps(prediction), target)
        true, false = donut_counts(prediction, target)
        assert got["field_f1"] == pytest.approx(true / (true + false / 2) if true + false else 1.0, abs=1e-12)
        assert got["field_f1"] <= got["key_f1"]
        hits, misses = hits + true, misses + false
    assert evaluator.compute()["field_f1"] == pytest.approx(hits / (hits + misses / 2), abs=1e-12)


def test_scores_lie_within_bounds_and_ignore_key_order() -> None:
    rng = random.Random(5)
    for _ in range(300):
        prediction, target = random_pair(rng)
        got = scores(prediction, target)
        assert all(0 <= value <= 1 for value in got.values())
        backwards = dict(reversed(prediction.items()))
        assert scores(backwards, target) == pytest.approx(got, abs=1e-12)


@pytest.mark.parametrize("bad", [None, [], "{}", {"a": object()}, {1: "a"}, {"a": float("nan")}])
def test_a_target_that_is_no_json_object_is_refused(bad: object) -> None:
    evaluator = StreamingEvaluator()
    with pytest.raises(ValueError, match=r"target|document|JSON"):
        evaluator.update("{}", bad)  # type: ignore[arg-type]
    assert evaluator.compute()["num"] == 0


def test_a_prediction_that_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction is text"):
        StreamingEvaluator().update({"a": 1}, {"a": 1})  # type: ignore[arg-type]


HOSTILE = {
    "long value": {"menu": {"nm": "x" * 1_000_000}},
    "long key": {"k" * 1_000_000: "tea"},
    "many keys": {f"key {i}": i for i in range(4000)},
    "many rows": {"menu": [{"nm": "tea", "price": "5.00"}] * 2000},
    "many scalars": {"menu": list(range(10_000))},
    "surrogates": {"menu": {"nm": "\ud800" * 1000, "\udfff": "a\ud800"}},
    "controls": {"menu": {"nm": "".join(map(chr, range(32)))}},
    "digits": {"total": {"total_price": 10**3999}},
    "dots": {"menu.nm": "tea", "": {"": {"": ""}}},
    "leaf": {"<leaf>": "<leaf>", "<root>": "<subtree>", "<subtree>": ["<leaf>"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_predictions_cost_little(name: str) -> None:
    text = json.dumps(HOSTILE[name])
    got = scores(text, TARGET)
    assert calls_of(scores, text, TARGET) < 2000 + 10 * len(text)
    assert got["json_validity"] == 1.0
    assert all(0 <= value <= 1 for value in got.values())


def test_edited_receipts_score_between_nothing_and_all() -> None:
    rng = random.Random(9)
    evaluator = StreamingEvaluator()
    for _ in range(100):
        target = random_receipt(rng, 4)
        evaluator.update(json.dumps(edited(target, rng, 0.3)), target)
        evaluator.update(json.dumps(random_object(rng, 2)), target)
    assert 0.2 < evaluator.compute()["field_f1"] < 0.9
