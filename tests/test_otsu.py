"""Blur and Otsu's threshold on grids small enough to do by hand."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynamo_lm.kernels import loader
from dynamo_lm.sampling import otsu
from dynamo_lm.sampling.otsu import above_threshold, blurred_entries, blurred_grid, foreground


@pytest.mark.parametrize(
    ("line", "smooth"),
    [
        (
            [1, 0, 0, 0],
            [0.5, 0.25, 0, 0],
        ),  # position 0 reads 1/4 from position 1 twice: beyond the border lies 1, not 0
        ([0, 1, 0, 0], [0.5, 0.5, 0.25, 0]),
        ([0, 1, 0], [0.5, 0.5, 0.5]),
        ([1, 0], [0.5, 0.5]),
        ([3], [3]),
    ],
)
def test_the_kernel_is_a_quarter_a_half_a_quarter_and_borders_reflect_without_repeating(line, smooth) -> None:
    assert blurred_grid(np.array(line, float)).tolist() == smooth
    where, values = blurred_entries(np.flatnonzero(line), np.array(line, float)[np.flatnonzero(line)], len(line), 1)
    assert where.tolist() == np.flatnonzero(smooth).tolist()
    assert values.tolist() == [value for value in smooth if value]


def test_axes_are_blurred_one_after_the_other() -> None:
    grid = np.zeros((4, 4))
    grid[0, 1] = 16
    assert blurred_grid(grid).tolist() == [[4, 4, 2, 0], [2, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_otsu_parts_two_clusters_and_counts_the_zeros() -> None:
    # 0 0 1 1 | 9 10
    assert above_threshold(np.array([1.0, 9, 1, 10]), zeros=2).tolist() == [False, True, False, True]
    # without zeros the range is 9 .. 10: the upper value alone
    assert above_threshold(np.array([9.0, 10]), zeros=0).tolist() == [False, True]


def test_a_value_on_the_threshold_survives() -> None:
    # bins 0, 128, 255: 1 * 2 * 191.5^2 = 73,344 for thresholds to 128, 2 * 1 * 191^2 = 72,962 beyond
    assert above_threshold(np.array([256.0, 128]), zeros=1).tolist() == [True, True]
    # bins 0, 128, 255, 255: 1 * 3 * 212.7^2 = 135,681 for thresholds to 128, 2 * 2 * 191^2 = 145,924 beyond
    assert above_threshold(np.array([256.0, 256, 128]), zeros=1).tolist() == [True, True, False]


def test_of_a_constant_grid_everything_survives() -> None:
    assert above_threshold(np.full(4, 0.25), zeros=0).all()
    assert foreground(np.arange(4), np.array([0.1, 0.2, 0.3, 0.4]), 2, 2, blur=True).all()  # k = 2 blurs to one value


grids = st.integers(1, 6).flatmap(
    lambda k: st.integers(1, 3).flatmap(
        lambda m: st.tuples(
            st.just(k),
            st.just(m),
            st.dictionaries(st.integers(0, k**m - 1), st.floats(0.01, 1), min_size=1, max_size=12),
        )
    )
)


@given(grids)
def test_blurring_few_entries_is_blurring_the_grid(drawn) -> None:
    k, m, entries = drawn
    grid = np.zeros(k**m)
    grid[list(entries)] = list(entries.values())
    dense = blurred_grid(grid.reshape((k,) * m)).ravel()
    cells = np.sort(np.array(list(entries)))
    where, values = blurred_entries(cells, grid[cells], k, m)
    sparse = np.zeros(k**m)
    sparse[where] = values
    np.testing.assert_allclose(sparse, dense, rtol=1e-12)
    assert dense.max() <= grid.max() * (1 + 1e-12)


@given(st.lists(st.floats(0.01, 1) | st.sampled_from([0.25, 0.5, 1.0]), min_size=1, max_size=12), st.integers(0, 30))
def test_the_threshold_is_the_reference_threshold(values, zeros) -> None:
    threshold = reference.otsu_threshold(values + [0.0] * zeros)
    assert above_threshold(np.array(values), zeros).tolist() == [value >= threshold for value in values]


@pytest.fixture(scope="module")
def compiled() -> Any:
    if not loader.available():
        pytest.skip("needs a C++ compiler")
    return loader.sampler()


def assert_foreground_is_numpys(compiled: Any, cells: np.ndarray, values: np.ndarray, k: int, m: int) -> None:
    with patch.object(otsu, "SPARSE_COST", 0), patch.object(loader, "_sampler", None):  # 0: never the dense grid
        expected = foreground(cells, values, k, m, blur=True)
    assert otsu._compiled(compiled, cells, values, k, m).tolist() == expected.tolist()


VALUES = (
    st.floats(0.01, 1)
    | st.sampled_from([0.25, 0.5, 1.0, np.nextafter(0.5, 1), 1 / 3, 0.1 + 0.2, 0.3])  # equal, some up to rounding only
    | st.integers(1, 80).map(lambda power: 2.0**-power)  # most of a joint is tiny
)
wide_grids = st.tuples(st.integers(1, 8), st.sampled_from([1, 2, 3, 4, 5, 7, 50])).flatmap(
    lambda shape: st.tuples(
        st.just(shape[1]),
        st.just(shape[0]),
        st.dictionaries(  # near each other, or anywhere
            st.integers(0, min(shape[1] ** shape[0], 60) - 1) | st.integers(0, shape[1] ** shape[0] - 1),
            VALUES,
            min_size=1,
            max_size=40,
        ),
    ).filter(lambda drawn: len(drawn[2]) * 3 ** drawn[1] < 100_000)
)


@settings(max_examples=200, deadline=None)
@given(wide_grids)
@example((2, 2, {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}))  # which blurs to one value
@example((1, 8, {0: 0.3}))
@example((3, 1, {0: 0.5, 2: 0.5}))
@example((50, 2, {49: 1.0, 50: 1.0, 2450: 0.5, 2499: 2**-10}))  # neighbours by index that are none on the grid
def test_the_compiled_foreground_is_numpys(compiled: Any, drawn) -> None:
    k, m, entries = drawn
    cells = np.sort(np.array(list(entries)))
    values = np.array([entries[cell] for cell in cells.tolist()])
    assert_foreground_is_numpys(compiled, cells, values, k, m)


def test_the_compiled_foreground_of_a_whole_joint_is_numpys(compiled: Any) -> None:
    rng = np.random.default_rng(0)
    for k, m, count, spread in [(50, 4, 2000, 12), (50, 4, 2000, 0.01), (50, 3, 900, 6), (50, 2, 60, 3), (5, 8, 50, 3)]:
        cells = np.unique(rng.integers(0, k**m, count))
        values = np.exp(rng.normal(0, spread, cells.size))
        assert_foreground_is_numpys(compiled, cells, values, k, m)


def test_few_entries_go_to_the_kernels_where_these_were_built(compiled: Any) -> None:
    with patch.object(loader, "_sampler", compiled), patch.object(otsu, "blurred_entries", side_effect=AssertionError):
        assert foreground(np.array([0, 1]), np.array([0.5, 2**-20]), 50, 4, blur=True).tolist() == [True, True]
