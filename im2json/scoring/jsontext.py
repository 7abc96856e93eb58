"""Tolerant reading of predictions: what a text that is not strict JSON was evidently meant to say.

A single pass over the tokens rewrites a text as JSON: it starts at the first brace, reads Python's literals
and quotes, leaves out commas before a closing bracket, stops where the object ends, and where the text ends
first it drops what was begun and not finished and closes what is open. Nothing is guessed: what is still not
strict JSON after that is unreadable.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from im2json.scoring.text import MAX_DEPTH, parse

MAX_REPAIRED = 1_000_000
"""Characters; a longer text is read as strict JSON or not at all, which bounds the time."""

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<open>[{\[])|(?P<close>[}\]])|(?P<comma>,)|(?P<colon>:)
    |(?P<string>"[^"\\]*+(?:\\.[^"\\]*+)*+(?P<end>"|\\?\Z))
    |(?P<python>'[^'\\]*+(?:\\.[^'\\]*+)*+(?P<finish>'|\\?\Z))
    |(?P<word>[\w.+-]+)""",
    re.VERBOSE | re.DOTALL,
)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_CLOSING = {"{": "}", "[": "]"}
_CUT_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*+)\\(?:u[0-9a-fA-F]{0,3}|x[0-9a-fA-F]?)?\Z")


class Reading(NamedTuple):
    """What a prediction says, how it was read, and whether it ends before its object does."""

    value: dict[str, Any] | None
    how: Literal["strict", "repaired", "unreadable"]
    truncated: bool


def read(text: str) -> Reading:
    """The object that a prediction is or was evidently meant to be. Never raises on a str.

    strict: what `parse` reads. repaired: an object after words or a code fence before and behind it were
    dropped, a tail that was cut short was closed (a value begun in it is kept as far as it goes, a key
    without a value is not), True, False, None and single quotes were read as Python does, or commas before
    a closing bracket were left out. unreadable: anything else, a list at the top included.
    """
    value = parse(text)
    if value is not None:
        return Reading(value, "strict", False)
    start = text.find("{", 0, MAX_REPAIRED)
    if start < 0 or len(text) > MAX_REPAIRED or text.lstrip().startswith("["):
        return Reading(None, "unreadable", False)
    rewriting = _Rewriting()
    value = parse("".join(rewriting.pieces)) if rewriting.run(text, start) else None
    if value is None:
        return Reading(None, "unreadable", False)
    return Reading(value, "repaired", bool(rewriting.open))


def leaf_spans(text: str) -> dict[str, Any] | None:
    """The object that `read` finds, with where each leaf stands, (start, end) in the text, in the leaf's place.

    None where `read` finds none, and for what is longer than MAX_REPAIRED.
    """
    rewriting = _Rewriting()
    if len(text) > MAX_REPAIRED or read(text).value is None or not rewriting.run(text, text.find("{")):
        return None
    # read as the text is, repeated keys and all, but with a number in place of each leaf
    pieces = (str(i) if i in rewriting.spans else piece for i, piece in enumerate(rewriting.pieces))
    numbered = parse("".join(pieces))
    assert numbered is not None
    found: dict[str, Any] = map_leaves(numbered, rewriting.spans.__getitem__)
    return found


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """A document with something else in place of each leaf."""
    if isinstance(value, dict):
        return {key: map_leaves(inner, function) for key, inner in value.items()}
    if isinstance(value, list):
        return [map_leaves(inner, function) for inner in value]
    return function(value)


class _Rewriting:
    """The JSON text so far; `whole` is how much of it stands once the brackets in `open` are closed."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.spans: dict[int, tuple[int, int]] = {}  # of the pieces that are leaves, in the text that is read
        self.place = (0, 0)  # of the present token
        self.open: list[str] = []
        self.whole = 0
        self.before = ""  # kind of the last token: open, close, comma, colon, value, key

    def run(self, text: str, start: int) -> bool:
        """Puts the object that begins at `start` into the pieces; False where they cannot be JSON."""
        place = start
        while place < len(text):
            token = _TOKEN.match(text, place)
            if token is None or not self._take(token, token.end() == len(text)):
                return False
            if not self.open:
                return True
            place = token.end()
        self.pieces[self.whole :] = [_CLOSING[bracket] for bracket in reversed(self.open)]
        return True

    def _take(self, token: re.Match[str], last: bool) -> bool:
        kind, text = token.lastgroup, token.group()
        self.place = token.span()
        if kind == "space":
            return True
        if kind in ("open", "string", "python", "word") and self.before in ("value", "key", "close"):
            return False
        if kind == "open":
            self.open.append(text)
            self._add(text, "open")
            return len(self.open) <= MAX_DEPTH
        if kind == "close":
            return self._close(text)
        if kind in ("comma", "colon"):
            self._add(text, kind, whole=False)
            return True
        if kind == "word":
            return self._word(text, last)
        return self._string(token)

    def _add(self, piece: str, kind: str, whole: bool = True) -> None:
        if kind == "value":
            self.spans[len(self.pieces)] = self.place
        self.pieces.append(piece)
        self.before = kind
        if whole:
            self.whole = len(self.pieces)

    def _close(self, bracket: str) -> bool:
        if _CLOSING[self.open.pop()] != bracket:
            return False
        if self.before == "comma":
            self.pieces.pop()
        self._add(bracket, "close")
        return True

    def _word(self, word: str, last: bool) -> bool:
        """A number or a literal; one that is cut off by the end is kept as far as it is one, or dropped."""
        if word in _WORDS or _NUMBER.fullmatch(word):
            self._add(_WORDS.get(word, word), "value")
            return True
        if last:
            number = _NUMBER.match(word)
            if number and not word[number.end() :].strip(".eE+-"):
                self._add(number.group(), "value")
                return True
        return last and (word == "-" or any(known.startswith(word) for known in _WORDS))

    def _string(self, token: re.Match[str]) -> bool:
        text, quote = token.group(), token.group()[0]
        finished = bool(token.group("end") == quote or token.group("finish") == quote)
        if not finished:
            text = _CUT_ESCAPE.sub(r"\1", text) + quote
        if quote == "'":
            try:
                text = json.dumps(ast.literal_eval(text.replace("\n", "\\n").replace("\r", "\\r")))
            except (ValueError, SyntaxError):
                return False
        is_key = self.open[-1] == "{" and self.before in ("open", "comma")
        if not is_key or finished:
            self._add(text, "key" if is_key else "value", whole=not is_key)
        return True
