"""Wrong input of every kind, at scale: it ends with 0, or with 2 and one line, and nothing is written.

Every example is one command line, run in this process through `cli.main`. Training and evaluation
themselves are left out where only the way to them is tested, and are real where files of a run are
damaged. The number of cases and the time they took are printed at the end (`-rP` shows them).
"""

import contextlib
import copy
import io
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from runs import train
from scale import part

import permlab.cli
import permlab.config
import permlab.config.compose
import permlab.config.schema
import permlab.run.evaluation
import permlab.run.story
import permlab.run.trainer
from permlab.cli import main
from permlab.config.check import plan_of
from permlab.config.evaluation import check_evaluation
from permlab.config.schema import _SCHEMAS, CONF, GROUPS, component_names, component_options, components
from permlab.errors import ConfigError

# Cases of each kind; together at least 2000.
ALL_CASES = {"overrides": 350, "sweeps": 100, "yaml": 130, "configs": 800, "files": 300, "checkpoints": 310}
NUM_RESUMES = part(20, of=2)
NUM_OVERRIDES, NUM_SWEEPS, NUM_YAML, NUM_CONFIGS, NUM_FILES, NUM_CHECKPOINTS = map(part, ALL_CASES.values())
# Seconds that one case may take on a slow machine.
LIMIT = 30.0

codes: Counter[tuple[str, int]] = Counter()


def cases(count: int) -> settings:
    """So many examples, the same ones every time, none of them minimised: the seed is shown instead."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def outcome(kind: str, name: str, words: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a command line, which must not raise and must be one line if it fails."""
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(name, words)
    said = err.getvalue()
    assert time.monotonic() - began < LIMIT, words
    lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
    assert code in (0, 2), (code, said)
    assert len(lines) == (1 if code else 0) or _only_warnings(lines, code), said
    assert not code or lines[-1].startswith("error: "), said
    assert "Traceback" not in said
    codes[kind, code] += 1
    return code, said


def _only_warnings(lines: list[str], code: int) -> bool:
    """Python's warnings, two lines each, beside the one of the error."""
    rest = lines[:-1] if code else lines
    return all("Warning: " in line or line.startswith("  ") for line in rest)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with size and time of change."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


# Words

KEYS = sorted(
    {f"{group}.{field.name}".lstrip(".") for group, schema in _SCHEMAS.items() for field in fields(schema)}
    | {
        f"{g}.{key}"
        for g in ("model", "method", "task", "data")
        for c in components(g)
        for key in component_options(g, c)
    }
    | {
        *GROUPS,
        "experiment",
        "tuned",
        "paths",
        "hydra",
        "hydra.run.dir",
        "trainer.profiler",
        "trainer.limit_val_batches",
    }
)
CHOICES = sorted({name for group in GROUPS for name in component_names(group)})
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "7",
    "1e400",
    "-1e308",
    "nan",
    "inf",
    "-inf",
    "1e-320",
    "9" * 40,
    "0x10",
    "1_000",
    "0.5",
    "1.0",
]
ODD = [
    *(
        "",
        " ",
        "null",
        "true",
        "False",
        "???",
        "[]",
        "{}",
        "[1,[2,[3]]]",
        "{a:{b:{c:1}}}",
        "[1,2",
        "{a:",
        "'",
        '"',
        "\\",
        "\\n",
    ),
    *(
        "a b",
        "ü",
        "日本",
        "\u202e",
        "\x00",
        "\x1b[31m",
        "\ud800",
        "%s%n",
        "$(id)",
        "`id`",
        "a;b",
        "a#b",
        "a@b",
        "~",
        "@",
        "a" * 3000,
    ),
    *(
        "${seed}",
        "${optim.lr}",
        "${nowhere}",
        "${oc.env:HOME}",
        "${oc.env:NOWHERE}",
        "${",
        "${optim}",
        "${optim.lr}${seed}",
        "${..seed}",
    ),
    *(
        "../../x",
        "../" * 40 + "etc/passwd",
        "/etc/passwd",
        "/dev/null",
        "/proc/self/mem",
        "/",
        ".",
        "..",
        "~root",
        "a/../../b",
        "CON",
        "-",
    ),
    *(
        "{start: 1, end: 0.1}",
        "{start: nan}",
        "{kind: linear, start: -1, end: 2}",
        "{start: 1, peak: 2, end: [3]}",
        "{_target_: os.abort}",
    ),
    *(
        "1,2",
        "a,b",
        "choice(1,2)",
        "range(0,3)",
        "interval(0,1)",
        "glob(*)",
        "glob(../*)",
        "shuffle(1,2)",
        "sort(3,1)",
        "extend_list(1)",
    ),
    *(
        "int(1.5)",
        "str(1)",
        "json_str('{')",
        "float(x)",
        "bool(3)",
        "row",
        "random_-1",
        "random_" + "9" * 30,
        "x.npz",
        "hilbert",
        "timm/x",
    ),
]


