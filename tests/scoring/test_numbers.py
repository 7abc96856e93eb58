"""Numbers: training text keeps how the source wrote them, and scoring compares what they are."""

from __future__ import annotations

import copy
import json
import pickle
import random
from fractions import Fraction
from typing import Any

import pytest
from helpers import prediction

from im2json.files import append_lines, read_json, read_lines, write_json
from im2json.jsontext import MAX_DIGITS, canonical, load_json, number_text, parse, scoring_text
from im2json.records import Prediction
from im2json.scoring import METRICS, StreamingEvaluator
from im2json.scoring.confidence import judge_leaves
from im2json.scoring.errors import example_errors
from im2json.scoring.fieldtable import FieldTable
from im2json.scoring.metrics import same_value
from im2json.scoring.schema import induce, read_schema
from im2json.scoring.tree import tree_edit_distance

AS_WRITTEN = (
    '{"rate":0.00005,"total":100.00,"long":12345678901234567.89,"n":1E3,"m":1e+5,"zero":-0,"z":-0.0,'
    '"id":12345678901234567890,"list":[1.10,[2.50,{"x":0.1000000000000000055}],"3.00"],"tiny":1e-999,"plain":[9.3,7]}'
)


def test_training_text_has_the_numbers_as_they_were_written() -> None:
    document = load_json(AS_WRITTEN, "here")
    assert canonical(document) == AS_WRITTEN
    assert canonical(pickle.loads(pickle.dumps(document))) == AS_WRITTEN  # as between processes
    assert canonical(copy.deepcopy(document)) == AS_WRITTEN
    assert canonical(parse(AS_WRITTEN)) == AS_WRITTEN
    assert json.loads(json.dumps(document)) == document == json.loads(AS_WRITTEN)  # floats in every other respect


def test_files_keep_numbers_as_they_were_written(tmp_path) -> None:
    row = {"target": load_json(AS_WRITTEN, "here"), "values": [0.1, float("nan"), float("-inf")], 'a": 1.50, "b': 2.5}
    lines, whole = tmp_path / "rows.jsonl", tmp_path / "whole.json"
    append_lines(lines, [row])
    (back,) = read_lines(lines)
    assert canonical(back["target"]) == AS_WRITTEN
    assert lines.read_text() == json.dumps(json.loads(lines.read_text())).replace(
        json.dumps(json.loads(AS_WRITTEN)), AS_WRITTEN.replace(":", ": ").replace(",", ", ")
    ) + "\n"  # fmt: skip
    write_json(whole, row["target"])
    assert canonical(read_json(whole)) == AS_WRITTEN
    assert canonical(json.loads(whole.read_text())) == canonical(json.loads(AS_WRITTEN))


EQUAL = [
    ("1000", "1000.0", "1e3", "1E+3", "1000.000", "10000e-1"),
    ("0", "-0", "0.0", "-0.0", "0e5", "-0.000e-7"),
    ("0.00005", "5e-05", "0.000050", "5E-5"),
    ("12345678901234567.89", "12345678901234567890e-3", "1.234567890123456789e16"),
    ("100000000000000000000000", "1e23", "1.0E23"),  # 1e23 is another number as a float
    ("1e-999", "10e-1000"),  # 0 as a float
    ("-2.5", "-2.50", "-25e-1"),
]
SPELLED = [text for group in EQUAL for text in group]


def fields_of(prediction: str, target: str) -> list[float]:
    table = FieldTable()
    table.update(load_json(prediction, "here"), load_json(target, "here"))
    return [row.f1 for row in table.compute()]


@pytest.mark.parametrize("texts", EQUAL, ids=lambda texts: texts[0])
def test_equal_numbers_are_equal_in_every_score(texts: tuple[str, ...]) -> None:
    perfect = {name: float(metric.higher_is_better) for name, metric in METRICS.items()}
    for text in texts:
        said, wanted = f'{{"a":{text},"b":[{{"c":{text}}},[{text}]]}}', load_json(
            f'{{"b":[{{"c":{texts[0]}}},[{texts[0]}]],"a":{texts[0]}}}', "here"
        )  # fmt: skip
        one = prediction({"text": said, "target": wanted, "confidence": {"a": 0.5, "b": [{"c": 0.5}, [0.5]]}})
        assert StreamingEvaluator().update(said, wanted) == perfect
        assert example_errors(one.reading, wanted) == {}
        assert fields_of(said, canonical(wanted)) == [1.0] * 3
        assert [leaf.right for leaf in judge_leaves(one)] == [True] * 3
        assert tree_edit_distance(one.document, wanted) == 0
        # and so is what a run keeps of them
        assert Prediction.from_json(json.loads(json.dumps(one.to_json()))).text == said


