"""The public door to the searches."""

from permlab.sparsity import search as module


def test_the_door_opens_on_every_search() -> None:
    assert set(module.__all__) == {"deal_and_match", "reconstruction_search", "swap_search"}
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
