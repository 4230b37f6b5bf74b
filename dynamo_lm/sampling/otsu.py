"""Adaptive thresholding of a joint grid: Gaussian blur and Otsu's threshold (method.md section 4, step 3; section 6.3).

In: the non-zero entries of a k^m grid. Out: which of them are foreground. It knows nothing of tokens. All arithmetic is
float64. The grid is built only when most of it would be touched anyway.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from dynamo_lm.kernels import loader

ROUNDING = 1e-9  # relative: values closer than this are equal, so that no decision hangs on the order of additions
BINS = 256
SPARSE_COST = 4  # dense entries blurred in the time of one sparse contribution (measured)


def foreground(cells: np.ndarray, values: np.ndarray, k: int, m: int, *, blur: bool) -> np.ndarray:
    """(h,) bool: which entries Otsu's threshold keeps, judged by their blurred value if `blur`, else by their own.

    cells (h,) int64, ascending, are row-major indices of the k^m grid; values (h,) float64 are above 0. All other
    entries of the grid are 0, and they count in the histogram.
    """
    if not blur:
        return above_threshold(values, zeros=k**m - cells.size)
    contributions = cells.size * 3**m
    fast = loader.sampler()
    if fast is not None and contributions < k**m:
        return _compiled(fast, cells, values, k, m)
    if contributions * SPARSE_COST < k**m:
        where, smooth = blurred_entries(cells, values, k, m)
        keep = above_threshold(smooth, zeros=k**m - where.size)
        return keep[np.searchsorted(where, cells)]
    grid = np.zeros(k**m)
    grid[cells] = values
    return above_threshold(blurred_grid(grid.reshape((k,) * m)).ravel(), zeros=0)[cells]


def _compiled(fast: Any, cells: np.ndarray, values: np.ndarray, k: int, m: int) -> np.ndarray:
    """`foreground` of few entries, blurred, by the kernels."""
    cells, values = np.ascontiguousarray(cells, np.int64), np.ascontiguousarray(values, np.float64)
    keep = np.empty(cells.size, bool)
    fast.dynamo_lm_foreground(loader.address(cells), loader.address(values), cells.size, k, m, loader.address(keep))
    return keep


def above_threshold(values: np.ndarray, zeros: int) -> np.ndarray:
    """(b,) bool: which of `values` are at or above Otsu's threshold, given `zeros` further values of 0.

    The range [lo, hi] of all values is cut into 256 equal bins, each closed at its lower edge, the last also at hi; a
    value within 1e-9 of a bin's width below an edge counts as on it. The threshold is the lower edge of the bin t that
    maximises the between-class variance w0 * w1 * (mean0 - mean1)^2 of the bin numbers below t against the rest, where
    w0 and w1 are the classes' sizes; of equal maxima (relative 1e-9) the lowest t. If hi - lo <= 1e-9 * hi, all stay.
    """
    lo, hi = 0.0 if zeros else values.min(), values.max()
    if hi - lo <= ROUNDING * hi:
        return np.ones(values.size, bool)
    bins = np.clip(np.floor((values - lo) / (hi - lo) * BINS + ROUNDING).astype(np.int64), 0, BINS - 1)
    histogram = np.bincount(bins, minlength=BINS)
    histogram[0] += zeros
    sizes = np.cumsum(histogram)
    sums = np.cumsum(histogram * np.arange(BINS))
    below, total = sizes[:-1].astype(float), sums[-1]  # entry t - 1: the class of bins below t; never empty
    above = sizes[-1] - below
    spread = below * above * (sums[:-1] / below - (total - sums[:-1]) / above) ** 2
    return bins > np.argmax(spread >= spread.max() * (1 - ROUNDING))


def blurred_grid(grid: np.ndarray) -> np.ndarray:
    """The grid (k, .., k) smoothed by the kernel (1/4, 1/2, 1/4) along every axis, with reflect-101 borders.

    Beyond the border lies the entry next to the border's, as in OpenCV's GaussianBlur with ksize 3; k = 1: unchanged.
    """
    if grid.shape[0] == 1:
        return grid
    for axis in range(grid.ndim):
        old = np.moveaxis(grid, axis, 0)
        grid = grid * 0.5
        new = np.moveaxis(grid, axis, 0)
        quarter = old * 0.25
        new[1:] += quarter[:-1]
        new[:-1] += quarter[1:]
        new[0] += quarter[1]
        new[-1] += quarter[-2]
    return grid


def blurred_entries(cells: np.ndarray, values: np.ndarray, k: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """`blurred_grid` for few entries: the cells (b,), ascending, that the blur reaches, and their values (b,).

    One axis after the other, so that what falls on the same cell is added up before it spreads again.
    """
    for axis in reversed(range(m)):
        stride = k ** (m - 1 - axis)
        at = cells // stride % k
        left, centre, right = _spread(k)
        lower, upper = np.flatnonzero(at > 0), np.flatnonzero(at < k - 1)
        targets = np.concatenate([cells.take(lower) - stride, cells, cells.take(upper) + stride])  # three ascending runs
        shares = np.concatenate(
            [
                values.take(lower) * left.take(at.take(lower)),
                values * centre,
                values.take(upper) * right.take(at.take(upper)),
            ]
        )
        order = np.argsort(targets, kind="stable")  # which merges runs
        targets = targets.take(order)
        first = np.flatnonzero(np.diff(targets, prepend=-1))
        cells, values = targets.take(first), np.add.reduceat(shares.take(order), first)
    return cells, values


@lru_cache(maxsize=16)
def _spread(k: int) -> tuple[np.ndarray, float, np.ndarray]:
    """The shares of each position's value that the blur sends to the left, (k,), keeps, and sends to the right, (k,)."""
    if k == 1:
        return np.zeros(1), 1.0, np.zeros(1)
    left, right = np.full(k, 0.25), np.full(k, 0.25)
    left[1] += 0.25  # reflected: position 0 reads its right neighbour twice,
    right[k - 2] += 0.25  # and the last its left one
    return left, 0.5, right
