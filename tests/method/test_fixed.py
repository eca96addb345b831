from pathlib import Path

import torch

import permlab.method
from permlab.method.fixed import Fixed
from permlab.option import options_of
from permlab.permutation import Site


def test_keeps_the_start_in_every_phase_and_learns_nothing():
    order = torch.tensor([2, 0, 3, 1])
    method = Fixed(Site(name="site", order=order))
    for step in range(10):
        method.advance(step, 10)
        sample = method(torch.randn(5, 4, 2))
        assert torch.equal(sample.order, order)
        assert sample.estimator == "none"
    assert torch.equal(method.eval()().order, order)
    assert not list(method.parameters())
    assert not method.state_dict()
    assert method.entropy() == 0


def test_has_no_options():
    assert options_of(Path(permlab.method.__file__).parent / "fixed.py", "Fixed") == {}
