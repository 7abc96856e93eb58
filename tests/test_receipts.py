"""The synthetic receipts are the same everywhere, follow the schema of CORD v2, add up, and differ between splits."""

import collections
import json
import random
import re

import numpy as np
import pytest

from im2json.data.receipts import COUNTS, Receipts, draw_receipt, render, words
from im2json.data.receipts.content import content_class
from im2json.data.receipts.layout import SIDE, Cell, Line, draw_style
from im2json.data.receipts.printing import print_page

MENU_KEYS = {"nm", "num", "unitprice", "cnt", "discountprice", "price", "sub"}
SUB_TOTAL_KEYS = {"subtotal_price", "discount_price", "service_price", "tax_price"}
PINNED = {
    "menu": [
        {"nm": "Smoothie", "cnt": "1x", "price": "13,500"},
        {"nm": "So Steamed", "cnt": "3x", "price": "43,500"},
    ],
    "sub_total": {"subtotal_price": "57,000"},
    "total": {"total_price": "57,000"},
}
TOTAL_KEYS = {"total_price", "cashprice", "changeprice", "creditcardprice", "menuqty_cnt"}


@pytest.fixture(scope="module")
def many():
    return [draw_receipt(3, "test", index) for index in range(400)]


def items(target):
    menu = target["menu"]
    return menu if isinstance(menu, list) else [menu]


def subs(item):
    sub = item.get("sub", [])
    return sub if isinstance(sub, list) else [sub]


def amount(text):
    """Return an amount in the smallest unit; all amounts of a receipt have the same number of decimals."""
    return int(re.sub(r"\D", "", text)) * (-1 if text.startswith("-") else 1)


def test_same_arguments_same_receipt():
    first, second = draw_receipt(5, "train", 7), draw_receipt(5, "train", 7)
    assert first == second
    assert np.array_equal(render(first).gray, render(second).gray)
    others = [draw_receipt(6, "train", 7), draw_receipt(5, "test", 7), draw_receipt(5, "train", 8)]
    assert all(other.target != first.target for other in others)


def test_content_does_not_change_between_versions():
    """Published figures hold only as long as the receipts stay the same."""
    assert draw_receipt(0, "train", 0).target == PINNED


def test_target_holds_the_printed_texts(many):
    def leaves(value):
        if isinstance(value, dict):
            return [leaf for child in value.values() for leaf in leaves(child)]
        return [leaf for child in value for leaf in leaves(child)] if isinstance(value, list) else [value]

    for receipt in many:
        assert isinstance(receipt.target["menu"], dict) == (len(items(receipt.target)) == 1)
        assert all(leaf and leaf in receipt.text for leaf in leaves(receipt.target))
        for item in items(receipt.target):
            assert set(item) <= MENU_KEYS
            assert {"nm", "price"} <= set(item)
            assert all(set(sub) <= {"nm", "price"} for sub in subs(item))
        assert set(receipt.target) <= {"menu", "sub_total", "total"}
        assert set(receipt.target.get("sub_total", {})) <= SUB_TOTAL_KEYS
        assert set(receipt.target["total"]) <= TOTAL_KEYS
        assert "total_price" in receipt.target["total"]
        json.dumps(receipt.target)


def test_amounts_add_up(many):
    for receipt in many:
        total, between = receipt.target["total"], dict(receipt.target.get("sub_total", {}))
        paid = pieces = 0
        for item in items(receipt.target):
            count = int(re.sub(r"\D", "", item.get("cnt", "1")))
            pieces += count
            paid += amount(item["price"]) + amount(item.get("discountprice", "0"))
            paid += sum(amount(sub.get("price", "0")) for sub in subs(item))
            if "unitprice" in item:
                assert amount(item["unitprice"]) * count == amount(item["price"])
        if between:
            assert amount(between.pop("subtotal_price")) == paid
        paid += sum(map(amount, between.values()))
        assert amount(total["total_price"]) == paid
        if "changeprice" in total:
            assert amount(total["cashprice"]) - amount(total["changeprice"]) == paid
        if "creditcardprice" in total:
            assert amount(total["creditcardprice"]) == paid
        if "menuqty_cnt" in total:
            assert int(total["menuqty_cnt"]) == pieces


