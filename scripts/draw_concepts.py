"""Draws the pictures of docs/concepts.md from what the package's own functions compute.

    python scripts/draw_concepts.py            # all of them
    python scripts/draw_concepts.py phases     # some

A function here is a picture of its name: docs/images/concept_<name>.png, for pages, and .svg, for print.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from permlab.data.digits import Digits
from permlab.figure.style import PALETTE, new_figure, style
from permlab.method.reorder import Reorder
from permlab.method.sinkhorn import Sinkhorn
from permlab.ops.assignment import assign
from permlab.ops.nm import nm_mask
from permlab.ops.scan_order import scan_order
from permlab.ops.sinkhorn import sinkhorn
from permlab.permutation import PermutationSample, Site, invert, order_to_matrix, permute

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
DPI = 200
BLUE, RED, GREEN, PINK, AMBER, SKY, BLACK = PALETTE
GREY, PALE = "#6b6b6b", "#e6e6e6"
# Colours of items, which keep them wherever they go.
ITEMS = (BLUE, AMBER, GREEN, RED, PINK, SKY)
LETTERS = "abcdefgh"
MASS = LinearSegmentedColormap.from_list("mass", ["white", BLUE])
SIGNED = LinearSegmentedColormap.from_list("signed", [RED, "white", BLUE])


# Strokes


def blank(axes: Axes, width: float, height: float, title: str = "") -> Axes:
    """A canvas of so many units, y downwards, without a frame."""
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.axis("off")
    axes.set_title(title)
    return axes


def ink(colour: object) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = to_rgb(colour)  # type: ignore[arg-type]
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"


def cell(axes: Axes, x: float, y: float, text: object = "", colour: object = "white", *, size: float = 1.0) -> None:
    """A square with its upper left corner at a place."""
    edge = "white" if colour != "white" else GREY
    axes.add_patch(Rectangle((x, y), size, size, facecolor=colour, edgecolor=edge, linewidth=1.2))  # type: ignore[arg-type]
    axes.text(x + size / 2, y + size / 2, str(text), ha="center", va="center", color=ink(colour), fontsize=10)


def arrow(
    axes: Axes, begin: tuple[float, float], end: tuple[float, float], colour: str = GREY, **settings: object
) -> None:
    defaults = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.4, "shrinkA": 2, "shrinkB": 2}
    axes.add_patch(FancyArrowPatch(begin, end, color=colour, **{**defaults, **settings}))  # type: ignore[arg-type]


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str = PALE) -> None:
    shape = f"round,pad=0,rounding_size={0.12}"
    patch = FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=colour, edgecolor="none")
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink(colour), fontsize=10)


def matrix(
    axes: Axes, values: Tensor, *, signed: bool = False, digits: int | None = 2, largest: float | None = None
) -> None:
    """Entries as colours and numbers, row = slot, column = item."""
    top = largest or max(float(values.abs().max()), 1e-9)
    norm = Normalize(-top, top) if signed else Normalize(0, top)
    colours = SIGNED if signed else MASS
    axes.imshow(values.numpy(), cmap=colours, norm=norm)
    rows, columns = values.shape
    for row in range(rows):
        for column in range(columns):
            value = float(values[row, column])
            text = "" if digits is None else f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
            text = "0" if value == 0 else text
            colour = ink(colours(norm(value)))
            axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=colour)
    axes.add_patch(Rectangle((-0.5, -0.5), columns, rows, fill=False, edgecolor="#c8c8c8", linewidth=1.0))
    axes.set_xticks(range(columns), LETTERS[:columns])
    axes.set_yticks(range(rows), range(rows))
    axes.tick_params(length=0, pad=2)
    axes.xaxis.tick_top()
    for spine in axes.spines.values():
        spine.set_visible(False)


# Pictures


def order() -> Figure:
    """The same permutation as an order, a rank and a matrix."""
    order = torch.tensor([2, 4, 1, 0, 3])
    rank, hard = invert(order), order_to_matrix(order)
    figure = new_figure(9.4, 3.5)
    left, right = figure.subplots(1, 2, width_ratios=[1.75, 1])
    blank(left, 9.6, 5.2)
    for item in range(5):
        slot = int(rank[item])
        cell(left, 2.4 + 1.4 * item, 0.9, LETTERS[item], ITEMS[item])
        cell(left, 2.4 + 1.4 * slot, 3.5, LETTERS[item], ITEMS[item])
        arrow(left, (2.9 + 1.4 * item, 1.95), (2.9 + 1.4 * slot, 3.45), ITEMS[item], linewidth=1.8)
    for place in range(5):
        centre = 2.9 + 1.4 * place
        left.text(centre, 0.68, f"{place}", ha="center", va="bottom", fontsize=9, color=GREY)
        left.text(centre, 4.72, f"{place}", ha="center", va="top", fontsize=9, color=GREY)
    for y, name in ((1.4, "items  x"), (4.0, "slots  y")):
        left.text(2.1, y, name, ha="right", va="center", fontsize=11, weight="bold")
    for y, edge in ((0.68, "bottom"), (4.72, "top")):
        left.text(2.1, y, "index", ha="right", va=edge, fontsize=9, color=GREY)
    left.set_title(
        f"order = {order.tolist()}:  slot i takes item order[i]\nrank = {rank.tolist()}:  item j goes to slot rank[j]",
        fontsize=10.5,
    )
    matrix(right, hard, digits=0)
    right.set(xlabel="column = item", ylabel="row = slot")
    right.xaxis.set_label_position("top")
    for item, label in enumerate(right.get_xticklabels()):
        label.set(color=ITEMS[item], weight="bold")
    right.set_title("matrix:  y = matrix @ x", fontsize=10.5)
    return figure


def site() -> Figure:
    """Where permutations act: at the items of an input, and at the channels that linear layers read."""
    figure = new_figure(9.4, 6.6)
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 1.02])
    _site_of_items(blank(top, 22, 7.2, "a site at the items of the input: 16 patches of a digit"))
    _site_of_weights(blank(bottom, 22, 7.4, "a site at the weights: 8 input channels of a linear layer, pruned to 2:4"))
    return figure


def _site_of_items(axes: Axes) -> None:
    image = Digits(val_fraction=0.2, test_fraction=0.2).dataset("test", 0).inputs[0][0]
    patches = [part for rows in image.split(2) for part in rows.split(2, dim=1)]
    start, other = scan_order("row", 4, 4), scan_order("spiral", 4, 4)
    axes.imshow(image.numpy(), cmap="gray_r", extent=(0, 4, 5.4, 1.4), vmin=0, vmax=1)
    for line in range(5):
        axes.plot([0, 4], [1.4 + line, 1.4 + line], color=SKY, linewidth=0.8)
        axes.plot([line, line], [1.4, 5.4], color=SKY, linewidth=0.8)
    for y, order in ((1.4, start), (4.4, other)):
        for slot, item in enumerate(order.tolist()):
            x = 5.6 + 0.75 * slot
            axes.imshow(patches[item].numpy(), cmap="gray_r", extent=(x, x + 0.65, y + 0.65, y), vmin=0, vmax=1)
            axes.add_patch(Rectangle((x, y), 0.65, 0.65, facecolor="none", edgecolor=SKY, linewidth=0.8))
            axes.text(x + 0.32, y + 1.0, f"{item}", ha="center", va="center", fontsize=8, color=GREY)
    axes.set(xlim=(0, 22), ylim=(7.2, 0))
    rank = invert(other)
    for slot, item in enumerate(start.tolist()):
        arrow(axes, (5.92 + 0.75 * slot, 2.65), (5.92 + 0.75 * int(rank[item]), 4.35), PALETTE[0], linewidth=0.8)
    axes.text(11.6, 0.85, "items, in the starting order (row)", ha="center", fontsize=10)
    axes.text(11.6, 6.1, "items in the method's order (here: spiral)", ha="center", fontsize=10)
    axes.text(2.0, 0.85, "embed cuts it", ha="center", fontsize=10)
    arrow(axes, (4.1, 1.75), (5.5, 1.75))
    box(axes, 18.4, 2.75, 3.0, 1.1, "method", SKY)
    arrow(axes, (18.3, 3.3), (17.4, 3.3))
    box(axes, 18.4, 4.2, 3.0, 1.1, "encode, head", PALE)
    arrow(axes, (17.5, 4.75), (18.3, 4.75))


WEIGHTS = [
    [0.9, 0.8, 0.7, 0.2, 0.1, 0.3, 0.2, 0.6],
    [0.8, 0.6, 0.9, 0.1, 0.3, 0.2, 0.5, 0.1],
    [0.2, 0.1, 0.3, 0.8, 0.9, 0.6, 0.7, 0.2],
    [0.7, 0.9, 0.5, 0.3, 0.2, 0.1, 0.1, 0.8],
]


def best_grouping(scores: Tensor) -> Tensor:
    """The order of eight channels under which 2:4 keeps most, of all ways to make two fours of them."""
    groups = [torch.tensor(part) for part in torch.combinations(torch.arange(1, 8), 3).tolist()]
    orders = []
    for part in groups:
        first = torch.cat([torch.zeros(1, dtype=torch.int64), part])
        rest = torch.tensor([channel for channel in range(8) if channel not in first.tolist()])
        orders.append(torch.cat([first, rest]))
    return max(orders, key=lambda order: kept(scores, order))


def kept(scores: Tensor, order: Tensor) -> float:
    """Share of the scores that 2:4 keeps in this order of the channels."""
    ordered = scores[:, order]
    return float((ordered * nm_mask(ordered, n=2, m=4)).sum() / scores.sum())


def _site_of_weights(axes: Axes) -> None:
    weights = torch.tensor(WEIGHTS)
    start, best = torch.arange(8), best_grouping(weights)
    for x, order, name in ((0.6, start, "as they are"), (13.0, best, "in the best order")):
        ordered = weights[:, order]
        mask = nm_mask(ordered, n=2, m=4)
        for row in range(4):
            for slot in range(8):
                value = float(ordered[row, slot])
                left = x + slot + (0.25 if slot >= 4 else 0.0)
                colour = MASS(value) if mask[row, slot] else "white"
                axes.add_patch(Rectangle((left, 1.7 + row), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.2))
                shade = ink(colour) if mask[row, slot] else "#a0a0a0"
                axes.text(left + 0.5, 2.2 + row, f"{value:.1f}", ha="center", va="center", fontsize=9, color=shade)
                if row == 0:
                    letter = LETTERS[int(order[slot])]
                    axes.text(left + 0.5, 1.4, letter, ha="center", va="center", fontsize=10, weight="bold")
        for left in (x, x + 4.25):
            axes.add_patch(Rectangle((left, 1.7), 4, 4, facecolor="none", edgecolor=GREY, linewidth=1.2))
        axes.text(x + 4.1, 0.6, f"channels {name}", ha="center", va="center", fontsize=10)
        axes.text(
            x + 4.1, 6.35, f"kept {kept(weights, order):.0%}", ha="center", va="center", fontsize=11, weight="bold"
        )
    arrow(axes, (9.5, 3.7), (12.7, 3.7), BLUE, linewidth=2)
    axes.text(11.1, 3.2, f"order\n{''.join(LETTERS[item] for item in best)}", ha="center", va="bottom", fontsize=10)
    axes.text(0.2, 3.7, "outputs", ha="center", va="center", rotation=90, fontsize=9, color=GREY)
    axes.text(
        11.0,
        7.15,
        "of every four channels in a row, each output keeps its two largest weights",
        ha="center",
        fontsize=9,
    )


SCORES = [[0.2, 0.9, 0.1, 0.3], [0.3, 0.7, 0.8, 0.2], [0.9, 0.2, 0.3, 0.4], [0.1, 0.4, 0.6, 0.5]]


def method() -> Figure:
    """A table of scores on its way to an order: the colder, the harder."""
    scores = torch.tensor(SCORES)
    figure = new_figure(9.4, 2.5)
    axes = figure.subplots(1, 5)
    matrix(axes[0], scores, digits=1)
    axes[0].set_title("scores", fontsize=10.5)
    for each, temperature in zip(axes[1:4], (1.0, 0.2, 0.05), strict=True):
        soft = sinkhorn(scores, temperature=temperature, num_iters=50)
        matrix(each, soft, largest=1.0)
        each.set_title(f"temperature {temperature:g}", fontsize=10.5)
    order = assign(scores)
    matrix(axes[4], order_to_matrix(order), digits=0)
    axes[4].set_title("hard", fontsize=10.5)
    notes = ("what is learned", "", "soft: rows and columns sum to 1", "", f"order {order.tolist()}")
    for each, note in zip(axes, notes, strict=True):
        each.set_xlabel(note, fontsize=9.5, labelpad=6)
    axes[0].set_ylabel("slot")
    return figure


VALUES = [0.3, 1.0, 0.7, 0.0]


def pulls() -> dict[str, dict[str, Tensor]]:
    """Forward and backward of the three estimators on one task: four items are to be brought into rising order.

    The loss is the squared distance of what the model sees from the items in rising order.
    """
    x = torch.tensor(VALUES).unsqueeze(-1)
    target = x.sort(dim=0).values
    found = {}
    for estimator in ("relaxed", "straight_through"):
        scores = torch.tensor(SCORES, requires_grad=True)
        soft, order = sinkhorn(scores, temperature=0.2, num_iters=50), assign(scores.detach())
        y = permute(x, PermutationSample(order=order, soft=soft, log_prob=None, estimator=estimator))  # type: ignore[arg-type]
        loss = (y - target).square().sum()
        loss.backward()
        forward = soft.detach() if estimator == "relaxed" else order_to_matrix(order)
        found[estimator] = {"forward": forward, "y": y.detach(), "loss": loss.detach(), "gradient": scores.grad}
    site = Site(name="items", order=torch.arange(4))
    law = {"baseline": "leave_one_out", "baseline_momentum": 0.9, "temperature_in_log_prob": True}
    times = {"temperature": 1.0, "lr": 0.1, "warmup_fraction": 0.0, "freeze_fraction": 0.0}
    drawing = Reorder(site, spread=1.0, num_samples=4, granularity="batch", **times, **law)  # type: ignore[arg-type]
    sample = drawing(x.unsqueeze(0), generator=torch.Generator().manual_seed(1))
    reward = -(permute(x.unsqueeze(0), sample) - target).square().sum((-2, -1))
    advantage = drawing.advantage(reward)
    (-(advantage * sample.log_prob).sum()).backward()
    found["score_function"] = {
        "forward": sample.order.squeeze(1),
        "loss": -reward.squeeze(1),
        "advantage": advantage.squeeze(1),
        "gradient": drawing.logits.grad.unsqueeze(0),  # type: ignore[union-attr]
    }
    return found


def estimator() -> Figure:
    """What flows forward, and what comes back, for each estimator."""
    found = pulls()
    figure = new_figure(9.4, 8.0)
    values = ", ".join(f"{name} = {value:g}" for name, value in zip(LETTERS, VALUES, strict=False))
    figure.suptitle(f"task: bring {values} into rising order;  solid: forward, dashed: the gradient", fontsize=10)
    figure.get_layout_engine().set(hspace=0.1, h_pad=0.08)  # type: ignore[union-attr]
    grid = figure.subplots(3, 3, width_ratios=[2.05, 1, 1])
    drawings = (_flow_of_relaxed, _flow_of_straight_through, _flow_of_score_function)
    for row, (name, draw) in enumerate(zip(found, drawings, strict=True)):
        draw(blank(grid[row, 0], 12, 5.4))
        grid[row, 0].set_title(name, fontsize=11.5, weight="bold", loc="left")
        _forward(grid[row, 1], name, found[name])
        matrix(grid[row, 2], -found[name]["gradient"], signed=True)
        grid[row, 2].set_title("back: pull on the scores" if row < 2 else "back: pull on the logits", fontsize=10)
    grid[2, 2].set_yticks([])
    return figure


def _forward(axes: Axes, name: str, found: dict[str, Tensor]) -> None:
    if name != "score_function":
        matrix(axes, found["forward"], largest=1.0, digits=2 if name == "relaxed" else 0)
        axes.set_title(f"forward: {'soft' if name == 'relaxed' else 'hard'}, loss {found['loss']:.2f}", fontsize=10)
        return
    blank(axes, 4, 4, "forward: 4 draws")
    axes.title.set_fontsize(10)
    axes.set(xlim=(-0.2, 6.6), ylim=(4.1, -0.8))
    for x, text in ((4.75, "loss"), (6.0, "adv.")):
        axes.text(x, -0.3, text, ha="center", va="center", fontsize=8.5, color=GREY)
    for draw, order in enumerate(found["forward"].tolist()):
        for slot, item in enumerate(order):
            cell(axes, slot, draw, LETTERS[item], ITEMS[item])
        axes.text(4.75, draw + 0.5, f"{found['loss'][draw]:.2f}", ha="center", va="center", fontsize=8.5)
        axes.text(6.0, draw + 0.5, f"{found['advantage'][draw]:+.2f}", ha="center", va="center", fontsize=8.5)


FORWARD, BACK = BLACK, RED


def _chain(
    axes: Axes, y: float, names: Sequence[str], *, widths: Sequence[float], gap: float = 0.75
) -> list[tuple[float, float]]:
    """Boxes in a row with arrows between them; where each begins and ends."""
    places, x = [], 0.1
    for name, width in zip(names, widths, strict=True):
        box(axes, x, y, width, 1.1, name)
        places.append((x, x + width))
        x += width + gap
    for (_, begin), (end, _) in itertools.pairwise(places):
        arrow(axes, (begin, y + 0.4), (end, y + 0.4), FORWARD)
    return places


def _legend(axes: Axes, y: float, text: str) -> None:
    axes.text(0.1, y, text, fontsize=9.5, va="top", color=GREY, linespacing=1.35)


def _back(axes: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    arrow(axes, begin, end, BACK, linestyle=(0, (4, 2)))


def _flow_of_relaxed(axes: Axes) -> None:
    places = _chain(axes, 1.0, ("scores", "soft", "soft @ x", "loss"), widths=(2.1, 1.8, 2.4, 1.6))
    for (begin, _), (_, end) in zip(places[1:], places, strict=False):
        _back(axes, (begin, 1.85), (end, 1.85))
    _legend(
        axes,
        2.7,
        "The model sees mixtures of items. The gradient is exact,\nfor mixtures; the hard order is another input.",
    )


def _flow_of_straight_through(axes: Axes) -> None:
    places = _chain(axes, 0.4, ("scores", "order", "x[order]", "loss"), widths=(2.1, 1.8, 2.4, 1.6))
    box(axes, places[1][0], 2.1, 1.8, 1.1, "soft")
    _back(axes, (places[3][0], 1.3), (places[2][1], 1.3))
    _back(axes, (places[2][0] + 1.2, 1.5), (places[1][1], 2.65))
    _back(axes, (places[1][0], 2.65), (places[0][0] + 1.05, 1.5))
    _legend(axes, 3.7, "The model sees items in a true order. The gradient comes\nback as if it had seen soft @ x.")


def _flow_of_score_function(axes: Axes) -> None:
    places = _chain(axes, 0.4, ("logits", "draws", "x[order]", "loss"), widths=(2.1, 1.8, 2.4, 1.6))
    box(axes, places[1][0] - 0.35, 2.1, 2.5, 1.1, "log_prob")
    _back(axes, (places[3][0] + 0.8, 1.5), (places[1][1] + 0.35, 2.65))
    axes.text(places[2][1] - 0.1, 2.75, "advantage", color=BACK, fontsize=9, va="center", ha="center")
    _back(axes, (places[1][0] - 0.35, 2.65), (places[0][0] + 1.05, 1.5))
    _legend(
        axes,
        3.7,
        "The model sees drawn orders. Nothing flows through it:\norders better than the others become more likely.",
    )


def phases() -> Figure:
    """Temperature over the three phases, and what a method hands on at five moments."""
    site = Site(name="items", order=torch.arange(4))
    times = {"temperature": {"kind": "exponential", "start": 0.5, "end": 0.03}, "lr": 0.1}
    torch.manual_seed(0)
    learner = Sinkhorn(
        site, **times, warmup_fraction=0.15, freeze_fraction=0.3, estimator="relaxed", num_iters=50, noise=0.0,
        start="order", start_scale=1.0, jitter=0.0, cost="table", width=1,
    )  # fmt: skip
    with torch.no_grad():
        learner.table.copy_(torch.tensor([SCORES]))
    num_steps, seen = 1000, {}
    for step in range(num_steps):
        learner.advance(step, num_steps)
        seen[step] = (learner.phase, learner.temperature)
    figure = new_figure(9.4, 4.6)
    rows = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    axes = rows[0].subplots()
    _bands(axes, seen)
    axes.set(xlabel="optimiser step", ylabel="temperature", xlim=(0, num_steps), ylim=(0, 0.56))
    moments = (75, 150, 425, 699, 850)
    for moment, letter in zip(moments, "ABCDE", strict=True):
        learner.advance(moment, num_steps)
        active = learner.phase == "active"
        height = learner.temperature if active else 0.25
        face, text = (BLUE, "white") if active else ("white", BLUE)  # hollow: the temperature has no say there
        axes.plot(moment, height, "o", markeredgecolor=BLUE, markerfacecolor=face, markersize=15, zorder=3)
        axes.text(moment, height, letter, ha="center", va="center", color=text, fontsize=9, weight="bold", zorder=4)
    for each, moment, letter in zip(rows[1].subplots(1, 5), moments, "ABCDE", strict=True):
        learner.advance(moment, num_steps)
        sample = learner.train()()
        shown = sample.soft if sample.soft is not None else order_to_matrix(sample.order)
        matrix(each, shown.detach(), largest=1.0, digits=2 if sample.soft is not None else 0)
        what = {"warmup": "starting order", "frozen": "learned order"}.get(
            learner.phase, f"temperature {learner.temperature:.2f}"
        )
        each.set_title(f"{letter}  {what}", fontsize=9.5)
    return figure


def _bands(axes: Axes, seen: dict[int, tuple[str, float]]) -> None:
    """A band for each phase, and the temperature where it counts."""
    tints = {"warmup": AMBER, "active": SKY, "frozen": GREEN}
    notes = {"warmup": "starting order", "active": "samples, learns, cools", "frozen": "learned order, hard"}
    for phase, tint in tints.items():
        steps = [step for step, (name, _) in seen.items() if name == phase]
        axes.axvspan(steps[0], steps[-1] + 1, color=tint, alpha=0.22, linewidth=0)
        middle = (steps[0] + steps[-1]) / 2
        axes.text(middle, 0.53, phase, ha="center", va="top", fontsize=11, weight="bold")
        axes.text(middle, 0.475, notes[phase], ha="center", va="top", fontsize=9)
        if phase == "active":
            axes.plot(steps, [seen[step][1] for step in steps], color=BLUE, linewidth=2.2)


PICTURES = {each.__name__: each for each in (order, site, method, estimator, phases)}


def main(names: Sequence[str]) -> None:
    """Draw and save."""
    for name in names or PICTURES:
        with matplotlib.rc_context(style() | {"svg.hashsalt": "permlab"}):
            figure = PICTURES[name]()
            around = {"bbox_inches": "tight", "pad_inches": 0.12}
            figure.savefig(IMAGES / f"concept_{name}.png", dpi=DPI, metadata={"Software": None}, **around)
            figure.savefig(IMAGES / f"concept_{name}.svg", metadata={"Date": None}, **around)


if __name__ == "__main__":
    main(sys.argv[1:])
