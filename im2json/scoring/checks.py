"""Check whether the amounts of a document add up. A check is a remark on a prediction, and never changes it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from im2json.errors import UserError
from im2json.jsontext import number_text
from im2json.records import Prediction
from im2json.scoring.metrics import is_number
from im2json.scoring.normal import fields, key_path, leaves, normal_items

_QUOTED = r'(?<![^\s.+=;-])"(?:[^"\\]|\\.)*"'
_TERM = re.compile(rf"\s*([+-]?)\s*((?![\s+=;-])(?:{_QUOTED}|[^+=;])+?)\s*(?=[+]|\s-|$)")

DECIMAL_POINTS = ("", ".", ",")
"""How the amounts of a document may be written: whole ones only, or with one of these before the decimals."""


class SumCheck(NamedTuple):
    """An equation between two sums of all leaves at some paths."""

    text: str  # as the user wrote it
    left: list[tuple[int, str]]  # signs and paths
    right: list[tuple[int, str]]

    @classmethod
    def parse(cls, text: str) -> SumCheck:
        """Read an equation, such as `menu.price + menu.sub.price = total.total_price`. A minus needs a space before it.

        A key that holds a dot or another sign of this notation is quoted, as in tables of fields: `"net.price" = a`.

        Raises:
            UserError: if the text is no such equation.
        """
        parts = _split(text, "=")
        sides = [[*_TERM.finditer(side)] for side in parts]
        whole = ["".join(term.group() for term in terms).strip() for terms in sides]
        if len(sides) != 2 or not all(sides) or whole != [side.strip() for side in parts]:
            raise UserError(
                f"--check-sum {text!r} is no equation of paths: write menu.price + menu.sub.price = total.total_price"
            )
        left, right = ([(-1 if term[1] == "-" else 1, _path(term[2])) for term in terms] for terms in sides)
        return cls(text.strip(), left, right)

    def holds(self, document: dict[str, Any]) -> bool | None:
        """Return whether a document adds up, or None if a side has no leaf or a leaf is no amount.

        A path without leaves counts as 0. A number is its value. Amounts in text are all read with the same decimal
        point, so that 1.125 is a thousand beside 1.234,50 and not beside 0.50; where several fit all of them, one with
        which the document adds up is enough.
        """
        values: dict[str, list[Any]] = {}
        for path, value in leaves(document):
            if not (value is None or (isinstance(value, str) and not value.strip())):
                values.setdefault(path, []).append(value)
        sides = [
            [(sign, value) for sign, path in side for value in values.get(path, [])] for side in (self.left, self.right)
        ]
        if not all(sides):
            return None
        readings = [[_sum(side, point) for side in sides] for point in DECIMAL_POINTS]
        known = [sums for sums in readings if None not in sums] or [[_sum(side, None) for side in sides]]
        return None if None in known[0] else any(left == right for left, right in known)


def _sum(terms: Iterable[tuple[int, Any]], point: str | None) -> Fraction | None:
    """Return the exact sum of signed values; None if one is no amount with this decimal point, or with any (None)."""
    total = Fraction(0)  # a sum of Decimals would be rounded to 28 digits
    for sign, value in terms:
        found = _value(value, point)
        if found is None:
            return None
        total += sign * Fraction(found)
    return total


def _value(value: Any, point: str | None) -> Decimal | None:
    if not is_number(value):
        return amount(value, point) if isinstance(value, str) else None
    text = number_text(value)
    return None if "e" in text else Decimal(text)  # 1e-999999999 as an exact fraction would fill the memory


def _split(text: str, separator: str) -> list[str]:
    """Split an equation, or several, at a separator that is not within quotes."""
    parts = [""]
    for piece in re.findall(rf"{_QUOTED}|.", text, re.DOTALL):
        if piece == separator:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def _path(text: str) -> str:
    """Return a path as `key_path` writes it."""
    try:
        return re.sub(_QUOTED, lambda quoted: key_path("", json.loads(quoted[0])), text)
    except ValueError:  # no text in JSON's quotes, so no path has it
        return text


def check_results(checks: Iterable[SumCheck], document: Mapping[str, Any] | None) -> dict[str, bool | None]:
    """Return check -> whether it holds, or None if that is undecided, for example in an unreadable answer."""
    return {check.text: check.holds(dict(document or {})) for check in checks}


class CheckCounts(NamedTuple):
    """How often some predictions pass a check, and how many wrong ones it catches."""

    holds: int
    fails: int
    cannot_say: int
    wrong: int  # predictions that differ from their target at a path of the equation
    caught: int  # of these, predictions that fail the check


def count_checks(predictions: Iterable[Prediction]) -> dict[str, CheckCounts]:
    """Count the outcomes of each check over some predictions."""
    outcomes: dict[str, list[tuple[bool | None, bool]]] = {}
    for prediction in predictions:
        for text, holds in prediction.checks.items():
            check = SumCheck.parse(text)
            paths = {path for _, path in [*check.left, *check.right]}
            sides = (prediction.document, prediction.target)
            have, want = (Counter(pair for pair in fields(normal_items(side)) if pair[0] in paths) for side in sides)
            outcomes.setdefault(text, []).append((holds, have != want))
    counts = {}
    for text, pairs in outcomes.items():
        states = [state for state, _ in pairs]
        wrong = [state for state, is_wrong in pairs if is_wrong]
        counts[text] = CheckCounts(
            states.count(True), states.count(False), states.count(None), len(wrong), wrong.count(False)
        )
    return counts


def parse_checks(text: str | None) -> list[SumCheck]:
    """Read the equations of --check-sum, which semicolons separate.

    Raises:
        UserError: naming the one that is no equation.
    """
    return [SumCheck.parse(part) for part in _split(text or "", ";") if part.strip()]


# --- amounts in text

_ALIKE = str.maketrans({
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe58\ufe63\uff0d", "-"),
    **dict.fromkeys("\u2018\u2019\u02bc\u00b4\u0060\u2032\uff07", "'"),
    **dict.fromkeys("\u00a0\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
    **dict.fromkeys("\uff0c\u066c", ","), **dict.fromkeys("\uff0e\u066b", "."),
    "\uff08": "(", "\uff09": ")",
})  # fmt: skip
"""What receipts write for a minus, an apostrophe, a space, a comma, a point and parentheses."""

_AMOUNT = re.compile(r"(?:(?<!\w)[.,])?\d+(?:[.,' ]\d+)*")
_GROUPS = re.compile(
    r"(?!0)\d{1,3}(?:(?P<mark>[.,' ])\d{3})(?:(?P=mark)\d{3})*|(?!0)\d{1,2}(?:(?P<lakh>[.,])\d{2})+(?P=lakh)\d{3}|\d+"
)
_MINUS_BEFORE = re.compile(r"(?<!\w)-|-\s+$")
_HYPHEN_BEFORE = re.compile(r"\w-$")
_MINUS_BEHIND = re.compile(r"-(?!-)|.*[^.,:/\s-]\s*-\s*$|\s*-\s*$", re.DOTALL)


def amount(text: str, point: str | None = None) -> Decimal | None:
    """Return the only number in a text with any currency around it, or None if there is none or more than one.

    Examples are `Rp. 12.500`, `-1,200.50`, `$ 3,5` and `1,23,456.00`. A minus before or behind the number makes it
    negative, and so do parentheses around it; `,-`, `/-` and `:-` stand for no decimals. A hyphen between a letter and
    the number is a minus in `RM-5.00`, but not before plain digits, which may be those of an invoice (`INV-2023`).

    Args:
        point: the decimal point, of DECIMAL_POINTS; with another the text may be no amount. If None, it is the first of
            them with which the text is one.
    """
    if point is None:
        return next(filter(lambda read: read is not None, (amount(text, one) for one in DECIMAL_POINTS)), None)
    text = text.translate(_ALIKE)
    found = list(_AMOUNT.finditer(text))
    if len(found) != 1:
        return None
    digits, before, behind = found[0][0], text[: found[0].start()], text[found[0].end() :]
    whole, _, decimals = digits.rpartition(point) if point and digits.count(point) == 1 else (digits, "", "")
    groups = _GROUPS.fullmatch(whole or "0")
    if groups is None or (point and point in whole) or (decimals and not decimals.isdigit()):
        return None
    in_parentheses = "(" in before.rpartition(")")[2] and ")" in behind.partition("(")[0]
    minus_before = _MINUS_BEFORE.search(before) or (_HYPHEN_BEFORE.search(before) and not digits.isdigit())
    negative = in_parentheses or minus_before or _MINUS_BEHIND.match(behind)
    return Decimal(f"{'-' if negative else ''}{''.join(filter(str.isdigit, whole))}.{decimals or 0}")
