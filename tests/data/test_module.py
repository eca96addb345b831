import os
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from permlab.config.build import build
from permlab.data.module import DataModule
from permlab.errors import ConfigError

DIGITS = {
    "name": "digits",
    "component": "digits",
    "val_fraction": 0.3,
    "test_fraction": 0.3,
    "batch_size": 150,  # four batches of 718 images
    "num_workers": 0,
}


def module_of(settings: dict, seed: int) -> DataModule:
    return DataModule(build("data", settings), settings, seed)


class Recorder(L.LightningModule):
    """Trains a weight that needs no training and keeps a fingerprint of every batch by step and epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, tuple[int, str]] = {}
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx: int):
        images, labels = batch
        fingerprint = " ".join(map(str, labels[:30].tolist())) + f" {images.sum():.1f}"
        self.seen[self.global_step] = (self.current_epoch, fingerprint)
        return self.weight * images.mean()

    def on_validation_epoch_start(self) -> None:
        self.validated.append(0)

    def validation_step(self, batch, batch_idx: int) -> None:
        self.validated[-1] += len(batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(L.Callback):
    """A checkpoint after every batch, as an interruption makes, and one after every validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.save_checkpoint(self.folder / f"batch{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.save_checkpoint(self.folder / f"validation{trainer.global_step}.ckpt")


def fit(settings, checkpoint: Path | None = None, callbacks=(), **arguments) -> Recorder:
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **arguments,
    )
    trainer.fit(recorder, datamodule=module_of(settings, 1), ckpt_path=checkpoint, weights_only=True)
    return recorder


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice on workers and logging
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "length",
    [
        {"max_epochs": 3},
        {"max_steps": 11, "max_epochs": -1, "val_check_interval": 3, "check_val_every_n_epoch": None},
    ],
)
def test_resuming_after_any_batch_sees_what_the_whole_run_saw(tmp_path: Path, length, num_workers: int) -> None:
    settings = DIGITS | {"num_workers": num_workers}
    whole = fit(settings, callbacks=[SaveEverywhere(tmp_path)], **length)
    num_steps = 12 if "max_steps" not in length else 11
    assert sorted(whole.seen) == list(range(num_steps))
    assert [epoch for _, (epoch, _) in sorted(whole.seen.items())] == [step // 4 for step in range(num_steps)]
    assert len({fingerprint for _, fingerprint in whole.seen.values()}) == num_steps
    assert set(whole.validated) == {539}
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int("".join(filter(str.isdigit, path.stem))))
    assert len(checkpoints) == num_steps + 3
    for checkpoint in checkpoints[:: 3 if num_workers else 1]:
        resumed = fit(settings, checkpoint, **length).seen
        first = int("".join(filter(str.isdigit, checkpoint.stem)))
        assert {step: fingerprint for step, (_, fingerprint) in resumed.items()} == {
            step: fingerprint for step, (_, fingerprint) in whole.seen.items() if step >= first
        }, checkpoint.stem


def test_an_epoch_cut_short_and_a_validation_cut_short_start_anew() -> None:
    recorder = fit(DIGITS, max_epochs=3, limit_train_batches=3, limit_val_batches=2)
    assert [epoch for _, (epoch, _) in sorted(recorder.seen.items())] == [0] * 3 + [1] * 3 + [2] * 3
    assert recorder.validated == [300] * 3


