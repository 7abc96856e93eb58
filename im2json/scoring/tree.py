"""Exact ordered tree-edit distance between documents, with Donut's tree and costs.

The tree: a root, a node for each key, under it a leaf for each scalar and a `<subtree>` node for each
object, keys and items in the order of `im2json.scoring.normal`. The costs, in characters: to insert or
delete a leaf costs its length, an inner node 1; to turn a leaf into another costs their Levenshtein
distance, an inner node into another 0 or 1 by label, a leaf into an inner node (or back) 1 + the leaf's
length. All costs are whole numbers.

What two documents share is trimmed (`_trimmed` says why that is exact), the rest goes to
`im2json.scoring.forest`.
"""

from __future__ import annotations

from typing import Any

from rapidfuzz.distance import Levenshtein

from im2json.scoring.forest import Forest, Node, forest_distance
from im2json.scoring.normal import Normal, normal_items

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


def _distance(a: Node, b: Node) -> int:
    """The distance of two trees with the same root: what agrees is trimmed, the rest is computed."""
    assert isinstance(a, tuple)
    assert isinstance(b, tuple)
    forest_a, forest_b = _trimmed(a[1], b[1])
    while len(forest_a) == 1 == len(forest_b):
        (a,), (b,) = forest_a, forest_b
        if isinstance(a, str) or isinstance(b, str) or a[0] != b[0]:
            break
        forest_a, forest_b = _trimmed(a[1], b[1])
    if not forest_a or not forest_b:
        return sum(map(tree_weight, forest_a or forest_b))
    if len(forest_a) == 1 == len(forest_b) and isinstance(forest_a[0], str) and isinstance(forest_b[0], str):
        return Levenshtein.distance(forest_a[0], forest_b[0])
    return forest_distance(forest_a, forest_b)


def _trimmed(a: Forest, b: Forest) -> tuple[Forest, Forest]:
    """Two forests without the trees that they share at the start and at the end.

    The distance stays the same, for costs that obey the triangle inequality, as these do. Let A be a first
    tree that both forests start with, and M a cheapest mapping between A F and A G. A node f of F that M
    maps into the second A has all of the first A to its left, so M maps those nodes to the left of f's
    image, within the second A. Follow f to its image, to the same node in the first A, to the image of
    that, and so on: each step leads further left and the chain ends with a deletion, without ever reaching
    G. By the triangle inequality deleting f costs no more than the chain, and no two chains share a step.
    With the nodes of G treated alike, M without the pairs that touch an A maps F to G at no higher cost.
    The last tree is the mirror image, and roots that agree can be taken off a pair of trees by the same
    argument.
    """
    start, end_a, end_b = 0, len(a), len(b)
    shorter = min(end_a, end_b)
    while start < shorter and a[start] == b[start]:
        start += 1
    while end_a > start and end_b > start and a[end_a - 1] == b[end_b - 1]:
        end_a, end_b = end_a - 1, end_b - 1
    return a[start:end_a], b[start:end_b]
