"""Carry out the orders of sites in a model, without changing what it computes."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from permlab.permutation import check_order
from permlab.sparsity.weight_site import Move, WeightSite

# Module path and, for each stretch of its rows, the first row, the one after the last, and the order of the columns.
_Gathers = dict[str, list[tuple[int, int, Tensor]]]


class GatheredLinear(nn.Linear):
    """Linear layer whose weight has its columns in another order than its input its channels.

    The input is gathered along its last axis first. Rows may fall into consecutive parts with an order
    each, as where queries, keys and values are one layer. Weight and bias are the given layer's own.

    Shapes:
        p: parts, where there are several.  i: input channels.
    Args:
        linear: the layer whose parameters these are, columns already in their new order.
        input_order: int64 `[i]` or `[p, i]`, column j of the weight reads input channel `input_order[..., j]`.
        splits: rows of each part; None for one part.
    Raises:
        ValueError: if the orders are no permutations of the input, or the parts are not all of the rows.
    Cost: one `index_select` for each part on top of the product.
    Example:
        >>> plain = torch.nn.Linear(2, 1)
        >>> gathered = GatheredLinear(plain, torch.tensor([1, 0]))
        >>> torch.equal(gathered(torch.tensor([1.0, 2.0])), plain(torch.tensor([2.0, 1.0])))
        True
    """

    input_order: Tensor

    def __init__(
        self, linear: nn.Linear, input_order: Int64[Tensor, "*p i"], *, splits: Sequence[int] | None = None
    ) -> None:
        # On meta nothing is allocated; the given layer's own parameters take the place of these.
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        check_order(input_order)
        self.splits = tuple(splits) if splits is not None else (linear.out_features,)
        shape = (linear.in_features,) if splits is None else (len(self.splits), linear.in_features)
        if input_order.shape != shape:
            raise ValueError(f"input_order is of shape {shape}, got {tuple(input_order.shape)}")
        if sum(self.splits) != linear.out_features:
            raise ValueError(f"splits={list(self.splits)} are not the {linear.out_features} rows of the layer")
        # A copy: layers that share an order would share memory, which safetensors does not store.
        self.register_buffer("input_order", input_order.to(linear.weight.device, copy=True))

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        if self.input_order.ndim == 1:
            return F.linear(input.index_select(-1, self.input_order), self.weight, self.bias)
        weights = self.weight.split(self.splits)
        biases = [None] * len(weights) if self.bias is None else self.bias.split(self.splits)
        parts = zip(self.input_order, weights, biases, strict=True)
        return torch.cat([F.linear(input.index_select(-1, order), *pair) for order, *pair in parts], dim=-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gathered in {len(self.splits)} part(s)"


def install_gather(
    model: nn.Module, path: str, input_order: Int64[Tensor, "*p i"], *, splits: Sequence[int] | None = None
) -> None:
    """Put a `GatheredLinear` in the place of a linear layer, around the same parameters; hooks on it are lost.

    A model of transformers then refuses `save_pretrained`.

    Args:
        model: changed in place.
        path: of the layer.
        input_order, splits: as in `GatheredLinear`.
    Raises:
        ValueError: if there is no plain linear layer of that name.
    """
    parent, _, leaf = path.rpartition(".")
    try:
        linear = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no layer {path}") from error
    if type(linear) is not nn.Linear:
        raise ValueError(f"{path} is a {type(linear).__name__}; only a plain Linear can be given a gather")
    setattr(model.get_submodule(parent), leaf, GatheredLinear(linear, input_order, splits=splits))
    if hasattr(model, "save_pretrained"):
        # transformers would build it again without its gathers, and so another model, and say nothing.
        model.save_pretrained = _refuse_to_save  # type: ignore[assignment]


def _refuse_to_save(*arguments: object, **options: object) -> None:
    raise ValueError(
        "this model has gathers, which from_pretrained would leave out, and so be another model; keep its export, "
        "which permlab.sparsity.export.as_causal_lm (or load_export) reads, or prune with task.sites=foldable"
    )


def find_gathers(model: nn.Module) -> dict[str, GatheredLinear]:
    """The layers of a model that gather their input, by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GatheredLinear)}


