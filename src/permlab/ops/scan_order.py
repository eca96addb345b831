"""Fixed orders of the cells of a grid.

Names are checked before torch is imported, so this module imports it only to build a tensor.
"""

import difflib
import random
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


# In place of a scan order: the one in which the patches of the training images compress best.
COMPRESSIBLE = "compressible"


class ScanName(NamedTuple):
    """A scan-order name taken apart: `reverse_random_7` is ("random", 7, True)."""

    base: str
    seed: int
    is_reversed: bool


def parse_name(name: str) -> ScanName:
    """Take a scan-order name apart.

    Accepts every name in `NAMES`; `random(7)` or `random_7` for a random order with its seed (0
    where none is given); and `reverse(<name>)` or `reverse_<name>` of what is not reversed already.

    Raises:
        ValueError: naming the unknown name and the nearest valid one.
    Example:
        >>> parse_name("reverse(random(7))")
        ScanName(base='random', seed=7, is_reversed=True)
    """
    inner = re.fullmatch(r"reverse_(\w.*)|reverse\((.*)\)", name)
    base = (inner[1] or inner[2]) if inner else name
    seeded = re.fullmatch(r"random(?:_([0-9]+)|\(([0-9]+)\))", base or "")
    if seeded:
        return ScanName("random", int(seeded[1] or seeded[2]), bool(inner))
    if base not in _BASES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; choices: {', '.join(_BASES)}, and reverse_ of each"
        raise ValueError(f"unknown scan order {name!r}{hint}")
    return ScanName(base, 0, bool(inner))


def check_name(name: str) -> None:
    """Raise unless `scan_order` knows the name.

    Raises:
        ValueError: naming the unknown name and the nearest valid one.
    """
    parse_name(name)


def scan_order(name: str, height: int, width: int) -> "torch.Tensor":
    """Order in which a path visits the cells of a grid, cells numbered in raster order.

    - `row`, `column`: line by line, each in the same direction.
    - `snake`: rows in alternating direction.
    - `zigzag`: anti-diagonals from the top-left corner in alternating direction, as in JPEG.
    - `diagonal`: diagonals of constant column - row, from the bottom-left corner to the
      top-right, each downwards to the right.
    - `hilbert`: a generalised Hilbert curve from the top-left corner. On every rectangle each
      step goes to a neighbouring cell; on a square with a power of two for side it is Hilbert's curve.
    - `peano`: Peano's curve on the next power of three, without the cells outside the grid; on a
      square with a power of three for side each step goes to a neighbouring cell, elsewhere it jumps.
    - `reorder_hilbert`, `reorder_peano`: as REOrder's code has them. The first is Hilbert's curve on
      the next power of two without the cells outside, which jumps; the second, `peano` there, reads
      nested blocks of 3 x 3 row by row or column by column and is not Peano's curve.
    - `spiral`: from the top-left corner right, down, left and up, inwards.
    - `random`: drawn once, from seed 0; `random_7` or `random(7)` from seed 7.
    - `reverse_<name>` or `reverse(<name>)`: the same path walked from its end.

    Shapes:
        The result is `[n]`, n = height * width.
    Args:
        name: as `parse_name` takes it.
        height: rows of the grid, at least 1.
        width: columns of the grid, at least 1.
    Returns:
        int64 gather indices on the CPU: slot i takes cell `order[i]`.
    Raises:
        ValueError: if the name is unknown, with the nearest valid one, or a side is below 1.
    Source: Kutscher et al. 2025, REOrder, arXiv:2505.23751 (column, diagonal, spiral,
        reorder_hilbert, reorder_peano; its snake is `zigzag` here); generalised Hilbert curve after
        J. Cerveny's gilbert.
    Differs from source: gilbert makes a diagonal step on some rectangles with an odd side, ours
        never does.
    Cost: O(n) time, in Python; O(n log n) for random; for curves that leave out cells O(m^2), m
        being up to two or three times the longer side.
    Example:
        >>> scan_order("snake", 2, 3)
        tensor([0, 1, 2, 5, 4, 3])
        >>> scan_order("reverse_diagonal", 2, 2)
        tensor([1, 3, 0, 2])
    """
    base, seed, is_reversed = parse_name(name)
    for side, size in (("height", height), ("width", width)):
        if size < 1:
            raise ValueError(f"{side}={size} is below 1")
    if base == "random":
        cells = _random(height * width, seed)
    else:
        cells = [row * width + column for row, column in _PATHS[base](height, width)]

    import torch

    return torch.tensor(cells[::-1] if is_reversed else cells)


Cells = Iterator[tuple[int, int]]


def _row(height: int, width: int) -> Cells:
    return ((row, column) for row in range(height) for column in range(width))


def _column(height: int, width: int) -> Cells:
    return ((row, column) for column in range(width) for row in range(height))


def _snake(height: int, width: int) -> Cells:
    for row in range(height):
        columns = range(width) if row % 2 == 0 else reversed(range(width))
        yield from ((row, column) for column in columns)


def _zigzag(height: int, width: int) -> Cells:
    for total in range(height + width - 1):
        rows = range(max(0, total - width + 1), min(height - 1, total) + 1)
        downwards = rows if total % 2 else reversed(rows)
        yield from ((row, total - row) for row in downwards)


def _diagonal(height: int, width: int) -> Cells:
    for difference in range(1 - height, width):
        columns = range(max(0, difference), min(width, height + difference))
        yield from ((column - difference, column) for column in columns)


