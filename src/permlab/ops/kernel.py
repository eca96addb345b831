"""What the compiled CPU kernels share: how they are compiled, and a power of two that vectorises."""

import math
from typing import Any, no_type_check

import numpy as np
from numba import njit, types
from numba.extending import overload

LOG2_E = math.log2(math.e)

# Reassociation lets sums be vectorised; NaN and infinity keep their meaning.
OPTIONS: dict[str, Any] = {
    "fastmath": {"contract", "reassoc", "nsz"},
    "error_model": "numpy",
    "no_cfunc_wrapper": True,
}
# Decorates a function that only compiled ones call.
piece = njit(**OPTIONS | {"no_cpython_wrapper": True})


@no_type_check
def compile_kernel(function, signature, options=OPTIONS):
    """Compile now, or load the machine code of an earlier process where some cache directory can be written."""
    try:
        return njit(signature, cache=True, nogil=True, **options)(function)
    except (RuntimeError, OSError):
        return njit(signature, nogil=True, **options)(function)


def exp2(x):
    """2^x, in compiled code only; that of the C library does not vectorise."""
    raise NotImplementedError("exp2 can be called from compiled code only")


@no_type_check
def _make_exp2(real, integer, mantissa, degree):
    """Right to about one unit in the last place.

    x = n + r with |r| <= 1/2. Adding `magic` puts n into the low bits of the mantissa, from where
    a shift moves it into the exponent; 2^r is a Taylor polynomial. At the bounds r = 0 and the
    bits come out as exactly 0 and infinity.
    """
    coefficients = np.array([math.log(2) ** k / math.factorial(k) for k in range(degree, -1, -1)], real)
    num_coefficients = degree + 1
    magic, shift = real(1.5 * 2**mantissa), integer(mantissa)
    lowest, highest = real(np.finfo(real).minexp - 1), real(np.finfo(real).maxexp)

    def compiled(x):
        x = lowest if x < lowest else x
        x = highest if x > highest else x
        rounded = x + magic
        r = x - (rounded - magic)
        p = coefficients[0]
        for k in range(1, num_coefficients):
            p = p * r + coefficients[k]
        return integer(real(p).view(integer) + (real(rounded).view(integer) << shift)).view(real)

    return compiled


_EXP2 = {
    types.float32: _make_exp2(np.float32, np.int32, mantissa=23, degree=7),
    types.float64: _make_exp2(np.float64, np.int64, mantissa=52, degree=13),
}


# No reassociation here: it would cancel `magic`.
@overload(exp2, jit_options={"fastmath": {"contract"}})
@no_type_check
def _exp2(x):
    return _EXP2[x]
