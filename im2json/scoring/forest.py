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

Two things keep it small. Nodes of a come in post-order, so the distances of a node's subtree are needed only until the
keyroots around it have passed it: they are kept for a part of a's nodes at a time. And the table of a keyroot that is
too large for a batch is filled node by node with those around it, and keeps only the rows that are still needed: the
last one, and those before the subtrees that are not finished.

n nodes of a, N of them in a part, m nodes of b, B keyroots of a in a batch, S nodes of the largest of them, C columns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
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
"""Cells that the tables of a batch, or the distances of a part's subtrees, may hold."""


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
    plus a large number for every keyroot before: a row. `trees` holds the distances of subtrees less the
    weight of b's subtree, `rename` the costs of renaming less the weight of b's node, so that offsets never
    need to be added. Both hold a part of a's nodes, from node `part` on.
    """

    def __init__(self, a: _Tree, b: _Tree) -> None:
        self.a, self.b, self.columns = a, b, _columns(b)
        total = sum(a.weight) + sum(b.weight)
        apart = 2 * total + 1
        tables = int(self.columns.table[-1]) + 1
        self.dtype = np.int32 if apart * (tables + 2) < 2**31 else np.int64
        self.far = 2 * apart
        self.apart = (self.columns.table * apart).astype(self.dtype)
        self.first_a = np.array(a.first)
        self.weight_a = np.array(a.weight, dtype=self.dtype)
        self.last_of = {first: node for node, first in enumerate(a.first)}  # first node -> last subtree that it begins
        self.part = 0
        self.rename = self.trees = np.empty((0, 0), dtype=self.dtype)

    def distance(self) -> int:
        """Fill the tables, except for the row of a's root, and return the distance of the forests."""
        root = len(self.a.labels) - 1
        alone = {k for keyroots in self.a.levels[:-1] for k in keyroots if self._cells(k) > _BATCH_CELLS}
        starting = {self.a.first[keyroot]: keyroot for keyroot in alone}
        passes = [_Pass(self, root)]  # of the keyroots around the present node, the innermost last
        for part in self._parts(alone):
            self._begin(part)
            for node in part:
                if node in starting:
                    passes.append(_Pass(self, starting[node]))
                for table in reversed(passes):  # the innermost finds the distances that the others need
                    table.step(node)
                if node == passes[-1].keyroot:
                    passes.pop()
        return int(passes[0].last[0, -2]) + int(self.apart[-1]) + sum(self.b.weight[:-1])

    def _cells(self, keyroot: int) -> int:
        return (keyroot - self.a.first[keyroot] + 2) * len(self.apart)

    def _parts(self, alone: set[int]) -> Iterator[range]:
        """Divide a's nodes but the root into parts that cut through no table of a batch."""
        most, start, node = max(1, _BATCH_CELLS // (len(self.b.labels) + 1)), 0, 0
        end_of = {
            self.a.first[keyroot]: keyroot + 1
            for keyroots in self.a.levels[:-1]
            for keyroot in keyroots
            if keyroot not in alone
        }
        while node < len(self.a.labels) - 1:
            end = end_of.get(node, node + 1)
            if end - start > most and node > start:
                yield range(start, node)
                start = node
            node = end
        if node > start:
            yield range(start, node)

    def _begin(self, part: range) -> None:
        """Find the distances of the subtrees of a part, except for those that are on the spines of larger tables."""
        self.part = part.start
        self.rename = _rename_costs(self.a, self.b, part, self.dtype)
        self.trees = np.empty((len(part), len(self.b.labels) + 1), dtype=self.dtype)  # N x (m + 1)
        self.trees[:, -1] = self.far  # no node: a keyroot's first column is reached from above alone
        for keyroots in self.a.levels:
            here = keyroots[bisect_left(keyroots, part.start) : bisect_left(keyroots, part.stop)]
            small = [keyroot for keyroot in here if self._cells(keyroot) <= _BATCH_CELLS]
            by_size = sorted(small, key=lambda keyroot: self.a.first[keyroot] - keyroot)
            while by_size:
                count = max(1, _BATCH_CELLS // self._cells(by_size[0]))
                self._batch(np.array(by_size[:count]), by_size[0] - self.a.first[by_size[0]] + 1)
                by_size = by_size[count:]

    def _batch(self, keyroots: Array, size: int) -> None:
        """Fill the tables of some keyroots of a, the largest first, against all of b."""
        first = self.first_a[keyroots]  # B
        rows = np.empty((size + 1, len(keyroots), len(self.apart)), dtype=self.dtype)  # (S + 1) x B x C
        rows[0] = self.first_row()
        for step in range(1, size + 1):
            active = int(np.searchsorted(first - keyroots - 1, -step, side="right"))
            nodes = first[:active] + (step - 1)  # those of the B that have so many nodes
            spine = self.first_a[nodes] == first[:active]
            on, off = np.flatnonzero(spine), np.flatnonzero(~spine)
            if len(on):
                rows[step, on] = self.spine_rows(rows[step - 1, on], nodes[on])
            if len(off):
                before = rows[self.first_a[nodes[off]] - first[off], off]  # B x C
                rows[step, off] = self.other_rows(rows[step - 1, off], before, nodes[off])

    def first_row(self) -> Array:
        return 0 - self.apart

    def other_rows(self, above: Array, before: Array, nodes: Array, start: int = 0) -> Array:
        """Return rows, from column `start` on, whose node is not on its keyroot's spine: all distances between subtrees
        are known.

        Args:
            above: the rows of the nodes before, B x C.
            before: the rows before the nodes' subtrees, B x C.
        """
        row = before[:, self.columns.back[start:]]
        row += self.trees[nodes[:, None] - self.part, self.columns.node[start:]]
        np.minimum(row, above[:, start:] + self.weight_a[nodes][:, None], out=row)
        return np.minimum.accumulate(row, axis=1, out=row)

    def spine_rows(self, above: Array, nodes: Array) -> Array:
        """Return rows whose node is on its keyroot's spine: distances are found here, level by level."""
        starts, local = self.columns.starts, nodes[:, None] - self.part
        rows = np.empty_like(above)
        for spine, begin, end in zip(self.columns.spines, starts, [*starts[1:], len(self.apart)]):
            part = above[:, begin:end]  # B x the level's columns
            row = self.trees[local, self.columns.node[begin:end]] - self.apart[begin:end]
            inside = spine - begin
            on_spine = self.columns.node[spine]
            row[:, inside] = part[:, inside - 1] + self.rename[local, on_spine]
            np.minimum(row, part + self.weight_a[nodes][:, None], out=row)
            row = np.minimum.accumulate(row, axis=1, out=row)
            rows[:, begin:end] = row
            self.trees[local, on_spine] = row[:, inside] + self.apart[spine]
        return rows


class _Pass:
    """The table of one keyroot of a, which is filled row by row and keeps the rows that are still needed."""

    def __init__(self, tables: _Tables, keyroot: int) -> None:
        self.tables, self.keyroot, self.first = tables, keyroot, tables.a.first[keyroot]
        self.last = tables.first_row()[None]  # 1 x C
        self.before: dict[int, Array] = {}  # first node of a subtree that is not finished -> the row before it
        root = len(tables.a.labels) - 1
        spine = (node for node in range(root) if tables.a.first[node] == self.first)
        self.last_on_spine = max(spine, default=-1) if keyroot == root else keyroot

    def step(self, node: int) -> None:
        """Add the row of the next node."""
        tables, first, nodes = self.tables, self.tables.a.first[node], np.array([node])
        if first == node:
            self.before[node] = self.last
        if first == self.first:
            self.last = tables.spine_rows(self.last, nodes)
        elif node < self.last_on_spine:
            self.last = tables.other_rows(self.last, self.before[first], nodes)
        else:  # from the first tree of a's forest on, no distance of subtrees is left to be found: b's root is all
            start, above = tables.columns.starts[-1], self.last
            self.last = np.empty_like(above)
            self.last[:, start:] = tables.other_rows(above, self.before[first], nodes, start)
        if tables.last_of[first] == node:
            del self.before[first]


def _rename_costs(a: _Tree, b: _Tree, part: range, dtype: Any) -> Array:
    """Return what turning a node of a part of a into one of b costs, less the weight of the latter: N x m."""
    here = slice(part.start, part.stop)
    labels, leaf_a, weight_a = a.labels[here], np.array(a.leaf[here]), np.array(a.weight[here], dtype=dtype)
    leaf_b, weight_b = np.array(b.leaf), np.array(b.weight, dtype=dtype)
    numbers: dict[str, int] = {}
    label_a, label_b = (np.array([numbers.setdefault(x, len(numbers)) for x in each]) for each in (labels, b.labels))
    costs = (label_a[:, None] != label_b).astype(dtype)  # N x m
    costs[leaf_a] = 1 + weight_a[leaf_a, None]
    costs[:, leaf_b] = 1 + weight_b[leaf_b]
    leaves_a, leaves_b = np.flatnonzero(leaf_a), np.flatnonzero(leaf_b)
    texts_a, texts_b = [labels[i] for i in leaves_a], [b.labels[j] for j in leaves_b]
    if texts_a and texts_b:
        costs[np.ix_(leaves_a, leaves_b)] = cdist(texts_a, texts_b, scorer=Levenshtein.distance, dtype=np.int32)
    costs -= weight_b
    return costs
