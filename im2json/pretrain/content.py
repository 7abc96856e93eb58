"""Forms whose keys follow from what is printed, not from where it stands.

A key stands for a kind of value (a count, an amount, words) or for the meaning of a label, so that a model has to look
ahead on the page before it writes a key. Keys, tags and prompts are made up as for the other forms, and the shapes
are not the target's.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from im2json.data.receipts.layout import Line
from im2json.pretrain.forms import compact, form_name, random_keys
from im2json.pretrain.looks import KINDS, LABELS, Entry, Part, entries, only_last_amount

CONTENT_FORMS = 64
LONGEST_KEY = 7  # characters, so that a page of rows stays short
TARGET_ORDER = ("words", "code", "count", "rate", "negative", "amount")  # of a row's values; no fixed order is this one


@dataclass(frozen=True)
class RowKeys:
    """What becomes of a row: the key of each kind, and of the lines below it."""

    keys: tuple[tuple[str, str], ...]  # kind and key, in the order in which they are written
    reading: bool  # or in the order in which they are printed
    below: str  # the key of the lines below; they are left out where it is empty
    below_texts: bool  # these lines are written as texts, or else as objects
    listed: bool  # a single line below stays a list
    negative_inside: bool  # a negative amount below the row is one of the row's own values

    def values(self, parts: Sequence[Part]) -> dict[str, str]:
        """The first part of each kind that has a key."""
        keys = dict(self.keys)
        found: dict[str, str] = {}
        for part in only_last_amount(parts):
            if part.kind in keys:
                found.setdefault(part.kind, part.text)
        order = found if self.reading else [kind for kind, _ in self.keys if kind in found]
        return {keys[kind]: found[kind] for kind in order}

    def fill(self, row: Entry) -> dict[str, Any]:
        """The row's object; empty where none of its parts has a key."""
        inside = [below[-1] for below in row.below if self.negative_inside and below[-1].kind == "negative"]
        rest = [below for below in row.below if below[-1] not in inside]
        filled: dict[str, Any] = self.values([*row.parts, *inside])
        if not self.below:
            return filled
        written: list[Any] = (
            [" ".join(part.text for part in below) for below in rest]
            if self.below_texts
            else [values for below in rest if (values := self.values(below))]
        )
        if written:
            filled[self.below] = written[0] if len(written) == 1 and not self.listed else written
        return filled


@dataclass(frozen=True)
class ContentForm:
    """A prompt and the JSON it asks for."""

    prompt: str
    shape: str
    rows: RowKeys
    labels: tuple[tuple[str, str], ...]  # meaning and key, in the order in which they are written
    reading: bool  # or in the order in which they are printed
    names: tuple[str, ...]  # keys and tags of the shape
    unwrap: bool  # a single row or text is written without its list
    rows_first: bool
    with_rest: bool  # lines that are neither row nor label are written too

    def fill(self, lines: Sequence[Line]) -> Any:
        """The JSON value that the form asks for on a page with these lines."""
        return SHAPES[self.shape](self, list(entries(lines)))

    def answer(self, lines: Sequence[Line]) -> str:
        """The same as text."""
        return compact(self.fill(lines))

    def row(self, entry: Entry) -> dict[str, Any]:
        return self.rows.fill(entry)

    def all_rows(self, page: list[Entry]) -> Any:
        """The rows' objects."""
        return self.alone([row for entry in page if entry.what == "row" and (row := self.row(entry))])

    def all_labels(self, page: list[Entry], at: int = 0, step: int = 1) -> dict[str, str]:
        """The labels' keys and values, of every `step`-th meaning from `at`; the first where one occurs twice."""
        keys = dict(self.labels[at::step])
        found: dict[str, str] = {}
        for entry in page:
            if entry.what == "label" and entry.meaning in keys:
                found.setdefault(entry.meaning, entry.parts[-1].text)
        order = found if self.reading else [meaning for meaning in keys if meaning in found]
        return {keys[meaning]: found[meaning] for meaning in order}

    def alone(self, values: list[Any]) -> Any:
        return values[0] if self.unwrap and len(values) == 1 else values

    def in_order(self, rows: Any, labels: Any) -> list[Any]:
        return [rows, labels] if self.rows_first else [labels, rows]


def _pairs(values: dict[str, Any]) -> list[list[Any]]:
    return [[key, value] for key, value in values.items()]


def _paired_rows(form: ContentForm, page: list[Entry]) -> Any:
    """Every row a list of [key, value]."""
    return form.alone([_pairs(row) for entry in page if entry.what == "row" and (row := form.row(entry))])


def _flat(form: ContentForm, page: list[Entry]) -> Any:
    """One list of all lines as objects that say what kind of line they are."""
    keys, (tag, row, rest, value, *_) = dict(form.labels), form.names
    listed: list[Any] = []
    for entry in page:
        if entry.what == "row":
            listed.append({tag: row, **form.row(entry)})
        elif entry.meaning in keys:
            listed.append({tag: keys[entry.meaning], value: entry.parts[-1].text})
        elif entry.what == "rest" and form.with_rest:
            listed.append({tag: rest, value: entry.text})
    return listed


