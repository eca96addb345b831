"""Exports as folders of transformers: opened by its own classes, or by none where they would be wrong."""

import json
import math
from pathlib import Path

import pytest
import torch
from pruned_models import prune
from tiny_models import IMAGES, LLAMA, llama, outputs, random_order
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from permlab.data.fast_tokenizer import as_pretrained, byte_tokenizer
from permlab.data.spec import DataSpec
from permlab.model.qwen_vl import QwenVl
from permlab.sparsity.export import as_causal_lm, export, load_export
from permlab.sparsity.fold import fold
from permlab.sparsity.site import read_sites

LENGTH = 24
BYTES = DataSpec(kind="text", num_classes=256, channels=1, height=1, width=LENGTH)
TEXT = "a\u0300 naïve text, Ā and 漢字, of which a model reads windows\n" * 9
OTHER = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8, vocab_size=9)
QWEN = {
    key: LLAMA[key] for key in ("width", "depth", "num_heads", "num_kv_heads", "mlp_width", "norm_eps", "rope_theta")
}
QWEN |= {"merge_size": 2, "vision_width": 16, "vision_depth": 1, "vision_heads": 2, "vision_mlp_width": 24}


def build(name):
    options = {"tie_embeddings": name.endswith("tied")}
    torch.manual_seed(0)
    if name.startswith("qwen"):
        model = QwenVl(BYTES, patch_size=1, **QWEN, **options)
    else:
        model = llama(BYTES, patch_size=1, **options, **({"rope_factor": 8.0} if "stretched" in name else {}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def setting(name, select="foldable", tokenizer="byte"):
    dense = build(name)
    sites = read_sites(dense, select=select)
    orders = {site.name: random_order(site) for site in sites}
    if tokenizer == "byte":
        tokenizer = as_pretrained(byte_tokenizer(), sequence_length=LENGTH)
    inputs = torch.randint(256, (2, LENGTH))
    return {"dense": dense, "pruned": prune(dense, sites, orders, n=2, m=4), "sites": sites, "orders": orders,
            "n": 2, "m": 4, "inputs": inputs, "config": {"model": name}, "tokenizer": tokenizer}  # fmt: skip


def perplexity(model, ids):
    """Over windows as a run reads them, each token but the first of a window being predicted."""
    windows = torch.tensor(ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)]).view(-1, LENGTH + 1)
    logits = outputs(model, windows[:, :-1])
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten()))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_stretched", "qwen", "qwen_tied"])
def test_the_folder_is_one_of_transformers(tmp_path, name):
    given = setting(name)
    report = export(tmp_path / "x", **given)
    config = AutoConfig.from_pretrained(tmp_path / "x")
    assert (config.max_position_embeddings, config.vocab_size) == (LENGTH, 256)
    assert (config.bos_token_id, config.eos_token_id) == (0, 0)
    assert config.tie_word_embeddings == name.endswith("tied")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x")
    assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode())
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(loading.values())
    assert type(model).__name__ in report["opens"]
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == 0
    expected = perplexity(given["pruned"], list(TEXT.encode()))
    assert perplexity(model, tokenizer(TEXT)["input_ids"]) == pytest.approx(expected, rel=1e-4)
    assert perplexity(as_causal_lm(tmp_path / "x"), list(TEXT.encode())) == pytest.approx(expected, rel=1e-4)
    loaded = load_export(tmp_path / "x", build(name))
    assert perplexity(loaded, list(TEXT.encode())) == pytest.approx(expected, rel=1e-4)
    steps = model.generate(**tokenizer("a", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert steps.shape == (1, 3)


def test_versions_before_five_find_the_angles_too(tmp_path):
    export(tmp_path / "x", **setting("llama_stretched"))
    settings = json.loads((tmp_path / "x" / "config.json").read_text())
    assert settings["rope_theta"] == LLAMA["rope_theta"]
    assert settings["rope_scaling"]["factor"] == 8.0
    now = LlamaConfig.from_dict(settings).rope_parameters
    del settings["rope_parameters"]
    assert LlamaConfig.from_dict(settings).rope_parameters == now
    assert '"PreTrainedTokenizerFast"' in (tmp_path / "x" / "tokenizer_config.json").read_text()


def test_a_qwen_stays_one_beside_its_own_tokenizer(tmp_path):
    tokenizer = Qwen2Tokenizer(vocab={chr(65 + index): index for index in range(26)} | {"<|endoftext|>": 26})
    export(tmp_path / "x", **setting("qwen", tokenizer=tokenizer))
    assert AutoConfig.from_pretrained(tmp_path / "x").model_type == "qwen2"
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "x"), Qwen2Tokenizer)
    export(tmp_path / "bare", **setting("qwen", tokenizer=None))
    assert AutoConfig.from_pretrained(tmp_path / "bare").model_type == "qwen2"
    assert not list((tmp_path / "bare").glob("tokenizer*"))


