"""OPT, a family of its own and the example of docs/models.md."""

import doctest
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import permlab.sparsity.family.opt
from permlab.sparsity.site import read_sites
from permlab.sparsity.sparsify import sparsify

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=16)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_all_layers_are_pruned_in_orders_that_fold(model: OPTForCausalLM, tmp_path: Path) -> None:
    tokens = torch.randint(50, (4, 12))
    pruned = sparsify(model, [tokens], sites=read_sites(model, select="foldable"))
    report = pruned.export(tmp_path / "folder", tokens)
    assert report["num_tensors"] == 12
    assert report["num_gathered"] == 0
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        ours, theirs = pruned.model(tokens).logits, opened(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    rows = opened.model.decoder.layers[0].fc1.weight.unflatten(1, (-1, 4))
    assert (rows != 0).sum(-1).max() == 2


def test_the_page_shows_the_file_and_its_example_is_true() -> None:
    source = Path(permlab.sparsity.family.opt.__file__).read_text()
    page = PAGE.read_text()
    assert source[source.index("FAMILY") :] in page
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(page.replace("```", ""), {}, "models.md", str(PAGE), 0)
    assert test.examples
    assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)
