"""In which form an export is written, so that other software opens it or says who does."""

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from permlab.sparsity import library as folder

CONFIG = "config.json"  # of the library that opens the folder
# Libraries look for the first. An export that they would misread has the second, and is no model to them.
WEIGHTS, OWN_WEIGHTS = "model.safetensors", "permlab.safetensors"
READER = "permlab.sparsity.export.load_export"


@dataclass(frozen=True)
class Layout:
    """The form of an export's folder.

    Args:
        opens: who opens the folder, for the report.
        write: adds the library's files to a folder, the weights excepted.
        weights: name of the file of the weights.
        rename: the library's name of a tensor or module of the model.
    """

    opens: str
    write: Callable[[Path], None]
    weights: str = WEIGHTS
    rename: Callable[[str], str] = str


def find_layout(model: nn.Module, tokenizer: Any = None, normalisation: Mapping[str, Any] | None = None) -> Layout:
    """The layout of the first file of `permlab.sparsity.library` that has one, in the order of their names.

    Where none has, the folder is ours alone, and its `config.json` tells others so.

    Args:
        model: folded, its gathers in it.
        tokenizer: of the text that it reads, as `transformers.AutoTokenizer` gives it; None for none.
        normalisation: `mean` and `std` by channel of the images that it reads, on the scale 0..1.
    """
    for name in sorted(module.name for module in pkgutil.iter_modules(folder.__path__)):
        layout = importlib.import_module(f"{folder.__name__}.{name}").layout(model, tokenizer, normalisation)
        if layout is not None:
            return layout
    return closed(f"{type(model).__name__}, which {READER} reads", weights=WEIGHTS)


def closed(note: str, *, weights: str = OWN_WEIGHTS) -> Layout:
    """Layout of a folder that no library opens.

    Args:
        note: what it holds and who reads it. It is also the `model_type`, which libraries quote when they refuse.
        weights: name of the file of the weights.
    """

    def write(path: Path) -> None:
        (path / CONFIG).write_text(json.dumps({"model_type": note}, indent=2) + "\n", encoding="utf-8")

    return Layout(note, write, weights)
