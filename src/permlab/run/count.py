"""What a computation costs, whatever carries it out: operations, and bytes that are alive at once."""

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from permlab.ops.cost import listening

# What no counter here sees, in words.
NOT_COUNTED = "elementwise operations, norms, sorting, assignment, optimiser, data"


@dataclass
class Count:
    """Costs of a computation.

    Args:
        flops: floating-point operations by kind, a product and its sum counted as two.
        num_operations: calls of torch's operators, each a kernel's launch on a GPU.
        peak_bytes: of all that it made, the most that was alive at one time.
        left_bytes: of that, alive at its end.
    """

    flops: Counter[str] = field(default_factory=Counter)
    num_operations: int = 0
    peak_bytes: int = 0
    left_bytes: int = 0

    @property
    def total(self) -> int:
        return sum(self.flops.values())


class _Ledger(TorchDispatchMode):
    """Adds up the memory of new tensors until nothing refers to it any more."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(self._storage(x)) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self.count.num_operations += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                self._add(self._storage(leaf), given)
        return result

    @staticmethod
    def _storage(tensor: torch.Tensor) -> Any:
        return tensor.untyped_storage()

    def _add(self, storage: Any, given: set[int]) -> None:
        key = id(storage)
        if key in given or self._known.get(key) is storage:
            return  # a view, or what an operation was done to in place
        size = storage.nbytes()
        self._known[key] = storage
        weakref.finalize(storage, self._drop, size)
        self.count.left_bytes += size
        self.count.peak_bytes = max(self.count.peak_bytes, self.count.left_bytes)

    def _drop(self, size: int) -> None:
        self.count.left_bytes -= size


@contextmanager
def counting() -> Iterator[Count]:
    """Count what is computed inside, gradients included.

    Matrix products, convolutions and attention are counted by torch, the kernels of `permlab.ops` by what they
    tell (`permlab.ops.cost`); see `NOT_COUNTED`. Tensors need no numbers: shapes on torch's `meta` device will do.

    Example:
        >>> with counting() as count:
        ...     product = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> count.total, count.peak_bytes
        (48, 104)
    """
    count = Count()
    backward = {torch.ops.aten.convolution_backward: _backward_of_convolution}
    torch_counts = FlopCounterMode(display=False, custom_mapping=backward)
    with listening() as ours, torch_counts, _Ledger(count):
        yield count
    by_operator = torch_counts.get_flop_counts().get("Global", {})
    count.flops.update({str(operator).removeprefix("aten."): flops for operator, flops in by_operator.items()})
    count.flops.update(ours)


def _backward_of_convolution(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    """As many operations as forward for each gradient, input's and weight's; torch's formula forgets the groups."""
    forward = conv_flop_count(list(x), list(weight), list(grad), transposed=transposed)
    return forward * sum(output_mask[:2])


def megabytes(size: float) -> str:
    """Bytes as people say them.

    Example:
        >>> megabytes(3 * 2**20), megabytes(5.25 * 2**30)
        ('3 MiB', '5.2 GiB')
    """
    mebi = size / 2**20
    return f"{mebi / 2**10:,.1f} GiB" if mebi >= 2**10 else f"{math.ceil(mebi):,} MiB"


def scientific(number: float) -> str:
    """A count with the prefix that people use.

    Example:
        >>> scientific(234), scientific(9_644_672), scientific(1.6e12)
        ('234', '9.6 M', '1.6 T')
    """
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {prefix}" if number >= 100 * size else f"{number / size:.1f} {prefix}"
    return f"{number:.0f}"
