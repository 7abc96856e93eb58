import json
import random

import pytest
from helpers import calls_of

from im2json.jsontext import MAX_DEPTH, MAX_REPAIRED, read

DOCUMENT = {
    "menu": [{"nm": 'té "x" \\ \n', "price": "5.00", "n": -12.5e3, "b": True, "z": None}, {"nm": "b"}],
    "total": {"price": 12},
}
WRITTEN = {
    "compact": json.dumps(DOCUMENT, separators=(",", ":"), ensure_ascii=False),
    "escaped": json.dumps(DOCUMENT),
    "indented": json.dumps(DOCUMENT, indent=2),
    "Python": repr(DOCUMENT),
}


@pytest.mark.parametrize("text", ['{"a":1}', ' {"a":1}\n', "{}"])
def test_strict_json_is_left_alone(text: str) -> None:
    assert read(text) == (json.loads(text), "strict", False)


REPAIRED = {
    "fence": ('```json\n{"a": 1}\n```', {"a": 1}),
    "words": ('Here you are: {"a": [1, 2]}. Anything {else}?', {"a": [1, 2]}),
    "trailing commas": ('{"a": [1, 2,], "b": 3,}', {"a": [1, 2], "b": 3}),
    "literals": ('{"a": True, "b": None, "c": [False]}', {"a": True, "b": None, "c": [False]}),
    "single quotes": (r"""{'a': 'it\'s "so"', "b": 'x'}""", {"a": 'it\'s "so"', "b": "x"}),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_what_is_repaired(name: str) -> None:
    text, value = REPAIRED[name]
    assert read(text) == (value, "repaired", False)


TRUNCATED = {
    '{"a": "some wo': {"a": "some wo"},
    '{"a": "x\\u00e': {"a": "x"},
    '{"a": "x\\\\\\': {"a": "x\\"},
    '{"a": [{"b": 1}, {"c": 2': {"a": [{"b": 1}, {"c": 2}]},
    '{"a": 1, "b': {"a": 1},
    '{"a": 1, "b"': {"a": 1},
    '{"a": 1, "b":': {"a": 1},
    '{"a": 1, "b": tr': {"a": 1},
    '{"a": 1.': {"a": 1},
    '{"a": 1, ': {"a": 1},
    "{": {},
}


@pytest.mark.parametrize("text", TRUNCATED)
def test_a_tail_is_closed(text: str) -> None:
    assert read(text) == (TRUNCATED[text], "repaired", True)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_document_cut_anywhere_is_read_as_far_as_it_goes(name: str) -> None:
    text = WRITTEN[name]
    for length in range(1, len(text)):
        reading = read(text[:length])
        assert (reading.how, reading.truncated) == ("repaired", True)
        assert is_part(reading.value, DOCUMENT), text[:length]
    assert read(text).value == DOCUMENT


def is_part(part: object, whole: object) -> bool:
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and is_part(value, whole[key]) for key, value in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) <= len(whole) and all(map(is_part, part, whole))
    return str(whole).startswith(str(part).removesuffix(".0")) or part == whole


UNREADABLE = ["", "words", "12", "[]", '[{"a": 1}]', '{"a" 1}', '{"a": 1]', '{"a": NaN}', '{"a": 00}', '{"a": b}']


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_is_no_object_stays_unreadable(text: str) -> None:
    assert read(text) == (None, "unreadable", False)


HOSTILE = {
    "objects": '{"a":' * 100_000,
    "lists": '{"a":' + "[" * 100_000,
    "bare lists": "[" * 100_000,
    "10 MB": "{" + "x" * 10_000_000,
    "10 MB of quotes": '{"a":"' * 1_500_000,
    "backslashes": '{"a":"' + "\\" * 900_000,
    "quotes": "{" + "'" * 900_000,
    "escaped quotes": '{"a":\'' + "\\'" * 400_000,
    "digits": '{"a":' + "9" * 900_000,
    "values": '{"a":[' + "1," * 40_000,
    "infinity": '{"a":Infinity}',
    "noise": "{" + "".join(random.Random(0).choices("{}[]\",:\\ 1ax'\ud800", k=500_000)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_read_in_one_pass(name: str) -> None:
    # a regular expression that goes back counts as one call, but at these lengths it would not return
    assert calls_of(read, HOSTILE[name]) < 2000 + 20 * len(HOSTILE[name])


def test_limits() -> None:
    assert read('{"a":' * MAX_DEPTH).how == "repaired"
    assert read('{"a":' * (MAX_DEPTH + 1)).how == "unreadable"
    assert read('{"a":"' + "x" * MAX_REPAIRED).how == "unreadable"
    assert read('{"a":"\ud800').value == {"a": "\ud800"}