def plain(text: str) -> bool:
    """Help, completion and the like are not errors and are tested where they belong."""
    return not text.startswith("-")


@st.composite
def keys(draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(KEYS))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        at = draw(st.integers(0, len(key)))
        key = (
            key[:at]
            + draw(st.sampled_from(["", "x", ".", "..", "@", "/", "=", " ", "ü", "[0]", "\x00"]))
            + key[at + 1 :]
        )
    elif kind == 1:
        key = draw(st.sampled_from(["+", "++", "~", "+++", "-~", "@"])) + key
    elif kind == 2:
        key += draw(st.sampled_from([".x", ".name", ".component", "._target_", "@a.b", "@_global_", ".0", "."]))
    elif kind == 3:
        key = draw(st.text(max_size=12))
    return key


VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(ODD),
    st.sampled_from(CHOICES),
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.lists(st.integers(-2, 70), max_size=70).map(str),
)


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    words = []
    for _ in range(draw(st.integers(1, 4))):
        key, value = draw(keys()), draw(VALUES)
        words.append(draw(st.sampled_from([f"{key}={value}"] * 9 + [key, f"{key}={value}={value}"])))
    return [word for word in words if plain(word)]


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    began = time.monotonic()
    yield
    total = sum(codes.values())
    kinds = ", ".join(f"{kind} {code}: {count}" for (kind, code), count in sorted(codes.items()))
    print(f"bad input: {total} cases in {time.monotonic() - began:.0f} s ({kinds})")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Nothing is trained; what would have been is a directory, which has to lie where runs lie."""
    reached: list[Path] = []
    monkeypatch.setattr(permlab.run.story, "train", lambda plan: reached.append(plan.directory))
    monkeypatch.chdir(tmp_path)
    return reached


def check_directories(reached: list[Path], words: list[str]) -> None:
    for path in reached:
        assert (
            not any(word.startswith(("paths", "+paths", "++paths", "~paths")) for word in words)
            or ".." not in path.name
        )
        runs = path.parents[2]
        assert len(path.parts) == len(runs.parts) + 3
        assert not {"..", "."} & set(path.relative_to(runs).parts)


def test_overrides(no_training: list[Path], tmp_path: Path) -> None:
    @cases(NUM_OVERRIDES)
    @given(overrides())
    @example(["seed=1"])  # few of the others are right
    def run(words: list[str]) -> None:
        no_training.clear()
        code, _ = outcome("overrides", "train", words)
        assert bool(no_training) == (code == 0)
        check_directories(no_training, words)

    run()
    assert tree(tmp_path) == {}
    assert 0 < codes["overrides", 0] < codes["overrides", 2]


SWEEPS = [
    "1,2",
    "a,b,c",
    "range(3)",
    "range(0,1000000000)",
    "range(5,1)",
    "choice(a,b)",
    "interval(0,1)",
    "glob(*)",
    "glob(s*)",
    ",",
    "1,,2",
]


def test_sweeps(no_training: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that cannot run is a line of its own, so here the command line is the whole sweep or one job of it."""
    import permlab.study.jobs

    monkeypatch.setattr(permlab.study.jobs, "_known_code", lambda plan: 2 if plan is None else 0)

    @cases(NUM_SWEEPS)
    @given(keys(), st.one_of(st.sampled_from(SWEEPS), VALUES), overrides())
    def run(key: str, value: str, rest: list[str]) -> None:
        assume(plain(key))
        out, err = io.StringIO(), io.StringIO()
        began = time.monotonic()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main("train", ["-m", f"{key}={value}", *rest[:1]])
        assert time.monotonic() - began < LIMIT
        lines = [line for line in err.getvalue().splitlines() if not line.startswith("warning: ")]
        assert code in (0, 1, 2)
        assert all(line.startswith("error: ") for line in lines), lines
        assert bool(lines) == bool(code)
        codes["sweeps", code] += 1

    run()
    assert tree(tmp_path) == {}


