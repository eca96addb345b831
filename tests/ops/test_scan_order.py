"""Scan orders against other constructions of the same paths, on many rectangles."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from permlab.ops.scan_order import NAMES, check_name, parse_name, scan_order
from permlab.permutation import check_order, invert

SIDES = (1, 2, 3, 4, 5, 8, 11)
GRIDS = [(height, width) for height in SIDES for width in SIDES]


def by_row(height, width):
    return np.arange(height * width)


def by_column(height, width):
    return np.arange(height * width).reshape(height, width).T.ravel()


def by_flipping_every_other_row(height, width):
    grid = np.arange(height * width).reshape(height, width)
    grid[1::2] = grid[1::2, ::-1]
    return grid.ravel()


def by_sorting_anti_diagonals(height, width):
    row, column = np.divmod(np.arange(height * width), width)
    total = row + column
    return np.lexsort((np.where(total % 2 == 1, row, column), total))


def by_numpy_diagonals(height, width):
    grid = np.arange(height * width).reshape(height, width)
    return np.concatenate([grid.diagonal(offset) for offset in range(1 - height, width)])


def by_peeling_and_turning(height, width):
    grid, path = np.arange(height * width).reshape(height, width), []
    while grid.size:
        path.extend(grid[0])
        grid = np.rot90(grid[1:])
    return np.array(path)


def by_cropping(ranks, height, width):
    """Cells of a rectangle by the rank that a larger square gives them."""
    return ranks[:height, :width].argsort(axis=None)


def by_cropping_hilberts_curve(height, width):
    side = 1 << (max(height, width) - 1).bit_length()
    ranks = np.empty((side, side), int)
    for rank, (row, column) in enumerate(hilbert_by_bits(side)):
        ranks[row, column] = rank
    return by_cropping(ranks, height, width)


def by_cropping_nested_blocks(height, width):
    """REOrder's recursion in rank matrices: blocks of blocks, read by rows (0, 2) or by columns (1, 3)."""
    turns = {0: [[0, 1, 0], [3, 0, 2], [0, 1, 0]], 2: [[2, 3, 2], [0, 2, 1], [2, 3, 2]]}
    # By columns: the first index is that of the column.
    turns |= {1: [[1, 0, 1], [2, 1, 3], [1, 0, 1]], 3: [[3, 2, 3], [0, 3, 1], [3, 2, 3]]}
    ranks = dict.fromkeys(turns, np.zeros((1, 1), int))
    while len(ranks[0]) < max(height, width):
        cells, larger = ranks[0].size, {}
        for turn, inner in turns.items():
            blocks = [[ranks[inner[i][j]] + (3 * i + j) * cells for j in range(3)] for i in range(3)]
            larger[turn] = np.block(blocks if turn % 2 == 0 else [list(row) for row in zip(*blocks, strict=True)])
        ranks = larger
    return by_cropping(ranks[0], height, width)


def by_cropping_peanos_curve(height, width):
    """Peano's definition by digits in base 3: one is turned over where the other coordinate's before it are odd."""
    digits = 0
    while 3**digits < max(height, width):
        digits += 1
    ranks = np.empty((3**digits, 3**digits), int)
    for rank in range(9**digits):
        t = [rank // 3**place % 3 for place in range(2 * digits - 1, -1, -1)]
        column = [2 - t[2 * i] if sum(t[1 : 2 * i : 2]) % 2 else t[2 * i] for i in range(digits)]
        row = [2 - t[2 * i + 1] if sum(t[0 : 2 * i + 1 : 2]) % 2 else t[2 * i + 1] for i in range(digits)]
        place = tuple(sum(d * 3 ** (digits - 1 - i) for i, d in enumerate(part)) for part in (row, column))
        ranks[place] = rank
    return by_cropping(ranks, height, width)


ORACLES = {
    "peano": by_cropping_peanos_curve,
    "reorder_hilbert": by_cropping_hilberts_curve,
    "reorder_peano": by_cropping_nested_blocks,
    "row": by_row,
    "column": by_column,
    "snake": by_flipping_every_other_row,
    "zigzag": by_sorting_anti_diagonals,
    "diagonal": by_numpy_diagonals,
    "spiral": by_peeling_and_turning,
}


@pytest.mark.parametrize("name", ORACLES)
def test_same_path_as_another_construction(name):
    for height, width in GRIDS:
        expected = ORACLES[name](height, width).tolist()
        assert scan_order(name, height, width).tolist() == expected, (height, width)


@pytest.mark.parametrize("name", NAMES)
def test_an_order_that_survives_two_inversions_and_reverses(name):
    for height, width in GRIDS:
        order = scan_order(name, height, width)
        assert order.shape == (height * width,)
        check_order(order)
        assert torch.equal(invert(invert(order)), order)
        if name.startswith("reverse_"):
            assert torch.equal(order, scan_order(name.removeprefix("reverse_"), height, width).flip(0))


def steps(name, height, width):
    order = scan_order(name, height, width).numpy()
    cells = np.stack(np.divmod(order, width))
    return np.abs(np.diff(cells)).sum(0)


@pytest.mark.parametrize("name", ["snake", "spiral", "hilbert"])
def test_contiguous_on_every_rectangle(name):
    for height in range(1, 20):
        for width in range(1, 20):
            assert (steps(name, height, width) == 1).all(), (height, width)
    assert (steps(name, 2, 61) == 1).all()
    assert (steps(name, 61, 10) == 1).all()


def hilbert_by_bits(side):
    """Hilbert's curve from the bits of the distance along it: pairs of bits choose and turn quadrants."""
    cells = []
    for distance in range(side * side):
        row = column = 0
        size, rest = 1, distance
        while size < side:
            second = (rest // 2) % 2
            first = (rest + second) % 2
            if first == 0:
                if second == 1:
                    row, column = size - 1 - row, size - 1 - column
                row, column = column, row
            row, column = row + size * second, column + size * first
            rest, size = rest // 4, 2 * size
        cells.append((row, column))
    return cells


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_hilbert_is_hilberts_curve_on_powers_of_two(side):
    cells = hilbert_by_bits(side)
    variants = (
        [row * side + column for row, column in cells],
        [column * side + row for row, column in cells],
    )
    assert scan_order("hilbert", side, side).tolist() in variants


@pytest.mark.parametrize("side", [3, 9, 27])
def test_peano_is_contiguous_on_powers_of_three(side):
    assert (steps("peano", side, side) == 1).all()


def test_reorders_hilbert_curve_jumps_as_its_code_does_on_14_by_14():
    taken = steps("reorder_hilbert", 14, 14)
    assert taken.max() == 3
    assert (taken == 1).mean() == pytest.approx(0.974, abs=5e-4)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (14, 14), (14, 15), (15, 14), (13, 13), (9, 40), (30, 17)])
