"""Zhang and Shasha's tree-edit distance with rows as vector operations.

K. Zhang and D. Shasha, "Simple fast algorithms for the editing distance between trees and related
problems", SIAM J. Comput. 18(6), 1989. Nodes are numbered in post-order. A keyroot is a node with a left
sibling, or the root; its spine is the path from it down to its first leaf. For every pair of keyroots (i,
j) a table holds the distances between the forests that are the first nodes of i's subtree and the first
nodes of j's. A cell needs the cells above, to the left and at the start of its nodes' subtrees, and the
distance of those two subtrees, which a pair of keyroots deeper down has found before.

Three things make it fast. A row of the tables for one i and all j is one vector: a column stands for a
keyroot j and a node of its subtree, or none. The step to the left, the only one within a row, is a running
minimum once the weight of the columns passed is taken off, and a large number less for every j keeps it
from running over into the next. And keyroots i whose subtrees hold no keyroots that are still to come go
side by side, as a batch.

n nodes of a, m nodes of b, B keyroots of a in a batch, S nodes of the largest of them, C columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

Node = str | tuple[str, tuple[Any, ...]]
"""A leaf (its text) or an inner node (label, children)."""

Forest = tuple[Node, ...]

Array = NDArray[Any]

_BATCH_CELLS = 1 << 22
"""Cells that the tables of a batch may hold; what keeps memory bounded where documents are huge."""


class _Tree(NamedTuple):
    """A forest's nodes in post-order, under a root that comes last."""

    labels: list[str]
    leaf: list[bool]
    weight: list[int]  # what inserting or deleting the node alone costs
    first: list[int]  # the first node of its subtree
    levels: list[list[int]]  # keyroots by how many levels of them their subtrees hold; the root comes last


class _Columns(NamedTuple):
    """The columns of all keyroots' tables, level after level; a keyroot's first column stands for no node."""

    node: Array  # C, the number of nodes for a keyroot's first column
    back: Array  # C, the column just before its node's subtree
    table: Array  # C, number of the keyroot
    spines: list[Array]  # by level: the columns whose node is on the spine
    starts: list[int]  # by level: its first column


def forest_distance(a: Forest, b: Forest) -> int:
    """The least cost of turning forest `a` into forest `b`, with the costs of `im2json.scoring.tree`."""
    tree_a, tree_b = _post_order(a), _post_order(b)
    if len(tree_a.labels) > len(tree_b.labels):  # the costs are symmetric, and fewer rows are fewer calls
        tree_a, tree_b = tree_b, tree_a
    return _Tables(tree_a, tree_b).distance()


def _post_order(forest: Forest) -> _Tree:
    tree = _Tree([], [], [], [], [])

    def visit(node: Node) -> int:
        """Appends a subtree, and returns the levels of keyroots within it."""
        first = len(tree.labels)
        if isinstance(node, str):
            tree.labels.append(node)
            tree.leaf.append(True)
            tree.weight.append(len(node))
            tree.first.append(first)
            return 0
        levels = 0
        for position, child in enumerate(node[1]):
            below = visit(child)
            if position:
                below = keyroot(below)
            levels = max(levels, below)
        tree.labels.append(node[0])
        tree.leaf.append(False)
        tree.weight.append(1)
        tree.first.append(first)
        return levels

    def keyroot(below: int) -> int:
        if below == len(tree.levels):
            tree.levels.append([])
        tree.levels[below].append(len(tree.labels) - 1)
        return below + 1

    keyroot(visit(("", forest)))
    return tree


def _columns(tree: _Tree) -> _Columns:
    node: list[int] = []
    back: list[int] = []
    table: list[int] = []
    spine: list[int] = []
    spines: list[Array] = []
    starts: list[int] = []
    number = 0
    for keyroots in tree.levels:
        spine = []
        starts.append(len(node))
        for keyroot in keyroots:
            start, first = len(node), tree.first[keyroot]
            node.append(len(tree.labels))
            node.extend(range(first, keyroot + 1))
            firsts = tree.first[first : keyroot + 1]
            back.append(start)
            back.extend([start - first + before for before in firsts])
            spine.extend([start + 1 + column for column, before in enumerate(firsts) if before == first])
            table.extend([number] * (keyroot - first + 2))
            number += 1
        spines.append(np.array(spine))
    return _Columns(np.array(node), np.array(back), np.array(table), spines, starts)


