"""Which weights of a model are N:M, and whether they are."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from permlab.sparsity.weight_site import WeightSite

# n, m and, where only some rows of the tensor are pruned, their half-open ranges as `rows`. Of an export under the
# names of a library also `ours`, the tensor's name in the model that was exported.
Pattern = Mapping[str, Any]


def verify_pattern(state: Mapping[str, Tensor], patterns: Mapping[str, Pattern]) -> dict[str, int | float]:
    """Check that of every m consecutive columns at most n are not zero, in every row that is to be pruned.

    Args:
        state: tensors by name, such as a model's state dict or the file of an export.
        patterns: `{"n": .., "m": ..}` by tensor name, with `"rows": [[start, stop], ..]` where not all are pruned.
    Returns:
        `num_tensors`, `num_groups` and `nonzero_fraction` of what was checked.
    Raises:
        ValueError: naming the first tensor that is missing or breaks its pattern, with the place.
    Example:
        >>> verify_pattern({"w": torch.tensor([[1.0, 0.0, 0.0, 2.0]])}, {"w": {"n": 1, "m": 2}})
        {'num_tensors': 1, 'num_groups': 2, 'nonzero_fraction': 0.5}
    """
    num_groups = num_nonzero = num_weights = 0
    for name, pattern in under_names_of(state, patterns).items():
        n, m = int(pattern["n"]), int(pattern["m"])
        if name not in state:
            raise ValueError(f"there is no tensor {name}")
        weight = state[name]
        if weight.shape[1] % m:
            raise ValueError(f"{name}: groups of {m} do not divide {weight.shape[1]} columns")
        for start, stop in pattern.get("rows", [[0, len(weight)]]):
            counts = (weight[start:stop] != 0).unflatten(1, (-1, m)).sum(-1)
            if (counts > n).any():
                row, group = (counts > n).nonzero()[0].tolist()
                raise ValueError(
                    f"{name} is not {n}:{m} in columns {group * m} to {group * m + m - 1} of row {start + row}, "
                    f"which hold {int(counts[row, group])} values that are not zero"
                )
            num_groups += counts.numel()
            num_nonzero += int(counts.sum())
            num_weights += counts.numel() * m
    fraction = num_nonzero / num_weights if num_weights else 0.0
    return {"num_tensors": len(patterns), "num_groups": num_groups, "nonzero_fraction": fraction}


def under_names_of(state: Mapping[str, Tensor], patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """The same patterns, a tensor that the state does not have being called as in the model that was exported."""
    return {name if name in state else pattern.get("ours", name): pattern for name, pattern in patterns.items()}


def read_patterns(sites: Sequence[WeightSite], *, n: int, m: int) -> dict[str, Pattern]:
    """Pattern of every weight that these sites prune, by tensor name.

    Args:
        sites: of one model.
        n, m: n kept of every m consecutive columns.
    Returns:
        What `verify_pattern` takes; rows are named where not all of a weight's are pruned.
    """
    rows: dict[str, list[tuple[int, int] | None]] = {}
    for site in sites:
        for reader in site.readers:
            rows.setdefault(f"{reader.module}.weight", []).append(reader.rows)
    patterns: dict[str, Pattern] = {}
    for name, ranges in rows.items():
        some = sorted(list(stretch) for stretch in ranges if stretch is not None)
        patterns[name] = {"n": n, "m": m} | ({"rows": some} if len(some) == len(ranges) else {})
    return patterns
