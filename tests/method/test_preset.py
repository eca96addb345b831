"""A method by the name of its preset is the one that a run has."""

import pytest
import torch

from permlab.errors import ConfigError
from permlab.method.preset import make_method
from permlab.method.sinkhorn import Sinkhorn
from permlab.permutation import Site, permute


def test_options_are_the_presets_but_for_those_given() -> None:
    method = make_method("sinkhorn_ste", 6, num_iters=3, temperature={"start": 1.0, "end": 0.5})
    assert isinstance(method, Sinkhorn)
    assert method.estimator == "straight_through"
    assert method.num_iters == 3
    assert method.temperature == 1.0
    assert make_method("sinkhorn", 6).estimator == "relaxed"


def test_a_site_brings_its_starting_order_and_groups() -> None:
    site = Site("tokens", torch.tensor([1, 0, 3, 2]), num_groups=2)
    method = make_method("sort_ste", site)
    assert method.best().tolist() == [1, 0, 3, 2]
    sample = method(torch.randn(2, 4, 3), generator=torch.Generator().manual_seed(0))
    permute(torch.randn(2, 4, 3), sample).sum().backward()
    assert any(parameter.grad is not None for parameter in method.parameters())


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("sinkhron", {}, "method=sinkhron: no such choice; nearest valid choice: sinkhorn"),
        ("sinkhorn", {"num_itres": 3}, "method.num_itres=3: unknown key; nearest valid choice: method.num_iters"),
        ("sinkhorn", {"temperature": -1}, "method.temperature=-1: expected a number >= 0"),
        (
            "sinkhorn",
            {"freeze_fraction": 0.9, "warmup_fraction": 0.2},
            "method.freeze_fraction=0.9: with method.warmup",
        ),
    ],
)
def test_wrong_names_and_values_are_named(preset: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(preset, 4, **options)
