"""Language models as folders of transformers: `AutoConfig`, `AutoTokenizer` and `AutoModelForCausalLM` open them.

A model with gathers is none of transformers' models. It is laid out alike, but for what would make transformers
open it: it would leave the gathers out, and be another model without an error.
"""

import copy
import json
from pathlib import Path
from typing import Any

from torch import nn

from permlab.sparsity.fold import find_gathers
from permlab.sparsity.layout import CONFIG, OWN_WEIGHTS, READER, WEIGHTS, Layout, closed

GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"
CONVERTER = "permlab.sparsity.export.as_causal_lm"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def layout(model: nn.Module, tokenizer: Any, normalisation: object = None) -> Layout | None:
    """Layout of a language model of ours, or of any model that is transformers' own."""
    described: Any = getattr(model, "causal_lm", None)
    config: Any
    if described is not None:
        try:
            config, rename = described(tokenizer)
        except ValueError as error:
            return closed(f"{type(model).__name__}, which {READER} reads ({error})")
    elif hasattr(model, "save_pretrained") and hasattr(model, "config"):
        config, rename = copy.deepcopy(model.config), str
        config.architectures = [type(model).__name__]
    else:
        return None
    for name in SPECIAL if tokenizer is not None else ():
        setattr(config, name, getattr(tokenizer, name))
    architecture, gathers = config.architectures[0], find_gathers(model)
    note = None
    opens = f"transformers' {architecture}, by AutoModelForCausalLM and AutoTokenizer"
    if gathers:
        reader = CONVERTER if architecture.endswith("ForCausalLM") else READER
        note = opens = f"{config.model_type} with gathers, which {reader} opens"

    def write(folder: Path) -> None:
        _write(folder, config, getattr(model, "generation_config", None), tokenizer, note)

    return Layout(opens, write, OWN_WEIGHTS if gathers else WEIGHTS, rename)


def _write(folder: Path, config: Any, generation: Any, tokenizer: Any, note: str | None) -> None:
    """Configuration, settings of generation and tokenizer; a note takes the place of the model's type."""
    from transformers import GenerationConfig

    settings = json.loads(config.to_json_string()) | ({"model_type": note} if note else {})
    rope = dict(settings.get("rope_parameters") or {})
    if "rope_theta" in rope:  # versions before 5 know these two names alone
        settings["rope_theta"] = rope.pop("rope_theta")
        settings |= {"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    generation = generation or GenerationConfig.from_model_config(config)
    (folder / GENERATION).write_text(generation.to_json_string(), encoding="utf-8")
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    # Older versions of transformers do not know this name of the plain class.
    path = folder / TOKENIZER
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")
