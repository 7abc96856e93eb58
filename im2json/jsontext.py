"""JSON as text: what a model learns to write, files of it, and reading what a model wrote.

Reading a prediction is tolerant of texts that are not strict JSON: a single pass over the tokens rewrites a text as
JSON. It starts at the first brace, reads Python's literals and quotes, leaves out commas before a closing bracket, and
stops where the object ends. Where the text ends first, it drops what was begun and not finished and closes what is
open. Nothing is guessed: what is still not strict JSON after that is unreadable.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from im2json.errors import UserError
from im2json.text import decode, escape_surrogates, shortened

MAX_DEPTH = 100
"""Levels of objects and lists that a document may nest. Deeper ones are refused, so that every walk over a
document can recurse without reaching the interpreter's limit, wherever it is called from."""

MAX_REPAIRED = 1_000_000
"""Characters; a longer text is read as strict JSON or not at all, which bounds the time."""


def canonical(obj: Any) -> str:
    """Return the text a model learns to write: compact JSON, the source's key order, non-ASCII as it is.

    Lone surrogates, which no UTF-8 file can hold, are written as JSON escapes. Raises ValueError where
    `obj` is not JSON (NaN and infinities included) or nests deeper than MAX_DEPTH.
    """
    return _dump(obj, sort_keys=False)


def scoring_text(obj: Any) -> str:
    """Return `canonical` with the keys sorted: two objects that differ in key order alone have the same text."""
    return _dump(obj, sort_keys=True)


def _dump(obj: Any, sort_keys: bool) -> str:
    try:
        text = json.dumps(obj, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON value: {error}") from error
    if _may_be_too_deep(text) and _too_deep(obj):
        raise ValueError(f"the value nests deeper than {MAX_DEPTH} levels")
    return escape_surrogates(text)


def parse(text: str) -> dict[str, Any] | None:
    """Return the object that a prediction is, or None if it is no object in strict JSON. Never raises on a str.

    White space around the object is allowed. None for: anything but an object at the top (a list of objects
    too, since a target is an object), NaN, Infinity and numbers that overflow to it, integers beyond the
    interpreter's limit (4,300 digits), nesting beyond MAX_DEPTH, raw control characters within strings, text
    before or behind. Of a key that occurs twice the last value holds, as in most JSON readers. Lone
    surrogates from escapes are kept.
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or (_may_be_too_deep(text) and _too_deep(value)):
        return None
    return value


def load_json(text: str | bytes, where: str) -> Any:
    """Return the value of a JSON text that a user may have written. `where`, a file or a row, begins the error.

    Raises:
        UserError: if the text is not UTF-8 or not JSON (NaN and Infinity included), is longer or deeper than Python's
            reader takes, or an object holds a key twice, of which json.loads would drop one.
    """
    decoded = text if isinstance(text, str) else decode(text, where)
    try:
        return json.loads(decoded, object_pairs_hook=_unique_keys, parse_constant=_refuse)
    except _RepeatedKeyError as error:
        raise UserError(f"{where}: the key {shortened(error.args[0])!r} stands twice in one object") from None
    except json.JSONDecodeError as error:
        near = decoded[max(0, error.pos - 15) : error.pos + 15]
        at = f"line {error.lineno}, column {error.colno}" if "\n" in decoded.strip() else f"column {error.colno}"
        raise UserError(f"{where}: is not JSON: {error.msg} at {at}, near {near!r}") from None
    except RecursionError:
        raise UserError(f"{where}: is not JSON that can be read: it nests too deep") from None
    except ValueError as error:  # an integer of thousands of digits, NaN or Infinity
        raise UserError(f"{where}: is not JSON that can be read: {error}") from None


class _RepeatedKeyError(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise _RepeatedKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return document


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number too large for a float")
    return value


def _may_be_too_deep(text: str) -> bool:
    """Return whether a document may nest too deep, by a cheap test that spares nearly all the walk."""
    return text.count("{") + text.count("[") > MAX_DEPTH


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, dict | list | tuple)]
        if not containers:
            return False
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return True


# --- tolerant reading

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
    """Return the object that a prediction is or was evidently meant to be. Never raises on a str.

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


def leaf_spans(text: str, reading: Reading | None = None) -> dict[str, Any] | None:
    """Return the object that `read` finds, with each leaf replaced by its (start, end) in the text.

    None if `read` finds no object, or the text is longer than MAX_REPAIRED. `reading` is that of the text, if it was
    read already.
    """
    rewriting = _Rewriting()
    found = read(text) if reading is None else reading
    if len(text) > MAX_REPAIRED or found.value is None or not rewriting.run(text, text.find("{")):
        return None
    # read as the text is, repeated keys and all, but with a number in place of each leaf
    pieces = (str(i) if i in rewriting.spans else piece for i, piece in enumerate(rewriting.pieces))
    numbered = parse("".join(pieces))
    assert numbered is not None
    spans: dict[str, Any] = map_leaves(numbered, rewriting.spans.__getitem__)
    return spans


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a document with `function` applied to each leaf."""
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
        self.span = (0, 0)  # of the present token
        self.open: list[str] = []
        self.whole = 0
        self.before = ""  # kind of the last token: open, close, comma, colon, value, key

    def run(self, text: str, start: int) -> bool:
        """Put the object that begins at `start` into the pieces, and return whether they can be JSON."""
        position = start
        while position < len(text):
            token = _TOKEN.match(text, position)
            if token is None or not self._take(token, token.end() == len(text)):
                return False
            if not self.open:
                return True
            position = token.end()
        self.pieces[self.whole :] = [_CLOSING[bracket] for bracket in reversed(self.open)]
        return True

    def _take(self, token: re.Match[str], last: bool) -> bool:
        kind, text = token.lastgroup, token.group()
        self.span = token.span()
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
            self.spans[len(self.pieces)] = self.span
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
        """Take a number or a literal. One that the end cuts off is kept as far as it is one, or dropped."""
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