def test_hilbert_stays_nearer_than_a_snake(height, width):
    def mean_distance(name, gap):
        row, column = np.divmod(scan_order(name, height, width).numpy(), width)
        return np.hypot(row[gap:] - row[:-gap], column[gap:] - column[:-gap]).mean()

    gap = min(height, width) // 2
    assert mean_distance("hilbert", gap) < mean_distance("snake", gap)


def test_hilbert_is_symmetric_in_height_and_width():
    wide, tall = scan_order("hilbert", 6, 10), scan_order("hilbert", 10, 6)
    assert torch.equal(wide, tall % 6 * 10 + tall // 6)


def test_published_corners_of_the_14_by_14_grid():
    assert scan_order("diagonal", 14, 14)[[0, 1, 2, -1]].tolist() == [182, 168, 183, 13]
    assert scan_order("zigzag", 8, 8)[:10].tolist() == [0, 1, 8, 16, 9, 2, 3, 10, 17, 24]


def test_random_depends_on_its_seed_only():
    assert torch.equal(scan_order("random", 5, 6), scan_order("random_0", 5, 6))
    assert torch.equal(scan_order("random(7)", 5, 6), scan_order("random_7", 5, 6))
    assert not torch.equal(scan_order("random_7", 5, 6), scan_order("random", 5, 6))
    assert torch.equal(scan_order("reverse(random(7))", 5, 6), scan_order("reverse_random_7", 5, 6))
    # From 0.84 0.76 0.42 0.26 0.51 0.40 0.78 0.30, the first numbers that Python's generator draws from seed 0.
    assert scan_order("random", 2, 4).tolist() == [3, 7, 5, 2, 4, 1, 6, 0]


def test_random_is_spread_over_all_orders():
    counts = np.zeros((6, 6))
    for seed in range(600):
        counts[np.arange(6), scan_order(f"random_{seed}", 2, 3)] += 1
    assert counts.min() > 60
    assert counts.max() < 140


def test_names():
    assert len(set(NAMES)) == len(NAMES) == 22
    for name in NAMES:
        check_name(name)
    assert parse_name("reverse(hilbert)") == parse_name("reverse_hilbert") == ("hilbert", 0, True)
    assert parse_name("random_12") == ("random", 12, False)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hilbrt", "did you mean hilbert?"),
        ("reverse_spirl", "did you mean reverse_spiral?"),
        ("reverse(colum)", "did you mean reverse_column?"),
        ("qqqq", "choices: row, column"),
        ("", "choices: row, column"),
        ("reverse_reverse_row", "did you mean reverse_row?"),
        ("reverse()", "did you mean"),
        ("random_x", "did you mean random?"),
        ("random(-1)", "did you mean random?"),
        ("Row", "did you mean row?"),
    ],
)
def test_an_unknown_name_gets_the_nearest_valid_one(name, hint):
    with pytest.raises(ValueError, match="unknown scan order") as error:
        check_name(name)
    assert repr(name) in str(error.value)
    assert hint in str(error.value)


@pytest.mark.parametrize(("height", "width", "culprit"), [(0, 3, "height=0"), (3, -1, "width=-1")])
def test_an_empty_grid_is_refused(height, width, culprit):
    with pytest.raises(ValueError, match=culprit):
        scan_order("row", height, width)


def test_names_and_schedules_are_checked_without_torch():
    code = (
        "import sys; from permlab.ops.scan_order import check_name; from permlab.ops.schedule import parse;"
        "check_name('hilbert'); parse(1.0); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