def _wrapped(form: ContentForm, page: list[Entry]) -> Any:
    """One list of objects with a single key, which is the kind of line."""
    keys, (row, rest, *_) = dict(form.labels), form.names
    listed: list[Any] = []
    for entry in page:
        if entry.what == "row":
            listed.append({row: form.row(entry)})
        elif entry.meaning in keys:
            listed.append({keys[entry.meaning]: entry.parts[-1].text})
        elif entry.what == "rest" and form.with_rest:
            listed.append({rest: entry.text})
    return listed


def _all_pairs(form: ContentForm, page: list[Entry]) -> Any:
    """[key, value] of every part of the rows and of every label."""
    keys = dict(form.labels)
    listed: list[Any] = []
    for entry in page:
        if entry.what == "row":
            listed += _pairs(form.row(entry))
        elif entry.meaning in keys:
            listed.append([keys[entry.meaning], entry.parts[-1].text])
    return listed


def _beside(form: ContentForm, page: list[Entry]) -> Any:
    """One object in which the rows stand beside the labels' values."""
    rows, labels = {form.names[0]: form.all_rows(page)}, form.all_labels(page)
    return rows | labels if form.rows_first else labels | rows


def _parts(form: ContentForm, page: list[Entry]) -> Any:
    """A list of two: rows, and labels as an object or as pairs."""
    labels = form.all_labels(page)
    return form.in_order(form.all_rows(page), _pairs(labels) if form.with_rest else labels)


def _three_parts(form: ContentForm, page: list[Entry]) -> Any:
    """A list of three: some labels, rows, the other labels."""
    return [form.all_labels(page, 0, 2), form.all_rows(page), form.all_labels(page, 1, 2)]


def _kinds(form: ContentForm, page: list[Entry]) -> Any:
    """What there is of each kind on the whole page, words left out."""
    runs = [parts for entry in page for parts in (entry.parts, *entry.below)]
    found = {
        key: [part.text for parts in runs for part in parts if part.kind == kind]
        for kind, key in form.rows.keys
        if kind != "words"
    }
    return {key: form.alone(texts) for key, texts in found.items() if texts}


SHAPES: dict[str, Callable[[ContentForm, list[Entry]], Any]] = {
    "rows": lambda form, page: form.all_rows(page),
    "beside": _beside,
    "flat": _flat,
    "parts": _parts,
    "named": lambda form, page: form.all_labels(page),
    "wrapped": _wrapped,
    "three parts": _three_parts,
    "deep": lambda form, page: {form.names[1]: _beside(form, page)},
    "paired rows": _paired_rows,
    "pairs": _all_pairs,
    "kinds": _kinds,
}
# Forms take these in turn; rows and labels together more often than either alone
_TURNS = ("beside", "rows", "parts", "flat", "deep", "three parts", "named", "wrapped", "beside", "rows", "parts",
          "paired rows", "three parts", "deep", "kinds", "pairs")  # fmt: skip


def _draw_rows(rng: random.Random, keys: Sequence[str], below: str) -> RowKeys:
    dropped = {kind for kind in KINDS if kind != "words" and rng.random() < (0.05 if kind == "amount" else 0.12)}
    kinds = [kind for kind in KINDS if kind not in dropped]
    rng.shuffle(kinds)
    target_order = [kind for kind in TARGET_ORDER if kind in kinds]
    while [kind for kind in kinds if kind in TARGET_ORDER] == target_order:
        rng.shuffle(kinds)
    by_kind = dict(zip(KINDS, keys))
    return RowKeys(
        keys=tuple((kind, by_kind[kind]) for kind in kinds),
        reading=rng.random() < 0.4,
        below=below if rng.random() < 0.8 else "",
        below_texts=rng.random() < 0.2,
        listed=rng.random() < 0.4,
        negative_inside=rng.random() < 0.5,
    )


def draw_content_form(rng: random.Random, shape: str) -> ContentForm:
    """A random form of one of SHAPES."""
    keys = random_keys(rng, len(KINDS) + len(LABELS) + 6, LONGEST_KEY)
    meanings = [meaning for meaning in LABELS if rng.random() < 0.9]
    rng.shuffle(meanings)
    by_meaning = dict(zip(LABELS, keys[len(KINDS) :]))
    names = keys[len(KINDS) + len(LABELS) :]
    return ContentForm(
        prompt=form_name(rng),
        shape=shape,
        rows=_draw_rows(rng, keys, names[-1]),
        labels=tuple((meaning, by_meaning[meaning]) for meaning in meanings),
        reading=rng.random() < 0.5,
        names=tuple(names[:-1]),
        unwrap=rng.random() < 0.5,
        rows_first=rng.random() < 0.5,
        with_rest=rng.random() < 0.4,
    )


@functools.cache
def content_forms() -> tuple[ContentForm, ...]:
    """The forms by content that the model has to know by heart."""
    forms = [
        draw_content_form(random.Random(f"im2json content forms/{index}"), _TURNS[index % len(_TURNS)])
        for index in range(CONTENT_FORMS)
    ]
    assert len({form.prompt for form in forms}) == CONTENT_FORMS
    return tuple(forms)
