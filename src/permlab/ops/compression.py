"""How well the tokens of images compress in a scan order: a prior for the order in which to read them.

A path that keeps together what is alike leaves long runs and repeated pairs of tokens, which a dictionary coder makes
short. Images become tokens by their patches' colours, or by the nearest entries of a codebook of patches.
"""

import lzma
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from permlab.ops.scan_order import PATHS, scan_order

# A token is a byte, so that a pair is two.
NUM_TOKENS = 256
# Levels of a channel, at most: more leave few tokens that occur twice.
MAX_LEVELS = 16
# Tokens of a word that is compressed.
WORDS = {"unigrams": 1, "bigrams": 2}


def colour_tokens(patches: Float[Tensor, "b n d"], num_channels: int) -> UInt8[Tensor, "b n"]:
    """Tokens by the mean of each channel over the patch, in equal steps from the least to the greatest of all.

    Shapes:
        b: images.  n: patches.  d: num_channels times the pixels of a patch, channel first.
    Args:
        num_channels: channels whose levels make the token: 16 levels for one, 6 for each of three.
    Raises:
        ValueError: if the channels do not divide the values of a patch, or are so many that each has one level.
    Example:
        >>> colour_tokens(torch.tensor([[[0.0, 0.2], [0.9, 1.1]]]), 1)
        tensor([[ 0, 15]], dtype=torch.uint8)
    """
    if num_channels < 1 or patches.shape[-1] % num_channels:
        raise ValueError(f"num_channels={num_channels} does not divide {patches.shape[-1]} values of a patch")
    num_levels = min(MAX_LEVELS, int(NUM_TOKENS ** (1 / num_channels) + 1e-9))
    if num_levels < 2:
        raise ValueError(f"num_channels={num_channels}: expected at most 8, of two levels each")
    means = patches.double().unflatten(-1, (num_channels, -1)).mean(-1)
    least, greatest = means.flatten(0, 1).amin(0), means.flatten(0, 1).amax(0)
    span = torch.where(greatest > least, greatest - least, 1.0)
    levels = ((means - least) / span * num_levels).long().clamp_max(num_levels - 1)
    return (levels * num_levels ** torch.arange(num_channels)).sum(-1).to(torch.uint8)


def codebook_tokens(patches: Float[Tensor, "b n d"], *, seed: int = 0) -> UInt8[Tensor, "b n"]:
    """Tokens by the nearest of up to 256 centres, which scikit-learn's MiniBatchKMeans finds among the patches.

    Shapes:
        b: images.  n: patches.  d: values of a patch.
    Args:
        seed: of the centres.
    Differs from source: REOrder's tokens are those of a pretrained VQ-VAE.
    Example:
        >>> codebook_tokens(torch.tensor([[[0.0], [1.0], [0.0]]])).unique().numel()
        2
    """
    from sklearn.cluster import MiniBatchKMeans

    flat = patches.double().flatten(0, 1).numpy()
    count = min(NUM_TOKENS, len(np.unique(flat, axis=0)))
    means = MiniBatchKMeans(count, random_state=seed, n_init=1, batch_size=4096)
    return torch.from_numpy(means.fit_predict(flat).astype(np.uint8)).view(patches.shape[:2])


def compressed_size(tokens: UInt8[Tensor, "b n"], order: Int64[Tensor, " n"], *, length: int = 1) -> int:
    """Bytes that LZMA needs for the tokens of all images, read in an order, one image after the other.

    Args:
        tokens: of every image's patches, in raster order.
        length: tokens of a word: 1 for unigrams; 2 for bigrams, the n - 1 pairs of neighbours in the order.
    Raises:
        ValueError: if the length is neither.
    Source: Python's `lzma`, the raw stream of LZMA2, without header and check.
    """
    if length not in (1, 2):
        raise ValueError(f"length={length}: expected 1 or 2")
    read = tokens[:, order].numpy()
    if length == 2:
        # Pairs are numbered: of their bytes every one stands twice, which a coder would find out in part.
        pairs = read[:, :-1].astype(np.uint16) * NUM_TOKENS + read[:, 1:]
        read = np.unique(pairs, return_inverse=True)[1].astype(np.uint16)
    # Where words are of two bytes, what is likely depends on which of the two comes next.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lp": length - 1, "lc": 4 - length, "pb": length - 1}]
    return len(lzma.compress(np.ascontiguousarray(read).tobytes(), format=lzma.FORMAT_RAW, filters=filters))


def reductions(
    tokens: Mapping[str, UInt8[Tensor, "b n"]], height: int, width: int, names: Iterable[str] = PATHS
) -> dict[str, dict[str, float]]:
    """How much smaller the tokens are in each scan order than row by row, in per cent.

    Args:
        tokens: of the same images by name of the way they were made.
        height, width: of the grid of patches.
        names: scan orders.
    Returns:
        By scan order: by `<way> unigrams` and `<way> bigrams`, and their `mean`.
    Source: Kutscher et al. 2025, REOrder, arXiv:2505.23751, whose prior is the reduction of uni- and bigrams by LZMA.
    Differs from source: a reduction against the row order and not against the raw tokens; other tokens; one
        stream for all images.
    Cost: four compressions for each order and two ways, about a second for 100,000 tokens and ten orders.
    """
    columns = [(f"{way} {word}", some, length) for way, some in tokens.items() for word, length in WORDS.items()]
    row = {name: compressed_size(some, scan_order("row", height, width), length=n) for name, some, n in columns}
    found = {}
    for scan in names:
        order = scan_order(scan, height, width)
        sizes = {name: compressed_size(some, order, length=length) for name, some, length in columns}
        table = {name: 100 * (1 - size / row[name]) for name, size in sizes.items()}
        found[scan] = table | {"mean": sum(table.values()) / len(table)}
    return found
