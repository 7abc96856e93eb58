"""Reading what a model wrote, where that is not strict JSON.

A single pass over the text looks for objects and rewrites each as JSON. It passes over thoughts, words and code fences,
reads Python's literals and quotes, numbers that JSON spells otherwise, and leaves out commas before a closing bracket.
The last object that is whole is the answer. If the text ends within its only object, what was begun and not finished is
dropped and what is open is closed. Nothing else is guessed: a broken object or list is passed over with all that it
holds, because a part of an answer is no answer.
"""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any, Literal, NamedTuple

from im2json.jsontext.numbers import MAX_DIGITS
from im2json.jsontext.text import MAX_DEPTH, map_leaves, parse

MAX_REPAIRED = 1_000_000
"""Characters; a longer text is read as strict JSON or not at all, which bounds the time."""


class Reading(NamedTuple):
    """What a prediction says, how it was read, whether it ends before its object does, and where that begins."""

    value: dict[str, Any] | None
    how: Literal["strict", "repaired", "unreadable"]
    truncated: bool
    start: int = 0  # index of the object's brace; 0 if there is no object


def read(text: str) -> Reading:
    """Return the object that a prediction is or was evidently meant to be. Never raises on a str.

    strict: what `parse` reads.

    repaired: the last whole object outside of thoughts (<think>...</think>), where
    - a tail that was cut short was closed, if no object is whole: a value begun in it is kept as far as it goes, a key
      without a value is not;
    - single quotes were read as Python does, true, false, null and None in any case, line breaks and other control
      characters within quotes as themselves, and a backslash that begins no escape as itself;
    - commas before a closing bracket were left out;
    - 007, +3, .5, 5., 0x1F, 1_000 and (in an object) 1,500 were read as the numbers that they are, NaN, infinities and
      undefined as null, and what only begins as a number, such as 2020-01-31, $5.00 and 5.00 EUR, as text up to the
      next comma, bracket or line break.

    unreadable: anything else, a list at the top included.
    """
    value = parse(text)
    if value is not None:
        return Reading(value, "strict", False, text.find("{"))
    found = _answer(text)
    value = parse("".join(found.pieces)) if found else None
    if found is None or value is None:
        return Reading(None, "unreadable", False)
    return Reading(value, "repaired", bool(found.open), found.start)


def leaf_spans(text: str, reading: Reading | None = None) -> dict[str, Any] | None:
    """Return the object that `read` finds, with each leaf replaced by its (start, end) in the text.

    None if `read` finds no object, or the text is longer than MAX_REPAIRED. `reading` is that of the text, if it was
    read already.
    """
    reading = read(text) if reading is None else reading
    if reading.value is None or len(text) > MAX_REPAIRED:
        return None
    found = _Rewriting(text, reading.start)
    found.run()
    # read as the text is, repeated keys and all, but with a number in place of each leaf
    pieces = (str(i) if i in found.spans else piece for i, piece in enumerate(found.pieces))
    numbered = parse("".join(pieces))
    assert numbered is not None
    spans: dict[str, Any] = map_leaves(numbered, found.spans.__getitem__)
    return spans


# --- where the answer stands

_LANDMARK = re.compile(r"""\{(?=\s*+(?:["'}]|\Z))|\[|<(?P<thought>think|thinking|thought|reasoning)>""", re.IGNORECASE)
_END_OF_THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_BRACKET = re.compile(r"[{}\[\]]")
_PART_OF_MORE = re.compile(r"""(?:["']\s*[,:]|[}\]]\s*,)\s*\Z""")
"""The text before an object that belongs to a larger value which could not be read."""
_ITEM_FOLLOWS = re.compile(r"""\s*+,\s*+\{(?=\s*+(?:["'}]|\Z))""")


def _answer(text: str) -> _Rewriting | None:
    """Return the last object that is whole, or else the one that the text's end cuts off, or None.

    An object without members counts only where no other has any. The first `</think>` that nothing began ends a thought
    that was begun in the prompt, which many chat templates do; within an object that can be read it is text. No part of
    the text is looked at more than a few times, whatever it holds.
    """
    if len(text) > MAX_REPAIRED:
        return None
    whole = cut = None
    position, tag = 0, _END_OF_THOUGHT.search(text)
    while landmark := _LANDMARK.search(text, position):
        if tag and tag.start() < landmark.start():
            whole = cut = tag = None
        if landmark["thought"]:
            tag = None
            end = _END_OF_THOUGHT.search(text, landmark.end())
            if end is None:
                break
            position = end.end()
            continue
        found = _Rewriting(text, landmark.start())
        outcome = found.run()
        is_object = text[found.start] == "{"
        if outcome == "whole":
            if is_object and not _is_part(found) and (found.has_member or whole is None):
                whole = found
            position = found.end
            if tag and tag.start() < position:
                tag = _END_OF_THOUGHT.search(text, position)
        elif outcome == "cut" and is_object:
            cut = cut if _is_part(found) else found
            position = len(text) if found.has_member else found.start + 1
        elif found.has_member:
            position = _behind(text, found)
        else:  # a bracket in words
            position = found.start + 1 if is_object else max(found.end, found.start + 1)
        if tag and tag.start() < position:  # what was begun in the thought was not finished in it
            whole = whole if outcome == "cut" else None
            position, tag = tag.end(), None
    if tag:
        return None
    return cut if cut and cut.has_member and not (whole and whole.has_member) else whole or cut


