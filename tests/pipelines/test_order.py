"""Order and keys: permutations, uniform draws, and dependence on their arguments only."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.order import epoch_order, uniforms, view_keys

SEEDS = st.integers(-(2**63) + 1, 2**63 - 1)  # the values that --seed accepts
EPOCHS = st.integers(0, 10**6)


def test_order_is_a_function_of_seed_and_epoch():
    assert not np.array_equal(epoch_order(100, 1, 2), epoch_order(100, 1, 3))
    assert not np.array_equal(epoch_order(100, 1, 2), epoch_order(100, 2, 2))
    assert not np.array_equal(epoch_order(100, 1, 2), epoch_order(100, 2, 1))


def test_order_does_not_change_between_versions():
    """A resumed run needs the same order: these values are part of the format."""
    assert epoch_order(10, 0, 0).tolist() == [3, 1, 9, 6, 2, 4, 7, 8, 0, 5]
    key = view_keys(np.array([17]), seed=1, epoch=2, view=1)
    assert key.tolist() == [12364756681435146658]


def test_every_position_is_equally_likely():
    first = [epoch_order(8, seed, 0)[0] for seed in range(8000)]
    counts = np.bincount(first, minlength=8)
    assert ((counts - 1000) ** 2 / 1000).sum() < 29.9  # chi-squared, 7 degrees, p = 1e-4


def test_keys_differ_by_sample_epoch_view_and_seed():
    samples = np.arange(500)
    combinations = itertools.product((0, 1), repeat=3)
    keys = [
        view_keys(samples, seed=seed, epoch=epoch, view=view) for seed, epoch, view in combinations
    ]
    assert len(np.unique(np.concatenate(keys))) == 8 * 500


def test_draws_are_uniform_and_streams_independent():
    keys = view_keys(np.arange(20_000), seed=0, epoch=0, view=0)
    draws = np.concatenate([uniforms(keys, 1, 4), uniforms(keys, 2, 4)], axis=1)
    assert draws.min() >= 0 and draws.max() < 1
    ordered = np.sort(draws, axis=0)
    deviation = np.abs(ordered - (np.arange(20_000)[:, None] + 0.5) / 20_000).max(axis=0)
    assert (deviation < 2.2 / np.sqrt(20_000)).all()  # Kolmogorov-Smirnov, p < 1e-3 each
    correlation = np.corrcoef(draws.T) - np.eye(8)
    assert np.abs(correlation).max() < 0.035  # five standard errors


@given(num_samples=st.integers(0, 3000), seed=SEEDS, epoch=EPOCHS)
def test_any_order_is_a_permutation(num_samples, seed, epoch):
    order = epoch_order(num_samples, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@given(
    samples=st.lists(st.integers(0, 2**62), min_size=1, max_size=40, unique=True),
    seed=SEEDS,
    epoch=EPOCHS,
    data=st.data(),
)
def test_keys_depend_on_the_sample_only_and_do_not_collide(samples, seed, epoch, data):
    keys = [view_keys(np.array(samples), seed=seed, epoch=epoch, view=view) for view in (0, 1)]
    assert len(np.unique(np.concatenate(keys))) == 2 * len(samples)
    permutation = data.draw(st.permutations(range(len(samples))))
    shuffled = view_keys(np.array(samples)[permutation], seed=seed, epoch=epoch, view=1)
    assert np.array_equal(shuffled, keys[1][permutation])


@given(
    keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20),
    stream=st.integers(0, 1000),
    count=st.integers(0, 30),
)
def test_draws_lie_in_the_unit_interval_and_more_draws_keep_the_first(keys, stream, count):
    keys = np.array(keys, np.uint64)
    draws = uniforms(keys, stream, count)
    assert draws.shape == (len(keys), count)
    assert ((draws >= 0) & (draws < 1)).all()
    assert np.array_equal(uniforms(keys, stream, count + 5)[:, :count], draws)