@pytest.mark.parametrize(
    ("asked", "cores", "ranks", "expected"), [(8, 2, 1, 2), (8, 4, 2, 2), (3, 16, 1, 3), (2, 1, 4, 1)]
)
def test_there_are_no_more_workers_than_cores(monkeypatch, asked: int, cores: int, ranks: int, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    module = module_of(DIGITS | {"num_workers": asked}, seed=0)
    module.trainer = SimpleNamespace(num_devices=ranks, global_rank=0, world_size=ranks, overfit_batches=0)
    assert module.train_dataloader().num_workers == expected


def test_no_workers_stay_none() -> None:
    assert module_of(DIGITS, seed=0).val_dataloader().num_workers == 0


def test_loaders_take_split_seed_and_sizes_from_the_settings(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    module = module_of(DIGITS | {"num_workers": 2}, seed=5)
    train, val, test = module.train_dataloader(), module.val_dataloader(), module.test_dataloader()
    assert [loader.shuffle for loader in (train, val, test)] == [True, False, False]
    assert [len(loader.dataset) for loader in (train, val, test)] == [718, 539, 540]
    assert {(loader.batch_size, loader.num_workers, loader.seed) for loader in (train, val, test)} == {(150, 2, 5)}
    assert {(loader.rank, loader.num_ranks) for loader in (train, val, test)} == {(0, 1)}


def test_mean_image_is_the_mean_of_all_where_there_are_few() -> None:
    module = module_of(DIGITS, seed=0)
    images = module.component.dataset("train", 0).inputs
    np.testing.assert_allclose(module.mean_image(limit=10_000), images[:, 0].numpy().mean(0), atol=1e-6)
    close_to_all = load_digits().images.mean(0) / 16
    assert np.abs(module.mean_image(limit=100) - close_to_all).max() < 0.2


def grey_photos(root: Path) -> dict:
    """Fifty images per class, black, dark and light; settings of the folder."""
    for split in ("train", "val"):
        for name, value in (("a", 0), ("b", 100), ("c", 200)):
            (root / split / name).mkdir(parents=True)
            for i in range(50):
                Image.new("L", (8, 6), value).save(root / split / name / f"{i}.png")
    folder = {"name": "image_folder", "component": "image_folder", "root": str(root), "image_size": 4, "resize": 4}
    looks = {"channels": 3, "patch_size": 1, "augment": "flip", "normalise": False, "val_fraction": 0.2}
    return folder | looks | {"batch_size": 8, "num_workers": 0}


def test_mean_image_is_of_every_class_in_a_sorted_dataset(tmp_path: Path) -> None:
    settings = grey_photos(tmp_path)
    mean = module_of(settings, seed=0).mean_image(limit=9)
    assert mean.shape == (4, 4)
    np.testing.assert_allclose(mean, 100 / 255, atol=1e-6)
    for path in (tmp_path / "train" / "a").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"data: .*a/\d+\.png: not a readable image"):
        module_of(settings, seed=0).mean_image(limit=1000)


def test_images_come_as_bytes_and_are_finished_where_they_are_used(tmp_path: Path) -> None:
    module = module_of(grey_photos(tmp_path), seed=0)
    batch = next(iter(module.train_dataloader()))
    assert batch.pixels.dtype == torch.uint8
    images, labels = module.on_after_batch_transfer(batch, 0)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0, 100, 200])[labels] / 255)
    assert module.on_after_batch_transfer((images, labels), 0) == (images, labels)


def test_splits_are_told_with_their_numbers_and_folders(tmp_path: Path) -> None:
    told = module_of(grey_photos(tmp_path) | {"val_is_test": True}, seed=0).describe()
    assert told == f"120 train, 30 val from {tmp_path}/train; 150 test from {tmp_path}/val"
    assert module_of(DIGITS, seed=0).describe() == "718 train, 539 val, 540 test"


def test_what_a_dataset_refuses_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    settings = {"name": "medmnist", "component": "medmnist", "root": str(tmp_path), "flag": "pathmnist"}
    module = module_of(settings | {"batch_size": 2, "num_workers": 0}, seed=0)
    with pytest.raises(ConfigError, match=r"data: .*pathmnist\.npz: no such file"):
        module.train_dataloader()


# Samples to calibrate on

TEXT = {
    "split_seed": None,
    "name": "pydocs",
    "component": "pydocs",
    "sequence_length": 16,
    "tokenizer": "byte",
    "vocab_size": 256,
}
TEXT |= {"val_fraction": 0.05, "test_fraction": 0.05, "batch_size": 8, "num_workers": 0}


def test_a_sample_is_drawn_without_repetition_by_seed_and_split() -> None:
    module = module_of(DIGITS | {"batch_size": 16}, seed=3)
    batches = module.sample("train", 40)
    assert [len(inputs) for inputs, _ in batches] == [len(labels) for _, labels in batches] == [16, 16, 8]
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    dataset = module.component.dataset("train", 3)
    places = [
        [i for i in range(len(dataset)) if torch.equal(dataset.inputs[i], image) and dataset.labels[i] == label]
        for image, label in zip(inputs, labels, strict=True)
    ]
    assert all(len(place) == 1 for place in places)
    drawn = [place[0] for place in places]
    assert len(set(drawn)) == 40
    assert drawn != sorted(drawn)

    def sample(seed: int, split: str = "train", **changes: object) -> torch.Tensor:
        found = module_of(DIGITS | changes, seed=seed).sample(split, 40)
        return torch.cat([images for images, _ in found])

    torch.rand(3)
    np.random.rand(3)
    assert torch.equal(sample(3), inputs), "the same whatever the size of batches"
    assert not torch.equal(sample(4), inputs)
    assert not torch.equal(sample(3, "val"), inputs)


def test_a_sample_has_all_of_a_smaller_split() -> None:
    module = module_of(DIGITS, seed=0)
    batches = module.sample("val", 10_000)
    assert sum(len(labels) for _, labels in batches) == 539
    torch.testing.assert_close(
        torch.cat([inputs for inputs, _ in batches]).sum(), module.component.dataset("val", 0).inputs.sum()
    )


def test_a_sample_of_text_is_windows_with_their_next_tokens() -> None:
    for inputs, targets in module_of(TEXT, seed=0).sample("val", 20):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == 16
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_an_empty_split_cannot_be_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(DIGITS, seed=0)
    monkeypatch.setattr(module, "dataset", lambda split: [])
    with pytest.raises(ValueError, match="the val split has no samples"):
        module.sample("val", 4)
