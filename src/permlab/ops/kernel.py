"""What the compiled CPU kernels share: how they are compiled, a barrier, and a power of two that vectorises."""

import math
from typing import Any, no_type_check

import numpy as np
from numba import int64, njit, types
from numba.extending import intrinsic, overload

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


# Teams of threads

_PATIENCE = 2**24  # looks at a counter: some hundredths of a second
_GIVEN_UP = -(2**62)


@intrinsic
@no_type_check
def _arrive(context, counter):
    """Add one to the counter, and return what it was."""

    def code(_, builder, __, arguments):
        pointer = builder.inttoptr(arguments[0], arguments[0].type.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[0].type(1), "seq_cst")

    return int64(int64), code


@intrinsic
@no_type_check
def _look(context, counter):
    def code(_, builder, __, arguments):
        pointer = builder.inttoptr(arguments[0], arguments[0].type.as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return int64(int64), code


@intrinsic
@no_type_check
def _exchange(context, counter, old, new):
    """Put `new` into the counter if it holds `old`; return what it held."""

    def code(_, builder, __, arguments):
        pointer = builder.inttoptr(arguments[0], arguments[0].type.as_pointer())
        pair = builder.cmpxchg(pointer, arguments[1], arguments[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 0)

    return int64(int64, int64, int64), code


@piece
@no_type_check
def gather_team(counter, team):
    """Wait until all threads of a team are running; False, for all of them, if one does not come.

    Before this an exception that a signal raises may keep a thread away; after it nothing can.

    Args:
        counter: address of an int64 that starts at zero, negative after a failure; of no use to a team of one.
        team: number of threads.
    """
    if team == 1:
        return True
    _arrive(counter)
    looks = 0
    while True:
        here = _look(counter)
        if here < 0:
            return False
        if here >= team:
            return True
        looks += 1
        if looks > _PATIENCE:
            _exchange(counter, here, _GIVEN_UP)


@piece
@no_type_check
def meet(counter, team):
    """Wait until all threads of a gathered team are here; then each sees what the others have written."""
    if team == 1:
        return
    target = (_arrive(counter) // team + 1) * team
    while _look(counter) < target:
        pass


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