# Files of the configuration


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut, changed, doubled or replaced."""
    kind = rng.randrange(7)
    at = rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))) + data[at + 4 :]
    if kind == 2:
        return data[at:] + data[:at]
    if kind == 3:
        return b""
    if kind == 4:
        lines = data.split(b"\n")
        rng.shuffle(lines)
        return b"\n".join(lines)
    if kind == 5:
        return bytes(rng.randrange(256) for _ in range(64))
    lines = data.split(b"\n")
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(LINES))
    return b"\n".join(lines)


LINES = [
    *(
        b"a: [",
        b"\tx: 1",
        b"{}",
        b"- 1",
        b"? x",
        b"&a x: *a",
        b"<<: 1",
        b"seed: !!python/object/apply:os.abort []",
        b"x: !!binary zz",
    ),
    *(
        b"defaults: 3",
        b"defaults: [nowhere]",
        b"defaults: [{model: [vit_b, vit_s]}]",
        b"3: 4",
        b"? [1, 2]\n: 3",
        b"_target_: os.abort",
    ),
    *(
        b"lr: ${nowhere}",
        b"lr: .nan",
        b"lr: .inf",
        b"order: 2020-01-01",
        b"name: ../../x",
        b"component: ../x",
        b"\xff\xfe",
        b"hydra: {run: {dir: x}}",
    ),
]


def test_yaml_files(no_training: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    for module in (permlab.cli, permlab.config.compose, permlab.config.schema):
        monkeypatch.setattr(module, "CONF", conf)
    names = ["train.yaml", "task/classify.yaml", "method/sinkhorn.yaml", "model/ssm_probe.yaml", "data/digits.yaml"]
    names += ["optim/adamw.yaml", "trainer/cpu.yaml", "logger/wandb.yaml", "eval.yaml", "method/sinkhorn_ste.yaml"]

    @cases(NUM_YAML)
    @given(st.sampled_from(names), st.integers(0, 2**32))
    def run(name: str, seed: int) -> None:
        original = (CONF / name).read_bytes()
        (conf / name).write_bytes(damage(original, random.Random(seed)))
        script = "eval" if name == "eval.yaml" else "train"
        try:
            outcome("yaml", script, ["run=nowhere"] if script == "eval" else ["method=sinkhorn"])
        finally:
            (conf / name).write_bytes(original)

    run()
    assert not (tmp_path / "runs").exists()


# Files of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = train(tmp_path_factory.mktemp("runs"), "task.control=false", "trainer.log_every_n_steps=1", steps=3)
    assert result.code == 0, result.err
    return result.run_dir


def leaves(value: object, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield (*path, key)
            yield from leaves(part, (*path, key))


WRONG = [
    *(
        None,
        True,
        -1,
        0,
        10**30,
        float("nan"),
        float("inf"),
        -0.5,
        "",
        "x",
        "../../x",
        "${seed}",
        [],
        {},
        [1, "a", None],
        {"a": {"b": 1}},
    ),
    *({"_target_": "os.abort"}, "???", "\x00", "vit_b", "sinkhorn", "/dev/null", [[[]]], 1e-300, "1", "a" * 500),
]


def test_configurations_of_runs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of config.yaml replaced, removed and added; what is then evaluated has a valid configuration."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    paths = list(leaves(config))

    class Reached(ConfigError):
        """Evaluation would begin."""

    def stop(*_: object) -> None:
        raise Reached("reached")

    monkeypatch.setattr(permlab.run.evaluation, "assemble", stop)
    monkeypatch.setattr(permlab.cli, "resolve_evaluation", _evaluating(run_dir))

    @cases(NUM_CONFIGS)
    @given(
        st.sampled_from(paths),
        st.sampled_from(WRONG),
        st.sampled_from(["set", "delete", "add", "bytes"]),
        st.integers(0, 2**32),
    )
    def run(path: tuple, value: object, kind: str, seed: int) -> None:
        changed = copy.deepcopy(config)
        node = changed
        for key in path[:-1]:
            node = node[key]
        if kind == "set":
            node[path[-1]] = value
        elif kind == "delete":
            del node[path[-1]]
        elif kind == "add":
            node[random.Random(seed).choice([3, None, "x", "_target_", ("a", 1), "", "name"])] = value
        text = yaml.dump(changed, Dumper=getattr(yaml, "CDumper", yaml.Dumper)).encode()  # of a tuple: a tag for Python
        (run_dir / "config.yaml").write_bytes(damage(text, random.Random(seed)) if kind == "bytes" else text)
        before = tree(run_dir)
        code, _ = outcome("config.yaml", "eval", [f"run={run_dir}"])
        assert code == 2
        assert tree(run_dir) == before

    run()


def damage_file(path: Path, rng: random.Random, *, kinds: int = 5) -> None:
    kind = 4 - rng.randrange(kinds)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.unlink()
        path.mkdir()
    elif kind == 2:
        path.unlink()
        path.symlink_to(rng.choice(["/dev/null", "nowhere", "/"]))
    else:
        path.write_bytes(damage(path.read_bytes(), rng))


def fresh(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def test_files_of_a_finished_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both scripts on a run of which one file is damaged; nothing is written whatever they find."""
    run_dir = tmp_path / "run"
    config = yaml.safe_load((finished / "config.yaml").read_text())
    names = [
        "summary.json",
        "config.yaml",
        "checkpoints/best.ckpt",
        "arrays/order.npz",
        "metrics.jsonl",
        "provenance.json",
        "DONE",
    ]
    fresh(finished, run_dir)
    monkeypatch.setattr(permlab.cli, "resolve_evaluation", _evaluating(run_dir))
    monkeypatch.setattr(permlab.cli, "resolve_train", _training(run_dir, config))
    monkeypatch.setattr(permlab.run.trainer, "run_test", lambda *_, **__: {})
    monkeypatch.setattr(permlab.run.story, "train", lambda plan: None)

    @cases(NUM_FILES)
    @given(st.sampled_from(names), st.integers(0, 2**32), st.booleans())
    def run(name: str, seed: int, evaluates: bool) -> None:
        fresh(finished, run_dir)
        damage_file(run_dir / name, random.Random(seed))
        before = tree(run_dir)
        outcome("files", *(("eval", [f"run={run_dir}"]) if evaluates else ("train", [])))
        assert tree(run_dir) == before

    run()


