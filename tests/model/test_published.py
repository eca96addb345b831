"""Published models as `python -m permlab.model get` leaves them, against the libraries that know them.

`make test-models` fetches them and runs these; elsewhere they are skipped.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assemble, configure

DATA = Path(os.environ.get("PERMLAB_DATA", Path(__file__).parents[2] / "data"))


def folder_of(name: str) -> Path:
    folder = DATA / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: make test-models")
    return folder


def backbone(*words: str) -> Any:
    return assemble(configure([*words, f"paths.data={DATA}"])).model.eval()


@pytest.mark.models
@torch.no_grad()
def test_smollm2_has_the_logits_that_transformers_computes() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of("smollm2_135m")
    text = "The assignment statement binds names to values, and modifies attributes or items of mutable objects."
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
    ours = backbone("task=lm", "model=smollm2_135m", "data=pydocs")(tokens)
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
    loss = torch.nn.functional.cross_entropy(ours[0, :-1], tokens[0, 1:])
    assert loss < 6, "it is a model of English"


@pytest.mark.models
@torch.no_grad()
def test_timm_opens_dinov2() -> None:
    import timm

    folder = folder_of("dinov2_s")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    assert sum(parameter.numel() for parameter in theirs.parameters()) > 2e7
    images = torch.rand(2, 3, *theirs.patch_embed.img_size)
    features = theirs(images)
    assert torch.isfinite(features).all()
    assert (features[0] - features[1]).abs().max() > 1e-3
