"""The order of samples: every one once per pass, views side by side, windows of shards, whatever the split over ranks."""

import numpy as np
import pytest

from fastmae.data.order import Order, batch_positions


@pytest.mark.parametrize(("n", "positions"), [(5, np.arange(23)), (1, np.arange(4)), (1000, np.arange(990, 2010))])
def test_order_is_a_permutation_of_each_epoch(n, positions):
    ids, epochs = Order(n, 0).at(positions)
    assert (epochs == positions // n).all()
    for epoch in np.unique(epochs):
        assert len(np.unique(ids[epochs == epoch])) == (epochs == epoch).sum()


def test_passes_and_seeds_differ():
    one, two = (Order(100, 0).at(np.arange(100 * p, 100 * (p + 1)))[0].tolist() for p in (0, 1))
    assert one != two and one != Order(100, 1).at(np.arange(100))[0].tolist()


def test_any_place_can_be_asked_for_in_any_order():
    whole = Order(37, 0).at(np.arange(200))
    again = Order(37, 0)
    for place in (199, 3, 77, 0, 38):
        ids, epochs = again.at(np.array([place]))
        assert (ids[0], epochs[0]) == (whole[0][place], whole[1][place])


def test_a_large_pass_is_shuffled_ahead_with_the_same_result(monkeypatch):
    plain = Order(37, 0).at(np.arange(200))
    monkeypatch.setattr("fastmae.data.order._LARGE", 1)
    order = Order(37, 0)
    for first in range(0, 200, 8):
        ids, epochs = order.at(np.arange(first, first + 8))
        assert np.array_equal(ids, plain[0][first : first + 8]) and np.array_equal(epochs, plain[1][first : first + 8])
        assert list(order._ahead) == [int(epochs[-1]) + 1]


def test_views_stand_side_by_side_and_each_is_an_epoch_of_its_own():
    ids, epochs = Order(7, 0, views=3).at(np.arange(42))
    plain, _ = Order(7, 0).at(np.arange(14))
    assert ids.tolist() == np.repeat(plain, 3).tolist()
    assert epochs.tolist() == [0, 1, 2] * 7 + [3, 4, 5] * 7
    assert len(set(zip(ids.tolist(), epochs.tolist(), strict=True))) == 42  # no crop and no mask is drawn twice


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_a_window_mixes_the_samples_of_a_few_shards_at_a_time(window):
    shard_of = np.repeat(np.arange(7), [5, 4, 6, 5, 1, 9, 3])
    order = Order(33, 0, window=window, shard_of=shard_of)
    for number in range(2):
        ids, _ = order.at(np.arange(33) + 33 * number)
        assert sorted(ids) == list(range(33))
        groups, left = [], ids.tolist()
        while left:  # each group holds all samples of its shards, and of no others
            size, shards = 0, set()
            while size == 0 or size != sum((shard_of == s).sum() for s in shards):
                shards.add(shard_of[left[size]])
                size += 1
            groups.append(shards)
            left = left[size:]
        assert all(len(g) <= window for g in groups) and sum(len(g) for g in groups) == 7
    assert not np.array_equal(order.at(np.arange(33))[0], ids)


def test_ranks_and_micro_batches_tile_the_positions():
    tiles = [batch_positions(m, 4, r, 3, start=100) for m in range(2) for r in range(3)]
    assert np.concatenate(tiles).tolist() == list(range(100, 124))
