"""Pictures of orders show the order they were given, and nothing is cut off."""

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from scipy.stats import kendalltau

from permlab.figure.matrices import matrices_figure
from permlab.figure.order import kendall, order_figure
from permlab.figure.scores import scores_figure

RNG = np.random.default_rng(0)


def collections(figure: Figure, index: int, kind: type) -> list:
    return [item for item in figure.axes[index].collections if isinstance(item, kind)]


def assert_nothing_is_cut_off(figure: Figure) -> None:
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01


@pytest.mark.parametrize("n", [2, 5, 64])
def test_kendall_against_scipy(n: int) -> None:
    a, b = RNG.permutation(n), RNG.permutation(n)
    assert kendall(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert kendall(a, a) == 1
    assert kendall(a, a[::-1] * 0 + n - a) == -1


def test_the_path_visits_the_patches_in_order() -> None:
    """Steps to neighbours are one collection and jumps another; colours tell which step comes when."""
    start, order = np.arange(12), RNG.permutation(12)
    figure = order_figure(start, order, grid=(3, 4), mean_image=None)
    for index, expected in ((2, start), (3, order)):
        points = [(float(item % 4), float(item // 4)) for item in expected]
        jumps, near = collections(figure, index, LineCollection)
        found = {
            float(slot): segment.tolist()
            for lines in (jumps, near)
            for slot, segment in zip(lines.get_array(), lines.get_segments(), strict=True)
        }
        assert [found[slot + 0.5] for slot in range(11)] == [list(map(list, points[i : i + 2])) for i in range(11)]
        assert all(np.hypot(*(b - a)) < 1.5 for a, b in near.get_segments())
        assert all(np.hypot(*(b - a)) > 1.5 for a, b in jumps.get_segments())
        assert max(jumps.get_linewidths()) < min(near.get_linewidths()) / 2
        markers = {line.get_label(): tuple(line.get_xydata()[0]) for line in figure.axes[index].lines}
        assert markers == {"read first": points[0], "read last": points[-1]}


def test_longer_jumps_are_paler() -> None:
    figure = order_figure(np.arange(16), np.array([0, 15, 1, 3, *range(4, 15), 2]), grid=(4, 4), mean_image=None)
    jumps = collections(figure, 3, LineCollection)[0]
    lengths = [np.hypot(*(b - a)) for a, b in jumps.get_segments()]
    by_length = [alpha for _, alpha in sorted(zip(lengths, jumps.get_alpha(), strict=True))]
    assert by_length == sorted(by_length, reverse=True)
    assert by_length[0] > by_length[-1]


def test_the_heat_map_holds_the_slot_of_every_patch() -> None:
    order = RNG.permutation(12)
    figure = order_figure(np.arange(12), order, grid=(3, 4), mean_image=np.zeros((6, 8)))
    values = figure.axes[1].images[0].get_array()
    assert all(values[divmod(order[slot], 4)] == slot for slot in range(12))
    numbers = {text.get_position(): text.get_text() for text in figure.axes[1].texts}
    assert all(numbers[(order[slot] % 4, order[slot] // 4)] == str(slot) for slot in range(12))


def test_several_orders_are_shown_by_their_mean_rank() -> None:
    orders = np.array([[0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 3, 2]])
    figure = order_figure(np.arange(4), orders, grid=(2, 2), mean_image=None)
    np.testing.assert_allclose(figure.axes[1].images[0].get_array().ravel(), [1 / 3, 2 / 3, 7 / 3, 8 / 3])
    assert "mean of 3" in figure.axes[1].get_title()


def test_the_title_tells_the_distance_from_the_start() -> None:
    figure = order_figure(np.arange(9), np.arange(9)[::-1].copy(), grid=(3, 3), mean_image=None)
    assert "-1.00" in figure.axes[1].get_title()


@pytest.mark.parametrize("grid", [(3, 3), (1, 9)])
def test_an_order_that_is_the_starting_one_is_shown_once(grid: tuple[int, int]) -> None:
    figure = order_figure(np.arange(9), np.arange(9), grid=grid, mean_image=None, name="fixed")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["fixed order, which is the starting one"]


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (4, 8), (16, 2), (1, 16), (1, 1)])
def test_every_grid_is_drawn_within_its_margins(grid: tuple[int, int]) -> None:
    n = grid[0] * grid[1]
    assert_nothing_is_cut_off(order_figure(np.arange(n), RNG.permutation(n), grid=grid, mean_image=None))


def test_items_in_a_row_are_drawn_as_slots() -> None:
    order = RNG.permutation(7)
    figure = order_figure(np.arange(7), order, grid=(1, 7), mean_image=None)
    points = figure.axes[1].collections[0].get_offsets()
    assert {(int(item), int(slot)) for item, slot in points} == {(order[slot], slot) for slot in range(7)}


def test_a_grid_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="3x3"):
        order_figure(np.arange(8), np.arange(8), grid=(3, 3), mean_image=None)


@pytest.mark.parametrize(("count", "steps"), [(1, [0]), (4, [0, 10, 20, 30]), (11, [0, 20, 40, 60, 80, 100])])
def test_matrices_at_evenly_spaced_steps(count: int, steps: list[int]) -> None:
    matrices = [np.full((3, 3), index / 10) for index in range(count)]
    figure = matrices_figure([10 * index for index in range(count)], matrices, name="soft matrix")
    shown = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in shown] == [f"step {step}" for step in steps]
    for axes, step in zip(shown, steps, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), matrices[step // 10])
        assert axes.images[0].get_clim() == (0, 1)
    assert_nothing_is_cut_off(figure)


def test_scores_of_both_signs_diverge_from_zero_on_one_scale_and_may_have_gaps() -> None:
    matrices = [np.array([[-2.0, np.nan], [np.nan, 1.0]]), np.array([[0.0, np.nan], [np.nan, 5.0]])]
    figure = matrices_figure([0, 1], matrices, name="scores")
    images = [axes.images[0] for axes in figure.axes[:2]]
    assert [image.get_clim() for image in images] == [(-5, 5)] * 2
    red, green, blue, _ = images[0].cmap(images[0].norm(0.0))
    assert min(red, green, blue) > 0.9, "zero is not white"
    positive = matrices_figure([0], [np.array([[1.0, 2.0], [3.0, 4.0]])], name="scores").axes[0].images[0]
    assert positive.get_clim() == (1, 4)


def test_a_matrix_that_stays_is_one_panel() -> None:
    matrices = [np.eye(3) * min(index, 2) for index in range(6)]
    figure = matrices_figure([10 * index for index in range(6)], matrices, name="scores")
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["step 0", "step 10", "step 20 to 50"]


def test_scores_over_time_are_one_line_per_item_coloured_by_its_start() -> None:
    start = np.array([2, 0, 1])
    scores = [np.array([0.0, -1.0, 1.0]), np.array([0.5, 0.0, 0.2])]
    figure = scores_figure([0, 100], scores, start)
    (lines,) = collections(figure, 0, LineCollection)
    by_slot = [segment.tolist() for segment in lines.get_segments()]
    assert by_slot == [[[0, 1.0], [100, 0.2]], [[0, 0.0], [100, 0.5]], [[0, -1.0], [100, 0.0]]]
    assert lines.get_array().tolist() == [0, 1, 2]
    assert_nothing_is_cut_off(figure)
