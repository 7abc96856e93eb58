import json

import pytest
from helpers import calls_of

from im2json.jsontext import MAX_DEPTH, canonical, parse, scoring_text


def test_canonical_keeps_order_and_characters() -> None:
    document = {"b": "é 抹茶", "a": [1, 2.5, None, True]}
    assert canonical(document) == '{"b":"é 抹茶","a":[1,2.5,null,true]}'
    assert scoring_text(document) == '{"a":[1,2.5,null,true],"b":"é 抹茶"}'
    assert scoring_text({"x": {"b": 1, "a": 2}}) == scoring_text({"x": {"a": 2, "b": 1}})
    assert parse(canonical(document)) == document


def test_lone_surrogates_become_escapes_and_come_back() -> None:
    text = canonical({"a": "x\ud800y", "😀": "\udc00"})
    assert text == '{"a":"x\\ud800y","😀":"\\udc00"}'
    text.encode("utf-8")
    assert parse(text) == {"a": "x\ud800y", "😀": "\udc00"}


@pytest.mark.parametrize("bad", [{"a": float("nan")}, {"a": float("inf")}, {"a": object()}, {("a",): 1}, {"a": {1}}])
def test_canonical_refuses_what_is_not_json(bad: object) -> None:
    with pytest.raises(ValueError, match="not a JSON value"):
        canonical(bad)


def nested(levels: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


def test_depth_is_bounded() -> None:
    deepest = nested(MAX_DEPTH)
    assert parse(json.dumps(deepest)) == deepest
    assert parse(canonical(deepest)) == deepest
    assert parse(json.dumps(nested(MAX_DEPTH + 1))) is None
    for levels in (MAX_DEPTH + 1, 100_000):
        with pytest.raises(ValueError, match=r"JSON value|nests deeper"):
            canonical(nested(levels))
    assert parse(json.dumps({"a": "[" * 1000})) == {"a": "[" * 1000}


@pytest.mark.parametrize("text", ['{"a": 1}', ' \n{"a":1}\t', '{"a":2,"a":1}'])
def test_parse_reads(text: str) -> None:
    assert parse(text) == {"a": 1}


HOSTILE = {
    "empty": "",
    "scalar": '"a"',
    "number": "12",
    "null": "null",
    "list": "[]",
    "list of objects": '[{"a":1}]',
    "words": "Here you are: {}",
    "fence": '```json\n{"a":1}\n```',
    "truncated": '{"a": "b',
    "behind": '{"a":1} {"a":1}',
    "comma": '{"a":1,}',
    "single quotes": "{'a': 1}",
    "nan": '{"a": NaN}',
    "infinity": '{"a": [-Infinity]}',
    "overflow": '{"a": 1e999}',
    "control": '{"a": "x\ny"}',
    "nul": '{"a": "\0"}',
    "bom": '\ufeff{"a": 1}',
    "digits": '{"a": ' + "1" * 100_000 + "}",
    "brackets": "[" * 100_000,
    "objects": '{"a":' * 100_000,
    "closed": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "garbage": "\x00\ud800{[\"'" * 1_000_000,
    "long text": "x" * 10_000_000,
    "unclosed text": '{"a":"' + "x" * 10_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_parse_refuses(name: str) -> None:
    assert parse(HOSTILE[name]) is None
    assert calls_of(parse, HOSTILE[name]) < 100  # however long the text is


def test_parse_keeps_what_is_odd_but_json() -> None:
    assert parse('{"a": "\\ud800", "": "\\u0000"}') == {"a": "\ud800", "": "\0"}
    assert parse('{"a": ' + "1" * 1000 + "}") == {"a": int("1" * 1000)}
    assert parse('{"a": -0.0, "b": 1e-999}') == {"a": 0, "b": 0}
