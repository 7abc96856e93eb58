import json
import pickle
import random

import pytest
from helpers import prediction
from oracles import edited, pairs, random_pair, random_receipt
from oracles import normal as oracle_normal

from im2json.catalogue import MIN_EXAMPLES
from im2json.records import Prediction
from im2json.scoring import StreamingEvaluator
from im2json.scoring.fieldtable import MAX_FOREIGN, FieldRow, FieldTable, compare_fields
from im2json.scoring.scorecard import Scorecard

Pair = tuple[dict[str, object], dict[str, object]]


def table(part: list[Pair]) -> FieldTable:
    found = FieldTable()
    for said, target in part:
        found.update(said, target)
    return found


def by_path(found: FieldTable) -> dict[str | None, FieldRow]:
    return {row.path: row for row in found.compute()}


def receipts(count: int, seed: int = 8) -> list[Pair]:
    rng = random.Random(seed)
    targets = [random_receipt(rng, rng.randrange(1, 6)) for _ in range(count)]
    return [(edited(target, rng, 0.3), target) for target in targets]


def test_by_hand() -> None:
    target = {"menu": [{"nm": "tea", "price": "5.00"}, {"nm": "pie"}], "total": 12}
    rows = by_path(table([({"menu": [{"nm": "pie"}, {"nm": "te"}, {"nm": "x"}], "tax": 1, "total": 12}, target)]))
    assert list(rows) == ["menu.nm", "menu.price", "total", "tax"]
    assert rows["menu.nm"] == ("menu.nm", 2, 3, 1 / 3, 1 / 2, 2 / 5, pytest.approx((1 + 2 / 3) / 2))
    assert rows["menu.price"] == ("menu.price", 1, 0, None, 0.0, 0.0, 0.0)
    assert rows["total"] == ("total", 1, 1, 1.0, 1.0, 1.0, 1.0)
    assert rows["tax"] == ("tax", 0, 1, 0.0, None, 0.0, None)


def test_paths_tell_keys_with_dots_from_keys_within_keys() -> None:
    documents = [
        {"a.b": "1"}, {"a": {"b": "1"}}, {'"a': {'b"': "1"}}, {"": {"a": {"b": "1"}}}, {"a": {"": {"b": "1"}}},
        {'"a.b"': "1"}, {"(other)": "1"}, {"a": [{"b.": [{".": "1"}]}]},
    ]  # fmt: skip
    paths = ['"a.b"', "a.b", '"\\"a".b"', '"".a.b', 'a."".b', '"\\"a.b\\""', '"(other)"', 'a."b."."."']
    assert [[row.path for row in table([(one, one)]).compute()] for one in documents] == [[path] for path in paths]
    found = table([(said, target) for said in documents for target in documents])
    assert {row.path: row.f1 for row in found.compute()} == dict.fromkeys(paths, 1 / 8)


def test_the_rows_add_up_to_the_field_metrics() -> None:
    evaluator, found = StreamingEvaluator(), FieldTable()
    rng = random.Random(9)
    for said, target in [random_pair(rng) for _ in range(200)]:
        evaluator.update(json.dumps(said), target)
        found.update(said, target)
    rows = found.compute()
    support, predicted = sum(row.support for row in rows), sum(row.predicted for row in rows)
    matched = sum(row.predicted * (row.precision or 0) for row in rows)
    assert matched / predicted == pytest.approx(evaluator.compute()["field_precision"])
    assert matched / support == pytest.approx(evaluator.compute()["field_recall"])
    assert all(row.recall is None or row.similarity >= row.recall - 1e-12 for row in rows)


def test_support_counts_every_value_of_the_targets() -> None:
    part = receipts(30)
    wanted = [path for _, target in part for path, _ in pairs(oracle_normal(target), "")]
    assert {row.path: row.support for row in table(part).compute() if row.support} == {
        path: wanted.count(path) for path in set(wanted)
    }


