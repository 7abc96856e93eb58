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
    assert read(text)[:3] == (json.loads(text), "strict", False)


REPAIRED = {
    "fence": ('```json\n{"a": 1}\n```', {"a": 1}),
    "words": ('Here you are: {"a": [1, 2]}. Anything {else}?', {"a": [1, 2]}),
    "braces in words": ('As in {template} and [1] and {"x"} and {{}, I read {"a": 1}. See {this}.', {"a": 1}),
    "a brace and a quote in words": ('From {"total} on: {"a": 1}', {"a": 1}),
    "doubled braces": ('{{"a": 1}}', {"a": 1}),
    "a closing brace too many": ('{"a": {"b": 1}}}', {"a": {"b": 1}}),
    "two answers": ('{"a": 1}\n{"a": 2}', {"a": 2}),
    "a brace too early": ('{"a": {"b": 1}}, "c": {"b": 2}, "c": {"b": 3}}', {"a": {"b": 1}}),
    "an answer after a list without brackets": ('{"a": 1}, {"a": 2}. So: {"a": 3}', {"a": 3}),
    "empty braces after the answer": ('{"a": 1}\n\nNote: empty fields are written as {}.', {"a": 1}),
    "empty braces before the answer": ('Instead of {}: {"a": 1}, as it is', {"a": 1}),
    "empty braces alone": ("I see nothing: {}.", {}),
    "two fences": ('```json\n{"a": 1}\n```\nBetter:\n```json\n{"a": 2}\n```', {"a": 2}),
    "a second answer that is cut": ('{"a": 1} {"b": ', {"a": 1}),
    "a second answer that is broken": ('{"a": 1} {"b": {"c": 2} "d"}', {"a": 1}),
    "a broken answer first": ('{"b": {"c": 2} "d"} {"a": 1}', {"a": 1}),
    "a thought": ('<think>{"a": "draft"}</think>{"a": 1}', {"a": 1}),
    "a thought begun in the prompt": ('maybe {"a": {"b": 2, hm</think>\n\n{"a": 1}', {"a": 1}),
    "a thought after the answer": ('{"a": 1}<think>or {"a": 2}?', {"a": 1}),
    "a thought in a value": ('so: {"a": "<think>", "b": "</think>"}', {"a": "<think>", "b": "</think>"}),
    "an end of a thought in a value": ('{"a": "x", "why": "a </think> tag",}', {"a": "x", "why": "a </think> tag"}),
    "ends of thoughts in and out of values": ('{"a": "</think>",} no</think>{"b": "</think>",}', {"b": "</think>"}),
    "a quote in a thought begun in the prompt": ('is it {"a": "b</think>{"a": 1}', {"a": 1}),
    "an open quote in a thought begun in the prompt": ("is it {'a': 'b</think>{\"a\": 1}", {"a": 1}),
    "a thought of braces": ('<THINK>{{"a": [</THINK> {"a": 1}', {"a": 1}),
    "trailing commas": ('{"a": [1, 2,], "b": 3,}', {"a": [1, 2], "b": 3}),
    "literals": ('{"a": True, "b": None, "c": [False]}', {"a": True, "b": None, "c": [False]}),
    "line breaks": ("{\"a\": \"x\ny\t\r\0z\", 'b': 'x\ny\t\r\0z'}", {"a": "x\ny\t\r\0z", "b": "x\ny\t\r\0z"}),
    "escapes": (
        r"""{"a": "C:\path\xe9\u00e9\'\"\\", 'b': 'C:\path\xe9\u00e9\U0001f600\'\"\\'}""",
        {"a": "C:\\pathéé'\"\\", "b": "C:\\pathéé😀'\"\\"},
    ),
    "numbers": (
        '{"a": 007, "b": .5, "c": 5., "d": +3, "e": -.5, "f": 0x1F, "g": 1_000, "h": [-00, +1.50e3]}',
        {"a": 7, "b": 0.5, "c": 5, "d": 3, "e": -0.5, "f": 31, "g": 1000, "h": [0, 1500]},
    ),
    "commas in numbers": (
        '{"a": 1,500, "b": -12,345,678.90,"c": 1,23,456.5, "d": [1,500]}',
        {"a": 1500, "b": -12345678.9, "c": 123456.5, "d": [1, 500]},
    ),
    "no numbers": (
        '{"a": NaN, "b": [-Infinity, inf, nan], "c": undefined, "d": "x"}',
        {"a": None, "b": [None, None, None], "c": None, "d": "x"},
    ),
    "nearly numbers": (
        '{"a": 2020-01-31, "b": 1.2.3, "c": 12,5, "d": 1.234,50, "e": 5kg}',
        {"a": "2020-01-31", "b": "1.2.3", "c": "12,5", "d": "1.234,50", "e": "5kg"},
    ),
    "decimal commas": ('{"a": 0,500, "b": -0,125, "c": 00,500}', {"a": "0,500", "b": "-0,125", "c": "00,500"}),
    "items with zeros": (
        '{"a": [1,0,0.5,10,2, 007], "b": [1,05/06/2020]}',
        {"a": [1, 0, 0.5, 10, 2, 7], "b": [1, "05/06/2020"]},
    ),
    "values that begin as numbers": (
        '{"a": 12:30, "b": 01/02/2020,"c": 12%, "d": 5.00 EUR\n,"e": 1/2, "f": [5 kg , 1/2], "g": 1\'000.50 }',
        {
            "a": "12:30",
            "b": "01/02/2020",
            "c": "12%",
            "d": "5.00 EUR",
            "e": "1/2",
            "f": ["5 kg", "1/2"],
            "g": "1'000.50",
        },
    ),
    "amounts": (
        '{"a": $5.00, "b": (5.00), "c": \u22125, "d": -$ 1,500.00, "e": [\u20ac.5,$2], "f": 5,00 EUR, "g": 1,500 }',
        {
            "a": "$5.00",
            "b": "(5.00)",
            "c": "\u22125",
            "d": "-$ 1,500.00",
            "e": ["\u20ac.5", "$2"],
            "f": "5,00 EUR",
            "g": 1500,
        },
    ),
    "literals in any case": (
        '{"a": TRUE, "b": NULL, "c": [Null, none, FALSE, INF], "d": N/A, "e": n/a}',
        {"a": True, "b": None, "c": [None, None, False, None], "d": "N/A", "e": "n/a"},
    ),
    "numbers too large": ('{"a": 1e999, "b": ' + "9" * 5_000 + "}", {"a": "1e999", "b": "9" * 5_000}),
    "single quotes": (r"""{'a': 'it\'s "so"', "b": 'x'}""", {"a": 'it\'s "so"', "b": "x"}),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_what_is_repaired(name: str) -> None:
    text, value = REPAIRED[name]
    assert read(text)[:3] == (value, "repaired", False)


TRUNCATED = {
    '{"a": "some wo': {"a": "some wo"},
    '{"a": "x\\u00e': {"a": "x"},
    '{"a": "x\\\\\\': {"a": "x\\"},
    '{"a": [{"b": 1}, {"c": 2': {"a": [{"b": 1}, {"c": 2}]},
    '{"a": 1, "b': {"a": 1},
    '{"a": 1, "b"': {"a": 1},
    '{"a": 1, "b":': {"a": 1},
    '{"a": 1, "b": tr': {"a": 1},
    '{"a": 1, "b": -Inf': {"a": 1},
    '{"a": 1, "b": +': {"a": 1},
    '{"a": 1, "b": 2,5': {"a": 1},
    '{"a": 1, "b": -1,500.00': {"a": 1},
    '{"a": 1, "b": $1,5': {"a": 1},
    '{"a": 1, "b": [2,5': {"a": 1, "b": [2, 5]},
    '{"a": 1, "b": $': {"a": 1},
    '{"a": 1, "b": -$ ': {"a": 1},
    '{"a": 1, "b": N/': {"a": 1},
    '{"a": 1, "b": 12:3': {"a": 1, "b": "12:3"},
    '{"a": 1, "b": NUL': {"a": 1},
    'not {}: {"a": 1': {"a": 1},
    '{"a": "x", "why": "a </think> t': {"a": "x", "why": "a </think> t"},
    'so {"a" is {"a": 1': {"a": 1},
    '<think>{"a": 2}</think>{"a": 1': {"a": 1},
    '{"a": 1.': {"a": 1},
    '{"a": 1, ': {"a": 1},
    "{": {},
}


@pytest.mark.parametrize("text", TRUNCATED)
def test_a_tail_is_closed(text: str) -> None:
    assert read(text)[:3] == (TRUNCATED[text], "repaired", True)


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


UNREADABLE = [
    "", "words", "12", "[]", '[{"a": 1}]', '{"a" 1}', '{"a": 1]', '{"a": b}', '{"a": "5" 6"}', '{"a": 1 {"b": 2}}',
    '{"a": [{"b": 1} {"b": 2}, {"b": 3}], "c": 4}', '```json\n[{"a": 1}, {"a": 2}]\n```', 'Here: [{"a": 1}, {"a": 2}]',
    '["x", {"a": 1}]', '[{"a": 1} {"a": 2}]', '{"a","b":"1"}],"c":{"d": 1}}', '{"a":{"b":1},{"b":2}],"c":{"d": 1}}',
    '[{"a": 1}, {"a": ', '<think>{"a": 1}', '<think>{"a": 1}</think> none',
    '{"a":1},\n{"a":2}', 'Result: {"a":1}, {"b":2}.', '{"a": 1}, {"a": 2', '{"a":1},{}', '{"q":[2,000.00]}',
    '{"q":[1,05]}', '{"q":[$2,000]}', '{"a": 5 "b": 6}', '{"a": 5 kg\n"b": 6}', '{"a": 1,"b": 2 {"c": 3}}',
    '{"a": "x", 5', '{"a": $}', '{"a": 1} hm</think> none', '{"a": 1</think>', "{'a', 'b'}",
    '{"a": }', '{"a": , "b": 1}', '{"a": 1,, "b": 2}', '{"a": -}', '{"a": .}',
]  # fmt: skip


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_is_no_object_stays_unreadable(text: str) -> None:
    assert read(text)[:3] == (None, "unreadable", False)


HOSTILE = {
    "braces": "{" * 900_000,
    "braces and quotes": '{"' * 8_000,
    "parts": '"a":{"b":1},' * 4_000,
    "lists in lists": "[1," * 8_000,
    "lists of nothing": "[{}," * 8_000,
    "cut objects in words": '{"a" ' * 8_000,
    "broken objects": '{"a":{"b":1}x' * 4_000,
    "thoughts": "<think>" * 100_000,
    "thoughts that end": '</think>{"a":' * 4_000,
    "commas": '{"a":' + "1,222" * 150_000,
    "spaces in a value": '{"a":5' + " " * 400_000 + "\n" + "1 2" * 150_000,
    "currencies": '{"a":' + "$ " * 400_000 + "}",
    "lists of currencies": '{"a":["$ ' + "$ ," * 8_000,
    "apostrophes": '{"a":1' + "'000" * 200_000,
    "tags in objects": '{"a":"</think>",}' * 4_000,
    "tags in cut objects": '{"a":"</think>' * 4_000,
    "items": '{"a":1},' * 4_000,
    "empty objects": '{} {"a":1,} ' * 4_000,
    "escapes": "{'" + "\\x4" * 4_000,
    "objects": '{"a":' * 100_000,
    "lists": '{"a":' + "[" * 100_000,
    "bare lists": "[" * 100_000,
    "10 MB": "{" + "x" * 10_000_000,
    "10 MB of quotes": '{"a":"' * 1_500_000,
    "backslashes": '{"a":"' + "\\" * 900_000,
    "quotes": "{" + "'" * 900_000,
    "escaped quotes": '{"a":\'' + "\\'" * 400_000,
    "digits": '{"a":' + "9" * 900_000,
    "values": '{"a":[' + "1," * 8_000,
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
