"""Structured sparsity: importance of weights, channel orders, N:M pruning, folding and export."""
