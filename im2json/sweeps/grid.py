"""Read grid.json as the points of a sweep. Every value is checked, and every point gets an id of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from im2json.errors import UserError
from im2json.files import read_json
from im2json.options import OPTIONS, PRESETS, TrainConfig, check, flag_name
from im2json.resume import fresh_options
from im2json.text import is_path

PARTS = ("preset", "base", "grid", "ablate", "seeds")
NOT_HERE = {
    "output": "a sweep names the run folders itself",
    "test": "a sweep scores the test split once, for the winner",
}
"""Options that a grid may not set, and why."""
Values = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    id: str  # follows from the options that decide the result, so it is the same in any grid
    config: TrainConfig
    flags: list[str]  # of `im2json train`, for this config
    resume_flags: list[str]  # those of options that do not affect the result, which --resume accepts again
    axis_values: Values  # axis -> value as written in the grid ("2r" for alpha)
    setting: str  # the differences from the base in words; the same for all seeds
    name: str  # the setting, with the seed if the grid repeats its points


@dataclass(frozen=True)
class Plan:
    """All points of a grid, in its order."""

    points: list[Point]
    axes: dict[str, list[Any]]  # axis -> its values in the order of the grid; a value that only the base has is first
    metric: str  # ranks the points
    base: Values | None  # axis -> value of the base of an ablation; None if the axes are crossed


class Variant(NamedTuple):
    """A combination of axis values, and how it differs from the base."""

    axis_values: Values
    changes: Values


def read_plan(path: Path, overrides: Iterable[str] = ()) -> Plan:
    """Return the plan of a grid file.

    Args:
        overrides: NAME=VALUE, replacing values of its base.

    Raises:
        UserError: naming the file, and the key or line that is wrong.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; name a grid, such as grid.json")
    stored = read_json(path)
    try:
        if not isinstance(stored, dict):
            raise UserError('a grid is a JSON object, like {"base": {"steps": 300}, "grid": {"r": [8, 16]}}')
        return make_plan(stored, dict(map(parse_override, overrides)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_override(text: str) -> tuple[str, Any]:
    """Return NAME=VALUE as (name, value), with the value in the type of its option.

    Raises:
        UserError: if there is no `=`.
    """
    name, equals, value = text.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    if not equals:
        raise UserError(f"--set {text}: expected NAME=VALUE, like steps=50")
    if name in OPTIONS and OPTIONS[name].kind is str:
        return name, value
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value  # "2r", or a value that the check will refuse


def make_plan(stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> Plan:
    """Return the plan of a grid that was read from its file.

    Raises:
        UserError: naming the key that is wrong.
    """
    for part in stored:
        if part not in PARTS:
            hint = "; options go into base, grid or ablate" if part in OPTIONS else ""
            raise UserError(f"unknown key {part!r}: a grid holds {', '.join(PARTS)}{hint}")
    preset = stored.get("preset")
    if preset is not None and preset not in list(PRESETS):  # a list, because a JSON value may not be hashable
        raise UserError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    if "grid" in stored and "ablate" in stored:
        raise UserError("grid and ablate: give one of the two, a grid crosses its axes, ablate varies one at a time")
    part = "ablate" if "ablate" in stored else "grid"
    base = {**_checked_base(stored.get("base", {})), **_checked_base(overrides, "--set")}
    axes, seeds = _checked_axes(stored.get(part, {}), part), _checked_seeds(stored)
    for name in base:
        if part == "grid" and name in axes:
            raise UserError(f"{name} is in base (or --set) and an axis of grid: leave one out")
    for where, names in (("base", base), (part, axes)):
        if "seeds" in stored and "seed" in names:
            raise UserError(f"{where}.seed and seeds: leave one out")

    variants = _ablated(base, axes, preset) if part == "ablate" else _crossed(axes)
    points = [_point(base, variant, seed, preset) for variant in variants for seed in seeds]
    _refuse_copies(points)
    if any(point.config.train.eval_every == 0 for point in points):
        raise UserError("eval_every: 0 leaves nothing to rank the points by: at least 1")
    centre = variants[0].axis_values if part == "ablate" else None
    ordered = {name: _ordered([v.axis_values[name] for v in variants], values) for name, values in axes.items()}
    return Plan(points, ordered, points[0].config.train.metric, centre)


def _ordered(used: list[Any], values: list[Any]) -> list[Any]:
    """Return the values that points use on an axis, in the grid's order; a value that only the base has is first."""
    return [value for value in dict.fromkeys([*(v for v in used if v not in values), *values]) if value in used]


def _crossed(axes: Mapping[str, list[Any]]) -> list[Variant]:
    """Return every combination of the axes' values."""
    combinations = (dict(zip(axes, values)) for values in itertools.product(*axes.values()))
    return [Variant(values, values) for values in combinations]


def _ablated(base: Values, axes: Mapping[str, list[Any]], preset: str | None) -> list[Variant]:
    """Return the base, and the base with one value changed, for each value.

    A value that the base already has makes no further point; it becomes the base's value on that axis, as written.
    """
    base_config = _resolve(base, preset)
    middle = {name: base_config.flat()[name] for name in axes}
    changes = []
    for name, values in axes.items():
        same = [value for value in values if point_id(_resolve({**base, name: value}, preset)) == point_id(base_config)]
        if len(same) > 1:
            raise UserError(f"ablate.{name}: {same[0]!r} and {same[1]!r} are the same point")
        middle[name] = same[0] if same else middle[name]
        changes += [(name, value) for value in values if value not in same]
    follows = base.get("alpha", "2r")
    if {"r", "alpha"} <= axes.keys() and isinstance(follows, str) and not isinstance(middle["alpha"], str):
        middle["alpha"] = follows  # true for points of every r, while a number would be true for the base alone
    return [Variant(middle, {})] + [Variant({**middle, name: value}, {name: value}) for name, value in changes]


def _in_words(values: Values) -> str:
    return " ".join(f"{name}={shown(value)}" for name, value in values.items()) or "base"


def shown(value: Any) -> str:
    """Return a value as text on one line; text with a line break or the like is quoted and escaped."""
    return str(value) if str(value).isprintable() else repr(value)


def _point(base: Values, variant: Variant, seed: Values, preset: str | None) -> Point:
    given = {**base, **variant.changes, **seed}
    config = _resolve(given, preset)
    return Point(
        id=point_id(config),
        config=config,
        flags=_flags(given, config, preset or "tiny"),
        resume_flags=[
            flag for name in given if not OPTIONS[name].affects_result for flag in as_flag(name, given[name])
        ],
        axis_values=variant.axis_values,
        setting=_in_words(variant.changes),
        name=_in_words({**variant.changes, **seed}),
    )


def _resolve(given: Values, preset: str | None) -> TrainConfig:
    """Return the config that `im2json train` would resolve a point's values to."""
    return TrainConfig.resolve(fresh_options({**_with_alpha(given, preset), "test": False}, preset), preset)


def point_id(config: TrainConfig) -> str:
    """Return a name that follows from the options that decide the result."""
    decides = config.identity(name for name, option in OPTIONS.items() if option.affects_result)
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
    model, train = config.model, config.train
    shown = f"r{model.r}-alpha{model.alpha:g}-dropout{model.dropout:g}-lr{train.lr:g}-seed{train.seed}"
    return f"{shown}-{digest[:8]}"


def _with_alpha(given: Values, preset: str | None) -> Values:
    """Return the values with an alpha like "2r" as a number."""
    alpha = given.get("alpha")
    if not isinstance(alpha, str):
        return given
    others = {name: value for name, value in given.items() if name != "alpha"}
    r = TrainConfig.resolve(fresh_options(others, preset), preset).model.r
    return {**given, "alpha": _times(alpha) * r}


def _times(alpha: str) -> float:
    """Return the factor of an alpha like "2r"."""
    return float(alpha.removesuffix("r") or 1)


def _flags(given: Values, config: TrainConfig, preset: str) -> list[str]:
    """Return the flags that give `im2json train` this config: the given values, and all that differ from the preset."""
    usual = TrainConfig.resolve({}, preset).flat()
    flags = ["--preset", preset]
    for name, value in config.flat().items():
        if value != usual[name] or name in given or name == "alpha":
            flags += as_flag(name, value)
    return flags


def as_flag(name: str, value: Any) -> list[str]:
    """Return the flag that gives a command this value of an option."""
    flag = flag_name(name)
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)]


def _checked_base(values: Any, where: str = "base") -> Values:
    if not isinstance(values, dict):
        raise UserError(f'{where}: expected an object of options, like {{"steps": 300}}')
    for name, value in values.items():
        _check(f"{where}.{name}" if where == "base" else f"{where} {name}", name, value)
    return values


def _checked_axes(axes: Any, part: str) -> dict[str, list[Any]]:
    if not isinstance(axes, dict):
        raise UserError(f'{part}: expected an object of axes, like {{"r": [8, 16, 32]}}')
    for name, values in axes.items():
        _check_values(f"{part}.{name}", name, values)
        if name == "metric" or not OPTIONS[name].affects_result:
            why = "points are ranked by one metric" if name == "metric" else "it does not change the result"
            raise UserError(f"{part}.{name}: {why}; it belongs into base")
    return axes


def _checked_seeds(stored: Mapping[str, Any]) -> list[Values]:
    if "seeds" not in stored:
        return [{}]
    _check_values("seeds", "seed", stored["seeds"])
    return [{"seed": seed} for seed in stored["seeds"]]


def _check_values(where: str, name: str, values: Any) -> None:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: expected a list of values, like [8, 16, 32], not {json.dumps(values)}")
    for value in values:
        _check(where, name, value)
    for first, second in itertools.combinations(values, 2):
        if first == second:
            raise UserError(f"{where}: {json.dumps(second)} comes twice")


def _check(where: str, name: str, value: Any) -> None:
    if name in NOT_HERE:
        raise UserError(f"{where}: leave it out, {NOT_HERE[name]}")
    if name == "alpha" and isinstance(value, str):
        if not re.fullmatch(r"([0-9]+\.?[0-9]*)?r", value):
            raise UserError(f'{where}: {value!r} is neither a number nor a multiple of r, like "2r"')
        value = _times(value)
    if name == "preset":
        raise UserError(f"{where}: it stands beside base, not among the options")
    if isinstance(value, str) and not is_path(value):
        raise UserError(f"{where}: {value!r} holds a character that no command line can")
    if problem := check(name, value):
        raise UserError(f"{where}: {problem.removeprefix(f'{flag_name(name)}: ')}")


def _refuse_copies(points: list[Point]) -> None:
    known: dict[str, Point] = {}
    for point in points:
        if (other := known.setdefault(point.id, point)) is not point:
            raise UserError(f"{other.name} and {point.name} are the same point: leave one out")
