"""The kernel's elementary functions against extended precision."""

import numpy as np
import pytest
from numba import njit

from permlab.ops.kernel import exp2
from permlab.ops.selective_scan_kernel import sigmoid, softplus


@njit
def apply(x, powers, gates, steps):
    for i in range(x.size):
        powers[i], gates[i], steps[i] = exp2(x[i]), sigmoid(x[i]), softplus(x[i])


def functions(x: np.ndarray) -> list[np.ndarray]:
    results = [np.empty_like(x) for _ in range(3)]
    apply(x, *results)
    return results


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_elementary_functions_are_accurate(dtype: type) -> None:
    x = np.concatenate([np.linspace(-80, 80, 50_001), np.linspace(-1, 1, 50_001)]).astype(dtype)
    exact = x.astype(np.longdouble)
    expected = [np.exp2(exact), 1 / (1 + np.exp(-exact)), np.maximum(exact, 0) + np.log1p(np.exp(-np.abs(exact)))]
    # e^x is taken as 2^(x log2 e), whose rounded argument costs accuracy in proportion to |x|.
    allowed = [1, 2 + np.abs(exact), 2 + np.abs(exact)]
    for found, wanted, ulps in zip(functions(x), expected, allowed, strict=True):
        assert (np.abs(found - wanted) <= 1.01 * ulps * np.finfo(dtype).eps * np.abs(wanted)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_elementary_functions_at_the_ends(dtype: type) -> None:
    powers, gates, steps = functions(np.array([-np.inf, -1e4, 0, 1e4, np.inf, np.nan], dtype))
    np.testing.assert_array_equal(powers, np.array([0, 0, 1, np.inf, np.inf, np.nan], dtype))
    np.testing.assert_array_equal(gates, np.array([0, 0, 0.5, 1, 1, np.nan], dtype))
    np.testing.assert_allclose(steps, np.array([0, 0, np.log(2), 1e4, np.inf, np.nan], dtype), rtol=1e-7)
