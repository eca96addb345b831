"""The public door to what leaves with a pruned model."""

from permlab.sparsity import export as module


def test_the_door_opens_on_every_public_name() -> None:
    assert set(module.__all__) == {
        "SemiStructuredLinear", "as_causal_lm", "as_timm", "export", "load_export", "read_patterns", "time_layers",
        "to_semi_structured", "verify_pattern",
    }  # fmt: skip
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
