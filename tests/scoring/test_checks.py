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
    "12.50-": "-12.5", "Rp58.000,-": 58_000, "0.5": "0.5", "": None, "free": None, "2 x 5.00": None,
    "\u22125,00": -5, "\u2013 $5.00": -5, "5,00-": -5, "5.00- EUR": -5, "5,00 EUR -": -5, "$ (5.00)": -5,
    "($5.00) *": -5, "(a) 5.00": 5, "12.\u2013": 12, "5,-- EUR": 5, "e-money 5.00": 5, "EUR -5": -5, "RM-5.00": -5,
    "0.125": "0.125", "0,750": "0.75", ".50": "0.5", "-.50": "-0.5", "Rp.500": 500, "1234.567": "1234.567",
    "12,345.678": "12345.678", "1,23,456.00": 123_456, "1,00,000": 100_000, "1\u202f000,00": 1000,
    "1\u2019234.50": "1234.5", "10 000 000": 10_000_000, "1 234.50": "1234.5", "\u0661\u0662\u066b\u0665": "12.5",
    "\uff11\uff12\uff0c\uff15": "12.5", "12,34,56": None, "01.02.2020": None, "2 3.50": None, "12 50": None,
    "1.234 567": None, "Rs. 500/-": 500, "5/-": 5, "kr 5:-": 5, "5:-": 5, "5:\u2013": 5, "1.500:-": 1500, "-5/-": -5,
    "(500/-)": -500, "5,00 kr -": -5, "INV-2023": 2023, "RM-500.00": -500, "e-5": 5, "EUR - 5": -5,
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


@pytest.mark.parametrize(
    ("prices", "total", "holds"),
    [
        ([1.125, 1], 2.125, True),
        ([0.5, 0.125], 0.625, True),
        ([1e-05], 0.00001, True),
        ([1.125], 1125, False),
        ([0.1, 0.2], 0.3, True),
        (["1.125", "1"], "2.125", True),
        (["1.125", "0.50"], "1.625", True),
        (["1.125", "0,50"], "1.125,50", True),
        (["1.125", "0,50"], "1.625", False),
        (["1.125", 0.5], "1.625", True),
        (["1.500", "500"], "2.000", True),
        (["1,125", "1.000.000"], "1,001,125", True),
        (["12,50", "3.50"], "16.00", True),  # as each is read by itself
        (["10,00", "2,00-"], "8,00", True),
        (["10.00", "\u22122.00"], "8.00", True),
        (["10.00", " ", None], "10.00", True),
        (["10.00", True], "10.00", None),
    ],
)
def test_numbers_are_their_value_and_a_documents_amounts_say_how_its_text_is_read(prices, total, holds):
    check = SumCheck.parse("items.price = total")
    assert check.holds({"items": [{"price": price} for price in prices], "total": total}) is holds


def test_keys_that_the_notation_uses_are_quoted():
    document = {"net.price": "2", "net": {"price": "3"}, "a+b": {"=": "4", ' "': "5"}}
    for equation, holds in {
        '"net.price" = net.price': False,
        "net.price + net.price = a": None,
        '"net.price" + "net"."price" + "a+b"."=" = x + "a+b"." \\""': False,
        '"net.price" + net.price = "a+b"." \\""': True,
        '"a+b"." \\"" - "net.price" = net.price ': True,
    }.items():
        assert SumCheck.parse(equation).holds(document) is holds, equation
    assert [check.text for check in parse_checks('"a;b" = c; d = e')] == ['"a;b" = c', "d = e"]


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
