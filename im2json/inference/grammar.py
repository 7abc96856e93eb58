"""A schema as a grammar in llguidance's dialect of Lark, of the compact JSON that models are trained to write."""

from __future__ import annotations

import json

from im2json.errors import UserError
from im2json.jsontext import canonical
from im2json.scoring.schema import BY_TYPE, Schema, types_of

PLACES = 64
"""Bits of a rule's parameter, which say what keys of an object have been written."""

# Numbers as any source may write them, but none that is read as infinity or refused as too long.
TERMINALS = r"""
STRING: /"([^"\\\x00-\x1f]|\\["\\bfnrt]|\\u00[01][0-9a-f]|\\ud[89a-f][0-9a-f]{2})*"/
INTEGER: /-?(0|[1-9][0-9]{0,299})/
NUMBER: INTEGER | /-?(0|[1-9][0-9]{0,299})\.[0-9]{1,60}/ | SMALL | LARGE
SMALL: /-?(0|[1-9][0-9]{0,199})(\.[0-9]{1,60})?[eE](\+?[0-9]{1,2}|-[0-9]{1,3})/
LARGE: /-?[0-9](\.[0-9]{1,60})?[eE]\+?([12][0-9]{2}|30[0-7])/
"""
SCALARS = {
    "string": "STRING",
    "integer": "INTEGER",
    "number": "NUMBER",
    "boolean": '"true" | "false"',
    "null": '"null"',
}


def lark(schema: Schema, lead: str = "") -> str:
    """The grammar of a schema that `scoring.schema` has checked, of texts that begin with `lead`.

    Raises:
        UserError: if an object has more required keys than can be kept track of.
    """
    rules = _Rules()
    # Any token that the grammar allows may be written, not only the tokenizer's own way of spelling what must follow.
    start = f"start: {json.dumps(lead) if lead else ''} {rules.value(schema)}"
    return "\n".join(['%llguidance {"no_forcing": true}', TERMINALS, start, *rules.lines])


class _Rules:
    """The rules so far, each a line or several."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def value(self, schema: Schema) -> str:
        """The name of a rule for what a schema allows."""
        if "anyOf" in schema:
            ways = [self.value(branch) for branch in schema["anyOf"]]
        elif "enum" in schema or "const" in schema:
            ways = [json.dumps(canonical(value)) for value in schema.get("enum", [schema.get("const")])]
        else:
            ways = [self.typed(schema, name) for name in types_of(schema)]
        return self.rule(" | ".join(ways))

    def name(self) -> str:
        self.count += 1
        return f"r{self.count}"

    def rule(self, body: str) -> str:
        """The name of a rule with this body."""
        name = self.name()
        self.lines.append(f"{name}: {body}")
        return name

    def typed(self, schema: Schema, name: str) -> str:
        if name == "object":
            return self.object(schema)
        if name == "array":
            return self.array(schema)
        narrowed = {key: schema[key] for key in BY_TYPE[name] if key in schema}
        if narrowed:
            return "%json " + json.dumps({"type": name, **narrowed})
        return SCALARS[name]

    def array(self, schema: Schema) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[" "]"'
        item = self.value(schema["items"])
        more = "" if most == 1 else f'("," {item}){{{max(0, least - 1)},{"" if most is None else most - 1}}}'
        return f'"[" {item} {more} "]"' + (' | "[" "]"' if least == 0 else "")

    def object(self, schema: Schema) -> str:
        """Its keys in any order, each once, all that are required: a rule's parameter holds what was written.

        Beyond the first 64 keys one may come only after the required ones, and may come again: its last value holds, as
        in any reader of JSON.
        """
        required = schema.get("required", [])
        if len(required) > PLACES:
            raise UserError(f"an object with {len(required)} required keys: {PLACES} can be kept track of")
        properties = schema.get("properties", {})
        if not properties:
            return '"{" "}"'
        complete = f"is_ones([0:{len(required)}])" if required else "true"
        further = self.name()
        first, ways = [] if required else ['"}"'], [f'"}}" %if {complete}']
        for bit, key in enumerate(sorted(properties, key=lambda key: key not in required)):
            member = self.rule(json.dumps(canonical(key) + ":") + " " + self.value(properties[key]))
            if bit < PLACES:
                first.append(f"{member} {further}::{1 << bit}")
                ways.append(f'"," {member} {further}::set_bit({bit}) %if bit_clear({bit})')
            else:
                first += [f"{member} {further}::0"] if not required else []
                ways.append(f'"," {member} {further}::_ %if {complete}')
        self.lines.append(f"{further}::_: " + " | ".join(ways))
        return f'"{{" ({" | ".join(first)})'
