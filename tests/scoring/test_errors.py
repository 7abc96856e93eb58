import json
import random
from collections import Counter

import pytest
from helpers import calls_of
from oracles import edited, random_pair, random_receipt

from im2json.jsontext import read
from im2json.scoring import StreamingEvaluator
from im2json.scoring.errors import ERRORS, ErrorCounts, digit_slip, example_errors

TARGET = {
    "menu": [{"nm": "tea", "price": "5.00"}, {"nm": "pie", "price": "17.00"}, {"nm": "rice", "price": "3.00"}],
    "total": {"price": "25.00", "cash": "30.00"},
}


def errors(prediction: object, target: dict[str, object] = TARGET) -> Counter[str]:
    text = prediction if isinstance(prediction, str) else json.dumps(prediction)
    return example_errors(read(text), target)


def changed(**parts: object) -> dict[str, object]:
    return {**TARGET, **parts}


MENU = TARGET["menu"]
CASES = {
    "nothing": (TARGET, {}),
    "key order and one-item lists": (changed(total=[{"cash": "30.00", "price": "25.00"}]), {}),
    "wrong value": (changed(total={"price": "25.00", "cash": "none"}), {"wrong_value": 1}),
    "digit slip": (changed(total={"price": "26.00", "cash": "3.00"}), {"digit_slip": 2}),
    "missing field": (changed(total={"price": "25.00"}), {"missing_field": 1}),
    "missing object": ({"menu": MENU}, {"missing_field": 2}),
    "extra field": (changed(total={**TARGET["total"], "tax": "1", "fees": ["2", "3"]}), {"extra_field": 3}),
    "first row missing": (changed(menu=MENU[1:]), {"missing_row": 1}),
    "all rows missing": ({"total": TARGET["total"]}, {"missing_row": 3}),
    "extra row in front": (changed(menu=[{"nm": "?"}, *MENU]), {"extra_row": 1}),
    "row lost, slip in another": (changed(menu=[MENU[0], {"nm": "rice", "price": "3.01"}]),
                                  {"missing_row": 1, "digit_slip": 1}),
    "cut short": (json.dumps(TARGET)[:-10], {"truncated": 1, "missing_field": 1}),
    "no JSON": ("tea 5.00", {"invalid_json": 1}),
    "in a fence": (f"```\n{json.dumps(TARGET)}\n```", {"invalid_json": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_classes_by_hand(name: str) -> None:
    prediction, wanted = CASES[name]
    assert errors(prediction) == Counter(wanted)


def test_nothing_is_wrong_exactly_where_all_fields_agree() -> None:
    rng = random.Random(5)
    for _ in range(300):
        prediction, target = random_pair(rng)
        found = errors(prediction, target)
        assert found.keys() <= ERRORS.keys()
        assert all(count > 0 for count in found.values())
        assert not errors(target, target)
        if not found:
            assert StreamingEvaluator().update(json.dumps(prediction), target)["field_f1"] == 1.0


@pytest.mark.parametrize(("a", "b"), [("12.50", "12.60"), ("1,000", "10,000"), ("12", "21"), ("0", "1"), ("a1", "a12")])
def test_digit_slips(a: str, b: str) -> None:
    assert digit_slip(a, b)
    assert digit_slip(b, a)


@pytest.mark.parametrize(("a", "b"), [("12", "12"), ("12.0", "12"), ("12", "34"), ("a", "b"), ("1", ""), ("1a", "2b")])
def test_what_is_no_digit_slip(a: str, b: str) -> None:
    assert not digit_slip(a, b)
    assert not digit_slip(b, a)


def test_counts_merge_whatever_the_split() -> None:
    rng = random.Random(6)
    targets = [random_receipt(rng, rng.randrange(1, 6)) for _ in range(60)]
    found = [errors(edited(target, rng, 0.3), target) for target in targets]
    whole, merged = ErrorCounts(), ErrorCounts()
    for example in found:
        whole.update(example)
    for part in range(7):
        counts = ErrorCounts()
        for example in found[part::7]:
            counts.update(example)
        merged.merge(counts)
    assert merged.compute() == whole.compute()
    assert list(whole.compute()) == list(ERRORS)
    assert whole.compute()["wrong_value"]["examples"] == sum("wrong_value" in example for example in found)
    assert whole.compute()["wrong_value"]["occurrences"] == sum(example["wrong_value"] for example in found)


def test_runaway_lists_cost_no_more_than_their_length() -> None:
    rows = [{"nm": str(i), "price": "1"} for i in range(20_000)]
    names = [row["nm"] for row in rows]
    assert errors({"menu": rows})["extra_row"] == len(rows) - 3
    assert errors({"menu": names})["extra_field"] == len(rows)
    assert calls_of(errors, {"menu": rows}) < 100 * len(rows)
    assert calls_of(errors, {"menu": names}) < 100 * len(rows)