def _spiral(height: int, width: int) -> Cells:
    top, left, bottom, right = 0, 0, height - 1, width - 1
    while top <= bottom and left <= right:
        yield from ((top, column) for column in range(left, right + 1))
        yield from ((row, right) for row in range(top + 1, bottom + 1))
        if top < bottom:
            yield from ((bottom, column) for column in range(right - 1, left - 1, -1))
        if left < right:
            yield from ((row, left) for row in range(bottom - 1, top, -1))
        top, left, bottom, right = top + 1, left + 1, bottom - 1, right - 1


def _hilbert(height: int, width: int) -> Cells:
    along, across = (1 + 0j, 1j) if width >= height else (1j, 1 + 0j)
    long, short = max(height, width), min(height, width)
    if long % 2 == 0 or short % 2 == 1:
        cells = _curve(0j, along, across, long, short)
    elif 2 * long <= 3 * short:
        cells = _curve(0j, across, along, short, long)
    else:
        cells = _curve_with_odd_end(along, across, long, short)
    return ((round(cell.imag), round(cell.real)) for cell in cells)


def _curve_with_odd_end(along: complex, across: complex, long: int, short: int) -> Iterator[complex]:
    """An odd length of an even breadth: an even length, then a near-square end walked across."""
    even = long - short + 1
    yield from _curve(0j, along, across, even, short)
    yield from _curve(even * along, across, along, short, short - 1)


def _curve(corner: complex, along: complex, across: complex, length: int, breadth: int) -> Iterator[complex]:
    """Walk a block from a corner to the next corner along its length, by unit steps.

    Positions are complex numbers (column + row * i); `along` and `across` are unit steps. On a
    chessboard such a walk exists only if the length is even or both sides are odd (or the
    breadth is 1): every split below hands on blocks of that kind.
    """
    assert length % 2 == 0 or breadth % 2 == 1
    if breadth == 1:
        yield from (corner + step * along for step in range(length))
    elif length == 2:
        yield from (corner + step * across for step in range(breadth))
        yield from (corner + along + step * across for step in reversed(range(breadth)))
    elif 2 * length > 3 * breadth:
        first = _even_half(length)
        yield from _curve(corner, along, across, first, breadth)
        yield from _curve(corner + first * along, along, across, length - first, breadth)
    else:
        near, left = _even_half(breadth), length // 2
        far_right = corner + (length - 1) * along + (near - 1) * across
        yield from _curve(corner, across, along, near, left)
        yield from _curve(corner + near * across, along, across, length, breadth - near)
        yield from _curve(far_right, -across, -along, near, length - left)


def _even_half(size: int) -> int:
    return 2 * ((size + 2) // 4)


def _cropped(cells: Cells, height: int, width: int) -> Cells:
    return ((row, column) for row, column in cells if row < height and column < width)


def _power(base: int, height: int, width: int) -> int:
    """The least power of the base that no side exceeds."""
    side = 1
    while side < max(height, width):
        side *= base
    return side


def _reorder_hilbert(height: int, width: int) -> Cells:
    side = _power(2, height, width)
    cells = _curve(0j, 1j, 1 + 0j, side, side)
    return _cropped(((round(cell.imag), round(cell.real)) for cell in cells), height, width)


def _peano(height: int, width: int) -> Cells:
    return _cropped(_peano_block(0, 0, _power(3, height, width), False, False), height, width)


def _peano_block(top: int, left: int, side: int, up: bool, leftwards: bool) -> Cells:
    """Walk a square from one corner to the opposite one, third by third, each column of thirds against the last."""
    if side == 1:
        yield top, left
        return
    third = side // 3
    for column in range(3):
        for row in range(3):
            is_up, is_leftwards = up != (column == 1), leftwards != (row == 1)
            below, beside = (2 - row if is_up else row), (2 - column if leftwards else column)
            yield from _peano_block(top + third * below, left + third * beside, third, is_up, is_leftwards)


# How REOrder turns the nine blocks of a block, as they are visited: even ones go by rows, odd ones by columns.
_REORDER_TURNS = ("010302010", "101213101", "232021232", "323031323")


def _reorder_peano(height: int, width: int) -> Cells:
    return _cropped(_reorder_block(0, 0, _power(3, height, width), 0), height, width)


def _reorder_block(top: int, left: int, side: int, turn: int) -> Cells:
    if side == 1:
        yield top, left
        return
    third = side // 3
    for place, inner in enumerate(_REORDER_TURNS[turn]):
        row, column = divmod(place, 3) if turn % 2 == 0 else divmod(place, 3)[::-1]
        yield from _reorder_block(top + third * row, left + third * column, third, int(inner))


def _random(num_cells: int, seed: int) -> list[int]:
    # Of Python's generators only random() promises the same numbers in every later version.
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(num_cells)]
    return sorted(range(num_cells), key=keys.__getitem__)


_PATHS = {
    "row": _row,
    "column": _column,
    "snake": _snake,
    "zigzag": _zigzag,
    "diagonal": _diagonal,
    "hilbert": _hilbert,
    "peano": _peano,
    "reorder_hilbert": _reorder_hilbert,
    "reorder_peano": _reorder_peano,
    "spiral": _spiral,
}
# Names of the orders that chance has no part in.
PATHS = tuple(_PATHS)
_BASES = (*PATHS, "random")
NAMES = (*_BASES, *(f"reverse_{base}" for base in _BASES))
