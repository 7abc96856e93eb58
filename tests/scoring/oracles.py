"""Slow references for the scores, and random documents to compare on."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import zss

WORDS = [
    "",
    " ",
    "cake",
    "cakes",
    "1,000",
    "10.00",
    "12.50",
    "Crème brûlée",
    "抹茶ラテ",
    "x",
    "  tea ",
    "👍🏽",
    "ﷺ",
]
KEYS = ["menu", "nm", "cnt", "price", "sub", "total", "total_price", "税", "a.b"]


def random_scalar(rng: random.Random) -> Any:
    return rng.choice([rng.choice(WORDS), rng.choice(WORDS), 0, 1, 2.5, -3, True, False, None])


def random_value(rng: random.Random, depth: int) -> Any:
    kind = rng.random()
    if depth == 0 or kind < 0.4:
        return random_scalar(rng)
    if kind < 0.65:
        return random_object(rng, depth - 1)
    if kind < 0.85:
        return [random_object(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind < 0.95:
        return [random_scalar(rng) for _ in range(rng.randrange(4))]
    return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]


def random_object(rng: random.Random, depth: int) -> dict[str, Any]:
    return {key: random_value(rng, depth) for key in rng.sample(KEYS, rng.randrange(4))}


def random_row(rng: random.Random) -> dict[str, Any]:
    row: dict[str, Any] = {
        "nm": rng.choice(WORDS[2:]),
        "price": f"{rng.randrange(1, 99)},{rng.randrange(1000):03d}",
    }
    if rng.random() < 0.5:
        row["cnt"] = rng.choice(["1", "2 x", 3])
    if rng.random() < 0.3:
        row["sub"] = [random_row(rng) for _ in range(rng.randrange(1, 3))]
    return row


def random_receipt(rng: random.Random, items: int) -> dict[str, Any]:
    rows = [random_row(rng) for _ in range(items)]
    return {
        "menu": rows[0] if len(rows) == 1 else rows,
        "sub_total": {"subtotal_price": f"{rng.randrange(99)},000", "tax_price": f"{rng.randrange(9)},500"},
        "total": {
            "total_price": f"{rng.randrange(99)},000",
            "cashprice": rng.choice(["50,000", ["50,000", "7"]]),
        },
    }


def edited(document: Any, rng: random.Random, rate: float) -> Any:
    """The document with values misread, keys renamed, wrapped or moved a level up, rows missing, doubled or
    swapped."""
    if isinstance(document, dict):
        out: dict[str, Any] = {}
        for key, value in document.items():
            change = rng.random() / rate
            if change < 0.15:
                continue
            if change < 0.25 and isinstance(value, dict):
                out |= value
                continue
            name = rng.choice(KEYS) if change < 0.4 else key
            out[name] = {key: value} if 0.4 < change < 0.5 else edited(value, rng, rate)
        return out
    if isinstance(document, list):
        rows = [edited(row, rng, rate) for row in document if rng.random() / rate > 0.15]
        rows = [copy for row in rows for copy in ([row, row] if rng.random() / rate < 0.1 else [row])]
        if rng.random() / rate < 0.1:
            rng.shuffle(rows)
        return rows
    if isinstance(document, str) and rng.random() < rate:
        place = rng.randrange(len(document) + 1)
        return document[:place] + rng.choice("x0, é") + document[place + rng.randrange(2) :]
    return document


def random_pair(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """A prediction and a target, of any shape or receipts, unrelated or one an edited copy of the other.

    Small enough for the oracles: the product of their numbers of leaves is at most 150.
    """
    while True:
        prediction, target = _any_pair(rng)
        if len(pairs(normal(prediction), "")) * len(pairs(normal(target), "")) <= 150:
            return prediction, target


def _any_pair(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    receipt = rng.random() < 0.4
    target = random_receipt(rng, rng.randrange(1, 5)) if receipt else random_object(rng, 3)
    kind = rng.random()
    if kind < 0.1:
        return random_object(rng, 3), target
    if kind < 0.2 and receipt:
        return random_receipt(rng, rng.randrange(1, 4)), target
    return edited(target, rng, rng.choice([0.1, 0.3, 1.0])), target


def normal(value: Any) -> list[Any]:
    """Donut's normal form with the stated policy, written for clarity alone: a list of str and dict."""
    if value is None or value == "" or value == [] or value == {}:
        return []
    if isinstance(value, bool):
        return ["true" if value else "false"]
    if isinstance(value, int | float | str):
        return [str(value).strip()]
    if isinstance(value, dict):
        pairs = [(key, normal(inner)) for key, inner in value.items()]
        pairs = sorted((pair for pair in pairs if pair[1]), key=lambda pair: (len(pair[0]), pair[0]))
        return [dict(pairs)] if pairs else []
    flat: list[Any] = []
    for element in value:
        flat += normal(element)
    return [element for element in flat if element != ""]


def donut_counts(prediction: Any, target: Any) -> tuple[int, int]:
    """(true positives, false positives + false negatives) as cal_f1 counts them."""
    predicted, wanted = pairs(normal(prediction), ""), pairs(normal(target), "")
    hits = 0
    misses = 0
    for pair in predicted:
        if pair in wanted:
            hits += 1
            wanted.remove(pair)
        else:
            misses += 1
    return hits, misses + len(wanted)


def pairs(items: list[Any], path: str) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for item in items:
        if isinstance(item, dict):
            for key, inner in item.items():
                out += pairs(inner, key if path == "" else path + "." + key)
        else:
            out.append((path, item))
    return out


@cache
def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def oracle_tree(items: list[Any], node: zss.Node, top: bool) -> zss.Node:
    for item in items:
        if isinstance(item, dict):
            home = node if top else zss.Node(("inner", "<subtree>"))
            for key, inner in item.items():
                home.addkid(oracle_tree(inner, zss.Node(("inner", key)), top=False))
            if not top:
                node.addkid(home)
        else:
            node.addkid(zss.Node(("leaf", item)))
    return node


def oracle_distance(a: Any, b: Any, edit_distance: Any = levenshtein) -> int:
    """Zhang and Shasha's distance by zss."""

    def size(node: zss.Node) -> int:
        kind, text = node.label
        return len(text) if kind == "leaf" else 1

    def rename(x: zss.Node, y: zss.Node) -> int:
        (kind_x, text_x), (kind_y, text_y) = x.label, y.label
        if kind_x == kind_y:
            return edit_distance(text_x, text_y) if kind_x == "leaf" else int(text_x != text_y)
        return 1 + len(text_x if kind_x == "leaf" else text_y)

    trees = [oracle_tree(normal(x), zss.Node(("inner", "<root>")), isinstance(x, dict)) for x in (a, b)]
    return int(zss.distance(*trees, zss.Node.get_children, size, size, rename))
