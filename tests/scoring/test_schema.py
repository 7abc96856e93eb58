from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from im2json.scoring.schema import induce, read_schema

SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text('aé"\\\n日', max_size=3)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from("ab€"), v, max_size=3), max_leaves=8
)
TARGETS = st.dictionaries(st.sampled_from(["x", "y", 'é"z']), VALUES, max_size=3)


@given(st.lists(TARGETS, max_size=5))
@settings(max_examples=60, deadline=None)
def test_every_target_is_valid_by_the_schema_induced_from_them(targets: list[dict[str, Any]]) -> None:
    schema = induce(targets)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)  # jsonschema.validate would check the schema for each target
    for target in targets:
        validator.validate(target)


@given(st.lists(TARGETS, max_size=5))
@settings(max_examples=30, deadline=None)
def test_an_induced_schema_can_be_read_back(tmp_path_factory: pytest.TempPathFactory, targets: list[Any]) -> None:
    path = tmp_path_factory.mktemp("schema") / "schema.json"
    path.write_text(json.dumps(induce(targets)), "utf-8")
    assert read_schema(path) == induce(targets)


def test_what_never_occurred_is_ruled_out() -> None:
    schema = induce([{"nm": "a", "n": []}, {"nm": "b", "price": None}, {"nm": "c", "price": "1"}])
    assert schema["required"] == ["nm"]
    assert schema["properties"]["price"] == {"type": ["null", "string"]}
    for wrong in ({}, {"nm": 1}, {"nm": "a", "other": 1}, {"nm": "a", "n": [1]}, {"nm": "a", "price": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_a_row_alone_and_rows_in_a_list_may_hold_the_same() -> None:
    schema = induce(
        [{"menu": {"nm": "a", "cnt": 1}}, {"menu": [{"nm": "a", "sub": {"x": "b"}}]}, {"menu": [{"nm": "b"}]}]
    )
    for menu in ({"nm": "a", "sub": {"x": "c"}}, [{"nm": "a", "cnt": 2}]):
        jsonschema.validate({"menu": menu}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"menu": {"cnt": 1}}, schema)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("{", "is not JSON"),
        ('{"type": "object", "type": "object"}', "the key 'type' stands twice in one object"),
        ("[]", 'begins with {"type": "object"'),
        ('{"type": "array"}', 'begins with {"type": "object"'),
        ('{"type": "object", "$ref": "#"}', "#: $ref is not supported"),
        ('{"type": "object", "properties": {"a/b": {}}}', "#/properties/a~1b has none of anyOf, enum, const, type"),
        ('{"type": "object", "properties": {"a": {"type": "text"}}}', "#/properties/a/type: 'text' is not one of"),
        ('{"type": "object", "properties": {"a": {"type": [[]]}}}', "#/properties/a/type: [[]] is not one of object"),
        ('{"type": "object", "properties": {"a": {"type": "array"}}}', "#/properties/a is an array without items"),
        ('{"type": "object", "properties": {"a": {"type": "string", "minimum": 1}}}', "#/properties/a: minimum is not"),
        ('{"type": "object", "properties": [1]}', "#/properties is not an object"),
        ('{"type": "object", "required": ["a"]}', "#/required is not a list of names that are in properties"),
        ('{"type": "object", "required": [1]}', "#/required is not a list of names that are in properties"),
        ('{"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a", "a"]}', "#/required names a key"),
        ('{"type": "object", "const": 5}', "#: 5 is not of the type that stands beside it"),
        (
            '{"type": "object", "properties": {"a": {"enum": [1, "x"], "type": "integer"}}}',
            '#/properties/a: "x" is not of the type',
        ),
        ('{"type": "object", "additionalProperties": {}}', "#: additionalProperties can only be false"),
        ('{"type": "object", "properties": {"a": {"anyOf": []}}}', "#/properties/a/anyOf is not a list with something"),
        ('{"type": "object", "properties": {"a": {"anyOf": [true]}}}', "#/properties/a/anyOf/0 is not a schema"),
        (
            '{"type": "object", "properties": {"a": {"type": "array", "items": {"type": "null"}, "minItems": -1}}}',
            "#/properties/a: minItems and maxItems are whole numbers",
        ),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_used_is_refused_with_its_place(tmp_path: Path, schema: str, said: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(schema, "utf-8")
    with pytest.raises(ValueError, match=r"mine\.json") as error:
        read_schema(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
