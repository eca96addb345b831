"""Searches for the order of a weight's input channels that suits an N:M mask best.

`deal_and_match` and `swap_search` maximise the score that the mask retains, `reconstruction_search`
minimises what the layer's output loses.
"""

from permlab.sparsity.reconstruction_search import reconstruction_search
from permlab.sparsity.retained_search import deal_and_match, swap_search

__all__ = ["deal_and_match", "reconstruction_search", "swap_search"]
