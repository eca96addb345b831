"""What the dense model predicts for the calibration samples, kept where there is room."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from permlab.sparsity.offload import Waiting
from permlab.task.prune.task import MAX_KEPT_WHOLE


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Thirty-two hex digits of shapes, types and every bit of some tensors.

    Example:
        >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(3)])
        False
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


class Predictions:
    """Logits by number of the batch, up to what softmax does not see.

    Up to `MAX_KEPT_WHOLE` logits are kept as they are. Log-probabilities in half precision are exact to
    a thousandth where they matter: those of likely tokens are small numbers.

    Args:
        num_logits: of all batches together.
        limit_gib: of what is kept in half precision; beyond it nothing is.
        folder: of the file, beyond what memory takes; None for the system's temporary one.
    """

    def __init__(self, num_logits: int, *, limit_gib: float, folder: Path | None = None) -> None:
        self.is_whole = num_logits <= MAX_KEPT_WHOLE
        self.is_kept = self.is_whole or 2 * num_logits <= limit_gib * 2**30
        self._waiting = Waiting(folder=folder)

    @property
    def in_memory(self) -> list[Tensor]:
        """What is kept and in no file."""
        return self._waiting.in_memory_now

    def put(self, index: int, logits: Tensor) -> None:
        if self.is_whole:
            self._waiting.put(str(index), logits)
        elif self.is_kept:
            self._waiting.put(str(index), logits.float().log_softmax(-1).half())

    def get(self, index: int, device: torch.device) -> Tensor | None:
        """Logits, or log-probabilities; None where they are not kept."""
        return self._waiting.get(str(index), device) if str(index) in self._waiting else None