def _is_part(found: _Rewriting) -> bool:
    text = found.text
    before = _PART_OF_MORE.search(text, max(0, found.start - 50), found.start)
    return before is not None or _ITEM_FOLLOWS.match(text, found.end) is not None


def _behind(text: str, broken: _Rewriting) -> int:
    """Return where a broken object or list ends, by its brackets alone."""
    depth = len(broken.open)
    for bracket in _BRACKET.finditer(text, broken.end):
        depth += 1 if bracket[0] in "{[" else -1
        if depth == 0:
            return bracket.end()
    return len(text)


# --- one object or list

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<open>[{\[])|(?P<close>[}\]])|(?P<comma>,)|(?P<colon>:)
    |(?P<string>"[^"\\]*+(?:\\.[^"\\]*+)*+(?P<end>"|\\?\Z))
    |(?P<python>'[^'\\]*+(?:\\.[^'\\]*+)*+(?P<finish>'|\\?\Z))
    |(?P<word>[\w.+-]+)""",
    re.VERBOSE | re.DOTALL,
)
_MARK = r"[-+(\u2212$\u00a2-\u00a5\u0e3f\u20a0-\u20c0\uff04\uffe0\uffe1\uffe5\uffe6]"
"""A sign, a currency or a parenthesis before a number."""
_BARE = r"""(?P<word>(?=(?:%s\ ?)*+(?:\.?\d|\Z)|[nN]/(?:[aA]|\Z))
    (?:[^\s,{}\[\]"'<`]++|[^\S\r\n]++(?=[^\s,{}\[\]"'<`])|(?<=\d)'(?=\d{3}(?!\d))|(?<=%s)\ \Z%s)++)"""
_ITEM = re.compile(_BARE % (_MARK, _MARK, ""), re.VERBOSE)
_MEMBER = re.compile(_BARE % (_MARK, _MARK, r"|,(?=\d)"), re.VERBOSE)
"""A value without quotes that begins as a number, maybe behind a currency or a parenthesis, or N/A. In an object the
comma before a digit belongs to it, because no key begins with a digit."""
_ZERO_LED = re.compile(r"0\d++(?![\w/:-])")

_CLOSING = {"{": "}", "[": "]"}


class _Rewriting:
    """The JSON of the object or list that begins at `start`: the first `whole` pieces are valid JSON once the brackets
    in `open` are closed."""

    def __init__(self, text: str, start: int) -> None:
        self.text = text
        self.start = self.end = start  # `end` is that of what was taken
        self.pieces: list[str] = []
        self.spans: dict[int, tuple[int, int]] = {}  # of the pieces that are leaves, in the text
        self.open: list[str] = []
        self.whole = 0
        self.before = "colon"  # kind of the last token: open, close, comma, colon, value, key
        self.has_member = False  # whether it has a key with a colon, which words in brackets have not

    def run(self) -> Literal["whole", "cut", "broken"]:
        """Rewrite as far as it goes, and say whether the text ends before that, or it is no JSON even then."""
        while self.end < len(self.text):
            token = None
            if self._expects_value():
                token = (_MEMBER if self._in_object() else _ITEM).match(self.text, self.end)
            token = token or _TOKEN.match(self.text, self.end)
            if token is None or not self._take(token):
                return "broken"
            self.end = token.end()
            if not self.open:
                return "whole"
        self.pieces[self.whole :] = [_CLOSING[bracket] for bracket in reversed(self.open)]
        return "cut"

    def _in_object(self) -> bool:
        return self.open[-1:] == ["{"]

    def _expects_value(self) -> bool:
        return self.before == "colon" or (self.before in ("open", "comma") and not self._in_object())

    def _expects_key(self) -> bool:
        return self.before in ("open", "comma") and self._in_object()

    def _take(self, token: re.Match[str]) -> bool:
        """Take the next token, and return whether it can stand there."""
        kind, text = token.lastgroup, token.group()
        if kind == "open" and self._expects_value() and len(self.open) < MAX_DEPTH:
            self.open.append(text)
            self._add(text, "open")
        elif kind == "close" and self.before not in ("key", "colon") and _CLOSING[self.open[-1]] == text:
            self.open.pop()
            if self.before == "comma":
                self.pieces.pop()
            self._add(text, "close")
        elif kind == "comma" and self.before in ("value", "close"):
            self._add(text, "comma", whole=False)
        elif kind == "colon" and self.before == "key":
            self.has_member = True
            self._add(text, "colon", whole=False)
        elif kind in ("string", "python"):
            return self._take_string(token)
        elif kind == "word":
            return self._take_word(token)
        else:
            return kind == "space"
        return True

    def _add(self, piece: str, kind: str, whole: bool = True) -> None:
        self.pieces.append(piece)
        self.before = kind
        if whole:
            self.whole = len(self.pieces)

    def _take_string(self, token: re.Match[str]) -> bool:
        text, is_key = token.group(), self._expects_key()
        if not (is_key or self._expects_value()):
            return False
        finished = text[0] in (token["end"], token["finish"])
        if not finished:
            text = _CUT_ESCAPE.sub(r"\1", text) + text[0]
        if not is_key:
            self._add_value(_quoted(text), token)
        elif finished:
            self._add(_quoted(text), "key", whole=False)
        return True

    def _take_word(self, token: re.Match[str]) -> bool:
        word, last = token.group(), token.end() == len(self.text)
        if not self._expects_value() or (_ZERO_LED.match(word) and self._splits_number(token.start())):
            return False
        if last and ("," in word or _is_beginning(word)):  # a comma may stand for a decimal point or separate thousands
            return True
        value = _bare(word, last)
        if value is not None:
            self._add_value(value, token)
        return value is not None

    def _splits_number(self, start: int) -> bool:
        """Return whether the comma before an item of a list stands behind a digit, as in 2,000."""
        before = self.text[max(0, start - 2) : start]
        return not self._in_object() and before[-1:] == "," and before[0].isdigit()

    def _add_value(self, piece: str, token: re.Match[str]) -> None:
        self.spans[len(self.pieces)] = token.span()
        self._add(piece, "value")


# --- strings, numbers and literals

_ESCAPE = re.compile(
    r"""(?P<json>\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt]))|\\x(?P<byte>[0-9a-fA-F]{2})|\\U(?P<point>[0-9a-fA-F]{8})
    |\\'|(?P<raw>[\\"\x00-\x1f])""",
    re.VERBOSE,
)
_CUT_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*+)\\(?:u[0-9a-fA-F]{0,3}|x[0-9a-fA-F]?|U[0-9a-fA-F]{0,7})?\Z")


