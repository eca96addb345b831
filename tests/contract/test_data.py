"""What every data set promises, checked for every preset found in conf/data.

A new data set is one file and one YAML: nothing here names a data set. One that reads files brings them in
its own test file: `make_files(root)` in tests/data/test_<component>.py writes a small data set into the folder
and returns the settings that go with it.
"""

import functools
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from presets import without_preset

from permlab.config.build import build
from permlab.config.schema import component_options, constant
from permlab.data.loader import Batchable, Loader
from permlab.errors import ConfigError

CONF, TESTS = Path(__file__).resolve().parents[2] / "conf", Path(__file__).resolve().parents[1] / "data"
PRESETS = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
SPLITS = ("train", "val", "test")
REFUSED = (ValueError, ConfigError)


# Building


@functools.cache
def _composed(preset: str) -> str:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = compose(overrides=[f"+data={preset}", "+paths.data=/nowhere"]).data
    return json.dumps(OmegaConf.to_container(data, resolve=True))


def preset_settings(preset: str) -> dict[str, Any]:
    """The preset as plain values, its parents merged in."""
    return {"name": preset, "component": preset} | json.loads(_composed(preset))


def component(preset: str) -> str:
    return preset_settings(preset)["component"]


def needs_files(preset: str) -> bool:
    return "root" in component_options("data", component(preset))


@functools.cache
def maker(name: str) -> Callable[[Path], dict[str, Any]]:
    """`make_files` of the data set's own test file."""
    path = TESTS / f"test_{name}.py"
    make_files = None
    if path.is_file():
        found = importlib.util.spec_from_file_location(f"files_of_{name}", path)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        make_files = getattr(module, "make_files", None)
    if make_files is None:
        pytest.fail(
            f"{name} reads files (it has an option root), and nothing here can write them: add make_files(root) to "
            f"{path}, which writes a small data set into the folder root and returns the settings that go with it"
        )
    return make_files


def settings_of(preset: str, root: Path) -> dict[str, Any]:
    """The preset with its files written below `root`, unless they are there, and without augmentation."""
    settings = preset_settings(preset)
    if needs_files(preset):
        folder, note = root / "files", root / "settings.json"
        if not folder.exists():
            folder.mkdir(parents=True)
            note.write_text(json.dumps(maker(component(preset))(folder)))
        settings |= json.loads(note.read_text()) | {"root": str(folder)}
    return settings | ({"augment": "none"} if "augment" in settings else {})


@pytest.fixture(scope="module")
def settings(request, tmp_path_factory) -> dict[str, Any]:
    """Of the preset that the test is about."""
    return settings_of(request.param, tmp_path_factory.mktemp(request.param))


each_preset = pytest.mark.parametrize("settings", PRESETS, indirect=True)


def augmented(settings: dict[str, Any]) -> dict[str, Any]:
    """With the augmentation that the preset has."""
    own = preset_settings(settings["name"])
    return settings | ({"augment": own["augment"]} if "augment" in own else {})


def dataset(settings: dict[str, Any], split: str = "train", seed: int = 0) -> Batchable:
    return build("data", settings).dataset(split, seed)


def loader(settings: dict[str, Any], *, seed: int = 0, num_workers: int = 0) -> Loader:
    """Of the training split, shuffled, in about six batches."""
    found = dataset(settings, seed=seed)
    size = max(1, len(found) // 6)
    return Loader(found, batch_size=size, seed=seed, shuffle=True, num_workers=num_workers)


def samples(batches: Iterable[Any]) -> list[bytes]:
    """Every sample with its label or targets, as bytes."""
    return [x.numpy().tobytes() + y.numpy().tobytes() for batch in batches for x, y in zip(*batch, strict=True)]


def contents(found: Batchable) -> list[bytes]:
    """Every sample of a split, in its own order."""
    return samples([found.__getitems__(range(len(found)))])


def is_part(part: list[bytes], whole: list[bytes]) -> bool:
    """Whether no sample is in a list more often than in another."""
    return not Counter(part) - Counter(whole)


def forget() -> None:
    """Empty every cache of the data sets, as a run that goes on in another process finds them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("permlab.data"):
            for cached in vars(module).values():
                getattr(cached, "cache_clear", lambda: None)()


def same(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists of batches are equal to the bit."""
    pairs = list(zip(first, second, strict=False))
    return len(first) == len(second) and all(torch.equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))


