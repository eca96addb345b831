import itertools

import pytest
import torch
from torch.nn import functional

from permlab.data.spec import DataSpec
from permlab.model.ssm_probe import SsmProbe

SPEC = DataSpec(kind="image", num_classes=5, channels=2, height=4, width=6)
READOUTS, DIRECTIONS, POSITIONS = ("last", "mean"), ("forward", "bidirectional"), ("none", "item", "slot")


def probe(**changes):
    options = {"patch_size": 2, "num_states": 4, "dt_min": -5.0, "dt_max": 0.5}
    options |= {"position": "none", "readout": "last", "direction": "forward"}
    return SsmProbe(SPEC, **(options | changes))


def sequential_states(items, decay, weight):
    """State after each slot, one step at a time."""
    state, states = torch.zeros(len(items), len(decay), dtype=items.dtype), []
    for item in items.unbind(1):
        state = decay * state + item @ weight.T
        states.append(state)
    return torch.stack(states, 1)


@pytest.mark.parametrize(("readout", "direction"), [*itertools.product(READOUTS, DIRECTIONS)])
def test_the_weighted_sum_is_the_recurrence(readout, direction):
    model = probe(readout=readout, direction=direction).double()
    items = torch.randn(3, 6, 8, dtype=torch.float64)
    passes = [items, items.flip(1)] if direction == "bidirectional" else [items]
    # The rate of the recurrence has the floor that keeps a slow decay below one.
    decays = (-functional.softplus(model.dt) - 1e-6).exp()
    states = [sequential_states(*parts) for parts in zip(passes, decays, model.weight, strict=True)]
    read = [state[:, -1] if readout == "last" else state.mean(1) for state in states]
    expected = model.head(model.norm(torch.cat(read, -1)))
    torch.testing.assert_close(model.read(items), expected, rtol=1e-10, atol=1e-10)


def test_the_floor_of_the_rate_does_not_show_in_a_trained_range():
    model = probe().double()
    expected = torch.exp(-functional.softplus(torch.linspace(-5, 0.5, 4)))
    torch.testing.assert_close(model.decay[0].float(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("dt", [-1e4, -200.0, -20.0, 0.0, 20.0, 200.0, 1e4])
def test_stable_for_any_parameter_value(dt, readout):
    model = probe(readout=readout)
    with torch.no_grad():
        model.dt.fill_(dt)
    assert (model.decay < 1).all()
    assert (model.decay >= 0).all()
    weights = model.slot_weights(2000)
    assert weights.isfinite().all()
    assert weights.abs().max() <= 1
    model(torch.rand(3, 2, 4, 6)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_initial_memories_span_the_configured_range():
    model = probe(num_states=3, dt_min=-2.0, dt_max=1.0, direction="bidirectional")
    torch.testing.assert_close(model.dt, torch.tensor([[-2.0, -0.5, 1.0]]).repeat(2, 1))


@pytest.mark.parametrize(("readout", "direction", "position"), [*itertools.product(READOUTS, DIRECTIONS, POSITIONS)])
def test_gradients_agree_with_finite_differences(readout, direction, position):
    model = probe(num_states=2, readout=readout, direction=direction, position=position).double()
    items = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    # gradcheck perturbs the parameters in place, so the closure need not take them.
    assert torch.autograd.gradcheck(
        lambda items, *parameters: model.read(items), (items, *model.parameters()), fast_mode=True
    )


@pytest.mark.parametrize(("readout", "direction", "position"), [*itertools.product(READOUTS, DIRECTIONS, POSITIONS)])
def test_the_logits_depend_on_the_order(readout, direction, position):
    model = probe(readout=readout, direction=direction, position=position).double()
    items = model.embed(torch.rand(3, 2, 4, 6, dtype=torch.float64))
    swapped = items[:, [0, 1, 3, 2, 4, 5]]
    assert (model.read(items) - model.read(swapped)).abs().max() > 1e-3


def test_positions_travel_with_the_item_or_stay_with_the_slot():
    images, order = torch.rand(3, 2, 4, 6), torch.tensor([4, 2, 0, 1, 5, 3])
    for position, places in (("item", order), ("slot", torch.arange(6))):
        model = probe(position=position)
        plain = probe()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "position_table"})
        expected = plain.read(plain.embed(images)[:, order] + model.position_table[places])
        torch.testing.assert_close(model.read(model.embed(images)[:, order]), expected)


def test_items_are_the_pixels_themselves():
    images = torch.rand(2, 2, 4, 6)
    items = probe().embed(images)
    assert items.shape == (2, 6, probe().num_features)
    torch.testing.assert_close(items[:, 4], images[:, :, 2:4, 2:4].flatten(1), rtol=0, atol=0)


def test_bfloat16_keeps_a_slow_decay_below_one():
    model = probe(dt_min=-9.0, num_states=8)
    images = torch.rand(4, 2, 4, 6)
    expected = model(images)
    model = model.bfloat16()
    result = model(images.bfloat16())
    assert result.dtype == torch.bfloat16
    assert (model.decay < 1).all()
    torch.testing.assert_close(result.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("position", POSITIONS)
def test_gradients_reach_every_parameter(position):
    model = probe(position=position, direction="bidirectional")
    model(torch.rand(3, 2, 4, 6)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_the_seed_fixes_the_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(probe(position="item").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_memories_and_positions_are_left_out_of_weight_decay():
    model = probe(position="slot")
    marked = {name for name, parameter in model.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert marked == {"dt", "position_table"}


def test_a_reversed_range_is_refused():
    with pytest.raises(ValueError, match=r"dt_min 1.0 exceeds dt_max 0.0"):
        probe(dt_min=1.0, dt_max=0.0)


def test_a_single_state_is_refused_since_its_norm_is_constant():
    with pytest.raises(ValueError, match="num_states=1: the layer norm"):
        probe(num_states=1)
    assert probe(num_states=1, direction="bidirectional")(torch.rand(1, 2, 4, 6)).shape == (1, 5)