def _evaluating(run_dir: Path):
    """In place of Hydra, which would compose the same every time: the settings of `eval run=...`."""
    evaluation = permlab.cli.resolve_evaluation([f"run={run_dir}"])

    def resolve(words: list[str]) -> Mapping[str, Any]:
        return check_evaluation({**evaluation, **dict(word.split("=", 1) for word in words)})

    return resolve


def _training(run_dir: Path, config: dict):
    """In place of Hydra: the plan of a run's own settings, wherever it lies."""
    plan = plan_of(config, run_dir)
    return lambda words: (plan, [])


# Checkpoints


def damaged_state(state: dict, rng: random.Random) -> object:
    """A checkpoint that can be read, but whose content is not what it should be."""
    weights = state["state_dict"]
    name = rng.choice(sorted(weights))
    kind = rng.randrange(10)
    if kind == 0:
        del weights[name]
    elif kind == 1:
        weights[name] = torch.zeros(3, 5, 7)
    elif kind == 2:
        weights[name] = rng.choice([None, 3, "x", [1], {}])
    elif kind == 3:
        weights["model.of.another"] = torch.zeros(2)
    elif kind == 4:
        weights[7] = torch.zeros(2)
    elif kind == 5:
        return rng.choice([None, [], 3, {}, torch.zeros(2), {"state_dict": 3}, {"state_dict": []}])
    elif kind == 6:
        del state[rng.choice(sorted(state))]
    elif kind == 7:
        state[rng.choice(sorted(state))] = rng.choice([None, -1, "x", [], {}, {"a": 1}])
    elif kind == 8:
        weights[name] = weights[name].to(torch.complex64)
    else:
        state["global_step"] = rng.choice(["x", None, -3, 10**9, 1.5])
    return state


