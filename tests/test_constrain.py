"""The grammar of a schema against jsonschema, and what may be written by a model that knows nothing."""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from im2json.data.collate import Collator
from im2json.data.sources import load_splits
from im2json.families import open_collator
from im2json.inference.constrain import Grammar
from im2json.jsontext import loads, parse
from im2json.scoring.schema import induce

KEYS = st.sampled_from(["a", "b", 'é"\n'])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-20, 20),
    st.sampled_from([0.5, -1.25, 1e-07, 1.5e16, 10**40]),
    st.sampled_from(["100.00", "-0", "1E5", "12.50e3", "0.00005", "2.5e300"]).map(lambda text: loads(text)),
    st.text('aé"\\\n\x01日\ud800', max_size=3),
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3), max_leaves=8)
TARGETS = st.dictionaries(KEYS, VALUES, max_size=3)


@functools.cache
def tiny() -> Collator:
    return open_collator("tiny", "extract JSON.")


def grammar(schema: dict[str, Any]) -> Grammar:
    tokenizer = tiny().processor.tokenizer
    return Grammar(schema, tokenizer, len(tokenizer), "schema")


def accepts(grammar: Grammar, document: dict[str, Any]) -> bool:
    """Whether the text that would be learned can be written, token by token."""
    matcher, tokens = grammar.matcher(), tiny().target_ids(document)[:-1]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def write(grammar: Grammar, rng: random.Random, most: int) -> tuple[list[int], bool]:
    """Tokens chosen at random among the allowed ones; whether EOS came."""
    matcher, tokens, eos = grammar.matcher(), [], tiny().processor.tokenizer.eos_token_id
    while len(tokens) < most:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        tokens.append(int(rng.choice(np.flatnonzero(bits))))
        if tokens[-1] == eos:
            return tokens, True
        assert matcher.consume_token(tokens[-1])
    return tokens, False


def decoded(tokens: list[int]) -> str:
    return tiny().processor.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_every_target_of_the_embedded_receipts_can_be_written() -> None:
    splits = load_splits("receipts")
    learned = grammar(induce(splits["train"].targets))
    for name, split in splits.items():
        assert all(accepts(learned, target) for target in split.targets), name


@given(st.lists(TARGETS, max_size=4), TARGETS)
@settings(max_examples=40, deadline=None)
def test_a_document_can_be_written_just_where_it_is_valid(targets: list[dict[str, Any]], other: dict[str, Any]) -> None:
    schema = induce(targets)
    learned, judge = grammar(schema), jsonschema.Draft202012Validator(schema)
    assert all(accepts(learned, target) for target in targets)
    assert accepts(learned, other) == judge.is_valid(other)


def test_keys_come_in_any_order_but_once() -> None:
    target = {"nm": "a", "cnt": {"x": 1, "y": None}, "price": "3", "z": []}
    learned = grammar(induce([target, {"nm": "b"}]))
    for order in itertools.permutations(target):
        assert accepts(learned, {key: target[key] for key in order})
    matcher = learned.matcher()
    twice = tiny().processor.tokenizer('{"nm":"a","nm":"b"}', add_special_tokens=False)["input_ids"]
    assert matcher.try_consume_tokens(twice) < len(twice)


