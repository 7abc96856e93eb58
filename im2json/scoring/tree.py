"""Exact ordered tree-edit distance between documents, with Donut's tree and costs.

The tree: a root, a node for each key, under it a leaf for each scalar and a `<subtree>` node for each
object, keys and items in the order of `im2json.scoring.normal`. The costs, in characters: to insert or
delete a leaf costs its length, an inner node 1; to turn a leaf into another costs their Levenshtein
distance, an inner node into another 0 or 1 by label, a leaf into an inner node (or back) 1 + the leaf's
length. All costs are whole numbers.

The algorithm is that of Zhang and Shasha, "Simple fast algorithms for the editing distance between trees and
related problems", SIAM J. Comput. 18(6), 1989.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from im2json.scoring.normal import Normal, normal_items

Node = str | tuple[str, tuple[Any, ...]]
"""A leaf (its text) or an inner node (label, children)."""

ROOT, ROW = "<root>", "<subtree>"


def tree_edit_distance(a: Any, b: Any) -> float:
    """The least cost, in characters and inner nodes, of turning document `a` into document `b`.

    A document is any JSON value; one that is not a list or an object is a list of itself. Raises ValueError
    where it is no JSON value or nests too deep.
    """
    return float(_distance(document_tree(a), document_tree(b)))


def tree_edit_accuracy(prediction: Any, target: Any) -> float:
    """Donut's nTED accuracy: max(0, 1 - distance(prediction, target) / distance({}, target)), within [0, 1].

    Where the target is empty Donut divides by zero; here {} against {} is 1.0 and anything else against {}
    is 0.0. Raises ValueError as `tree_edit_distance` does.
    """
    predicted, wanted = document_tree(prediction), document_tree(target)
    size = tree_weight(wanted) - 1  # the root of {} stays
    if predicted == wanted:
        return 1.0
    if tree_weight(predicted) - 1 >= 2 * size:  # the difference of the sizes alone reaches the target's size
        return 0.0
    return max(0.0, 1.0 - _distance(predicted, wanted) / size)


def document_tree(document: Any) -> Node:
    """Donut's tree of a document. An object's keys hang from the root; a list's objects are rows under it."""
    items = normal_items(document)
    if isinstance(document, dict):
        return ROOT, _keys(items[0]) if items else ()
    return ROOT, _children(items)


def _keys(row: Normal) -> tuple[Node, ...]:
    return tuple((key, _children(items)) for key, items in row.items())


def _children(items: list[Any]) -> tuple[Node, ...]:
    return tuple(item if isinstance(item, str) else (ROW, _keys(item)) for item in items)


def tree_weight(node: Node) -> int:
    """What inserting the whole tree costs."""
    return len(node) if isinstance(node, str) else 1 + sum(map(tree_weight, node[1]))


class _PostOrder(NamedTuple):
    """A tree's nodes in post-order, numbered from 1: entry 0 of each list is unused."""

    labels: list[str]
    leaf: list[bool]
    weight: list[int]  # what inserting or deleting the node alone costs
    first: list[int]  # the node's leftmost descendant
    keyroots: list[int]  # nodes with a left sibling, and the root


def _post_order(root: Node) -> _PostOrder:
    tree = _PostOrder([""], [False], [0], [0], [])

    def visit(node: Node) -> int:
        first = len(tree.labels)
        if isinstance(node, tuple):
            for position, child in enumerate(node[1]):
                number = visit(child)
                if position:
                    tree.keyroots.append(number)
        is_leaf = isinstance(node, str)
        tree.labels.append(node if isinstance(node, str) else node[0])
        tree.leaf.append(is_leaf)
        tree.weight.append(len(node) if is_leaf else 1)
        tree.first.append(first)
        return len(tree.labels) - 1

    tree.keyroots.append(visit(root))
    tree.keyroots.sort()
    return tree


def _distance(a: Node, b: Node) -> int:
    if a == b:
        return 0
    tree_a, tree_b = _post_order(a), _post_order(b)
    rename = _rename_costs(tree_a, tree_b)
    distances = [[0] * len(tree_b.labels) for _ in tree_a.labels]
    for i in tree_a.keyroots:
        for j in tree_b.keyroots:
            _fill(tree_a, tree_b, i, j, rename, distances)
    return distances[-1][-1]


def _rename_costs(a: _PostOrder, b: _PostOrder) -> list[list[int]]:
    weight_a, weight_b = np.array(a.weight)[:, None], np.array(b.weight)[None, :]
    leaf_a, leaf_b = np.array(a.leaf)[:, None], np.array(b.leaf)[None, :]
    labels: dict[str, int] = {}
    label_a, label_b = (np.array([labels.setdefault(x, len(labels)) for x in t.labels]) for t in (a, b))
    costs = np.where(leaf_a != leaf_b, 1 + np.where(leaf_a, weight_a, weight_b), label_a[:, None] != label_b)
    leaves_a, leaves_b = np.flatnonzero(leaf_a), np.flatnonzero(leaf_b)
    if len(leaves_a) and len(leaves_b):
        texts_a, texts_b = [a.labels[i] for i in leaves_a], [b.labels[j] for j in leaves_b]
        costs[np.ix_(leaves_a, leaves_b)] = cdist(
            texts_a, texts_b, scorer=Levenshtein.distance, dtype=np.int64
        )
    rows: list[list[int]] = costs.tolist()
    return rows


def _fill(
    a: _PostOrder, b: _PostOrder, i: int, j: int, rename: list[list[int]], distances: list[list[int]]
) -> None:
    """Distances between the trees on the leftmost paths of i and j, by way of their prefixes' forests."""
    first_i, first_j = a.first[i], b.first[j]
    columns = range(first_j, j + 1)
    row = [0]
    for y in columns:
        row.append(row[-1] + b.weight[y])
    forest = [row]  # forest[x - first_i + 1][y - first_j + 1]: nodes first_i..x against nodes first_j..y
    for x in range(first_i, i + 1):
        above, delete, spine = forest[-1], a.weight[x], a.first[x] == first_i
        before_x = forest[a.first[x] - first_i]
        row = [above[0] + delete]
        for column, y in enumerate(columns, start=1):
            cost = min(above[column] + delete, row[-1] + b.weight[y])
            if spine and b.first[y] == first_j:
                cost = min(cost, above[column - 1] + rename[x][y])
                distances[x][y] = cost
            else:
                cost = min(cost, before_x[b.first[y] - first_j] + distances[x][y])
            row.append(cost)
        forest.append(row)
