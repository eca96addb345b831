"""Where input channels of linear layers can be permuted, and what has to move along for the order to cost nothing."""

from permlab.sparsity.block import block_names
from permlab.sparsity.read_sites import read_sites
from permlab.sparsity.stream_site import stream_sites
from permlab.sparsity.weight_site import Move, Reader, WeightSite

__all__ = ["Move", "Reader", "WeightSite", "block_names", "read_sites", "stream_sites"]
