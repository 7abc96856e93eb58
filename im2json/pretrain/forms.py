"""What pre-training asks for besides transcription: JSON of many shapes, under meaningless prompts and keys.

A form has a made-up name, which is its prompt, and made-up keys. The forms in this file go by the position of lines
and cells: they say which lines of a page they want and how their cells become values, so that the model learns to
write nested JSON with values from the picture, and to pick lines. Those of content.py go by what is printed. No form
has the target's keys or its shape, and no prompt asks for an extraction: fine-tuning teaches that.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from im2json.data.receipts.layout import Line

FORMS = 24
NEUTRAL_KEYS = [
    "left", "right", "first", "second", "head", "tail", "label", "value", "code", "part", "mark", "note",
    "text", "word", "row", "cell", "body", "top", "end", "side", "kind", "place",
]  # fmt: skip
# Words of CORD v2's keys; no key of ours holds one of them
FORBIDDEN = (
    "menu", "nm", "num", "cnt", "price", "sub", "total", "tax", "service", "discount", "cash", "change",
    "credit", "card", "unit", "qty", "void", "emoney", "vat", "etc",
)  # fmt: skip
_SYLLABLES = [
    first + vowel + last for first in "bdfgklmnprstvz" for vowel in "aeiou" for last in ("", "", "n", "r", "s", "k")
]


def compact(value: Any) -> str:
    """JSON text as fine-tuning writes it: no spaces, other scripts as they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def random_key(rng: random.Random) -> str:
    """A key in snake_case that holds none of the target's words."""
    while True:
        words = [
            rng.choice(NEUTRAL_KEYS) if rng.random() < 0.3 else "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 2)))
            for _ in range(rng.choice((1, 1, 2, 2, 3)))
        ]
        key = rng.choice(("_", "_", "")).join(words)
        if not any(word in key for word in FORBIDDEN):
            return key


def random_keys(rng: random.Random, count: int, longest: int = 99) -> list[str]:
    """`count` different keys of at most `longest` characters."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        key = random_key(rng)
        if len(key) <= longest:
            keys[key] = None
    return list(keys)


def form_name(rng: random.Random) -> str:
    """A form's prompt."""
    return f"form {''.join(rng.choices(_SYLLABLES, k=2))}"


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(child, (dict, list)) for child in value.values())


def _is_rows(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(child, dict) for child in value)
    )


def has_target_shape(value: Any) -> bool:
    """Whether the value, or any value in it, is shaped like the target, whatever its keys.

    That is an object of two or three: rows (a list of objects or a single one), and besides, in any order, nothing but
    objects of plain texts.
    """
    children = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if isinstance(value, dict) and len(children) in (2, 3):
        for at, rows in enumerate(children):
            if _is_rows(rows) and all(map(_is_flat, children[:at] + children[at + 1 :])):
                return True
    return any(map(has_target_shape, children))


def _has_digit(text: str) -> bool:
    return any(char.isdigit() for char in text)


PICKS: dict[str, Callable[[Sequence[Line]], list[Line]]] = {
    "all": lambda lines: list(lines),
    "several cells": lambda lines: [line for line in lines if len(line.cells) > 1],
    "one cell": lambda lines: [line for line in lines if len(line.cells) == 1],
    "ends in a number": lambda lines: [line for line in lines if _has_digit(line.cells[-1].text[-1:])],
    "no number": lambda lines: [line for line in lines if not _has_digit(line.text)],
    "but the first": lambda lines: list(lines[1:]),
    "but the last": lambda lines: list(lines[:-1]),
    "first two": lambda lines: list(lines[:2]),
    "last two": lambda lines: list(lines[-2:]),
}


def _first_word(text: str) -> list[str]:
    return text.split(" ", 1)


def row_values(line: Line, split: str) -> list[str]:
    """The values of a line: its cells, the first of them in two where `split` says so."""
    cells = [cell.text for cell in line.cells]
    if split == "first word":
        return _first_word(cells[0]) + cells[1:]
    if split == "last word":
        return cells[0].rsplit(" ", 1) + cells[1:]
    return cells


@dataclass(frozen=True)
class Section:
    """A part of a form: which lines, and what becomes of each."""

    key: str
    pick: str
    layout: str  # objects, texts, lists, or fields: one object with a key a line
    split: str
    keys: tuple[str, ...]
    order: tuple[int, ...]  # in which the values of a row are written
    unwrap: bool  # a single row is written without its list

    def fill(self, lines: Sequence[Line]) -> Any:
        """The section's JSON value, None where no line is picked."""
        rows = PICKS[self.pick](lines)
        if not rows:
            return None
        if self.layout == "fields":
            return {key: row_values(line, self.split)[-1] for key, line in zip(self.keys, rows)}
        values = [self._row(line) for line in rows]
        return values[0] if self.unwrap and len(values) == 1 else values

    def _row(self, line: Line) -> Any:
        if self.layout == "texts":
            return line.text
        values = row_values(line, self.split)
        if self.layout == "lists":
            return values
        return {self.keys[index]: values[index] for index in self.order if index < len(values)}


@dataclass(frozen=True)
class Form:
    """A prompt and the JSON it asks for. With one unnamed section the JSON is a list."""

    prompt: str
    sections: tuple[Section, ...]

    def fill(self, lines: Sequence[Line]) -> Any:
        """The JSON value that the form asks for on a page with these lines."""
        if not self.sections[0].key:
            return self.sections[0].fill(lines) or []
        filled = {section.key: section.fill(lines) for section in self.sections}
        return {key: value for key, value in filled.items() if value is not None}

    def answer(self, lines: Sequence[Line]) -> str:
        """The same as text."""
        return compact(self.fill(lines))


def draw_section(rng: random.Random, key: str, keys: Sequence[str] = ()) -> Section:
    """A random section under `key`, whose rows use `keys` where they are given."""
    layout = "objects" if keys else rng.choice(("objects", "objects", "objects", "fields", "texts", "lists"))
    order = list(range(4))
    if rng.random() < 0.5:
        rng.shuffle(order)
    return Section(
        key=key,
        pick=rng.choice(list(PICKS)) if key else rng.choice(("all", "several cells", "ends in a number")),
        layout=layout,
        split=rng.choice(("", "", "first word", "last word")),
        keys=tuple(keys) or tuple(random_keys(rng, 20 if layout == "fields" else 4)),
        order=tuple(order),
        unwrap=bool(key) and rng.random() < 0.4,
    )


@functools.cache
def fixed_forms() -> tuple[Form, ...]:
    """The forms whose keys the model has to know by heart, as fine-tuning will ask it to."""
    forms = []
    for index in range(FORMS):
        rng = random.Random(f"im2json forms/{index}")
        count = rng.choice((0, 1, 2, 2, 3))
        names = random_keys(rng, count) if count else [""]
        sections = tuple(draw_section(rng, name) for name in names)
        # Several sections of objects could come out in the target's shape
        while len(sections) > 1 and all(section.layout in ("objects", "fields") for section in sections):
            sections = tuple(draw_section(rng, name) for name in names)
        forms.append(Form(form_name(rng), sections))
    assert len({form.prompt for form in forms}) == FORMS
    return tuple(forms)


def keyed_form(rng: random.Random) -> Form:
    """A form whose prompt spells the keys of its rows."""
    keys = random_keys(rng, 3)
    while len(" ".join(keys)) > 30:
        keys = random_keys(rng, 3)
    section = Section("", "all", "objects", "", tuple(keys), (0, 1, 2), unwrap=False)
    return Form(f"keys {' '.join(keys)}", (section,))
