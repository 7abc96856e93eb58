"""The lines of pre-training's pages: receipts, free lines, and tables whose rows mix the kinds of a receipt anew."""

from __future__ import annotations

import dataclasses
import datetime
import random
import string
from dataclasses import dataclass

from im2json.data.receipts import draw_receipt
from im2json.data.receipts.layout import Cell, Line, Style, draw_style
from im2json.data.receipts.words import FOOD, SHOP, cased, phrase, random_word
from im2json.pretrain.looks import LABELS
from im2json.pretrain.tokenizer import CHARACTERS

SPLIT = "pretrain"  # of the receipts: its content is disjoint from train, validation and test by construction
INDENT = 0.06  # of the width
MOST_TABLE_LINES = 16
CASES = ("upper", "title", "lower")


def _free_word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return cased(random_word(rng), rng.choice(CASES))
    if kind < 0.45:
        return "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(1, 6)))
    if kind < 0.55:
        return cased(phrase(rng, FOOD + SHOP, 12, most=1), rng.choice(CASES))
    if kind < 0.85:
        return _free_number(rng)
    if kind < 0.97:
        return "".join(rng.choices(string.punctuation, k=rng.randint(1, 3)))
    return "".join(rng.choices(CHARACTERS[-16:], k=rng.randint(1, 3)))


def _free_number(rng: random.Random) -> str:
    value = rng.randint(0, 10 ** rng.randint(1, 7))
    form = rng.choice(
        ("{:d}", "{:,d}", "{:,d}", "dots", "cents", "comma", "-{:,d}", "x{:d}", "{:d}x", "@{:,d}", "Rp{:,d}")
    )
    if form == "dots":
        return f"{value:,}".replace(",", ".")
    if form in ("cents", "comma"):
        return f"{value // 100}{'.' if form == 'cents' else ','}{value % 100:02d}"
    return form.format(value)


