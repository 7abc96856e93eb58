"""Sums that should add up."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from helpers import prediction

from im2json.scoring.checks import CheckCounts, SumCheck, amount, count_checks, parse_checks

AMOUNTS = {
    "10,000": 10_000, "10.000": 10_000, "Rp. 12.500": 12_500, "-1,200.50": "-1200.5", "$ 3,5": "3.5", "7": 7,
    "1.234.567,89": "1234567.89", "1 250": 1_250, "1'000.25": "1000.25", "(250)": -250, "-Rp.500": -500,
    "12.50-": "12.5", "Rp58.000,-": 58_000, "0.5": "0.5", "": None, "free": None, "2 x 5.00": None,
}  # fmt: skip


@pytest.mark.parametrize("text", AMOUNTS)
def test_amounts(text):
    wanted = AMOUNTS[text]
    assert amount(text) == (None if wanted is None else Decimal(wanted))


BILL = {
    "menu": [{"nm": "a", "price": "10,000", "sub": [{"price": "500"}]}, {"nm": "b", "price": "2,000"}],
    "total": {"total_price": "12.500", "cash": "20,000", "change": "7,500"},
}


@pytest.mark.parametrize(
    ("equation", "holds"),
    [
        ("menu.price + menu.sub.price = total.total_price", True),
        ("menu.price=total.total_price", False),
        ("total.cash - total.change = total.total_price", True),
        ("menu.price + menu.sub.price + menu.nothing = total.total_price", True),
        ("menu.price = total.nothing", None),
        ("menu.nm = total.total_price", None),
    ],
)
def test_sums(equation, holds):
    assert SumCheck.parse(equation).holds(BILL) is holds


def test_a_misread_total_is_caught():
    check = SumCheck.parse("menu.price + menu.sub.price = total.total_price")
    assert check.holds({**BILL, "total": {"total_price": "12,600"}}) is False


def test_long_amounts_are_not_rounded():
    digits = "9" * 40
    check = SumCheck.parse("a = b")
    assert check.holds({"a": [digits, "1"], "b": [digits, "2"]}) is False
    assert check.holds({"a": [digits, "0.10", "0.20"], "b": [digits, "0.30"]}) is True


def test_several_equations():
    first, second = parse_checks("a-b.c = d ; e = f;")
    assert (first.left, first.right, second.text) == ([(1, "a-b.c")], [(1, "d")], "e = f")
    assert parse_checks(None) == []


@pytest.mark.parametrize("text", ["a", "a =", "= b", "a = b = c", "a + = b", "+"])
def test_what_is_no_equation_is_named(text):
    with pytest.raises(ValueError, match=r"--check-sum .* is no equation of paths: write"):
        SumCheck.parse(text)


def test_checks_are_counted_beside_what_is_wrong():
    equation = "menu.price + menu.sub.price = total.total_price"
    misread = {**BILL, "total": {"total_price": "12,600"}}
    other = {**BILL, "total": {**BILL["total"], "cash": "1"}}  # of no matter to the equation
    check = SumCheck.parse(equation)
    predictions = [
        prediction({"text": json.dumps(said), "target": BILL, "checks": {equation: check.holds(said)}})
        for said in (BILL, misread, other, {"total": {}})
    ]
    assert count_checks(predictions) == {equation: CheckCounts(holds=2, fails=1, cannot_say=1, wrong=2, caught=1)}
    assert count_checks([prediction({"text": "{}", "target": {}})]) == {}
