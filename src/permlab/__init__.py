"""permlab: a laboratory for learned permutations.

What follows is there under `permlab.` and is imported when it is first asked for: torch takes seconds, and
importing the package alone takes milliseconds. `docs/python.md` shows it in use.
"""

import importlib

TYPE_CHECKING = False  # as typing has it, whose import takes longer than all of this
if TYPE_CHECKING:
    from permlab.errors import ConfigError as ConfigError
    from permlab.method.preset import make_method as make_method
    from permlab.permutation import PermutationSample as PermutationSample
    from permlab.permutation import Site as Site
    from permlab.permutation import invert as invert
    from permlab.permutation import permute as permute
    from permlab.run.python import Run as Run
    from permlab.run.python import train as train
    from permlab.sparsity.export import export as export
    from permlab.sparsity.export import load_export as load_export
    from permlab.sparsity.site import Move as Move
    from permlab.sparsity.site import Reader as Reader
    from permlab.sparsity.site import WeightSite as WeightSite
    from permlab.sparsity.site import read_sites as read_sites
    from permlab.sparsity.sparsify import SparsifiedModel as SparsifiedModel
    from permlab.sparsity.sparsify import sparsify as sparsify

__version__ = "0.1.0"

_HOMES = {
    "permlab.errors": ("ConfigError",),
    "permlab.method.preset": ("make_method",),
    "permlab.permutation": ("PermutationSample", "Site", "invert", "permute"),
    "permlab.run.python": ("Run", "train"),
    "permlab.sparsity.export": ("export", "load_export"),
    "permlab.sparsity.sparsify": ("SparsifiedModel", "sparsify"),
    "permlab.sparsity.site": ("Move", "Reader", "WeightSite", "read_sites"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