def _quoted(text: str) -> str:
    """Return a string in JSON's or Python's quotes as JSON."""
    return f'"{_ESCAPE.sub(_escape, text[1:-1])}"'


def _escape(found: re.Match[str]) -> str:
    if found["json"]:
        return found["json"]
    if found["byte"] or found["point"]:
        code = int(found["byte"] or found["point"], 16)
        return json.dumps(chr(code))[1:-1] if code <= sys.maxunicode else json.dumps(found[0])[1:-1]
    return json.dumps(found["raw"])[1:-1] if found["raw"] else "'"


_LITERALS = {
    "true": "true",
    "false": "false",
    **dict.fromkeys(("null", "none", "undefined"), "null"),
    **{sign + name: "null" for sign in ("", "+", "-") for name in ("nan", "infinity", "inf")},
}  # in any case
_BEGINNINGS = (*_LITERALS, "n/a", ".0", "+.0", "-.0")
"""A word with which one of these begins is dropped at the end of the text, where more might have followed."""


def _is_beginning(word: str) -> bool:
    word = word.lower()
    begun = any(known.startswith(word) and known != word for known in _BEGINNINGS)
    return begun or re.fullmatch(f"(?:{_MARK} ?)++", word) is not None


_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_OTHER_NUMBER = re.compile(
    r"""(?P<sign>[+-]?)(?P<whole>(?!0)\d{1,3}(?:,\d{2,3})*,\d{3}|\d+(?:_\d+)*|(?=\.\d))
    (?:\.(?P<fraction>\d*))?(?P<exponent>(?:[eE][+-]?\d+)?)""",
    re.VERBOSE | re.ASCII,
)
_BASED_NUMBER = re.compile(r"[+-]?0(?:[xX][0-9a-fA-F]+|[oO][0-7]+|[bB][01]+)")
_TEXT = re.compile(rf"(?:{_MARK} ?)*+\.?\d|n/a", re.IGNORECASE)


def _bare(word: str, last: bool) -> str | None:
    """Return the JSON of a value without quotes, or None if it is no literal and does not begin as a number or N/A.

    At the end of the text a number is kept as far as it is one.
    """
    if word.lower() in _LITERALS:
        return _LITERALS[word.lower()]
    number = _NUMBER.match(word)
    if number and last and not word[number.end() :].strip(".eE+-"):
        word = number.group()
    written = _number(word) if len(word) <= MAX_DIGITS else None
    if written is not None and math.isfinite(float(written)):
        return written
    return json.dumps(word) if _TEXT.match(word) else None


def _number(word: str) -> str | None:
    """Return a number as JSON spells it, or None if the word is none."""
    if _NUMBER.fullmatch(word):
        return word
    if _BASED_NUMBER.fullmatch(word):
        return str(int(word, 0)) if len(word) <= 1_000 else None
    found = _OTHER_NUMBER.fullmatch(word)
    if found is None:
        return None
    whole = found["whole"].replace(",", "").replace("_", "").lstrip("0") or "0"
    fraction = f".{found['fraction']}" if found["fraction"] else ""
    return f"{found['sign'].strip('+')}{whole}{fraction}{found['exponent']}"
