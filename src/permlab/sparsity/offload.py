"""Tensors that wait: on the CPU, and beyond a size in a file that is mapped into memory."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Bytes that wait in memory; what comes on top of them waits in files.
IN_MEMORY = 2**30


class Waiting:
    """Tensors by name, put away until they are asked for.

    A tensor that is on the CPU and finds room stays what it is. One of an accelerator is copied to
    the CPU; one without room goes to a file without a name, which ends with its tensor.

    Args:
        in_memory: bytes for all of them; what does not fit is mapped from files.
        folder: of the files; None for the system's temporary one.
    Example:
        >>> waiting = Waiting(in_memory=0)
        >>> waiting.put("x", torch.ones(2, 3, dtype=torch.bfloat16))
        >>> waiting.get("x").sum(), waiting.num_mapped
        (tensor(6., dtype=torch.bfloat16), 12)
    """

    def __init__(self, *, in_memory: int = IN_MEMORY, folder: Path | None = None) -> None:
        self.in_memory, self.folder = in_memory, folder
        self.num_bytes = self.num_mapped = 0  # in memory, and in files
        self._held: dict[str, Tensor] = {}
        self._mapped: set[str] = set()

    def put(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, in place of that of the same name; it must not be changed afterwards."""
        self.drop(name)
        tensor = tensor.detach()
        if self.num_bytes + tensor.nbytes > self.in_memory:
            self._held[name] = _mapped(tensor, self.folder)
            self._mapped.add(name)
            self.num_mapped += tensor.nbytes
        else:
            self._held[name] = tensor.cpu()
            self.num_bytes += tensor.nbytes

    def get(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        return self._held[name].to(device)

    def drop(self, name: str) -> None:
        """Forget a tensor, if there is one of this name."""
        tensor = self._held.pop(name, None)
        if tensor is None:
            return
        if name in self._mapped:
            self._mapped.remove(name)
            self.num_mapped -= tensor.nbytes
        else:
            self.num_bytes -= tensor.nbytes

    @property
    def in_memory_now(self) -> list[Tensor]:
        """Tensors that no file holds."""
        return [tensor for name, tensor in self._held.items() if name not in self._mapped]

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)


def _mapped(tensor: Tensor, folder: Path | None) -> Tensor:
    """The same tensor, in a file that is gone when nobody uses it."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:  # the map keeps what it maps
        array = np.memmap(file, dtype=np.uint8, mode="w+", shape=(max(1, tensor.nbytes),))
    place = torch.from_numpy(array)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    place.copy_(tensor)
    return place