def damage_checkpoint(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        path.write_bytes(damage(path.read_bytes(), rng))
    else:
        torch.save(damaged_state(torch.load(path, weights_only=True), rng), path)


def test_checkpoints(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picked weights, for evaluation; the test pass itself is left out."""
    run_dir = tmp_path / "run"
    fresh(finished, run_dir)
    original = (run_dir / "checkpoints" / "best.ckpt").read_bytes()
    monkeypatch.setattr(permlab.run.trainer, "run_test", lambda *_, **__: {})
    monkeypatch.setattr(permlab.cli, "resolve_evaluation", _evaluating(run_dir))

    @cases(NUM_CHECKPOINTS)
    @given(st.integers(0, 2**32))
    def run(seed: int) -> None:
        (run_dir / "checkpoints" / "best.ckpt").write_bytes(original)
        damage_checkpoint(run_dir / "checkpoints" / "best.ckpt", random.Random(seed))
        before = tree(run_dir)
        outcome("checkpoints", "eval", [f"run={run_dir}"])
        assert tree(run_dir) == before

    run()


def test_resuming(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real training on from a damaged checkpoint or record; what cannot be used is left as it is."""
    run_dir = tmp_path / "run"
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 4}
    fresh(finished, run_dir)
    monkeypatch.setattr(permlab.cli, "resolve_train", _training(run_dir, config))
    monkeypatch.setattr(permlab.run.story, "draw_all", lambda run_dir: [])

    @cases(NUM_RESUMES)
    @given(
        st.sampled_from(["checkpoints/last.ckpt", "checkpoints/last.ckpt", "metrics.jsonl", "summary.json"]),
        st.integers(0, 2**32),
    )
    def run(name: str, seed: int) -> None:
        fresh(finished, run_dir)
        (run_dir / "DONE").unlink()
        if name != "summary.json":
            (run_dir / "summary.json").unlink()
        rng = random.Random(seed)
        path = run_dir / name
        if name.endswith("ckpt"):
            damage_checkpoint(path, rng)
        else:
            damage_file(path, rng, kinds=2)  # a file still: one that cannot be replaced is no bad input, but a bad disk
        damaged = path.read_bytes() if path.is_file() else None
        code, _ = outcome("resuming", "train", [])
        if code:
            assert damaged is None or path.read_bytes() == damaged
        assert (run_dir / "DONE").is_file() == (code == 0)

    run()


def test_there_are_two_thousand_cases() -> None:
    """All of them in `make test-all`."""
    assert sum(ALL_CASES.values()) + 20 >= 2000
    if len({kind for kind, _ in codes}) == 7:  # the whole file was run
        wanted = sum(map(part, ALL_CASES.values())) + NUM_RESUMES
        assert sum(codes.values()) >= wanted, codes
