"""Tree-edit distance: im2json's beside zss with nltk's edit_distance, which is what Donut's evaluator runs.

    pip install zss nltk
    python benchmarks/tree_edit.py

Both run on the same pairs of receipts, one process, and have to agree on every pair. A prediction is the
target with a fifth of its values misread and, in a third of the pairs, a row missing, doubled or renamed.
Prints milliseconds a pair, their ratio, and what larger jobs cost without an oracle.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Callable
from typing import Any

from im2json.scoring.tree import ROOT, document_tree, tree_edit_accuracy, tree_edit_distance

Document = dict[str, Any]
WORDS = ["nasi", "goreng", "ayam", "es", "teh", "manis", "kopi", "susu", "bakso", "special", "ice", "lemon"]


def receipt(rng: random.Random, items: int) -> Document:
    """A receipt of CORD's shape."""

    def price() -> str:
        return f"{rng.randrange(1, 200)},{rng.randrange(10) * 100:03d}"

    def row(sub: bool = True) -> Document:
        made: Document = {"nm": " ".join(rng.sample(WORDS, rng.randrange(1, 4))).upper(), "price": price()}
        if rng.random() < 0.8:
            made["cnt"] = str(rng.randrange(1, 9))
        if rng.random() < 0.3:
            made["unitprice"] = price()
        if sub and rng.random() < 0.15:
            made["sub"] = row(False)
        return made

    return {
        "menu": [row() for _ in range(items)],
        "sub_total": {"subtotal_price": price(), "tax_price": price(), "service_price": price()},
        "total": {"total_price": price(), "cashprice": price(), "changeprice": price(), "menuqty_cnt": "4"},
    }


def misread(rng: random.Random, document: Any) -> Any:
    """A copy with a fifth of the values changed in a character."""
    if isinstance(document, dict):
        return {key: misread(rng, value) for key, value in document.items()}
    if isinstance(document, list):
        return [misread(rng, value) for value in document]
    place = rng.randrange(len(document))
    return document[:place] + rng.choice("0158OI") + document[place + 1 :] if rng.random() < 0.2 else document


def prediction(rng: random.Random, target: Document) -> Document:
    predicted: Document = misread(rng, target)
    rows, kind = predicted["menu"], rng.random()
    if kind < 0.11 and len(rows) > 1:
        del rows[rng.randrange(len(rows))]
    elif kind < 0.22:
        rows.insert(rng.randrange(len(rows)), dict(rng.choice(rows)))
    elif kind < 0.33:
        row = rng.choice(rows)
        row["name"] = row.pop("nm")
    return predicted


def oracle(edit_distance: Callable[[str, str], int]) -> Callable[[Document, Document], float]:
    """zss over the same trees, with the costs in Python as Donut has them."""
    import zss

    def convert(node: Any) -> Any:
        if isinstance(node, str):
            return zss.Node((True, node))
        converted = zss.Node((False, node[0]))
        for child in node[1]:
            converted.addkid(convert(child))
        return converted

    def weight(node: Any) -> int:
        leaf, text = node.label
        return len(text) if leaf else 1

    def rename(a: Any, b: Any) -> int:
        (leaf_a, text_a), (leaf_b, text_b) = a.label, b.label
        if leaf_a and leaf_b:
            return edit_distance(text_a, text_b)
        if leaf_a or leaf_b:
            return 1 + len(text_a if leaf_a else text_b)
        return int(text_a != text_b)

    def distance(a: Document, b: Document) -> float:
        trees = convert(document_tree(a)), convert(document_tree(b))
        return float(zss.distance(*trees, zss.Node.get_children, weight, weight, rename))

    return distance


def seconds(function: Callable[[Document, Document], float], pairs: list[Any]) -> tuple[float, list[float]]:
    start = time.perf_counter()
    values = [function(*pair) for pair in pairs]
    return time.perf_counter() - start, values


def make_pairs(rng: random.Random, items: list[int]) -> list[tuple[Document, Document]]:
    targets = [receipt(rng, count) for count in items]
    return [(prediction(rng, target), target) for target in targets]


def beside_the_oracle(rng: random.Random) -> None:
    from nltk.metrics.distance import edit_distance

    slow = oracle(edit_distance)
    print(f"{'items':>5} {'pairs':>5} {'zss + nltk ms':>14} {'im2json ms':>11} {'ratio':>7}")
    for items, count in ((1, 20), (3, 20), (10, 8), (30, 2)):
        pairs = make_pairs(rng, [items] * count)
        theirs, wanted = seconds(slow, pairs)
        ours, got = min((seconds(tree_edit_distance, pairs) for _ in range(5)), key=lambda timed: timed[0])
        assert got == wanted, "the two disagree"
        figures = f"{theirs / count * 1e3:14.1f} {ours / count * 1e3:11.3f} {theirs / ours:7.0f}"
        print(f"{items:5d} {count:5d} {figures}")


def alone(rng: random.Random) -> None:
    pairs = make_pairs(rng, [rng.choice([1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 8]) for _ in range(100)])
    print(f"100 CORD-like documents: {seconds(tree_edit_accuracy, pairs)[0]:.3f} s")
    unrelated = [(pairs[i - 1][1], pair[1]) for i, pair in enumerate(pairs)]
    print(f"100 against another document each: {seconds(tree_edit_accuracy, unrelated)[0]:.3f} s")
    target = receipt(rng, 500)
    print(f"500 items against a near copy: {seconds(tree_edit_distance, [near_copy(target)])[0]:.2f} s")
    print(f"500 items, a fifth misread: {seconds(tree_edit_distance, make_pairs(rng, [500]))[0]:.2f} s")
    for rows in (1_000, 2_000):
        said, target = (
            {"menu": [{"nm": f"item {i}", "cnt": "1", "price": f"{i},{j}00"} for i in range(rows)]} for j in (0, 5)
        )
        spent = seconds(tree_edit_distance, [(said, target)])[0]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{rows:,} rows with every amount wrong: {spent:.1f} s, the process at most {peak:.0f} MiB")
    runaway = {"menu": [{"nm": f"item {i}", "price": str(i)} for i in range(5000)]}
    spent = seconds(tree_edit_accuracy, [(runaway, receipt(rng, 3))])[0]
    print(f"a prediction of 5,000 rows against 3 ({ROOT} and all): {spent * 1e3:.1f} ms")


def near_copy(target: Document) -> tuple[Document, Document]:
    """The target with its first, middle and last row changed."""
    rows = [dict(row) for row in target["menu"]]
    rows[0]["nm"], rows[len(rows) // 2]["price"] = "OTHER", "0"
    return {**target, "menu": [*rows[:-1], {"nm": "LAST"}]}, target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-oracle", action="store_true", help="leave the slow side out")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    if not options.no_oracle:
        beside_the_oracle(rng)
    alone(rng)


if __name__ == "__main__":
    main()