def test_an_object_may_have_more_keys_than_are_kept_track_of() -> None:
    target = {f"key {i}": i for i in range(100)}
    learned = grammar(induce([target, {"key 0": 1, "key 9": 1}]))
    assert accepts(learned, target)
    assert accepts(learned, {"key 50": 3, "key 9": 1, "key 0": 2, "key 99": 3})
    assert not accepts(learned, {"key 9": 1})
    with pytest.raises(ValueError, match="100 required keys: 64"):
        grammar(induce([target]))


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"enum": ["a", 1, None, {"x": [1]}]}, ["a", 1, None, {"x": [1]}], ["b", 2, {}]),
        ({"const": "€"}, ["€"], ["", None]),
        ({"type": "string", "pattern": "^[0-9]+,[0-9]{2}$"}, ["12,30"], ["12", "a,30"]),
        ({"type": "string", "format": "date"}, ["2026-01-31"], ["31.1.2026"]),
        ({"type": "string", "minLength": 1, "maxLength": 2}, ["a", "日本"], ["", "abc"]),
        ({"type": ["integer", "null"], "minimum": 3}, [3, 1000, None], [2, -4]),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
         [[1, 2], [1] * 3], [[1], [1] * 4]),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 1}, [[], [1]], [[1, 2]]),
        ({"anyOf": [{"type": "null"}, {"type": "object"}]}, [None, {}], [{"a": 1}, []]),
    ],
)  # fmt: skip
def test_keywords_of_an_edited_schema(schema: dict[str, Any], right: list[Any], wrong: list[Any]) -> None:
    edited = grammar({"type": "object", "properties": {"a": schema}, "required": ["a"]})
    assert [value for value in right if not accepts(edited, {"a": value})] == []
    assert [value for value in wrong if accepts(edited, {"a": value})] == []


def test_what_the_engine_does_not_support_is_named() -> None:
    with pytest.raises(ValueError, match="Unknown format: no such"):
        grammar({"type": "object", "properties": {"a": {"type": "string", "format": "no such"}}})


@given(st.lists(TARGETS, min_size=1, max_size=4), st.integers(0), st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_whatever_is_written_is_valid_cut_or_not(targets: list[dict[str, Any]], seed: int, most: int) -> None:
    schema = induce(targets)
    learned = grammar(schema)
    tokens, whole = write(learned, random.Random(seed), most)
    rest = learned.rest(tokens)
    assert not (whole and rest)
    document = parse(decoded([*tokens, *rest]))
    assert document is not None
    jsonschema.validate(document, schema)


def test_a_string_with_a_pattern_is_ended_too() -> None:
    amount = {"type": "string", "pattern": "^[0-9]+,[0-9]{2}$"}
    learned = grammar({"type": "object", "properties": {"a": amount}, "required": ["a"]})
    for written in ("", '{"a":"', '{"a":"12', '{"a":"12,3'):
        tokens = tiny().processor.tokenizer(written, add_special_tokens=False)["input_ids"]
        document = parse(decoded([*tokens, *learned.rest(tokens)]))
        assert document is not None
        jsonschema.validate(document["a"], amount)


def test_a_number_is_ended_where_more_keys_have_to_follow() -> None:
    parts = {"a": {"type": "number", "minimum": 0}, "b": {"type": "number", "minimum": 1, "maximum": 20}}
    schema = {"type": "object", "properties": {**parts, "c": {"type": "string"}}, "required": ["a", "b", "c"]}
    learned = grammar(schema)
    for written in ("", '{"a":', '{"a":5', '{"a":5.', '{"b":20', '{"b":2', '{"c":"","b":1'):
        tokens = tiny().processor.tokenizer(written, add_special_tokens=False)["input_ids"]
        rest = learned.rest(tokens)
        jsonschema.validate(parse(decoded([*tokens, *rest])), schema)
        assert len(rest) < 50


@pytest.mark.parametrize(
    ("written", "closed"),
    [
        ('{"n', '{"nm":""}'),
        ('{"nm":"a', '{"nm":"a"}'),
        ('{"nm":"a\\', '{"nm":"a\\""}'),
        ('{"nm":"a","sub":[{"x":1', '{"nm":"a","sub":[{"x":1}]}'),
        ('{"sub":[', '{"sub":[],"nm":""}'),
        ('{"nm":"a"}', '{"nm":"a"}'),
    ],
)
def test_a_cut_text_is_closed_with_as_little_as_possible(written: str, closed: str) -> None:
    learned = grammar(induce([{"nm": "a", "sub": [{"x": 1}]}, {"nm": "b"}]))
    tokens = tiny().processor.tokenizer(written, add_special_tokens=False)["input_ids"]
    assert decoded([*tokens, *learned.rest(tokens)]) == closed