@pytest.mark.parametrize("parts", [2, 5, 40])
def test_any_split_and_order_gives_the_same_rows(parts: int) -> None:
    rng = random.Random(10)
    part = [({**said, **{f"key {rng.randrange(400)}": 1 for _ in range(9)}}, target)
            for said, target in receipts(40)]  # fmt: skip
    whole = table(part)
    merged = FieldTable()
    shuffled = rng.sample(part, len(part))
    for i in range(parts):
        merged.merge(pickle.loads(pickle.dumps(table(shuffled[i::parts]))))
    for got, wanted in zip(merged.compute(), whole.compute(), strict=True):
        assert got[:3] == wanted[:3]
        assert got[3:] == pytest.approx(wanted[3:], abs=1e-12)


def test_paths_that_only_predictions_have_are_bounded() -> None:
    target = {"total": "1"}
    found = table([({f"k{i:05}": "x", "k" * 1000 + str(i): "y", "total": "1"}, target) for i in range(3000)])
    rows = found.compute()
    assert len(rows) == 1 + MAX_FOREIGN + 1
    assert rows[-1].path is None
    assert rows[-1].predicted == 6000 - MAX_FOREIGN
    assert rows[-1].recall is None
    assert len(pickle.dumps(found)) < 50_000
    one_example = table([({f"k{i}": "x" for i in range(3000)}, target)])
    assert sum(row.predicted for row in one_example.compute()) == 3000


def test_a_path_that_turns_up_in_a_target_later_is_one_of_the_targets() -> None:
    rows = by_path(table([({"a": "1"}, {}), ({"a": "1"}, {"a": "1"})]))
    assert rows["a"][:5] == ("a", 1, 2, 0.5, 1.0)


def test_tables_of_different_seeds_do_not_mix() -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        FieldTable(1).merge(FieldTable(2))


def rows(texts: list[dict[str, object]], targets: list[dict[str, object]]) -> list[Prediction]:
    return [
        prediction({"id": str(i), "text": json.dumps(text), "target": target})
        for i, (text, target) in enumerate(zip(texts, targets))
    ]


def test_which_fields_got_better() -> None:
    rng = random.Random(12)
    targets = [{"same": str(i), "better": str(i), "noisy": str(i), "worse": str(i)} for i in range(200)]

    def read(better: float, worse: float) -> list[dict[str, object]]:
        shares = {"same": 1.0, "better": better, "noisy": 0.5, "worse": worse}
        return [{key: value if rng.random() < shares[key] else "?" for key, value in target.items()}
                for target in targets]  # fmt: skip

    found = compare_fields(rows(read(0.4, 0.9), targets), rows(read(0.7, 0.7), targets)[::-1])
    assert found["better"].low > 0
    assert found["worse"].high < 0
    assert not found["noisy"].exceeds_noise
    assert found["same"][2:] == (0.0, 0.0, 0.0)
    half = 1.96 * (0.5 * (0.4 * 0.6 + 0.7 * 0.3) / 100) ** 0.5
    assert found["better"].high - found["better"].low == pytest.approx(2 * half, rel=0.25)


@pytest.mark.parametrize(("count", "says"), [(MIN_EXAMPLES - 1, False), (MIN_EXAMPLES, True)])
def test_a_handful_of_examples_never_exceeds_the_noise(count: int, says: bool) -> None:
    targets: list[dict[str, object]] = [{"a": "1"}] * count
    found = compare_fields(rows([{"a": "2"}] * count, targets), rows([{"a": "1"}] * count, targets))
    assert found["a"].difference == 1.0
    assert found["a"].exceeds_noise == says


def test_other_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="same targets"):
        compare_fields(rows([{}], [{"a": "1"}]), rows([{}], [{"b": "1"}]))


def test_a_scorecard_merges_into_the_single_pass() -> None:
    part = [(json.dumps(prediction)[: -1 if i % 9 == 0 else None], target, str(i))
            for i, (prediction, target) in enumerate(receipts(40))]  # fmt: skip
    whole, merged = Scorecard(), Scorecard()
    for example in part:
        whole.update(*example)
    for i in range(3):
        card = Scorecard()
        for example in part[i::3]:
            card.update(*example)
        merged.merge(pickle.loads(pickle.dumps(card)))
    got, wanted = merged.as_json(), whole.as_json()
    assert got["num"] == wanted["num"] == 40
    assert got["errors"] == wanted["errors"]
    assert got["errors"]["truncated"]["examples"] == 5
    for name, value in wanted["metrics"].items():
        assert got["metrics"][name] == pytest.approx(value, abs=1e-12)
    json.dumps(got, allow_nan=False)
