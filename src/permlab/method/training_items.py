"""What a method may ask of the training data before training."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

Draw = Callable[[int], tuple[Float[Tensor, "b n d"], Int64[Tensor, " b"]]]


@dataclass(frozen=True)
class TrainingItems:
    """Items of training images and their labels, read only if a method draws them.

    Shapes:
        b: images.  n: items.  d: features of an item.
    Args:
        draw: items, not yet ordered and as the untrained model embeds them, and labels of up to so many training
            images, the same ones every time.
        seed: of searches.
    """

    draw: Draw
    seed: int = 0
