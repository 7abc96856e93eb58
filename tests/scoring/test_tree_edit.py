import random
import tracemalloc

import pytest
from helpers import calls_of, slow
from oracles import edited, oracle_distance, random_object, random_pair, random_receipt

from im2json.scoring import forest, tree
from im2json.scoring.forest import forest_distance
from im2json.scoring.tree import _trimmed, document_tree, tree_edit_accuracy, tree_edit_distance


@pytest.mark.parametrize("seed", [0, 1, *slow(*range(2, 20))])
def test_equals_the_oracle_on_random_pairs(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        prediction, target = random_pair(rng)
        wanted = oracle_distance(prediction, target)
        assert abs(tree_edit_distance(prediction, target) - wanted) < 1e-9, (prediction, target)
        size = oracle_distance({}, target)
        accuracy = max(0.0, 1 - wanted / size) if size else float(wanted == 0)
        assert abs(tree_edit_accuracy(prediction, target) - accuracy) < 1e-9, (prediction, target)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ({}, {}, 0),
        ({}, {"a": ""}, 0),
        ({"a": "tea"}, {"a": "tea"}, 0),
        ({"a": "tea"}, {"a": [{"b": "tea"}]}, 2),  # a row and a key come between
        ({"a": "tea"}, {"a": "team"}, 1),
        ({"a": "tea"}, {"b": "tea"}, 1),
        ({"a": "tea"}, {}, 4),  # the key and three characters
        ({}, {"a": {"b": "tea"}}, 6),  # a, its row, b and three characters
        ({"a": {"b": "tea"}}, {"a": [{"b": "tea"}]}, 0),
        ({"b": "1", "a": "2"}, {"a": "2", "b": "1"}, 0),
        ({"a": ["x", "y"]}, {"a": ["y", "x"]}, 2),
        ({"a": 0}, {"a": "0"}, 0),
        ({"a": False}, {"a": "false"}, 0),
        ({"a": None}, {}, 0),
        ({"a": [1, {"b": 2}]}, {"a": [1]}, 3),
        ({"a": [["x"], ["y"]]}, {"a": ["x", "y"]}, 0),
        ({"a": " "}, {}, 1),  # a key with an empty leaf, as in Donut
        ({"a": "<leaf>"}, {"a": "<leaf"}, 1),
        ([{"a": "x"}], {"a": "x"}, 1),
        ({"日": "抹茶"}, {"日": "抹茶ラテ"}, 2),
    ],
)
def test_by_hand(a: object, b: object, distance: int) -> None:
    assert tree_edit_distance(a, b) == distance
    assert tree_edit_distance(b, a) == distance


def test_accuracy_by_hand() -> None:
    assert tree_edit_accuracy({"a": "tex"}, {"a": "tea"}) == 1 - 1 / 4
    assert tree_edit_accuracy({}, {"a": "tea"}) == 0.0
    assert tree_edit_accuracy({"q": "zzzzzzzz"}, {"a": "tea"}) == 0.0


def test_accuracy_where_donut_divides_by_zero() -> None:
    assert tree_edit_accuracy({}, {}) == 1.0
    assert tree_edit_accuracy({"a": []}, {"b": None}) == 1.0
    assert tree_edit_accuracy({"a": "x"}, {}) == 0.0
    assert tree_edit_accuracy({"a": " "}, {}) == 0.0


@pytest.mark.parametrize("cells", [300, *slow(1, 1 << 22)])
def test_trimming_and_batches_change_nothing(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest, "_BATCH_CELLS", cells)
    rng = random.Random(cells)
    trimmed_away = 0
    for _ in range(300):
        prediction, target = random_pair(rng)
        a, b = document_tree(prediction)[1], document_tree(target)[1]
        whole = forest_distance(a, b)
        assert whole == tree_edit_distance(prediction, target)
        less_a, less_b = _trimmed(a, b)
        assert forest_distance(less_a, less_b) == whole
        trimmed_away += len(a) - len(less_a)
    assert trimmed_away > 100


