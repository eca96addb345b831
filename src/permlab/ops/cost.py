"""What the operations here compute that no counter of torch's operators sees: compiled kernels, and sums of products.

A scan and Sinkhorn's sweeps are told to whoever counts; nobody listens in an ordinary run.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_LISTENING: list[Counter[str]] = []


def note(name: str, flops: int, *inputs: Tensor | None, backward: float = 2.0) -> None:
    """Tell whoever counts of an operation, and of its gradient where one is going to be wanted.

    Args:
        name: of the operation.
        flops: additions, multiplications and exponentials of its forward pass, each counted as one.
        inputs: that a gradient may be wanted for.
        backward: how many times the forward pass the gradient takes, what it computes again included.
    Example:
        >>> with listening() as counts:
        ...     note("scan", 10, torch.ones(1, requires_grad=True))
        >>> dict(counts)
        {'scan': 30}
    """
    if not _LISTENING:
        return
    is_trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    for counts in _LISTENING:
        counts[name] += flops + (round(backward * flops) if is_trained else 0)


@contextmanager
def listening() -> Iterator[Counter[str]]:
    """Floating-point operations that are noted inside, by name."""
    counts: Counter[str] = Counter()
    _LISTENING.append(counts)
    try:
        yield counts
    finally:
        _LISTENING.remove(counts)