class _Tables:
    """The state of one comparison.

    Cells are kept less their column's offset, which is the weight of the keyroot's nodes up to the column
    plus a large number for every keyroot before: `rows`. `trees` holds the subtrees' distances less the
    weight of b's subtree, `rename` the costs of renaming less the weight of b's node, so that offsets never
    need to be added.
    """

    def __init__(self, a: _Tree, b: _Tree) -> None:
        self.a, self.b, self.columns = a, b, _columns(b)
        total = sum(a.weight) + sum(b.weight)
        apart = 2 * total + 1
        tables = int(self.columns.table[-1]) + 1
        self.dtype = np.int32 if apart * (tables + 2) < 2**31 else np.int64
        self.apart = (self.columns.table * apart).astype(self.dtype)
        self.first_a = np.array(a.first)
        self.weight_a = np.array(a.weight, dtype=self.dtype)
        self.rename = _rename_costs(a, b, self.dtype)
        self.trees = np.empty((len(a.labels), len(b.labels) + 1), dtype=self.dtype)
        self.trees[:, -1] = 2 * apart  # no node: a keyroot's first column is reached from above alone

    def distance(self) -> int:
        for keyroots in self.a.levels[:-1]:
            by_size = sorted(keyroots, key=lambda keyroot: self.a.first[keyroot] - keyroot)
            while by_size:
                size = by_size[0] - self.a.first[by_size[0]] + 1
                count = max(1, _BATCH_CELLS // ((size + 1) * len(self.apart)))
                self._batch(np.array(by_size[:count]), size)
                by_size = by_size[count:]
        return self._forests()

    def _batch(self, keyroots: Array, size: int) -> None:
        """Fills the tables of some keyroots of a, the largest first, against all of b."""
        first = self.first_a[keyroots]  # B
        rows = self._new_rows(size, len(keyroots))
        for step in range(1, size + 1):
            active = int(np.searchsorted(first - keyroots - 1, -step, side="right"))
            nodes = first[:active] + (step - 1)  # those of the B that have so many nodes
            spine = self.first_a[nodes] == first[:active]
            if spine.all():
                self._spine_rows(rows, step, slice(0, active), nodes)
            elif not spine.any():
                self._other_rows(rows, step, slice(0, active), nodes, first[:active])
            else:
                on, off = np.flatnonzero(spine), np.flatnonzero(~spine)
                self._spine_rows(rows, step, on, nodes[on])
                self._other_rows(rows, step, off, nodes[off], first[off])

    def _forests(self) -> int:
        """Fills the tables of a's root, save the row of the root itself, and returns the distance of the
        forests.

        From the first tree of the forest on, no subtree's distance is left to be found: b's root is all
        that matters.
        """
        size = len(self.a.labels) - 1
        rows = self._new_rows(size, 1)
        everything = slice(0, 1)
        last_on_spine = max((node for node in range(size) if self.a.first[node] == 0), default=-1)
        for node in range(size):
            if self.a.first[node] == 0:
                self._spine_rows(rows, node + 1, everything, np.array([node]))
            else:
                start = self.columns.starts[-1] if node > last_on_spine else 0
                self._other_rows(rows, node + 1, everything, np.array([node]), np.array([0]), start)
        return int(rows[size, 0, -2]) + int(self.apart[-1]) + sum(self.b.weight[:-1])

    def _new_rows(self, size: int, batch: int) -> Array:
        rows = np.empty((size + 1, batch, len(self.apart)), dtype=self.dtype)  # S + 1, B, C
        rows[0] = 0 - self.apart
        return rows

    def _other_rows(self, rows: Array, step: int, batch: Any, nodes: Array, first: Array, start: int = 0) -> None:
        """Rows whose node is not on its keyroot's spine: all distances between subtrees are known."""
        members = np.arange(rows.shape[1])[batch]
        before = rows[self.first_a[nodes] - first, members]  # B, C
        row = before[:, self.columns.back[start:]]
        row += self.trees[nodes[:, None], self.columns.node[start:]]
        np.minimum(row, rows[step - 1, batch, start:] + self.weight_a[nodes][:, None], out=row)
        rows[step, batch, start:] = np.minimum.accumulate(row, axis=1)

    def _spine_rows(self, rows: Array, step: int, batch: Any, nodes: Array) -> None:
        """Rows whose node is on its keyroot's spine: distances are found here, level by level."""
        starts = self.columns.starts
        for spine, begin, end in zip(self.columns.spines, starts, [*starts[1:], len(self.apart)]):
            above = rows[step - 1, batch, begin:end]  # B, the level's columns
            columns = self.columns.node[begin:end]
            row = self.trees[nodes[:, None], columns] - self.apart[begin:end]
            inside = spine - begin
            on_spine = self.columns.node[spine]
            row[:, inside] = above[:, inside - 1] + self.rename[nodes[:, None], on_spine]
            np.minimum(row, above + self.weight_a[nodes][:, None], out=row)
            row = np.minimum.accumulate(row, axis=1)
            rows[step, batch, begin:end] = row
            self.trees[nodes[:, None], on_spine] = row[:, inside] + self.apart[spine]


def _rename_costs(a: _Tree, b: _Tree, dtype: Any) -> Array:
    """What turning a node of a into one of b costs, less the weight of the latter: n x m."""
    leaf_a, leaf_b = np.array(a.leaf), np.array(b.leaf)
    weight_a, weight_b = np.array(a.weight, dtype=dtype), np.array(b.weight, dtype=dtype)
    numbers: dict[str, int] = {}
    label_a, label_b = (np.array([numbers.setdefault(x, len(numbers)) for x in t.labels]) for t in (a, b))
    costs = (label_a[:, None] != label_b).astype(dtype)  # n x m
    costs[leaf_a] = 1 + weight_a[leaf_a, None]
    costs[:, leaf_b] = 1 + weight_b[leaf_b]
    leaves_a, leaves_b = np.flatnonzero(leaf_a), np.flatnonzero(leaf_b)
    texts_a, texts_b = [a.labels[i] for i in leaves_a], [b.labels[j] for j in leaves_b]
    if texts_a and texts_b:
        costs[np.ix_(leaves_a, leaves_b)] = cdist(texts_a, texts_b, scorer=Levenshtein.distance, dtype=np.int32)
    costs -= weight_b
    return costs