# Gathers


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    """A setting with gathers, and its export."""
    given = setting("llama_tied", select="all")
    folder = tmp_path_factory.mktemp("gathered") / "x"
    export(folder, **given)
    return given, folder


@pytest.mark.parametrize("opener", [AutoConfig, AutoModelForCausalLM])
def test_transformers_refuses_what_it_would_misread_and_says_who_reads_it(gathered, opener):
    with pytest.raises(ValueError, match=r"llama with gathers, which permlab\.sparsity\.export\.as_causal_lm opens"):
        opener.from_pretrained(gathered[1])


@pytest.mark.parametrize("options", [{}, {"config": OTHER}])
def test_the_class_itself_finds_no_weights_either(gathered, options):
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        LlamaForCausalLM.from_pretrained(gathered[1], **options)


def test_what_reads_it_reads_it_right(gathered):
    given, folder = gathered
    expected = outputs(given["pruned"], given["inputs"])
    model = as_causal_lm(folder)
    torch.testing.assert_close(outputs(model, given["inputs"]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        outputs(load_export(folder, build("llama_tied")), given["inputs"]), expected, rtol=1e-4, atol=1e-4
    )
    assert isinstance(AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast)


def test_a_model_with_gathers_is_not_saved_as_one_without(gathered, tmp_path):
    given, folder = gathered
    in_memory = as_causal_lm(given["dense"])
    in_memory.save_pretrained(tmp_path / "whole")
    sites = read_sites(in_memory)
    fold(in_memory, sites, {site.name: random_order(site) for site in sites})
    plain = LlamaForCausalLM(as_causal_lm(given["dense"]).config)
    for model in (as_causal_lm(folder), load_export(folder, plain), in_memory):
        with pytest.raises(ValueError, match=r"has gathers, which from_pretrained would leave out.*as_causal_lm"):
            model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


# What transformers has not


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (lambda: llama(IMAGES, position="slot"), "got a Llama of image with slot"),
        (lambda: llama(BYTES, patch_size=1, position="none"), "got a Llama of text with none"),
        (lambda: QwenVl(IMAGES, patch_size=1, tie_embeddings=False, **QWEN), "got a QwenVl of image"),
    ],
)
def test_a_folder_that_transformers_cannot_open_says_so(tmp_path, model, note):
    dense = model().eval()
    sites = read_sites(dense, select=["mlp.down_proj"])[:1]
    orders = {site.name: random_order(site) for site in sites}
    inputs = torch.rand(2, 2, 4, 4) if dense.kind == "image" else torch.randint(256, (2, LENGTH))
    report = export(
        tmp_path / "x", dense=dense, pruned=prune(dense, sites, orders, n=2, m=4), sites=sites, orders=orders,
        n=2, m=4, inputs=inputs, config={},
    )  # fmt: skip
    assert note in report["opens"]
    for opener in (AutoConfig.from_pretrained, as_causal_lm):
        with pytest.raises(ValueError, match=note):
            opener(tmp_path / "x")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        LlamaForCausalLM.from_pretrained(tmp_path / "x", config=OTHER)
    expected = outputs(load_export(tmp_path / "x", model().eval()), inputs)
    assert expected.isfinite().all()


# Others' tools


def test_lm_evaluation_harness_reads_the_folder(tmp_path):
    lm_eval = pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness (lm_eval with its hf extra) is no dependency"
    )
    given = setting("llama")
    export(tmp_path / "x", **given)
    texts = ["naïve", "a text\n", "Ā"]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "rows.jsonl").write_text(rows)
    lines = f"""
        task: rows
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
        output_type: loglikelihood_rolling
        test_split: test
        doc_to_text: ""
        doc_to_target: "{{{{text}}}}"
        metric_list: [{{metric: byte_perplexity}}]
    """
    (tmp_path / "rows.yaml").write_text("\n".join(line[8:] for line in lines.splitlines()))
    options = {"pretrained": str(tmp_path / "x"), "device": "cpu"}
    found = lm_eval.simple_evaluate(model="hf", model_args=options, tasks=[str(Path(tmp_path, "rows.yaml"))])
    # The same by hand: bytes behind the token of the beginning.
    total = 0.0
    for text in texts:
        ids = torch.tensor([[0, *text.encode()]])
        chances = outputs(given["pruned"], ids[:, :-1]).log_softmax(-1)
        total += float(chances.gather(-1, ids[:, 1:, None]).sum())
    expected = math.exp(-total / sum(len(text.encode()) for text in texts))
    assert found["results"]["rows"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-4)