@pytest.mark.parametrize("cells", [1, 40, 200, 1_000])
def test_documents_that_are_taken_part_by_part_have_the_same_distance(
    cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(cells)
    for _ in range(15):
        prediction, target = random_pair(rng)
        a, b = document_tree(prediction)[1], document_tree(target)[1]
        with monkeypatch.context() as patch:
            patch.setattr(forest, "_BATCH_CELLS", cells)
            found = forest_distance(a, b)
        assert found == forest_distance(a, b) == oracle_distance(prediction, target), (prediction, target)


@pytest.mark.parametrize("before", [{}, {"a": "1"}])
def test_memory_does_not_grow_with_the_product_of_the_sizes(
    before: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forest, "_BATCH_CELLS", 1 << 16)

    def rows(cents: str) -> dict[str, object]:
        return {**before, "menu": [{"nm": f"item {i}", "price": f"{i}.{cents}"} for i in range(200)]}

    nodes = 1 + 5 * 200
    tracemalloc.start()
    try:
        assert tree_edit_distance(rows("00"), rows("50")) == 200
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * nodes * nodes  # bytes; a single table of all pairs of nodes has twice as many


def test_equal_ends_of_a_forest_add_nothing() -> None:
    rng = random.Random(13)
    for _ in range(300):
        a, b, start, end = (document_tree(random_object(rng, 2))[1] for _ in range(4))
        assert forest_distance(start + a + end, start + b + end) == forest_distance(a, b)
        copies = rng.randrange(4)  # the same tree many times over, so that which copy is trimmed is a choice
        assert forest_distance(start * copies + a, start * copies + b) == forest_distance(a, b)


def test_weights_beyond_32_bits() -> None:
    long = "x" * 3_000_000
    a = {"menu": [{"nm": long + str(i), "price": str(i)} for i in range(12)]}
    b = {"menu": [{"nm": "tea", "price": str(i)} for i in range(12)], "total": "1"}
    distance = sum(len(row["nm"]) for row in a["menu"]) + 1 + 1
    assert tree_edit_distance(a, b) == tree_edit_distance(b, a) == distance


def test_a_long_document_against_a_near_copy() -> None:
    rng = random.Random(17)
    target = random_receipt(rng, 60)
    rows = list(target["menu"])
    rows[0], rows[30], rows[59] = ({**rows[i], "nm": "changed"} for i in (0, 30, 59))
    distance = sum(tree_edit_distance(rows[i], target["menu"][i]) for i in (0, 30, 59))
    assert tree_edit_distance({**target, "menu": rows}, target) == distance
    del rows[45]
    size = tree_edit_distance({}, {"a": target["menu"][45]}) - 1
    assert tree_edit_distance({**target, "menu": rows}, target) == distance + size
    shuffled = edited(target, rng, 0.2)
    assert tree_edit_distance(shuffled, target) == tree_edit_distance(target, shuffled)


def test_symmetry_identity_and_triangle() -> None:
    rng = random.Random(7)
    for _ in range(100):
        a, b, c = (random_object(rng, 3) for _ in range(3))
        assert tree_edit_distance(a, a) == 0
        assert tree_edit_distance(a, b) == tree_edit_distance(b, a)
        assert tree_edit_distance(a, c) <= tree_edit_distance(a, b) + tree_edit_distance(b, c)


def test_what_is_not_a_document_is_refused() -> None:
    deep: dict[str, object] = {}
    for _ in range(200):
        deep = {"a": deep}
    for bad in (deep, {"a": object()}, {1: "x"}, {"a": {1, 2}}):
        with pytest.raises(ValueError, match=r"document"):
            tree_edit_distance(bad, {})


def test_a_runaway_prediction_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    target = random_receipt(random.Random(0), 3)
    runaway = {"menu": [{"nm": f"item {i}", "price": str(i)} for i in range(5000)]}
    assert tree_edit_accuracy(runaway, target) == 0.0
    # each of its 20,000 nodes is looked at a few times, and none is compared with the target's
    assert calls_of(tree_edit_accuracy, runaway, target) < 20 * 20_000
    monkeypatch.setattr(tree, "forest_distance", None)
    assert tree_edit_accuracy(runaway, target) == 0.0
