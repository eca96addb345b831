"""Wrong keys, habits of Hydra and Lightning: each is answered with what does it here."""

import pytest

from permlab.config.compose import resolve_train
from permlab.config.suggest import nearest_key
from permlab.errors import ConfigError


def problem_of(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_train(words)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("word", "suggested"),
    [
        ("max_steps=5", "trainer.max_steps"),
        ("max_step=5", "trainer.max_steps"),
        ("batch_size=5", "data.batch_size"),
        ("lr=0.1", "optim.lr or method.lr or model.lr"),
        ("trainer.lr=0.1", "optim.lr or method.lr or model.lr"),
        ("epochs=5", "trainer.max_epochs"),
        ("trainer.epochs=5", "trainer.max_epochs"),
        ("runs=x", "paths.runs"),
        ("every_n_steps=5", "checkpoint.every_n_steps"),
        ("metod=sinkhorn", "method"),
        ("sede=1", "seed"),
        ("model.widht=3", "model.width"),
        ("optim.lrr=1", "optim.lr"),
    ],
)
def test_a_key_is_looked_for_in_every_group(word: str, suggested: str) -> None:
    assert problem_of(word).endswith(f"unknown key; nearest valid choice: {suggested}")


def test_a_key_that_is_like_none_has_those_of_its_group() -> None:
    assert "unknown key; valid choices: " in problem_of("qqqq=1")
    assert "trainer" in problem_of("qqqq=1")


@pytest.mark.parametrize("key", [None, 3, ("a", 1), "", True])
@pytest.mark.parametrize("group", ["", "method"])
def test_a_file_may_hold_any_key_and_any_group(key: object, group: str) -> None:
    for config in ({}, {"method": None, "trainer": 3, "optim": [1], key: 2}):
        assert nearest_key(group, key, config).startswith("; ")


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("hydra.run.dir=out", "runs lie below paths.runs=out"),
        ("hydra.sweep.dir=out", "runs lie below paths.runs=out"),
        ("hydra/launcher=joblib", "--processes"),
        ("hydra/sweeper=optuna", "-m runs every combination"),
        ("+hydra.sweeper.n_trials=3", "-m runs every combination"),
        ("hydra.mode=MULTIRUN", "-m runs"),
        ("hydra.verbose=true", "PERMLAB_DEBUG=1"),
        ("hydra.job.chdir=true", "--help"),
    ],
)
def test_settings_of_hydra_are_refused_with_what_does_it_here(word: str, answer: str) -> None:
    problem = problem_of(word)
    assert problem.startswith(f"{word}: Hydra's own settings are not used; ")
    assert answer in problem


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("trainer.fast_dev_run=true", "debug=fdr"),
        ("fast_dev_run=true", "debug=fdr"),
        ("trainer.logger=true", "logger=csv"),
        ("trainer.default_root_dir=x", "paths.runs"),
        ("trainer.enable_checkpointing=false", "checkpoint."),
        ("trainer.overfit_batches=-1", "expected an integer > 0"),
        ("trainer.limit_train_batches=0", "expected an integer > 0"),
        ("trainer.limit_val_batches=1.5", "<= 1"),
        ("trainer.profiler=simpel", "nearest valid choice: simple"),
        ("trainer.accelerator=gup", "nearest valid choice: gpu"),
        ("trainer.strategy=dpp", "nearest valid choice: ddp"),
        ("debug=fast", "debug=fast: no such choice"),
    ],
)
def test_settings_of_lightning_work_or_name_the_way(word: str, answer: str) -> None:
    assert answer in problem_of(word)


def test_a_plus_means_what_it_means_to_hydra() -> None:
    plain, _ = resolve_train(["experiment=prune/digits", "trainer.max_steps=5"])
    for plus in ("+", "++"):
        again, warnings = resolve_train([f"{plus}experiment=prune/digits", f"{plus}trainer.max_steps=5"])
        assert again.config == plain.config
        assert not warnings
    assert resolve_train(["experiment=null", "debug=null"])[0].config == resolve_train([])[0].config


def test_a_group_has_one_choice() -> None:
    assert problem_of("model=vit_nano", "model=vim_nano") == (
        "model=vim_nano: there is model=vit_nano before it; -m model=vit_nano,vim_nano runs both"
    )
    assert resolve_train(["seed=1", "seed=2"])[0].config["seed"] == 2, "of a key the last one counts, as in Hydra"
