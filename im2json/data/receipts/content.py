"""Draw what a receipt says: its lines, and the JSON that a model should read in them.

A receipt has 1 to 8 items in one of several layouts, amounts that add up, and header, date and footer lines that belong
to no field. The target holds every text as it is printed.
"""

from __future__ import annotations

import dataclasses
import datetime
import random
import zlib
from dataclasses import dataclass
from typing import Any

from im2json.data.receipts.layout import Cell, Line, Style, draw_style
from im2json.data.receipts.words import FOOD, FOOTERS, SHOP, STREETS, cased, phrase, word

CONTENT_CLASSES = {"train": 0, "validation": 1, "test": 2}
"""Keep splits apart: the first item of every receipt in a split hashes to this number, whatever the seed."""
OTHER_CLASS = 3
"""The content class of every other split, such as the one of pre-training."""

LAYOUTS = {"count left": 3, "count middle": 2, "no count": 4, "two lines": 1, "at": 1}
"""The layouts of an item, each with its weight in the draw."""
LONGEST_NAME = 13
"""Characters."""
MOST_LINES = 19
MOST_ITEM_LINES = 11
"""Discounts and subs are added only up to this many lines."""


@dataclass(frozen=True)
class Receipt:
    """The lines of a receipt, the style to print them in, and the JSON that a model should read."""

    lines: tuple[Line, ...]
    target: dict[str, Any]
    style: Style

    @property
    def text(self) -> str:
        """Return the transcription: the lines from top to bottom, with one space between the cells of a line."""
        return "\n".join(line.text for line in self.lines)


@dataclass(frozen=True)
class Money:
    """Print amounts as one shop does. An amount is a whole number of the currency's smallest unit."""

    thousands: str
    point: str | None  # None if no decimals are printed
    sign: str
    sign_everywhere: bool  # False: before the totals only

    def text(self, amount: int, total: bool = False) -> str:
        """Return an amount as printed, with a minus before the currency sign."""
        whole, cents = (abs(amount), "") if self.point is None else divmod(abs(amount), 100)
        digits = f"{whole:,}".replace(",", self.thousands)
        if self.point is not None:
            digits += f"{self.point}{cents:02d}"
        sign = self.sign if total or self.sign_everywhere else ""
        return ("-" if amount < 0 else "") + sign + digits


@dataclass(frozen=True)
class Shop:
    """Describe what all lines of one receipt have in common."""

    money: Money
    layout: str
    case: str
    label_case: str
    colon: str
    count_form: str
    numbered: bool  # whether items have a number before their name


@dataclass
class Item:
    """A bought item with its lines and fields. `amount` includes its discount and its subs."""

    lines: list[Line]
    fields: dict[str, Any]
    count: int
    amount: int


def _draw_money(rng: random.Random) -> Money:
    whole, with_cents = ((",", None), (".", None)), ((",", "."), (".", ","))
    thousands, point = rng.choice((*whole, *whole, ("", None), *with_cents))
    if rng.random() < 0.7:
        return Money(thousands, point, "", False)
    sign = rng.choice(("Rp", "Rp ", "Rp.") if point is None else ("$", "$", "€", "£"))
    return Money(thousands, point, sign, rng.random() < 0.4)


def _draw_shop(rng: random.Random, items: int) -> Shop:
    layouts = [name for name in LAYOUTS if items < 5 or name not in ("two lines", "at")]
    layout = rng.choices(layouts, weights=[LAYOUTS[name] for name in layouts])[0]
    return Shop(
        money=_draw_money(rng),
        layout=layout,
        case=rng.choice(("upper", "upper", "upper", "title", "title", "lower")),
        label_case=rng.choice(("upper", "upper", "title")),
        colon=rng.choice(("", "", ":")),
        count_form=rng.choice(("{}", "{}", "{}x", "{}X", "x{}") if layout != "at" else ("{}", "{}x")),
        numbered=layout in ("count middle", "no count") and rng.random() < 0.2,
    )


def _unit_price(rng: random.Random, money: Money) -> int:
    if money.point is None:
        return rng.randint(4, 190) * 500
    return rng.choice((rng.randint(50, 2999), rng.randint(2, 59) * 50))


def _item_lines(shop: Shop, name: str, number: str, count: str, unit: str, price: str) -> list[Line]:
    shown = f"{number} {name}" if number else name
    if shop.layout == "count left":
        return [Line((Cell(f"{count} {shown}"), Cell(price, "r", 1.0)))]
    if shop.layout == "count middle":
        return [Line((Cell(shown), Cell(count, "r", 0.66), Cell(price, "r", 1.0)))]
    if shop.layout == "no count":
        return [Line((Cell(shown), Cell(price, "r", 1.0)))]
    return [Line((Cell(shown),)), Line((Cell(f"{count} {unit}", "l", 0.06), Cell(price, "r", 1.0)))]


