"""What text datasets share: a long row of tokens, cut into samples."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class TokenWindows(Dataset):
    """Tokens in windows that do not overlap; in each, every token but the last predicts its successor.

    A window is one token longer than a sample, so that inputs and targets are equally long. What
    is left over at the end is dropped. The first token of a window is never a target.

    Shapes:
        tokens: integers `[num_tokens]`.
    Args:
        sequence_length: tokens per sample.
        where: what the tokens were read from, for the error message.
    Raises:
        ValueError: naming `where`, if there are too few tokens for one window.
    Example:
        >>> windows = TokenWindows(np.arange(7), sequence_length=2, where="an example")
        >>> windows.__getitems__([0, 1])
        (tensor([[0, 1], [3, 4]]), tensor([[1, 2], [4, 5]]))
    """

    def __init__(self, tokens: np.ndarray, *, sequence_length: int, where: str) -> None:
        num_windows = len(tokens) // (sequence_length + 1)
        if num_windows == 0:
            raise ValueError(
                f"{where}: {len(tokens)} tokens are less than the {sequence_length + 1} "
                f"that sequence_length {sequence_length} needs"
            )
        whole = tokens[: num_windows * (sequence_length + 1)]
        # A copy, as torch cannot share memory that is read-only. Bytes stay bytes until they are fetched.
        self.windows = torch.from_numpy(whole.reshape(num_windows, -1).copy())

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 `[len(indices), sequence_length]` each."""
        windows = self.windows[torch.as_tensor(indices)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
