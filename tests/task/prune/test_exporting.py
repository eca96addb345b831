"""Exports of finished runs by the command line, opened by transformers alone; two short runs, eight seconds."""

import contextlib
import io
import json
import math

import pytest
import torch
from runs import data_module, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from permlab.cli import main

SHORT = ("task=prune", "data=pydocs", "data.sequence_length=32", "task.num_samples=4", "task.dense_steps=2")
SMALL = ("data.val_fraction=0.02", "data.test_fraction=0.02")


@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [("llama_nano", ("data.tokenizer=byte",)), ("qwen_vl_nano", ("data.tokenizer=bpe", "data.vocab_size=300"))],
)
def test_the_folder_has_the_numbers_of_the_run(tmp_path, model, tokenizer):
    words = (*SHORT, *SMALL, f"model={model}", *tokenizer, "method=fixed", "task.sites=foldable", "task.num_groups=1")
    run = train(tmp_path / "runs", *words)
    assert run.code == 0, run.err
    folder = tmp_path / "exported"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main("eval", [f"run={run.run_dir}", f"export={folder}"]) == 0
    assert "by AutoModelForCausalLM and AutoTokenizer" in said.getvalue()
    assert json.loads((folder / "report.json").read_text())["test/perplexity"] == run.summary["test/perplexity"]
    assert json.loads((folder / "permlab.json").read_text())["model"]["component"] == model.removesuffix("_nano")

    # The text of the test split, from its windows by way of the tokenizer; losses from transformers' model.
    opened, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    test = data_module(run.config).component.dataset("test", 0)
    windows = test.windows.long()
    ids = tokenizer(tokenizer.decode(windows.flatten()), verbose=False)["input_ids"]
    assert ids[:-4] == windows.flatten().tolist()[:-4]
    with torch.no_grad():
        logits = opened(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten())
    assert math.exp(loss) == pytest.approx(run.summary["test/perplexity"], rel=1e-4)
