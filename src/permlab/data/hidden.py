"""One order, which nobody is told, in which the blocks of all images of a data set lie: what is true is known."""

import numpy as np

from permlab.data.spec import DataSpec


def hidden_order(seed: int, spec: DataSpec) -> np.ndarray:
    """Order in which the blocks of every image are laid out anew, drawn by a seed that is not the run's.

    Shapes:
        int64 `[n]`: block `i` of a shuffled image is block `order[i]` of the image, both in raster order.
    Args:
        spec: of the images; its patch size is the side of a block, in pixels.
    Raises:
        ValueError: if that does not divide the image.
    """
    height, width = spec.grid(spec.patch_size)
    return np.random.default_rng([seed, height, width]).permutation(height * width)


def rearranged(images: np.ndarray, order: np.ndarray, side: int) -> np.ndarray:
    """Images whose blocks lie in another order.

    Shapes:
        images: `[num_images, c, h, w]`.  order: int64 `[n]`, n = (h / side) * (w / side).
    Args:
        side: of a block, in pixels.
    Returns:
        A new array of the same shape and type; block `i` is block `order[i]` of the image.
    Example:
        >>> rearranged(np.arange(4).reshape(1, 1, 2, 2), np.array([3, 0, 1, 2]), 1).flatten()
        array([3, 0, 1, 2])
    """
    count, channels, height, width = images.shape
    rows, columns = height // side, width // side
    blocks = images.reshape(count, channels, rows, side, columns, side).swapaxes(3, 4)
    moved = blocks.reshape(count, channels, rows * columns, side, side)[:, :, order]
    whole = moved.reshape(count, channels, rows, columns, side, side).swapaxes(3, 4)
    return np.ascontiguousarray(whole).reshape(images.shape)


def true_order(order: np.ndarray) -> np.ndarray:
    """Order of the blocks of a shuffled image under which it is the image again: the inverse.

    Example:
        >>> true_order(np.array([3, 0, 1, 2]))
        array([1, 2, 3, 0])
    """
    return np.argsort(order)