def test_variety(many):
    sizes = collections.Counter(len(items(receipt.target)) for receipt in many)
    assert set(sizes) <= set(range(1, 9))
    assert sizes[1]
    assert max(sizes) == 8
    assert sum(sizes[n] for n in (2, 3, 4, 5)) > 0.6 * len(many)
    seen = collections.Counter()
    for receipt in many:
        for item in items(receipt.target):
            seen.update(list(item))
            seen["sub list"] += isinstance(item.get("sub"), list)
        seen.update(list(receipt.target.get("sub_total", {})))
        seen.update(list(receipt.target["total"]))
    assert all(seen[key] >= 8 for key in MENU_KEYS | SUB_TOTAL_KEYS | TOTAL_KEYS | {"sub list"}), seen
    assert len({receipt.style.font for receipt in many}) == 8
    assert len({receipt.style.size for receipt in many}) >= 6
    text = "\n".join(receipt.text for receipt in many)
    assert all(re.search(form, text) for form in (r"\d,000\b", r"\d\.000\b", r"\d\.\d\d\b", r"\d,\d\d\b", "Rp", r"\$"))


def test_a_third_of_the_words_is_random(many):
    known = {word.lower() for word in (*words.FOOD, *words.SHOP)}
    drawn = [word.lower() for receipt in many for item in items(receipt.target) for word in item["nm"].split()]
    unknown = sum(not any(entry.startswith(word) for entry in known) for word in drawn)
    assert 0.25 < unknown / len(drawn) < 0.4


def test_splits_share_no_receipt():
    """The first item of a receipt determines its split, whatever the seed."""
    firsts = {
        split: {
            (item["nm"], item["price"])
            for seed in (0, 1)
            for target in Receipts(split, 150, seed).targets
            for item in items(target)[:1]
        }
        for split in (*COUNTS, "pretrain")
    }
    classes = {split: {content_class(*first) for first in found} for split, found in firsts.items()}
    assert all(len(found) == 1 for found in classes.values())
    assert len(set.union(*classes.values())) == 4


def test_a_sequence_of_examples():
    split = Receipts("test", seed=4)
    assert len(split) == COUNTS["test"] == len(split.ids) == len(split.targets)
    example = split[17]
    assert example.id == split.ids[17] == "receipts-4-test-17"
    assert example.target == split.targets[17]
    assert example.image.mode == "RGB"
    assert example.image.size == (SIDE, SIDE)
    with pytest.raises(IndexError):
        split[100]
    with pytest.raises(ValueError, match="no split 'tset'"):
        Receipts("tset")
    assert len(list(Receipts("train", 3))) == 3


def test_centres_lie_on_the_printed_characters():
    """There is ink where the strokes of an x cross, also on a turned page."""
    lines = (Line((Cell("xxxx"), Cell("xxxx", "r", 1.0))),) * 6
    checked = 0
    for index in range(300):
        receipt = draw_receipt(1, "test", index)
        style = draw_style(random.Random(index), lines)
        if style.noise or style.shadow or style.desk is not None:
            continue
        page = print_page(lines, style)
        assert len(page.centres) == 48
        for _, x, y in page.centres:
            patch = page.gray[int(y) - 1 : int(y) + 2, int(x) - 2 : int(x) + 3]
            assert patch.min() < style.paper - 0.3 * (style.paper - style.ink)
        checked += 1
        assert [char for char, _, _ in render(receipt).centres] == [c for c in receipt.text if not c.isspace()]
    assert checked > 20


def test_everything_is_inside_the_picture(many):
    for receipt in many[:150]:
        page = render(receipt)
        assert page.gray.shape == (SIDE, SIDE)
        assert page.gray.dtype == np.uint8
        assert all(0 < x < SIDE and 0 < y < SIDE for _, x, y in page.centres)
        assert 0 <= page.degradation <= 1


def test_lines_that_cannot_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        draw_style(random.Random(0), (Line((Cell("W" * 80),)),))
    with pytest.raises(ValueError, match="do not fit"):
        draw_style(random.Random(0), (Line((Cell("a"),)),) * 40)
