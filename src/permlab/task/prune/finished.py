"""After the orders are learned: polished, pruned under, measured, and what the pruned model is compared with."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from permlab.config.plan import Plan
from permlab.data.module import DataModule
from permlab.record.checkpoint import read_unfinished
from permlab.record.provenance import peak_memory_mib
from permlab.record.pulse import Pulse, watched
from permlab.record.rundir import is_rank_zero, write_checkpoint
from permlab.sparsity.calibrate import OutputErrors
from permlab.sparsity.descent import Descent
from permlab.sparsity.layer import SiteLayers, assemble_weights
from permlab.sparsity.mask import hard_mask
from permlab.sparsity.offload import Waiting
from permlab.sparsity.polish import Swappable, polish
from permlab.sparsity.quality import efficacy_of_sums
from permlab.sparsity.site import block_names
from permlab.sparsity.walk import Walker
from permlab.task.learner import Result, Summary
from permlab.task.prune.calibrated import CalibratedLearner, Keep, Orders
from permlab.task.prune.exporting import export_run
from permlab.task.prune.predictions import fingerprint

# Steps of a descent after which its state is written.
SAVED_EVERY = 10


class Traces(NamedTuple):
    """Calibration losses on the way to the final orders: of every round of a descent, and of every try of a polish."""

    descent: Sequence[float] = ()
    polished: Sequence[float] = ()


class FinishedLearner(CalibratedLearner):
    """The weights that orders amount to, their loss on the calibration samples, and the end of the story.

    With `task.calibrate=sequential` the model is pruned block after block once more when the orders are
    known, each block on the statistics behind those before it.
    """

    # Weights under orders

    def _hard_values(self, orders: Orders, keep: Keep | None = None) -> dict[str, Tensor]:
        """Pruned weights of every site by item."""
        values = {}
        for name, order in orders.items():
            layers = self.layers[name]
            values[name] = layers.items * (keep[name] if keep else hard_mask(order, layers.scores, n=self.n, m=self.m))
        return values

    def _pruned_values(self, orders: Orders, keep: Keep | None = None) -> dict[str, Tensor]:
        """Pruned weights of every site by item, updated where the pruner does that."""
        if self.task.pruner != "sparsegpt":
            return self._hard_values(orders, keep)
        keep, pattern = keep or {}, {"n": self.n, "m": self.m}
        pruned = {name: at.prune(orders[name], **pattern, keep=keep.get(name)) for name, at in self.layers.items()}
        return {name: layers.stack(pruned[name]) for name, layers in self.layers.items()}

    def _assemble(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole weights by parameter name, from values by item of every site."""
        rows = {name: self.layers[name].unstack(value) for name, value in values.items()}
        return assemble_weights(self.model, self.method.sites, rows)

    def _run(self, values: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        return self._run_with(self._assemble(values), inputs)

    def _run_with(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        named = {f"model.{name}": weight.to(self.device) for name, weight in weights.items()}
        return functional_call(self.reading, named, (inputs,))

    def _prune(self, orders: Orders, keep: Keep | None = None) -> dict[str, Tensor]:
        """Whole pruned weights by parameter name."""
        if self._ready is not None and not keep and _equal(orders, self._ready[0]):
            return self._ready[1]
        if self.is_sequential or self._lacks_hessians:
            return self._prune_on_a_walk(orders, keep)
        names = watched("pruning", "sites", list(orders))
        keep, pattern = keep or {}, {"n": self.n, "m": self.m}
        rows = {
            name: self.layers[name].prune(orders[name].to(self.device), **pattern, keep=keep.get(name))
            for name in names
        }
        return assemble_weights(self.model, self.method.sites, rows)

    @property
    def _lacks_hessians(self) -> bool:
        if self.task.pruner != "sparsegpt":
            return False
        return any(part.is_released for layers in self.layers.values() for part in layers.statistics)

    def _prune_on_a_walk(self, orders: Orders, keep: Keep | None = None) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        with Pulse("pruning", "blocks", len(block_names(self.model))) as pulse:
            done = iter(range(1, 1 + len(block_names(self.model))))

            def visit(path: str, statistics: Any) -> Mapping[str, Tensor]:
                block = self._pruned_block(statistics, orders, keep)
                weights.update({name: weight.cpu() for name, weight in block.items()})
                pulse.beat(next(done))
                return block

            self._walk(visit, behind=self.is_sequential)
        return weights

    # The calibration loss

    @torch.no_grad()
    def calibration_loss(self, values: Mapping[str, Tensor]) -> float:
        """Mean divergence from the dense model, in nats, on the calibration samples."""
        return self._pruned_loss(self._assemble(values))

    @torch.no_grad()
    def _pruned_loss(self, weights: Mapping[str, Tensor]) -> float:
        weights = {name: weight.to(self.device) for name, weight in weights.items()}
        return sum(float(part) for part in self._losses_of_batches(lambda inputs: self._run_with(weights, inputs)))

    def _losses_of_batches(self, forward: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """The calibration loss in parts that add up to it."""
        for index, (inputs, _) in enumerate(self.calibration):
            yield self._share_of_loss(index, forward(inputs.to(self.device)))

    def _loss_and_gradient(self, orders: Orders) -> tuple[float, dict[str, Tensor]]:
        """Calibration loss of the model as it is pruned under these orders, and its gradient for the weights."""
        leaves = {name: value.requires_grad_() for name, value in self._pruned_values(orders).items()}
        loss = 0.0
        with torch.enable_grad():
            for part in self._losses_of_batches(lambda inputs: self._run(leaves, inputs)):
                part.backward()
                loss += float(part.detach())
        return loss, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    # The end

    def finish(self, test: Callable[[], Summary]) -> Result:
        """Harden, polish and prune; test what the pruned model is compared with, and last of all itself."""
        began = time.monotonic()
        self._bring_layers()
        starts, learned, keep = self.method.bases(), self._orders(), self.masks.keep()
        if keep:
            orders, traces = learned, Traces()
            losses = [self.calibration_loss(self._pruned_values(*pair)) for pair in ((starts, None), (learned, keep))]
        else:
            orders, losses, traces = self._finished_orders()
        pruned = self._prune(orders, keep)
        seconds = self._seconds + time.monotonic() - began
        summary = {
            "prune/calibration_loss_start": losses[0],
            "prune/calibration_loss_learned": losses[1],
            "prune/calibration_loss": self._last_loss(
                orders, pruned, keep, [(starts, losses[0]), (learned, losses[1])]
            ),
            "prune/num_parameters": float(sum(p.numel() for part in self.learned() for p in part[1].parameters())),
            "prune/num_sites": float(len(orders)),
        }
        summary |= self._gap(learned)
        quality, arrays = self._quality(orders, pruned, keep)
        summary |= quality
        summary["prune/seconds"] = round(seconds, 3)
        summary["prune/peak_memory_mib"] = peak_memory_mib() - self._memory
        arrays["sites"] |= {f"{name}_loss": np.array(values) for name, values in traces._asdict().items()}
        arrays |= {"orders": _as_arrays(orders), "starts": _as_arrays(starts)}
        return Result(summary | self._test_all(orders, pruned, keep, test), arrays, self._tested_state())

    def _orders(self) -> Orders:
        """The present hard orders: those of the method until they are settled."""
        return self.masks.orders() or self.method.orders()

    def _finished_orders(self) -> tuple[Orders, list[float], Traces]:
        """Hardened and polished orders, the losses of start and learned ones, and those on the way."""
        starts, learned = self.method.bases(), self.method.orders()
        losses = self._losses_of(starts, learned)
        better = starts if losses[0] <= losses[1] else learned
        descent: list[float] = []
        if self.method.num_descent_steps:
            learned, descent = self._descend(better, min(losses))
            better = learned
        orders, polished = self._polish(better, learned)
        return orders, losses, Traces(descent, polished)

    def _bring_layers(self) -> None:
        """To where the model is: the trainer moves that to its device, and back to the CPU after training."""
        for layers in self.layers.values():
            layers.bring(self.model)

    def _losses_of(self, starts: Orders, learned: Orders) -> list[float]:
        """Calibration losses under the orders at the start and under the learned ones."""
        if self._ready is not None:
            if self._ready_loss is None:
                self._ready_loss = self._pruned_loss(self._ready[1])
            return [self._ready_loss] * 2
        first = self.calibration_loss(self._pruned_values(starts))
        same = _equal(starts, learned)
        return [first, first if same else self.calibration_loss(self._pruned_values(learned))]

    def _last_loss(
        self, orders: Orders, pruned: Mapping[str, Tensor], keep: Keep, known: Sequence[tuple[Orders, float]]
    ) -> float:
        if not keep and (self._ready is not None or not self.is_sequential):
            for others, loss in known:
                if _equal(orders, others):
                    return loss
        return self._pruned_loss(pruned)

    def _gap(self, learned: Orders) -> Summary:
        """How much worse than the relaxed model, which is what was trained, the hard one is."""
        soft = self._soft_values()
        if soft is None:
            return {}
        return {"prune/soft_hard_gap": self.calibration_loss(self._hard_values(learned)) - self.calibration_loss(soft)}

    def _soft_values(self) -> dict[str, Tensor] | None:
        raise NotImplementedError

    def _descend(self, orders: Orders, loss: float) -> tuple[Orders, list[float]]:
        """Where a descent from these orders ends, if that is better than their loss; goes on where it was stopped."""
        sites, steps = _Swappables(self.layers, self.method.num_groups), self.method.num_descent_steps
        descent = Descent(
            sites,
            orders,
            n=self.n,
            m=self.m,
            num_steps=steps,
            share=self.method.swap_share,
            round_length=len(self.calibration),
            seed=self.seed,
        )
        path = Path(self.run_folder or ".", "checkpoints", "descent.ckpt")
        with contextlib.suppress(ValueError):  # of nothing, or of another descent
            descent.load_state_dict(read_unfinished(path))
        with Pulse("descent", "steps", steps) as pulse:
            while descent.step < steps:
                descent.advance(*self._loss_of_a_batch(descent.orders, descent.step))
                pulse.beat(descent.step)
                if descent.step % SAVED_EVERY == 0 and is_rank_zero() and self.run_folder is not None:
                    write_checkpoint(path, descent.state_dict())
        path.unlink(missing_ok=True)
        ends = (descent.orders, descent.best)
        better = (end for end in ends if self.calibration_loss(self._pruned_values(end)) < loss)
        return next(better, orders), descent.losses

    def _loss_of_a_batch(self, orders: Orders, step: int) -> tuple[float, dict[str, Tensor]]:
        """A batch's part of the calibration loss and its gradient for all weights; every epoch has its own order."""
        count = len(self.calibration)
        generator = torch.Generator().manual_seed((self.seed << 20) + step // count)
        index = int(torch.randperm(count, generator=generator)[step % count])
        leaves = {name: value.requires_grad_() for name, value in self._pruned_values(orders).items()}
        with torch.enable_grad():
            inputs = self.calibration[index][0].to(self.device)
            loss = self._share_of_loss(index, self._run(leaves, inputs))
            loss.backward()
        return loss.item(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def _polish(self, better: Orders, learned: Orders) -> tuple[Orders, list[float]]:
        """The learned orders, or, where the method is polished, the better of start and learned after that."""
        if self.method.num_polish_steps == 0:
            return learned, []
        sites = _Swappables(self.layers, self.method.num_groups)
        steps = self.method.num_polish_steps
        with Pulse("polishing", "losses", steps + 1) as pulse:
            loss = pulse.counting(self._loss_and_gradient)
            return polish(sites, better, loss, n=self.n, m=self.m, num_steps=steps, seed=self.seed)

    @torch.no_grad()
    def _quality(
        self, orders: Orders, pruned: Mapping[str, Tensor], keep: Keep | None = None
    ) -> tuple[Summary, dict[str, dict[str, np.ndarray]]]:
        """What is retained and what is lost, as a whole, and by site and layer."""
        names = watched("quality", "sites", list(orders))
        masks, pattern = keep or {}, {"n": self.n, "m": self.m}
        sums = [self.layers[name].kept(orders[name], **pattern, keep=masks.get(name)) for name in names]
        kept, default, best, total = (sum(column) for column in zip(*sums, strict=True))
        errors = self._errors(pruned)
        by_site = {
            "site": np.array(list(orders)),
            "retained": np.array([part[0] / part[3] for part in sums]),
            "layer": np.array(list(errors)),
            "reconstruction_error": np.array(list(errors.values())),
        }
        whole = {
            "prune/retained": kept / total,
            "prune/efficacy": efficacy_of_sums(kept, default, best),
            "prune/reconstruction_error": sum(errors.values()) / len(errors),
        }
        return whole, {"sites": by_site}

    def _errors(self, pruned: Mapping[str, Tensor]) -> dict[str, float]:
        """Of every layer on held-out samples, behind the blocks of the dense model."""
        modules = self._pruned_modules()
        errors = OutputErrors({name: (layer, pruned[f"{name}.weight"]) for name, layer in modules.items()})
        blocks, waiting = block_names(self.model), Waiting(folder=self.cache_folder)
        walker = Walker(self.reading, self.model, blocks, [x.to(self.device) for x in self.held_out], waiting=waiting)
        with Pulse("quality", "blocks", len(blocks)) as pulse:
            for done, path in enumerate(walker):
                pulse.beat(done)
                with errors.summed(f"{path}."):
                    walker.run(keep=not walker.is_last)
        return errors.relative()

    def _test_all(
        self, orders: Orders, pruned: Mapping[str, Tensor], keep: Keep, test: Callable[[], Summary]
    ) -> Summary:
        """The dense model, the one with the channels as they are, and the pruned one, which stays in the model."""
        layers, self.layers = self.layers, {}
        model = self._fingerprint
        summary = {f"{key}_dense": value for key, value in self._recall({"model": model}, test).items()}
        default = {name: torch.arange(len(order), device=order.device) for name, order in orders.items()}
        unpermuted = None
        if keep or not _equal(orders, default):

            def test_unpermuted() -> Summary:
                self.layers = layers
                weights = self._prune(default)
                self.layers = {}
                self._use(weights)
                return test()

            unpermuted = self._recall({"model": model, "pruned": self._plain_pruning()}, test_unpermuted)
        layers.clear()
        self._use(pruned)
        last = test()
        return summary | {f"{key}_unpermuted": value for key, value in (unpermuted or last).items()} | last

    def _recall(self, what: Mapping[str, Any], find: Callable[[], Summary]) -> Summary:
        return find() if self.known is None else self.known.recall(what, find)

    def _plain_pruning(self) -> dict[str, Any]:
        """All that pruning with the channels as they are depends on, besides the model and the data's settings."""
        task = self.task
        readers = sorted((r.module, r.rows) for site in self.method.sites for r in site.readers)
        options = ("n", "m", "pruner", "power", "damping", "calibrate", "num_samples", "sequence_length")
        return {key: getattr(task, key) for key in options} | {
            "layers": readers,
            "samples": fingerprint(inputs for inputs, _ in self.calibration),
        }

    @torch.no_grad()
    def _use(self, weights: Mapping[str, Tensor]) -> None:
        """Put these weights into the model, under its parameters' names."""
        for name, weight in weights.items():
            self.model.get_parameter(name).copy_(weight)

    def _tested_state(self) -> dict[str, Tensor]:
        """What `checkpoints/best.ckpt` holds: the pruned model and its methods."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        state |= {f"method.{name}": value for name, value in self.method.state_dict().items()}
        return state | {"read_order.order": self.read_order.order}

    def export(self, folder: Path, plan: Plan, data: DataModule, before: Mapping[str, Path], *, sparse: bool) -> None:
        export_run(plan, self.method, data, folder, dense_run=before.get("dense"), sparse=sparse)


class _Swappables(Mapping[str, Swappable]):
    """What polishing is told of every site, made when it looks at the site."""

    def __init__(self, layers: Mapping[str, SiteLayers], num_groups: Mapping[str, int]) -> None:
        self.layers, self.num_groups = layers, num_groups

    def __getitem__(self, name: str) -> Swappable:
        return Swappable(self.layers[name].items, self.layers[name].scores, self.num_groups[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def _as_arrays(orders: Orders) -> dict[str, np.ndarray]:
    return {name: order.cpu().numpy() for name, order in orders.items()}


def _equal(orders: Orders, others: Orders) -> bool:
    return all(torch.equal(order.cpu(), others[name].cpu()) for name, order in orders.items())
