"""A model run block after block: what flows into the layers of one, which is then left behind, pruned or not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from permlab.sparsity.calibrate import Forward, InputStatistics, Recorder, on_inputs
from permlab.sparsity.offload import Waiting

# What a visitor is told: the block's path, and the statistics of the layers in it.
Visit = Callable[[str, dict[str, InputStatistics]], Mapping[str, Tensor] | None]


@torch.no_grad()
def walk(
    forward: Forward,
    model: nn.Module,
    blocks: Sequence[str],
    modules: Mapping[str, nn.Module],
    batches: Sequence[Any],
    visit: Visit,
    *,
    behind: bool = False,
    waiting: Waiting | None = None,
    end: Callable[[int, Any], None] | None = None,
) -> None:
    """Collect the statistics of a model's layers block by block, and let the visitor say how to go on.

    A block in half precision computes in float32 while it is visited; the others wait as they are,
    and so do the activations between two blocks, on the CPU or in a file. What a model does outside
    of its blocks is done again for each of them, up to the block, which takes next to nothing.

    Args:
        forward: runs the model on a batch. Every block is called once, with the hidden states first, and what
            comes between two blocks depends on no block but the one before.
        model: holds the blocks.
        blocks: their paths; those that the forward pass does not call are left out.
        modules: layers in the blocks, by path, whose inputs are wanted.
        batches: inputs of the model.
        visit: is called for every block with the statistics of its layers, in the order of the forward pass.
            With `behind` it returns weights by their names in the model, behind which the next block is
            visited; without, what it returns is not looked at and the next comes behind the dense block.
        behind: whether to go on behind those weights: Wanda's and SparseGPT's programs prune a block before they
            look at the next.
        waiting: where activations wait.
        end: is called for every batch, by its number, with what the model gives behind all blocks as they were
            left. None where nobody wants it, which saves what comes behind the last block.
    Raises:
        ValueError: as `collect`.
    Source: Frantar and Alistarh 2023, arXiv:2301.00774, and Sun et al. 2024, arXiv:2306.11695, whose programs
        walk like this.
    Differs from source: any model whose blocks are called by its own forward pass; one pass less for the last block.
    Cost: a pass of the model, and with `behind` nearly a second one.
    """
    walker = Walker(forward, model, blocks, batches, waiting=waiting)
    seen: set[str] = set()
    for path in walker:
        inside = {name: module for name, module in modules.items() if name.startswith(f"{path}.")}
        record, is_needed = Recorder(), end is not None or not walker.is_last
        with on_inputs(inside, record):
            walker.run(keep=is_needed and not behind)
        statistics = record.statistics()
        seen |= set(statistics)
        weights = visit(path, statistics)
        if behind and is_needed:
            with exchanged(model, weights or {}):
                walker.run(keep=True)
    for name in modules:
        if name not in seen:
            raise ValueError(f"layer {name} was not called in the forward pass")
    if end is not None:
        for index in range(len(batches)):
            end(index, walker.output(index))


class _ReachedError(Exception):
    """The block that is visited has computed what was wanted of it."""


class Walker:
    """The blocks of a model in the order in which its forward pass calls them, each run with what the last has left.

    Args:
        forward, model, blocks, batches, waiting: as in `walk`.
    Raises:
        ValueError: if there is no batch.
    """

    def __init__(
        self,
        forward: Forward,
        model: nn.Module,
        blocks: Sequence[str],
        batches: Sequence[Any],
        *,
        waiting: Waiting | None = None,
    ) -> None:
        if not batches:
            raise ValueError("the calibration set is empty")
        self.forward, self.batches = forward, batches
        self.waiting = Waiting() if waiting is None else waiting
        self.blocks = {path: model.get_submodule(path) for path in blocks}
        self.done: list[str] = []
        self._rest: tuple[Any, ...] | None = None  # what a block returns beside its hidden states

    @property
    def is_last(self) -> bool:
        return len(self.done) + 1 == len(self.blocks)

    def __iter__(self) -> Iterator[str]:
        while len(self.done) < len(self.blocks):
            path = self._run(0, None)
            if not isinstance(path, str):
                return  # the model does not call the blocks that are left
            self._here = path
            yield path
            self.done.append(path)
            for index in range(len(self.batches)):
                self.waiting.drop(f"{len(self.done) - 1}.{index}")

    @torch.no_grad()
    def run(self, *, keep: bool) -> None:
        """Run the block on every batch; with `keep` its outputs are what comes behind it is given."""
        block = self.blocks[self._here]
        with _widened(block):
            for index in range(len(self.batches)):
                output = self._run(index, block)
                if keep:
                    first, *rest = output if isinstance(output, tuple) else (output,)
                    self._rest = tuple(rest) if isinstance(output, tuple) else None
                    self.waiting.put(f"{len(self.done) + 1}.{index}", first)

    @torch.no_grad()
    def output(self, index: int) -> Any:
        """What the model gives for a batch behind all of its blocks."""
        return self._run(index, None, to_the_end=True)

    def _left(self, index: int, dtype: torch.dtype | None, device: torch.device) -> Any:
        first = self.waiting.get(f"{len(self.done)}.{index}", device).to(dtype)
        return first if self._rest is None else (first, *self._rest)

    def _run(self, index: int, here: nn.Module | None, *, to_the_end: bool = False) -> Any:
        """Output of a block on a batch, or of the model; without a block the path of the first that is not done."""
        reached: list[Any] = []

        def stub(path: str, own: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else next(iter(kwargs.values()))
                if path in self.done:
                    dtype = hidden.dtype if to_the_end else None
                    return self._left(index, dtype, hidden.device) if path == self.done[-1] else hidden
                reached.append(path if here is None else own(*_wide(args), **_wide(kwargs)))
                raise _ReachedError

            return call

        with _in_place_of_forward(self.blocks, stub):
            try:
                return self.forward(self.batches[index])
            except _ReachedError:
                return reached[0]


@contextmanager
def _in_place_of_forward(
    blocks: Mapping[str, nn.Module], stub: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    own: dict[str, Any] = {path: block.__dict__.get("forward") for path, block in blocks.items()}
    for path, block in blocks.items():
        block.forward = stub(path, block.forward)
    try:
        yield
    finally:
        for path, block in blocks.items():
            del block.forward
            if own[path] is not None:
                block.forward = own[path]


@contextmanager
def _widened(block: nn.Module) -> Iterator[None]:
    """The block's weights in float32 where they are in half precision."""
    narrow = [p for p in block.parameters() if p.is_floating_point() and p.dtype.itemsize < 4]
    own = [parameter.data for parameter in narrow]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, data in zip(narrow, own, strict=True):
            parameter.data = data


def _wide(values: Any) -> Any:
    """Arguments with their tensors in float32 at least."""
    if isinstance(values, Tensor):
        return values.float() if values.is_floating_point() and values.dtype.itemsize < 4 else values
    if isinstance(values, (tuple, list)):
        return type(values)(_wide(value) for value in values)
    return {key: _wide(value) for key, value in values.items()} if isinstance(values, dict) else values


@contextmanager
def exchanged(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A model with other values of some parameters, by name; what refers to the old ones is left alone."""
    own = {name: model.get_parameter(name).data for name in weights}
    for name, weight in weights.items():
        model.get_parameter(name).data = weight.to(own[name].device)
    try:
        yield
    finally:
        for name, data in own.items():
            model.get_parameter(name).data = data
