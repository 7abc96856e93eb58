"""Check whether the amounts of a document add up. A check is a remark on a prediction, and never changes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from im2json.errors import UserError
from im2json.records import Prediction
from im2json.scoring.normal import fields, normal_items

_TERM = re.compile(r"\s*([+-]?)\s*([^\s+=;-][^+=;]*?)\s*(?=[+]|\s-|$)")
_AMOUNT = re.compile(r"\d+(?:[.,' \u00a0]\d+)*")


class SumCheck(NamedTuple):
    """An equation between two sums of all leaves at some paths."""

    text: str  # as the user wrote it
    left: list[tuple[int, str]]  # signs and paths
    right: list[tuple[int, str]]

    @classmethod
    def parse(cls, text: str) -> SumCheck:
        """Read an equation, such as `menu.price + menu.sub.price = total.total_price`. A minus needs a space before it.

        Raises:
            UserError: if the text is no such equation.
        """
        sides = [[*_TERM.finditer(side)] for side in text.split("=")]
        whole = ["".join(term.group() for term in terms).strip() for terms in sides]
        if len(sides) != 2 or not all(sides) or whole != [side.strip() for side in text.split("=")]:
            raise UserError(
                f"--check-sum {text!r} is no equation of paths: write menu.price + menu.sub.price = total.total_price"
            )
        left, right = ([(-1 if term[1] == "-" else 1, term[2]) for term in terms] for terms in sides)
        return cls(text.strip(), left, right)

    def holds(self, document: dict[str, Any]) -> bool | None:
        """Return whether a document adds up, or None if a side has no leaf or a leaf is no amount.

        A path without leaves counts as 0.
        """
        leaves: dict[str, list[str]] = {}
        for path, leaf in fields(normal_items(document)):
            leaves.setdefault(path, []).append(leaf)
        sums = []
        for side in (self.left, self.right):
            amounts = [(sign, amount(leaf)) for sign, path in side for leaf in leaves.get(path, [])]
            if not amounts or any(value is None for _, value in amounts):
                return None
            # A sum of Decimals would be rounded to 28 digits.
            sums.append(sum(sign * Fraction(value) for sign, value in amounts if value is not None))
        return bool(sums[0] == sums[1])


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
    return [SumCheck.parse(part) for part in (text or "").split(";") if part.strip()]


def amount(text: str) -> Decimal | None:
    """Return the only number in a text with any currency around it, or None if there is none or more than one.

    Examples are `Rp. 12.500`, `-1,200.50` and `$ 3,5`. The last separator is a decimal point unless three digits follow
    it or the same separator precedes it. A minus before the number, or parentheses around the text, make it negative.
    """
    found = _AMOUNT.findall(text)
    if len(found) != 1:
        return None
    (digits,) = found
    before = text[: text.index(digits)]
    negative = "-" in before or (text.strip().startswith("(") and text.strip().endswith(")"))
    parts = re.split(r"([.,' \u00a0])", digits)
    decimals = ""
    if len(parts) > 1 and len(parts[-1]) != 3 and parts[-2] in ".," and parts[-2] not in parts[1:-2]:
        decimals = parts[-1]
        parts = parts[:-2]
    return Decimal(f"{'-' if negative else ''}{''.join(parts[::2])}.{decimals or 0}")
