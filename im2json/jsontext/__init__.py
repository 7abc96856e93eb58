"""JSON as text: what a model learns to write, files of it, and reading what a model wrote."""

from im2json.jsontext.numbers import MAX_DIGITS, Number, dumps, loads, number_text
from im2json.jsontext.text import (
    MAX_DEPTH,
    canonical,
    kind_of,
    load_json,
    map_leaves,
    parse,
    parse_target,
    scoring_text,
)
from im2json.jsontext.tolerant import MAX_REPAIRED, Reading, leaf_spans, read

__all__ = [
    "MAX_DEPTH",
    "MAX_DIGITS",
    "MAX_REPAIRED",
    "Number",
    "Reading",
    "canonical",
    "dumps",
    "kind_of",
    "leaf_spans",
    "load_json",
    "loads",
    "map_leaves",
    "number_text",
    "parse",
    "parse_target",
    "read",
    "scoring_text",
]