def test_numbers_that_differ_in_a_digit_that_no_float_has_are_not_equal() -> None:
    said, target = '{"a": 12345678901234567.89}', load_json('{"a": 12345678901234567.90}', "here")
    got = StreamingEvaluator().update(said, target)
    assert [got[name] for name in ("exact_match", "field_f1", "value_accuracy")] == [0.0] * 3
    assert got["edit_distance"] > 0
    assert fields_of(said, canonical(target)) == [0.0]


def test_text_stays_text_and_true_is_no_number() -> None:
    evaluator = StreamingEvaluator()
    assert evaluator.update('{"a": "1000.0"}', {"a": "1000"})["field_f1"] == 0.0
    assert evaluator.update('{"a": "1000"}', {"a": 1000})["exact_match"] == 0.0
    assert evaluator.update('{"a": "1000"}', {"a": 1000.0})["field_f1"] == 1.0  # as in Donut, which compares text
    for said in ('{"a": true}', '{"a": "1"}'):
        assert evaluator.update(said, {"a": 1})["value_accuracy"] == 0.0
    assert evaluator.update('{"a": true}', {"a": 1})["field_f1"] == 0.0


@pytest.mark.parametrize("digits", ["1" + "0" * 400, "9" * MAX_DIGITS, "1e308", "1e-400"])
def test_numbers_beyond_floats_are_scored(digits: str) -> None:
    evaluator = StreamingEvaluator()
    assert evaluator.update(f'{{"a": {digits}}}', load_json(f'{{"a": {digits}}}', "here"))["field_f1"] == 1.0
    for target in ({"a": 1.5}, {"a": -3}, {"a": "x"}, {"a": 10**300}):
        got = evaluator.update(f'{{"a": {digits}}}', target)
        assert got["field_f1"] == 0.0
        assert 0 <= got["value_similarity"] < 1


@pytest.mark.parametrize("digits", ["9" * (MAX_DIGITS + 1), "1e400", "-1E999", "0." + "1" * MAX_DIGITS])
def test_numbers_that_cannot_be_held_are_refused_by_name(digits: str) -> None:
    assert parse(f'{{"a": {digits}}}') is None
    with pytest.raises(ValueError, match=r"row 3: is not JSON that can be read: .*(too large|digits)"):
        load_json(f'{{"a": {digits}}}', "row 3")


def any_number(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(SPELLED)
    digits = "".join(rng.choices("0001259", k=rng.randrange(1, 25)))
    fraction = "." + "".join(rng.choices("0001259", k=rng.randrange(1, 25))) if rng.random() < 0.6 else ""
    exponent = rng.choice("eE") + rng.choice(["", "+", "-"]) + str(rng.randrange(30)) if rng.random() < 0.4 else ""
    return rng.choice(["", "-"]) + (digits.lstrip("0") or "0") + fraction + exponent


def test_a_numbers_own_text_is_its_exact_value_and_equal_ones_share_it() -> None:
    rng = random.Random(0)
    for _ in range(2_000):
        a, b = any_number(rng), any_number(rng)
        x, y = load_json(f"[{a},{b}]", "here")
        assert Fraction(number_text(x)) == Fraction(a)
        assert (number_text(x) == number_text(y)) == same_value(x, y) == (Fraction(a) == Fraction(b))
        assert number_text(load_json(number_text(x), "here")) == number_text(x)
        assert (scoring_text({"n": x}) == scoring_text({"n": y})) == same_value(x, y)


def any_document(rng: random.Random, depth: int = 3) -> str:
    """Compact JSON with numbers, and text that looks like them."""
    kind = rng.randrange(5) if depth else 4
    if kind == 0:
        return f"[{','.join(any_document(rng, depth - 1) for _ in range(rng.randrange(4)))}]"
    if kind < 4:
        keys = rng.sample(["b", "a", "1.0", ':2.5,\\"', "\\\\"], rng.randrange(4))
        return "{" + ",".join(f'"{key}":{any_document(rng, depth - 1)}' for key in keys) + "}"
    return rng.choice([any_number(rng), any_number(rng), '"1.50"', '": 1.5, \\""', '"\\\\"', "null", "true"])


def test_any_document_is_written_as_it_was_read() -> None:
    rng = random.Random(0)
    for _ in range(1_000):
        text = any_document(rng)
        assert canonical(load_json(text, "here")) == text


def test_a_schema_takes_numbers_however_they_are_written(tmp_path) -> None:
    targets: list[Any] = [load_json(text, "here") for text in ('{"a": 100.00, "n": 3}', '{"a": 0.00005, "n": -0}')]
    assert induce(targets)["properties"]["a"] == {"type": "number"}
    path = tmp_path / "schema.json"
    kinds = '{"type": "object", "properties": {"a": {"type": "integer", "enum": [1e3, 2.0]}, "b": {"const": 100.00}}}'
    path.write_text(kinds)
    assert canonical(read_schema(path)) == kinds.replace(" ", "")
    path.write_text(kinds.replace("2.0", "2.5"))
    with pytest.raises(ValueError, match=r"2\.5 is not of the type"):
        read_schema(path)
