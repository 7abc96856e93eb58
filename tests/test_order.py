"""The order of the examples: a pure function of seed and step, shared out without loss."""

from __future__ import annotations

import itertools

import pytest

from im2json.data.order import Order, Share


def epoch(order: Order, number: int) -> list[int]:
    first = number * order.steps_per_epoch
    return [i for step in range(first, first + order.steps_per_epoch) for i in order.step(step)]


@pytest.mark.parametrize(("examples", "batch"), [(10, 4), (8, 4), (3, 8), (1, 1), (17, 1)])
def test_each_epoch_is_a_permutation_in_full_steps_but_the_last(examples, batch):
    order = Order(examples, batch, seed=0)
    for number in range(4):
        assert sorted(epoch(order, number)) == list(range(examples))
    sizes = [len(order.step(step)) for step in range(order.steps_per_epoch)]
    assert sizes[:-1] == [batch] * (len(sizes) - 1)
    assert sizes[-1] == examples % batch or sizes[-1] == batch
    assert sum(sizes) == examples


def test_epochs_and_seeds_differ():
    orders = [epoch(Order(100, 8, seed), number) for seed in range(3) for number in range(3)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))


def test_a_step_depends_on_nothing_but_seed_and_step():
    forward = Order(23, 5, seed=7)
    seen = [forward.step(step) for step in range(40)]
    assert [Order(23, 5, seed=7).step(step) for step in range(40)] == seen
    backward = Order(23, 5, seed=7)
    assert [backward.step(step) for step in reversed(range(40))] == seen[::-1]


def test_the_batch_size_cuts_the_same_permutation():
    assert epoch(Order(30, 4, seed=1), 2) == epoch(Order(30, 7, seed=1), 2)


@pytest.mark.parametrize("microbatch", [1, 2, 3, 100])
@pytest.mark.parametrize("processes", [1, 2, 3, 5, 16])
def test_microbatches_partition_every_step(processes, microbatch):
    order = Order(11, 8, seed=3)
    for step in range(2 * order.steps_per_epoch):  # steps of 8 and 3 examples
        shares = [order.microbatches(step, Share(microbatch, rank, processes)) for rank in range(processes)]
        assert sorted(i for share in shares for part in share for i in part) == sorted(order.step(step))
        assert all(parts for share in shares for parts in share)
        assert all(len(part) <= microbatch for share in shares for part in share)
        sizes = [sum(map(len, share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_a_short_step_leaves_some_processes_nothing():
    order = Order(9, 8, seed=0)
    assert sorted(len(order.microbatches(1, Share(100, rank, 4))) for rank in range(4)) == [0, 0, 0, 1]


def test_epochs_in_steps():
    order = Order(10, 4, seed=0)
    assert [order.steps(epochs) for epochs in (1, 2, 0.34, 0.01, 1.5)] == [3, 6, 1, 1, 4]


def test_examples_of_like_length_share_a_microbatch():
    lengths = [50, 10, 40, 20, 60, 30, 70, 80]
    order = Order(8, 8, seed=0, lengths=lengths)
    parts = [[lengths[i] for i in part] for part in order.microbatches(0, Share(4))]
    assert parts == [[10, 20, 30, 40], [50, 60, 70, 80]]
    # and no process gets only short ones
    assert [[lengths[i] for i in part] for part in order.microbatches(0, Share(4, 1, 2))] == [[20, 40, 60, 80]]