@torch.no_grad()
def fold(model: nn.Module, sites: Sequence[WeightSite], orders: Mapping[str, Tensor]) -> dict[str, str]:
    """Bring the readers' columns of every site into its order, the model computing what it did.

    Where a site has moves, its order is folded: what the channels are the rows of is permuted alike. Where
    it has none, its readers become `GatheredLinear`, unless the order is the identity. Parameters keep
    their identity, tied ones included. On an error the model is as it was.

    Args:
        model: changed in place.
        sites: from `read_sites` of this model or one of the same structure; no two on the same columns.
        orders: int64 order of each site's items, by name.
    Returns:
        `folded` or `gather` for each site, by name; `gather` is what costs time when the model runs.
    Raises:
        ValueError: if an order is missing, belongs to no site or is no permutation, if it leaves a head that
            it has to stay in, if two sites permute the same, or a layer has a gather already.
    Cost: O(size of the permuted parameters).
    Example:
        >>> from permlab.sparsity.site import Move, Reader
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> site = WeightSite("mlp", "mlp", (Reader("2", None),), 4, (Move("0.weight", 0), Move("0.bias", 0)))
        >>> x = torch.rand(3, 2)
        >>> before = mlp(x)
        >>> fold(mlp, [site], {"mlp": torch.tensor([3, 1, 0, 2])})
        {'mlp': 'folded'}
        >>> torch.allclose(mlp(x), before)
        True
    """
    _check_orders(sites, orders)
    _check_claims(model, sites)
    modes: dict[str, str] = {}
    gathers: _Gathers = {}
    for site in sites:
        order = orders[site.name].detach()
        columns = site.column_order(order)
        is_still = torch.equal(columns, torch.arange(len(columns), device=columns.device))
        for reader in site.readers:
            weight = _linear(model, reader.module).weight
            start, stop = reader.rows or (0, len(weight))
            weight[start:stop] = weight[start:stop].index_select(1, columns.to(weight.device))
            if not site.moves and not is_still:
                gathers.setdefault(reader.module, []).append((start, stop, columns))
        _permute_moves(model, site.moves, order)
        modes[site.name] = "folded" if site.moves or is_still else "gather"
    for path, parts in gathers.items():
        _gather_parts(model, path, parts)
    return modes


def _permute_moves(model: nn.Module, moves: Sequence[Move], order: Tensor) -> None:
    done: set[tuple[int, int, int]] = set()
    for move in moves:
        parameter = model.get_parameter(move.tensor)
        key = (id(parameter), move.axis, move.start)
        if key not in done:  # tied parameters have two names
            stretch = parameter.narrow(move.axis, move.start, len(order))
            stretch.copy_(stretch.index_select(move.axis, order.to(parameter.device)))
            done.add(key)


def _gather_parts(model: nn.Module, path: str, parts: list[tuple[int, int, Tensor]]) -> None:
    linear = _linear(model, path)
    still = torch.arange(linear.in_features)
    edges = [0, *(edge for start, stop, _ in sorted(parts, key=_first) for edge in (start, stop)), linear.out_features]
    gaps = [(start, stop, still) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]
    pieces = sorted(parts + gaps, key=_first)
    if len(pieces) == 1:
        install_gather(model, path, pieces[0][2])
    else:
        orders = torch.stack([order.cpu() for _, _, order in pieces])
        install_gather(model, path, orders, splits=[stop - start for start, stop, _ in pieces])


def _first(part: tuple[int, int, Tensor]) -> int:
    return part[0]


def _check_orders(sites: Sequence[WeightSite], orders: Mapping[str, Tensor]) -> None:
    names = [site.name for site in sites]
    if missing := [name for name in names if name not in orders]:
        raise ValueError(f"site {missing[0]} has no order")
    if strange := [name for name in orders if name not in names]:
        raise ValueError(f"the order {strange[0]} belongs to no site")
    for site in sites:
        order = orders[site.name]
        try:
            check_order(order)
        except ValueError as error:
            raise ValueError(f"site {site.name}: {error}") from error
        site.column_order(order)  # raises where the number of items is another
        width = site.num_items // site.num_heads
        if site.moves and not torch.equal(order // width, torch.arange(site.num_items, device=order.device) // width):
            raise ValueError(f"the order of site {site.name} leaves its {site.num_heads} heads, and would not fold")


def _check_claims(model: nn.Module, sites: Sequence[WeightSite]) -> None:
    """Raise where two sites would permute the same entries along the same axis, which has no one order then."""
    claims: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
    for site in sites:
        for key, start, stop, what in sorted(_claims_of(model, site)):
            for other_start, other_stop, other in claims.get(key, []):
                if start < other_stop and other_start < stop and other != site.name:
                    raise ValueError(f"sites {other} and {site.name} both permute {what}")
            claims.setdefault(key, []).append((start, stop, site.name))


def _claims_of(model: nn.Module, site: WeightSite) -> set[tuple[tuple[int, int], int, int, str]]:
    claims = set()
    for reader in site.readers:
        linear = _linear(model, reader.module)
        start, stop = reader.rows or (0, linear.out_features)
        claims.add(((id(linear.weight), 1), start, stop, f"the columns of {reader.module}"))
    for move in site.moves:
        parameter = model.get_parameter(move.tensor)
        # A reader's claim on columns counts rows; a move along columns takes all of them.
        start, stop = (move.start, move.start + site.num_items) if move.axis != 1 else (0, len(parameter))
        claims.add(((id(parameter), move.axis), start, stop, f"axis {move.axis} of {move.tensor}"))
    return claims


def _linear(model: nn.Module, path: str) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no layer {path}") from error
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{path} is a {type(module).__name__}, not a Linear")
    if isinstance(module, GatheredLinear):
        raise ValueError(f"{path} has a gather already; a model is folded once")
    return module
