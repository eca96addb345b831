import hashlib
from pathlib import Path

import pytest

from permlab.config.compose import compose_config
from permlab.config.schema import CONF, component_names
from permlab.data.source import Source, read_settings, read_source, sha256


@pytest.mark.parametrize("name", component_names("data"))
def test_every_data_set_says_how_large_it_is_and_how_it_can_be_had(name: str) -> None:
    source = read_source(CONF / "data" / f"{name}.yaml")
    assert source.name == name
    assert source.summary
    assert source.size
    assert source.licence
    assert len(source.origin) > 10
    if source.debian or source.torchvision:
        assert source.hashes, "what is fetched is compared with a hash"
        assert source.num_bytes > 1e6, "and needs to have room"


def test_hashes_are_those_that_were_published() -> None:
    hashes = read_source(CONF / "data" / "fashion_mnist.yaml").hashes
    assert sorted(hashes) == [
        f"{part}-{what}-ubyte.gz" for part in ("t10k", "train") for what in ("images-idx3", "labels-idx1")
    ]
    assert "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7" in hashes["train-images-idx3-ubyte.gz"]
    assert "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05" in hashes["t10k-labels-idx1-ubyte.gz"]


def test_a_missing_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# My own data set\n# Size: 3 MB\n# From: here\nbatch_size: 1\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: its comments have no line `# Licence: \.\.\.`"):
        read_source(path)


@pytest.mark.parametrize(
    ("size", "expected"), [("31 MB", 31e6), ("1.5 GB", 1.5e9), ("yours", 0), ("4 MB to 13 GB", 4e6)]
)
def test_size_in_words_is_read(size: str, expected: float) -> None:
    assert Source("mine", "", size, "", "").num_bytes == expected


def test_problems_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    digest = hashlib.sha256(b"whole").hexdigest()
    source = Source("mine", "", "", "", "", hashes={"a.gz": ("0" * 64, digest)})
    assert source.problem(tmp_path) == f"{path}: no such file"
    path.write_bytes(b"broken")
    assert source.problem(tmp_path).startswith(f"{path}: is not the file that was published")
    path.write_bytes(b"whole")
    assert sha256(path) == digest
    assert source.problem(tmp_path) is None


@pytest.mark.parametrize("name", ["fashion_mnist", "c4"])
def test_settings_are_what_hydra_composes(name: str) -> None:
    composed, _ = compose_config("train", [f"data={name}", "paths.data=/some/where"])
    assert read_settings(CONF / "data" / f"{name}.yaml", "/some/where") == {
        key: value for key, value in composed["data"].items() if key != "name"
    }