def _draw_item(rng: random.Random, shop: Shop) -> Item:
    name = cased(phrase(rng, FOOD, LONGEST_NAME - 5 * shop.numbered), shop.case)
    number = str(rng.randint(1000, 9999)) if shop.numbered else ""
    count = rng.choice((1, 1, 1, 1, 2, 2, 3, 4, rng.randint(5, 12))) if shop.layout != "no count" else 1
    each = _unit_price(rng, shop.money)
    money, printed = shop.money, shop.count_form.format(count)
    unit = ("@" if shop.layout == "at" else "") + dataclasses.replace(money, sign="").text(each)
    fields: dict[str, Any] = {"nm": name}
    if number:
        fields["num"] = number
    if shop.layout != "no count":
        fields["cnt"] = printed
    if shop.layout in ("two lines", "at"):  # printed after the count
        fields["unitprice"] = unit
    fields["price"] = money.text(each * count)
    lines = _item_lines(shop, name, number, printed, unit, fields["price"])
    return Item(lines, fields, count, each * count)


def _add_discount(rng: random.Random, shop: Shop, item: Item) -> None:
    step = 500 if shop.money.point is None else 5
    amount = -step * rng.randint(1, max(1, item.amount // step // 3))
    label = rng.choice(("disc", "discount", "promo", f"disc {rng.choice((5, 10, 20))}%"))
    printed = shop.money.text(amount)
    item.lines.append(Line((Cell(cased(label, shop.label_case), "l", 0.06), Cell(printed, "r", 1.0))))
    price = item.fields.pop("price")
    item.fields |= {"discountprice": printed, "price": price}
    item.amount += amount


def _add_subs(rng: random.Random, shop: Shop, item: Item, most: int) -> None:
    subs = []
    for _ in range(rng.choice((1, 1, 2)) if most > 1 else 1):
        name = cased(phrase(rng, FOOD, 12, most=2), shop.case)
        cells, sub = [Cell(f"+ {name}", "l", 0.06)], {"nm": name}
        if rng.random() < 0.5:
            amount = rng.randint(1, 8) * (500 if shop.money.point is None else 25)
            sub["price"] = shop.money.text(amount)
            cells.append(Cell(sub["price"], "r", 1.0))
            item.amount += amount
        item.lines.append(Line(tuple(cells)))
        subs.append(sub)
    item.fields["sub"] = subs[0] if len(subs) == 1 else subs


def content_class(name: str, price: str) -> int:
    """Return the class, 0 to 3, of a receipt whose first item is printed with this name and price."""
    return zlib.crc32(f"{name}/{price}".encode()) % 4


def _draw_items(rng: random.Random, split: str) -> tuple[Shop, list[Item]]:
    items = rng.choices(range(1, 9), weights=(13, 31, 26, 14, 8, 4, 2, 2))[0]
    shop = _draw_shop(rng, items)
    first = _draw_item(rng, shop)
    while content_class(first.fields["nm"], first.fields["price"]) != CONTENT_CLASSES.get(split, OTHER_CLASS):
        first = _draw_item(rng, shop)
    drawn = [first] + [_draw_item(rng, shop) for _ in range(items - 1)]
    extras = rng.random()
    lines_left = MOST_ITEM_LINES - sum(len(item.lines) for item in drawn)
    for item in drawn:
        if extras < 0.2 and lines_left > 0 and rng.random() < 0.4:
            _add_discount(rng, shop, item)
            lines_left -= 1
        elif 0.2 <= extras < 0.42 and lines_left > 0 and rng.random() < 0.5:
            _add_subs(rng, shop, item, lines_left)
            lines_left -= 2
    return shop, drawn


def _amount_line(rng: random.Random, shop: Shop, labels: tuple[str, ...], printed: str, big: bool = False) -> Line:
    label = cased(rng.choice(labels), shop.label_case)
    return Line((Cell(label + shop.colon), Cell(printed, "r", 1.0)), big=big)


def _draw_sub_total(rng: random.Random, shop: Shop, amount: int) -> tuple[list[Line], dict[str, str], int]:
    """Return the lines and fields between the items and the total, and the total."""
    if rng.random() < 0.5:
        return [], {}, amount
    lines, fields = [], {}

    def add(key: str, labels: tuple[str, ...], value: int) -> None:
        fields[key] = shop.money.text(value)
        lines.append(_amount_line(rng, shop, labels, fields[key]))

    add("subtotal_price", ("subtotal", "sub total", "sub-total", "sub ttl"), amount)
    step = 100 if shop.money.point is None else 1
    if rng.random() < 0.2:
        discount = -step * max(1, amount * rng.choice((5, 10, 15, 20)) // 100 // step)
        add("discount_price", ("discount", "total disc", "voucher", "member disc"), discount)
        amount += discount
    rate = rng.choice((5, 6, 7, 10))
    service = step * (amount * rate // 100 // step) if rng.random() < 0.25 else 0
    if service:
        add("service_price", ("service", f"service {rate}%", "svc charge", "service chg"), service)
    rate = rng.choice((5, 7, 8, 10, 11))
    tax = step * ((amount + service) * rate // 100 // step) if rng.random() < 0.5 else 0
    if tax:
        add("tax_price", ("tax", f"tax {rate}%", f"PB1 {rate}%", "PPN", f"VAT {rate}%"), tax)
    return lines, fields, amount + service + tax


def _draw_total(rng: random.Random, shop: Shop, total: int, pieces: int) -> tuple[list[Line], dict[str, str]]:
    fields = {"total_price": shop.money.text(total, total=True)}
    labels = ("total", "total", "grand total", "total due", "jumlah")
    lines = [_amount_line(rng, shop, labels, fields["total_price"], big=rng.random() < 0.3)]

    def add(key: str, labels: tuple[str, ...], value: int) -> None:
        fields[key] = shop.money.text(value, total=True)
        lines.append(_amount_line(rng, shop, labels, fields[key]))

    paid = rng.random()
    if paid < 0.42:
        note = rng.choice((5000, 10000, 50000, 100000)) // (1 if shop.money.point is None else 50)
        cash = -(-total // note) * note
        add("cashprice", ("cash", "cash", "tunai", "paid cash"), cash)
        if cash > total or rng.random() < 0.5:
            add("changeprice", ("change", "change", "kembali", "change due"), cash - total)
    elif paid < 0.58:
        add("creditcardprice", ("card", "credit card", "visa", "debit card", "mastercard"), total)
    if rng.random() < 0.15:
        fields["menuqty_cnt"] = str(pieces)
        if rng.random() < 0.4:
            label = cased(rng.choice(("items", "item(s)")), shop.label_case)
            lines.append(Line((Cell(f"{pieces} {label}"),)))
        else:
            lines.append(_amount_line(rng, shop, ("items", "total qty", "qty", "total items"), str(pieces)))
    return lines, fields


def _draw_header(rng: random.Random, shop: Shop, most: int) -> list[Line]:
    align, at = rng.choice((("c", 0.5), ("c", 0.5), ("l", 0.0)))
    name = cased(phrase(rng, SHOP, 18), rng.choice((shop.case, "upper")))
    texts = [name]
    if rng.random() < 0.6:
        street = cased(word(rng, STREETS), "title")
        house = rng.randint(1, 250)
        texts.append(rng.choice((f"Jl. {street} No. {house}", f"{house} {street} St.", street)))
    if rng.random() < 0.35:
        phone = f"{rng.randint(20, 999):03d}-{rng.randint(1000000, 9999999)}"
        texts.append(rng.choice(("Tel ", "Tel: ", "Ph. ", "")) + phone)
    lines = [Line((Cell(text, align, at),)) for text in texts]
    lines[0] = dataclasses.replace(lines[0], big=rng.random() < 0.4)
    if rng.random() < 0.65:
        date = datetime.date(rng.randint(2012, 2026), rng.randint(1, 12), rng.randint(1, 28))
        left = date.strftime(rng.choice(("%d/%m/%Y", "%Y-%m-%d", "%d.%m.%y", "%d-%m-%y")))
        time = f"{rng.randint(7, 22):02d}:{rng.randint(0, 59):02d}"
        lines.append(Line((Cell(left), Cell(time, "r", 1.0))))
    if rng.random() < 0.3:
        kind = rng.choice(("Table", "No", "Order", "Cashier", "Meja", "Ref"))
        who = cased(word(rng, SHOP), "title") if kind == "Cashier" else str(rng.randint(1, 9999))
        lines.append(Line((Cell(f"{kind}{rng.choice((':', ''))} {who}"),)))
    return lines[:most]


def _draw_footer(rng: random.Random, shop: Shop, most: int) -> list[Line]:
    lines = []
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        text = rng.choice(FOOTERS) if rng.random() < 0.5 else phrase(rng, SHOP, 20)
        lines.append(Line((Cell(cased(text, rng.choice((shop.case, "title"))), "c", 0.5),)))
    return lines[:most]


def draw_receipt(seed: int, split: str, index: int) -> Receipt:
    """Return the receipt at `index` of a split, which is the same on every machine."""
    rng = random.Random(f"im2json receipts/{seed}/{split}/{index}")
    shop, items = _draw_items(rng, split)
    lines = [line for item in items for line in item.lines]
    sub_lines, sub_fields, total = _draw_sub_total(rng, shop, sum(item.amount for item in items))
    total_lines, total_fields = _draw_total(rng, shop, total, sum(item.count for item in items))
    ruled = rng.random() < 0.35
    if ruled:
        lines[0] = dataclasses.replace(lines[0], rule=True)
        (sub_lines or total_lines)[0] = dataclasses.replace((sub_lines or total_lines)[0], rule=True)
    lines_left = MOST_LINES - len(lines) - len(sub_lines) - len(total_lines)
    header = _draw_header(rng, shop, max(0, lines_left))
    footer = _draw_footer(rng, shop, max(0, lines_left - len(header)))
    menu = [item.fields for item in items]
    target: dict[str, Any] = {"menu": menu[0] if len(menu) == 1 else menu}
    if sub_fields:
        target["sub_total"] = sub_fields
    target["total"] = total_fields
    printed = (*header, *lines, *sub_lines, *total_lines, *footer)
    return Receipt(printed, target, draw_style(rng, printed))
