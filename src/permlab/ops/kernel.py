"""What the compiled CPU kernels share: how they are compiled, a barrier, and a power of two that vectorises."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
from numba import int64, njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, overload

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

LOG2_E = math.log2(math.e)

# Reassociation lets sums be vectorised; NaN and infinity keep their meaning.
OPTIONS: dict[str, Any] = {
    "fastmath": {"contract", "reassoc", "nsz"},
    "error_model": "numpy",
    "no_cfunc_wrapper": True,
}
# Decorates a function that only compiled ones call.
piece = njit(**OPTIONS | {"no_cpython_wrapper": True})


class _Cache(FunctionCache):
    """Numba's cache of machine code, which by itself looks at the file of the kernel only, not at this one."""

    def _index_key(self, *arguments: Any) -> tuple[Any, ...]:
        return (*super()._index_key(*arguments), _THIS_FILE)


_THIS_FILE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@contextmanager
def _one_at_a_time(cache: Any) -> Iterator[None]:
    """Ranks and jobs that start together: one compiles, the others wait for its machine code."""
    if fcntl is None or not hasattr(cache, "_impl"):  # nowhere to keep anything
        yield
        return
    folder = Path(cache._cache_path)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{cache._impl.filename_base}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@no_type_check
def compile_kernel(function, signature, options=OPTIONS):
    """Compile now, or load the machine code of an earlier process where some cache directory can be written."""
    kernel = njit(nogil=True, **options)(function)
    with suppress(RuntimeError, OSError):
        kernel._cache = _Cache(function)
    try:
        with _one_at_a_time(kernel._cache):
            kernel.compile(signature)
    except OSError:  # of a cache that cannot be written after all
        kernel = njit(nogil=True, **options)(function)
        kernel.compile(signature)
    kernel.disable_compile()
    return kernel


# Teams of threads

_LOOKS = 2**19  # at a counter before the core is left to others: several times as long as the pause really takes
_PAUSE = 20  # microseconds that it is left to them; giving way without a pause leaves it to nobody for long
_PATIENCE = 2**10  # pauses after which a thread counts as missing: some tenths of a second
_GIVEN_UP = -(2**62)
_sleep = types.ExternalFunction("usleep", types.int32(types.uint32))


@intrinsic
@no_type_check
def _arrive(context, counter):
    """Add one to the number at an address, and return what it was."""

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
        counter: address of two int64 that start at zero, of no use to a team of one: the number of arrivals,
            negative after a failure, and that of the pauses made by those who waited.
        team: number of threads.
    """
    if team == 1:
        return True
    _arrive(counter)
    while True:
        here = 0
        for _ in range(_PATIENCE):
            for _ in range(_LOOKS):
                here = _look(counter)
                if here < 0:
                    return False
                if here >= team:
                    return True
            _sleep(_PAUSE)
        if _exchange(counter, here, _GIVEN_UP) == here:
            return False


@piece
@no_type_check
def meet(counter, team):
    """Wait until all threads of a gathered team are here; then each sees what the others have written."""
    if team == 1:
        return
    target = (_arrive(counter) // team + 1) * team
    looks = 0
    while _look(counter) < target:
        looks += 1
        if looks % _LOOKS == 0:
            _arrive(counter + 8)
            _sleep(_PAUSE)


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
