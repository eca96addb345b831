"""The public door to sites."""

from permlab.sparsity import site as module


def test_the_door_opens_on_every_name() -> None:
    assert set(module.__all__) == {"Move", "Reader", "WeightSite", "block_names", "read_sites", "stream_sites"}
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
