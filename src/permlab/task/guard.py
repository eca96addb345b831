"""What happens to an optimiser step in which a number is NaN or infinite."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from permlab.errors import NonFiniteError

REMEDY = "lower optim.lr or method.lr, or raise method.temperature"
RATES = "lower optim.lr, optim.weight_decay or method.lr"
LAST_GOOD = "the newest file in checkpoints/ is the last good state"


class NonFiniteGuard:
    """Collects what is wrong with a step, and decides at its end: stop the run, or leave the step out.

    The decision is taken once per optimiser step and by all ranks together, so that weights and
    optimisers stay alike and no rank waits for one that has stopped. A device that is not the CPU
    would have to wait for every look at its numbers: there a run that is to `stop` looks at what it
    has noted at logged steps and before a checkpoint is written, and still names the step.

    Args:
        on_nonfinite: `stop` the run, or `skip` the optimiser step.
        max_skips: steps that a run may leave out; one more ends it.
    Example:
        >>> guard = NonFiniteGuard(on_nonfinite="skip", max_skips=1)
        >>> guard.report("step 3: the loss is nan")
        >>> guard.leaves_out(torch.device("cpu")), guard.leaves_out(torch.device("cpu"))
        (True, False)
    """

    def __init__(self, *, on_nonfinite: Literal["stop", "skip"] = "stop", max_skips: int = 10) -> None:
        self.on_nonfinite, self.max_skips = on_nonfinite, max_skips
        self.num_skipped = 0
        self._found: str | None = None
        self._noted: list[tuple[Tensor, list[str]]] = []

    def looks_later(self, device: torch.device) -> bool:
        """Whether a look at a number is put off, as the device would have to wait for it."""
        return device.type != "cpu" and self.on_nonfinite == "stop"

    def note(self, tensors: Mapping[str, Tensor | None], message: str) -> None:
        """Have these tensors looked at by `look`; `{name}` in the message stands for the first that is not finite."""
        present = {name: value for name, value in tensors.items() if value is not None}
        if present:
            flags = torch.stack([torch.isfinite(value).all() for value in present.values()])
            self._noted.append((flags, [message.replace("{name}", name) for name in present]))

    def look(self) -> None:
        """Report the first of the noted tensors that is not finite."""
        noted, self._noted = self._noted, []
        if not noted or torch.cat([flags for flags, _ in noted]).all():
            return
        messages = [
            message for flags, names in noted for message, good in zip(names, flags.tolist(), strict=True) if not good
        ]
        self.report(messages[0])

    def report(self, what: str) -> None:
        """Remember what is wrong with this step; only the first counts, the others follow from it."""
        self._found = self._found or what

    def leaves_out(self, device: torch.device) -> bool:
        """Whether this step is left out, on every rank; starts on the next step.

        Raises:
            NonFiniteError: if the run is to stop, or has left out more than `max_skips` steps.
        """
        found, self._found = self._found, None
        if not _on_any_rank(found is not None, device):
            return False
        found = found or "another process met a number that is not finite"
        if self.on_nonfinite == "stop":
            raise NonFiniteError(f"{found}, or set trainer.on_nonfinite=skip; {LAST_GOOD}")
        self.num_skipped += 1
        if self.num_skipped > self.max_skips:
            raise NonFiniteError(f"{found}; more than trainer.max_skips={self.max_skips} steps left out; {LAST_GOOD}")
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"num_skipped": self.num_skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_skipped = int(state["num_skipped"])


def _on_any_rank(flag: bool, device: torch.device) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def first_bad(tensors: Mapping[str, Tensor | None]) -> str | None:
    """Name of the first tensor that holds NaN or an infinite number; None where all are finite."""
    bad = (name for name, value in tensors.items() if value is not None and not torch.isfinite(value).all())
    return next(bad, None)


def first_bad_gradient(module: nn.Module) -> str:
    found = first_bad({name: parameter.grad for name, parameter in module.named_parameters()})
    return f"first in {found}" if found else "by overflow of the sum"


def remedy(name: str) -> str:
    """The keys to change where this tensor is the first that is not finite."""
    if name.startswith(("weight method.", "soft", "log_prob")):
        return "lower method.lr or raise method.temperature"
    if name in ("images", "inputs"):
        return "the data itself is not finite, see data.root"
    return REMEDY