def _free_line(rng: random.Random) -> Line:
    cells, room = [], rng.randint(6, 30)
    places = rng.choice((("l",), ("l",), ("c",), ("r",), ("l", "r"), ("l", "r"), ("l", "r"), ("l", "m", "r")))
    for place in places:
        text = _free_word(rng)
        while rng.random() < 0.5 and len(text) < room // len(places) - 3:
            text += " " + _free_word(rng)
        text = text[: room // len(places)].strip() or "-"
        align, at = {
            "l": ("l", rng.choice((0.0, 0.0, INDENT))),
            "c": ("c", 0.5),
            "r": ("r", 1.0),
            "m": ("r", 0.66),
        }[place]
        cells.append(Cell(text, align, at))
    return Line(tuple(cells), rule=rng.random() < 0.05, big=rng.random() < 0.05)


def free_lines(rng: random.Random, most: int) -> list[Line]:
    """Lines of random words, numbers and signs."""
    return [_free_line(rng) for _ in range(rng.randint(1, min(most, 18)))]


@dataclass(frozen=True)
class Print:
    """How amounts, counts, words and labels look over one table."""

    money: str
    sign: str
    count: str
    case: str
    label_case: str
    colon: str

    def amount(self, rng: random.Random) -> str:
        """A random amount of 3 to 6 digits."""
        value = rng.randint(1, 10 ** rng.choice((2, 3, 3))) * (500 if self.money in ("comma", "dot", "plain") else 5)
        if self.money == "plain":
            return f"{value}"
        if self.money in ("comma", "dot"):
            return f"{value:,}".replace(",", "," if self.money == "comma" else ".")
        return f"{value // 100}{'.' if self.money == 'cents' else ','}{value % 100:02d}"

    def words(self, rng: random.Random, longest: int) -> str:
        return cased(phrase(rng, FOOD, longest), self.case)


def _draw_print(rng: random.Random) -> Print:
    return Print(
        money=rng.choice(("comma", "comma", "dot", "dot", "plain", "cents", "decimal comma")),
        sign=rng.choice(("", "", "", "Rp", "Rp ", "$")),
        count=rng.choice(("{}", "{}x", "{}X", "x{}")),
        case=rng.choice(CASES),
        label_case=rng.choice(("upper", "upper", "title")),
        colon=rng.choice(("", "", ":")),
    )


def _row_lines(rng: random.Random, look: Print, layout: str) -> list[Line]:
    words, count = look.words(rng, 10), look.count.format(rng.choice((1, 1, 2, 3, rng.randint(4, 30))))
    code, rate = str(rng.randint(1000, 9999)), look.amount(rng)
    amount = Cell(look.sign + look.amount(rng), "r", 1.0)
    middle = Cell(count, "r", rng.choice((0.6, 0.66)))
    if layout == "two lines":
        below = Cell(f"{count} {rng.choice(('', '@'))}{rate}", "l", INDENT)
        return [Line((Cell(words),)), Line((below, amount))]
    cells = {
        "plain": (Cell(words), amount),
        "count words": (Cell(f"{count} {words}"), amount),
        "words count": (Cell(words), middle, amount),
        "words, count": (Cell(f"{words} x{rng.randint(1, 20)}"), amount),
        "code": (Cell(f"{code} {words}"), amount),
        "code count": (Cell(f"{code} {words[:8].strip()}"), middle, amount),
        "rate": (Cell(words[:7].strip()), Cell(f"@{rate}", "r", 0.66), amount),
        "negative": (Cell(words), Cell("-" + look.amount(rng), "r", 1.0)),
    }[layout]
    return [Line(cells)]


ROW_LAYOUTS = ("plain", "count words", "words count", "words, count", "code", "code count", "rate", "two lines",
               "two lines", "negative")  # fmt: skip


def _lines_below(rng: random.Random, look: Print) -> list[Line]:
    """A line or two that belong to the row above."""
    if rng.random() < 0.35:
        label = cased(rng.choice(("disc", "discount", "promo", f"disc {rng.randint(1, 50)}%")), look.label_case)
        return [Line((Cell(label, "l", INDENT), Cell(f"-{look.amount(rng)}", "r", 1.0)))]
    lines = []
    for _ in range(rng.choice((1, 1, 2))):
        cells = [Cell(f"+ {look.words(rng, 11)}", "l", INDENT)]
        if rng.random() < 0.5:
            cells.append(Cell(look.amount(rng), "r", 1.0))
        lines.append(Line(tuple(cells)))
    return lines


def _label_line(rng: random.Random, look: Print, meaning: str) -> Line:
    label = rng.choice(LABELS[meaning])
    if meaning in ("state", "served", "less") and rng.random() < 0.3:
        label += f" {rng.randint(1, 25)}%"
    value = f"{rng.randint(1, 40)}" if meaning == "pieces" else look.sign + look.amount(rng)
    if meaning == "less" and rng.random() < 0.8:
        value = "-" + value
    return Line((Cell(cased(label, look.label_case) + look.colon), Cell(value, "r", 1.0)), big=rng.random() < 0.1)


def _other_line(rng: random.Random, look: Print) -> Line:
    kind = rng.random()
    if kind < 0.25:
        day = datetime.date(rng.randint(2005, 2030), rng.randint(1, 12), rng.randint(1, 28))
        date = day.strftime(rng.choice(("%d/%m/%Y", "%Y-%m-%d", "%d.%m.%y", "%d-%m-%y")))
        return Line((Cell(date), Cell(f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}", "r", 1.0)))
    if kind < 0.4:
        text = f"{rng.choice(('', 'Tel ', 'Ph. '))}{rng.randint(20, 999):03d}-{rng.randint(1000000, 9999999)}"
    elif kind < 0.6:
        text = f"{cased(random_word(rng), look.case)} {rng.randint(1, 9999)}"
    else:
        text = cased(phrase(rng, SHOP, 18), look.case)
    return Line((Cell(text, *rng.choice((("c", 0.5), ("l", 0.0)))),))


def table_lines(rng: random.Random, most: int) -> list[Line]:
    """Other lines, rows of one or of several layouts with lines below some, labels in any order, other lines."""
    look = _draw_print(rng)
    lines = [_other_line(rng, look) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    layout = rng.choice(ROW_LAYOUTS)
    mixed, more = rng.random() < 0.5, rng.random() < 0.4
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 5))):
        lines += _row_lines(rng, look, rng.choice(ROW_LAYOUTS) if mixed else layout)
        if more and rng.random() < 0.5:
            lines += _lines_below(rng, look)
    lines += [_label_line(rng, look, meaning) for meaning in rng.sample(list(LABELS), rng.choice((0, 1, 2, 3, 4, 5)))]
    lines += [_other_line(rng, look) for _ in range(rng.choice((0, 0, 1, 2)))]
    return lines[: min(most, MOST_TABLE_LINES)]


def draw_lines(
    rng: random.Random, seed: int, index: int, most: int, free: float, tables: float
) -> tuple[tuple[Line, ...], Style]:
    """Lines of a page and a style in which they fit; `free` and `tables` are the shares of pages without a receipt."""
    kind = rng.random()
    if kind >= free + tables:
        receipt = draw_receipt(seed, SPLIT, index)
        if len(receipt.lines) <= most:
            return receipt.lines, receipt.style
        start = rng.randint(0, len(receipt.lines) - most)
        return receipt.lines[start : start + most], receipt.style
    while True:
        lines = tuple((free_lines if kind < free else table_lines)(rng, most))
        try:
            return lines, draw_style(rng, lines)
        except ValueError:
            continue


def harden(rng: random.Random, style: Style) -> Style:
    """The style with low contrast, blur, noise and a turn all at once."""
    return dataclasses.replace(
        style,
        ink=max(style.ink, style.paper - rng.randint(90, 130)),
        blur=rng.uniform(0.3, 0.8),
        noise=rng.uniform(5, 14),
        angle=rng.uniform(-2.5, 2.5),
    )
