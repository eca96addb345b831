"""Tokens of patches, and which scan order makes them small, on images whose order is known."""

import bz2
import lzma

import numpy as np
import pytest
import torch

from permlab.ops.compression import codebook_tokens, colour_tokens, compressed_size, reductions
from permlab.ops.scan_order import PATHS, scan_order

SIDE = 12


def along(name: str, count: int = 100, seed: int = 0) -> torch.Tensor:
    """Images whose tokens rarely change along a scan order: stripes in its direction, broken off at random."""
    rng = np.random.default_rng(seed)
    changes = rng.random((count, SIDE * SIDE)) < 0.15
    changes[:, 0] = True
    fresh = rng.integers(16, size=changes.shape)
    last = np.maximum.accumulate(np.where(changes, np.arange(SIDE * SIDE), 0), 1)
    tokens = torch.empty(count, SIDE * SIDE, dtype=torch.uint8)
    tokens[:, scan_order(name, SIDE, SIDE)] = torch.from_numpy(np.take_along_axis(fresh, last, 1).astype(np.uint8))
    return tokens


@pytest.mark.parametrize("name", ["row", "column", "hilbert", "spiral", "diagonal"])
def test_stripes_compress_best_along_their_direction(name):
    table = reductions({"planted": along(name)}, SIDE, SIDE)
    assert table.keys() == set(PATHS)
    best = max(table, key=lambda scan: table[scan]["mean"])
    assert best == name
    assert table["row"] == {"planted unigrams": 0.0, "planted bigrams": 0.0, "mean": 0.0}
    if name != "row":
        assert min(table[name].values()) > 10


@pytest.mark.parametrize("length", [1, 2])
def test_another_compressor_agrees(length):
    """bzip2 sorts contexts where LZMA looks for repetitions."""
    tokens, row = along("row"), torch.arange(SIDE * SIDE)
    sizes = {}
    for name in ("row", "column"):
        read = tokens[:, scan_order(name, SIDE, SIDE)].numpy()
        words = read if length == 1 else read[:, :-1].astype(np.uint16) * 256 + read[:, 1:]
        theirs = len(bz2.compress(words.tobytes()))
        sizes[name] = theirs, compressed_size(tokens, scan_order(name, SIDE, SIDE), length=length)
        assert sizes[name][1] == compressed_size(tokens[:, scan_order(name, SIDE, SIDE)], row, length=length)
    assert all(ours < theirs for ours, theirs in zip(sizes["row"], sizes["column"], strict=True))


@pytest.mark.parametrize("length", [1, 2])
def test_what_is_compressed_can_be_read_back(monkeypatch, length):
    streams, compress = [], lzma.compress

    def keeping(data: bytes, **settings: object) -> bytes:
        packed = compress(data, **settings)
        assert lzma.decompress(packed, **settings) == data
        streams.append((data, packed))
        return packed

    monkeypatch.setattr(lzma, "compress", keeping)
    tokens, order = along("hilbert", 3), scan_order("spiral", SIDE, SIDE)
    size = compressed_size(tokens, order, length=length)
    ((data, packed),) = streams
    assert size == len(packed)
    read = [[image[slot] for slot in order.tolist()] for image in tokens.tolist()]
    words = [tuple(image[slot : slot + length]) for image in read for slot in range(len(image) - length + 1)]
    numbers = np.frombuffer(data, np.uint8 if length == 1 else np.uint16).tolist()
    pairs = set(zip(words, numbers, strict=True))
    assert len(pairs) == len(set(words)) == len(set(numbers))


def test_no_order_of_noise_is_better():
    tokens = torch.randint(256, (100, SIDE * SIDE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    table = reductions({"noise": tokens}, SIDE, SIDE)
    assert max(abs(value) for values in table.values() for value in values.values()) < 1


def test_colours_are_levels_of_the_channels_means():
    patches = torch.rand(5, 6, 3 * 4, generator=torch.Generator().manual_seed(0))
    means = patches.double().numpy().reshape(30, 3, 4).mean(-1)
    levels = []
    for channel in means.T:
        edges = np.linspace(channel.min(), channel.max(), 7)
        levels.append(np.digitize(channel, edges[1:-1]))
    expected = levels[0] + 6 * levels[1] + 36 * levels[2]
    assert colour_tokens(patches, 3).flatten().tolist() == expected.tolist()


def test_patches_of_one_kind_have_one_token():
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(5, (40, 9), generator=generator)
    patches = torch.randn(5, 12, generator=generator)[kinds]
    tokens = codebook_tokens(patches, seed=3)
    pairs = set(zip(kinds.flatten().tolist(), tokens.flatten().tolist(), strict=True))
    assert len(pairs) == 5
    assert len({token for _, token in pairs}) == 5
    assert torch.equal(tokens, codebook_tokens(patches, seed=3))


def test_many_patches_share_a_few_tokens_with_their_neighbours():
    """Patches of one token are closer to each other than patches are at large."""
    patches = torch.rand(40, 25, 4, generator=torch.Generator().manual_seed(0))
    tokens, flat = codebook_tokens(patches).flatten(), patches.flatten(0, 1)
    assert 100 < len(tokens.unique()) <= 256
    spread = [flat[tokens == token].sub(flat[tokens == token].mean(0)).pow(2).sum() for token in tokens.unique()]
    assert sum(spread) < 0.3 * flat.sub(flat.mean(0)).pow(2).sum()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_channels=3 does not divide 4"):
        colour_tokens(torch.zeros(1, 1, 4), 3)
    with pytest.raises(ValueError, match="num_channels=9"):
        colour_tokens(torch.zeros(1, 1, 9), 9)
    with pytest.raises(ValueError, match="length=3"):
        compressed_size(along("row", 1), torch.arange(SIDE * SIDE), length=3)