# What the specification says


def test_every_data_set_has_a_preset():
    assert without_preset("data", lambda cls: hasattr(cls, "kind") and hasattr(cls, "dataset")) == []


def test_the_shape_is_known_before_torch_is_imported(tmp_path):
    every = [settings_of(preset, tmp_path / preset) for preset in PRESETS]
    code = (
        "import json, sys\n"
        "from dataclasses import asdict\n"
        f"from {build.__module__} import build\n"
        "for settings in json.loads(sys.argv[1]):\n"
        "    spec = asdict(build('data', settings).spec())\n"
        "    print(json.dumps([spec, sorted({'torch', 'torchvision', 'transformers'} & set(sys.modules))]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(every)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for settings, line in zip(every, done.stdout.splitlines(), strict=True):
        spec, slow = json.loads(line)
        assert slow == [], f"data={settings['name']}: spec() imports {', '.join(slow)}; import them in dataset()"
        assert spec == asdict(build("data", settings).spec()), f"data={settings['name']}: spec() is not the same twice"


@each_preset
def test_batches_are_what_the_specification_says(settings):
    spec = build("data", settings).spec()
    assert spec.grid(spec.patch_size), "patch_size is one that divides the sample"
    largest = 0
    for split in SPLITS:
        found = dataset(augmented(settings), split)
        assert len(found) > 0, f"{split} is empty"
        inputs, targets = found.__getitems__(range(min(64, len(found))))
        assert len(inputs) == len(targets) == min(64, len(found))
        assert targets.dtype == torch.int64, f"labels and targets are int64, not {targets.dtype}"
        assert targets.min() >= 0, f"labels and targets count from 0; {split} holds {targets.min()}"
        assert targets.max() < spec.num_classes, f"{split} holds {targets.max()}; num_classes is {spec.num_classes}"
        if spec.kind == "image":
            assert inputs.shape[1:] == (spec.channels, spec.height, spec.width), "images are [b, c, h, w]"
            assert inputs.dtype == torch.float32, f"images are float32, not {inputs.dtype}"
            assert inputs.isfinite().all(), f"pixels are finite numbers; those of {split} are not"
            assert targets.ndim == 1, "an image has one label"
            largest = max(largest, *found.__getitems__(range(len(found)))[1].tolist())
        elif spec.kind == "text":
            assert inputs.shape == targets.shape == (len(inputs), spec.width), "tokens are [b, length]"
            assert inputs.dtype == torch.int64, f"tokens are int64, not {inputs.dtype}"
            assert inputs.min() >= 0, f"tokens count from 0; {split} holds {inputs.min()}"
            assert inputs.max() < spec.num_classes, f"{split} holds {inputs.max()}; num_classes is {spec.num_classes}"
            assert torch.equal(inputs[:, 1:], targets[:, :-1]), "the target of a token is the next one"
    if spec.kind == "image":
        assert largest == spec.num_classes - 1, f"num_classes is {spec.num_classes}, and no label is above {largest}"


TEXTS = [preset for preset in PRESETS if constant("data", component(preset), "kind") == "text"]


@pytest.mark.parametrize("settings", TEXTS, indirect=True)
def test_a_text_says_what_gave_its_tokens(settings):
    """So that a trained model can leave with it: decoded and encoded again, a text has the same ids."""
    described = build("data", settings)
    assert hasattr(described, "load_tokenizer"), "load_tokenizer(seed) gives transformers' own tokenizer"
    tokenizer = described.load_tokenizer(0)
    tokens = dataset(settings, "test")[0][0].tolist()
    text = tokenizer.decode(tokens)
    length = len(tokens) - 4  # where a window ends within a character, or a pair of bytes
    assert tokenizer(text, add_special_tokens=False)["input_ids"][:length] == tokens[:length]
    assert {tokenizer.eos_token_id, tokenizer.bos_token_id} - {None} <= set(range(described.spec().num_classes))


# The order of batches


@each_preset
def test_batches_are_a_function_of_seed_and_epoch(settings):
    epochs = {}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name, seed in (("first", 0), ("other", 1), ("again", 0)):
        forget()
        found = loader(augmented(settings), seed=seed)
        epochs[name] = [list(found) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before), "fetching leaves torch's random state as it was"
    for number in range(2):
        assert same(epochs["first"][number], epochs["again"][number]), f"epoch {number} of the same seed differs"
        assert not same(epochs["first"][number], epochs["other"][number]), "another seed has the same batches"
    assert not same(*epochs["first"]), "the second epoch has the batches of the first"
    found = loader(settings)
    whole = contents(found.dataset)
    for _ in range(2):
        seen = samples(found)
        assert len(whole) - len(seen) < found.batch_size, "an epoch leaves out more than the last, incomplete batch"
        assert is_part(seen, whole), "an epoch hands out a sample twice"


@pytest.mark.parametrize("num_workers", [0, 2])
@each_preset
def test_an_epoch_goes_on_where_it_was_left(settings, num_workers):
    settings = augmented(settings)
    whole = loader(settings)
    expected = [batch for _ in range(2) for batch in whole]
    left = loader(settings, num_workers=num_workers)
    begun = iter(left)
    seen = [next(begun) for _ in range(len(left) // 2)]
    state = json.loads(json.dumps(left.state_dict()))
    resumed = loader(settings, num_workers=num_workers)
    resumed.load_state_dict(state)
    seen += [batch for _ in range(2) for batch in resumed]
    assert same(seen, expected), "a run that was resumed sees other batches than one that was not"


# Splits


@each_preset
def test_splits_share_no_sample(settings):
    for seed in range(2):
        found = {split: set(contents(dataset(settings, split, seed))) for split in SPLITS}
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            shared = found[one] & found[other]
            assert not shared, f"{len(shared)} samples are in {one} and in {other}, seed {seed}"


@each_preset
def test_the_seed_splits_unless_the_docstring_says_it_has_no_say(settings):
    described = build("data", settings)
    page = f"{type(described).__doc__} {type(described).dataset.__doc__}"
    is_fixed = "seed has no say" in " ".join(page.split())
    differs = any(
        contents(dataset(settings, split, 0)) != contents(dataset(settings, split, seed))
        for split in SPLITS
        for seed in (1, 2)
    )
    assert differs != is_fixed, (
        f"other seeds give other splits: {differs}. Where they do not, the docstring of the class or of its "
        "dataset() has the words `the seed has no say`; elsewhere they do"
    )


@each_preset
def test_splits_hold_the_same_whole_under_every_seed(settings):
    spec = build("data", settings).spec()
    whole = [[sample for split in SPLITS for sample in contents(dataset(settings, split, seed))] for seed in (0, 1)]
    if spec.kind == "image":
        alike = sorted(whole[0]) == sorted(whole[1])
        assert alike, "a sample is in no split, or in two, under one seed"
    else:
        # What is left over at the end of a text, less than a sample, is in no split.
        assert abs(len(whole[0]) - len(whole[1])) <= len(SPLITS), "splits hold more under one seed than another"


# Labels that say nothing

LABELLED = [preset for preset in PRESETS if "shuffle_labels" in component_options("data", component(preset))]


def test_every_data_set_of_labelled_images_can_shuffle_them():
    assert [name for name in PRESETS if constant("data", component(name), "kind") == "image"] == LABELLED


@pytest.mark.parametrize("settings", LABELLED, indirect=True)
def test_labels_of_the_training_split_are_shuffled_and_no_others(settings):
    for split in SPLITS:
        (images, labels), (same, others) = (
            (found := dataset(settings | {"shuffle_labels": shuffle}, split)).__getitems__(range(len(found)))
            for shuffle in (False, True)
        )
        assert torch.equal(images, same), f"the images of {split} are others"
        assert torch.equal(labels.sort().values, others.sort().values), f"{split} has other labels"
        assert torch.equal(labels, others) == (split != "train"), f"shuffled labels in {split}: {split != 'train'}"


# Broken files

COMPONENTS = {component(preset): preset for preset in reversed(PRESETS) if needs_files(preset)}
FAULTS: dict[str, Callable[[bytes], bytes | None]] = {
    "garbled": lambda content: bytes(255 - byte for byte in content),
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2 - 1],
    "missing": lambda content: None,
}


def read(settings: dict[str, Any]) -> tuple[str, Any, list[bytes]]:
    """What is said against the files, or nothing; the component, and the samples of all splits."""
    try:
        described = build("data", settings)
        described.spec()
        return "", described, [sample for split in SPLITS for sample in contents(described.dataset(split, 0))]
    except REFUSED as error:
        return str(error), None, []


def broken(settings: dict[str, Any], name: Path, fault: str, folder: Path) -> dict[str, Any]:
    """A copy of the data set in which one file is broken; a folder is read once, so each has its own."""
    shutil.copytree(settings["root"], folder)
    content = FAULTS[fault]((folder / name).read_bytes())
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    return settings | {"root": str(folder)}


def files_of(settings: dict[str, Any]) -> list[Path]:
    root = Path(settings["root"])
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def files(request, tmp_path_factory) -> dict[str, Any]:
    """Settings of the first preset of a component that reads files."""
    return settings_of(COMPONENTS[request.param], tmp_path_factory.mktemp(request.param))


each_component = pytest.mark.parametrize("files", COMPONENTS, indirect=True)


@pytest.mark.parametrize("fault", FAULTS)
@each_component
def test_a_broken_file_is_named(files, fault, tmp_path):
    said, _, whole = read(files)
    assert not said, f"make_files writes what cannot be read: {said}"
    for number, name in enumerate(files_of(files)):
        settings = broken(files, name, fault, tmp_path / str(number))
        path = Path(settings["root"], name)
        message, _, left = read(settings)
        if message:
            places = (path, path.parent) if fault == "missing" else (path,)
            assert any(str(place) in message for place in places), f"{name}, {fault}, is not named: {message}"
            continue
        # A file may be shorter, or not be there, and what is read still be right.
        assert fault in ("cut", "missing"), f"{name}, {fault}, is read without a word"
        assert len(left) < len(whole), f"{name}, {fault}, is read without a word as a file with as many samples"
        assert is_part(left, whole), f"{name}, {fault}, is read without a word as samples that were in no file"


@pytest.mark.parametrize("name", [name for name in COMPONENTS if "on_corrupt" in component_options("data", name)])
def test_broken_files_can_be_left_out_and_are_counted(name, tmp_path):
    files = settings_of(COMPONENTS[name], tmp_path / "whole") | {"on_corrupt": "skip"}
    _, described, whole = read(files)
    assert described.num_skipped == 0, "num_skipped counts what was left out, and nothing is broken yet"
    num_left_out = 0
    for number, file in enumerate(files_of(files)):
        settings = broken(files, file, "cut", tmp_path / str(number))
        if not read(settings | {"on_corrupt": "stop"})[0]:
            continue  # not broken, only shorter
        path = str(Path(settings["root"], file))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            message, described, left = read(settings)
        if message:
            assert path in message, f"{file}, cut, cannot be left out, and is not named: {message}"
            continue
        assert any(path in str(warning.message) for warning in caught), f"{file}, cut, is left out without a warning"
        assert described.num_skipped == 1, f"{described.num_skipped} were counted where one was broken"
        assert is_part(left, whole), f"{file}, cut, is read as samples that were in no file"
        assert len(left) < len(whole), f"{file}, cut, is said to be left out, and as many samples are read"
        num_left_out += 1
    assert num_left_out, "on_corrupt=skip left out nothing of all that is broken"


@each_component
def test_a_folder_that_is_not_there_is_named(files, tmp_path):
    message, _, _ = read(files | {"root": str(tmp_path / "elsewhere")})
    assert str(tmp_path / "elsewhere") in message, f"what is not there is not named: {message or 'nothing is said'}"


# The YAML


@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_has_a_help_line_and_what_every_loader_needs(preset):
    first = (CONF / "data" / f"{preset}.yaml").read_text().splitlines()[0]
    assert re.fullmatch(r"# \S.{10,}", first), "the first line of the YAML says in a comment what the data are"
    lacks = {"batch_size", "num_workers"} - preset_settings(preset).keys()
    assert not lacks, f"conf/data/{preset}.yaml has no {' and no '.join(sorted(lacks))}"
