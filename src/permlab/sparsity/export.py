"""Everything that leaves with a pruned model: its folder, its like in other libraries, its sparse kernels."""

from permlab.sparsity.export_folder import export, load_export
from permlab.sparsity.interop import as_causal_lm, as_timm
from permlab.sparsity.pattern import read_patterns, verify_pattern
from permlab.sparsity.semi_structured import SemiStructuredLinear, time_layers, to_semi_structured

__all__ = [
    "SemiStructuredLinear",
    "as_causal_lm",
    "as_timm",
    "export",
    "load_export",
    "read_patterns",
    "time_layers",
    "to_semi_structured",
    "verify_pattern",
]
