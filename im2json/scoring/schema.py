"""Induce the JSON Schema of a run's targets, and read and check a schema from a file.

Decoding can be constrained to a part of JSON Schema (2020-12):

- anyOf, enum, const, or type, which may be a list;
- objects: properties, required. The properties come in any order, and no others are written, whether or not
  additionalProperties is false;
- arrays: items, minItems, maxItems;
- strings: pattern, format, minLength, maxLength; numbers: minimum, maximum, exclusiveMinimum, exclusiveMaximum,
  multipleOf.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from genson import SchemaBuilder
from genson.schema.strategies import Object

from im2json.errors import UserError
from im2json.jsontext import MAX_DEPTH, Number, dumps, load_json, map_leaves, number_text

Schema = dict[str, Any]
NOTES = {"$schema", "$id", "$comment", "title", "description", "default", "examples"}
"""Keywords that do not constrain what is written."""

BY_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"pattern", "format", "minLength", "maxLength"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": set(),
    "null": set(),
}
ONE_OF = ("anyOf", "enum", "const", "type")


class _Object(Object):
    """Writes `required` also if it is empty. genson omits it then, and would read the omission as unknown."""

    def to_schema(self) -> Schema:
        return {**super().to_schema(), "required": sorted(self._required or ())}


class _Builder(SchemaBuilder):
    EXTRA_STRATEGIES = (_Object,)


def induce(targets: Iterable[dict[str, Any]]) -> Schema:
    """Return the schema of all that occurs in the targets: types, keys, and which keys are always present.

    Keys are in the order of their first occurrence. An array that was always empty may only be empty.
    """
    builder = _Builder(schema_uri="https://json-schema.org/draft/2020-12/schema")
    builder.add_schema({"type": "object"})
    for target in targets:
        builder.add_object(map_leaves(target, _plain))
    return _closed(builder.to_schema())


def _plain(leaf: Any) -> Any:
    """Return a leaf in the types that genson knows."""
    return json.loads(leaf.text) if isinstance(leaf, Number) else leaf


def _closed(schema: Schema) -> Schema:
    """Return a schema that excludes what never occurred, which genson would allow."""
    closed = dict(schema)
    types = types_of(schema)
    if "anyOf" in schema:
        closed["anyOf"] = [_closed(branch) for branch in _alike(schema["anyOf"])]
    if "object" in types:
        closed["properties"] = {key: _closed(value) for key, value in schema.get("properties", {}).items()}
        closed["additionalProperties"] = False
    if "array" in types:
        closed |= {"items": _closed(schema["items"])} if "items" in schema else {"maxItems": 0}
    return closed


def _alike(branches: list[Schema]) -> list[Schema]:
    """Give an object and a list of objects in the same position the keys of both.

    Some targets have one row where others have a list of rows, and the rows are of the same kind.
    """
    found = {name: branch for branch in branches for name in types_of(branch)}
    if not {"object", "array"} <= found.keys() or "object" not in types_of(found["array"].get("items", {})):
        return branches
    builder = _Builder(schema_uri=None)
    builder.add_schema(found["object"])
    builder.add_schema(found["array"]["items"])
    row = builder.to_schema()
    others = [branch for branch in branches if branch is not found["object"] and branch is not found["array"]]
    return [*others, row, {**found["array"], "items": row}]


def types_of(schema: Schema) -> list[str]:
    """Return the types that `type` names, or none if it is absent."""
    types = schema.get("type", [])
    return [types] if isinstance(types, str) else types


def outline(schema: Schema) -> Any:
    """Return a document of a schema's shape: each key once, one entry in every array, and empty strings for values."""
    if "anyOf" in schema:
        return max(map(outline, schema["anyOf"]), key=lambda document: len(dumps(document)), default="")
    if "properties" in schema:
        return {key: outline(each) for key, each in schema["properties"].items()}
    return [outline(schema["items"])] if "items" in schema else ""


def read_schema(path: Path) -> Schema:
    """Read a schema that decoding can be constrained to.

    Raises:
        UserError: naming the file, the JSON pointer and what is wrong there.
    """
    try:
        schema = load_json(path.read_bytes(), f"schema {path}")
    except OSError as error:
        raise UserError(f"schema {path} cannot be read: {error.strerror}") from error
    if not isinstance(schema, dict) or types_of(schema) != ["object"]:
        raise UserError(f'schema {path}: a target is an object, so it begins with {{"type": "object"')
    for problem in _problems(schema, "#"):
        raise UserError(f"schema {path}: {problem}")
    return schema


def _problems(schema: Any, pointer: str) -> Iterator[str]:
    """Yield what is wrong in a schema, and in the schemas within it; `pointer` is its JSON pointer."""
    if not isinstance(schema, dict):
        yield f"{pointer} is not a schema, which is an object"
        return
    if pointer.count("/") > 2 * MAX_DEPTH:
        yield f"{pointer} nests deeper than {MAX_DEPTH} levels"
        return
    kinds = [name for name in ONE_OF if name in schema]
    if not kinds:
        yield f"{pointer} has none of {', '.join(ONE_OF)}, one of which says what may stand there"
        return
    known = set(NOTES) | ({"type"} if kinds[0] != "anyOf" else set())
    if kinds[0] == "type":
        types = types_of(schema)
        if not isinstance(types, list) or not types or any(name not in list(BY_TYPE) for name in types):
            yield f"{pointer}/type: {schema['type']!r} is not one of {', '.join(BY_TYPE)}, or a list of them"
            return
        known = known.union(*(BY_TYPE[name] for name in types))
    for keyword in schema.keys() - known - {kinds[0]}:
        yield f"{pointer}: {keyword} is not supported here"
    yield from _wrong_values(schema, pointer)
    for below, part in _parts(schema, pointer):
        yield from _problems(part, below)


def _wrong_values(schema: Schema, pointer: str) -> Iterator[str]:
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    if not isinstance(properties, dict):
        yield f"{pointer}/properties is not an object"
    elif not isinstance(required, list) or not all(isinstance(key, str) and key in properties for key in required):
        yield f"{pointer}/required is not a list of names that are in properties"
    elif len(set(required)) < len(required):
        yield f"{pointer}/required names a key twice"
    if schema.get("additionalProperties", False) is not False:
        yield f"{pointer}: additionalProperties can only be false: name what may be written in properties"
    for name in ("anyOf", "enum"):
        if name in schema and not (isinstance(schema[name], list) and schema[name]):
            yield f"{pointer}/{name} is not a list with something in it"
    listed = schema["enum"] if isinstance(schema.get("enum"), list) else []
    for value in [*listed, *([schema["const"]] if "const" in schema else [])]:
        if "type" in schema and not any(name in list(types_of(schema)) for name in _types_of_value(value)):
            yield f"{pointer}: {dumps(value)} is not of the type that stands beside it"
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    if not _whole(least) or not (most is None or (_whole(most) and most >= least)):
        yield f"{pointer}: minItems and maxItems are whole numbers, the first not above the second"
    elif "array" in types_of(schema) and "items" not in schema and most != 0:
        yield f"{pointer} is an array without items: say what may stand in it"


def _types_of_value(value: Any) -> list[str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return ["number"] if "." in number_text(value) or "e" in number_text(value) else ["integer", "number"]
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return [names[type(value)]]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parts(schema: Schema, pointer: str) -> Iterator[tuple[str, Any]]:
    """Yield the schemas directly within a schema, each with its JSON pointer."""
    branches, properties = schema.get("anyOf"), schema.get("properties")
    if isinstance(branches, list):
        yield from ((f"{pointer}/anyOf/{i}", branch) for i, branch in enumerate(branches))
    if isinstance(properties, dict):
        for key, value in properties.items():
            yield f"{pointer}/properties/{key.replace('~', '~0').replace('/', '~1')}", value
    if "items" in schema:
        yield f"{pointer}/items", schema["items"]
