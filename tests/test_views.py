"""The trainer accepts any dataset of view pairs, and their randomness depends on the key alone."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torchvision import transforms

from densecl.augment import AugmentConfig, TwoCropsTransform, TwoViews
from densecl.data.dataset import open_source
from densecl.data.loader import KeyedDataset, build_loader
from densecl.trainer import train
from tiny import TINY


class OwnPairs(Dataset):
    """A user's dataset: plain pairs, no geometry, random numbers from any global generator."""

    def __init__(self, noise):
        self.noise = noise

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return tuple(torch.full((3, 32, 32), index / 12) + self.noise() for _ in range(2))


TORCHVISION_TRANSFORM = transforms.Compose(
    [
        transforms.RandomResizedCrop(32),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
        transforms.ToTensor(),
    ]
)


def torchvision_views(folder):
    return TwoCropsTransform(open_source(folder), TORCHVISION_TRANSFORM, TINY.seed)


SOURCES = {
    "two views": lambda folder: TwoViews(open_source(folder), AugmentConfig(size=32), TINY.seed),
    "torchvision": torchvision_views,
    "own, torch": lambda folder: OwnPairs(lambda: torch.randn(3, 32, 32)),
    "own, random": lambda folder: OwnPairs(lambda: random.random() * torch.linspace(-1, 1, 32)),
    "own, numpy": lambda folder: OwnPairs(
        lambda: torch.from_numpy(np.random.randn(3, 32, 32).astype(np.float32))
    ),
}


@pytest.fixture(params=SOURCES)
def kind(request):
    return request.param


@pytest.fixture
def views(kind, tmp_path, make_images):
    return SOURCES[kind](make_images(tmp_path / "images"))


def batches(views, first=0, last=6, **settings):
    return list(build_loader(replace(TINY, **settings), views, first, last))


def same(a, b):
    return torch.equal(a["im_q"], b["im_q"]) and torch.equal(a["im_k"], b["im_k"])


def test_training_accepts_the_views_and_measures_matches_only_with_geometry(kind, views, tmp_path):
    model = train(replace(TINY, out=str(tmp_path / "out")), views=views)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert np.isfinite([row["loss"], row["loss_global"], row["loss_dense"]]).all()
        if kind == "two views":
            assert 0 <= row["match_acc"] <= 1
        else:
            assert row["match_acc"] is None
    assert (tmp_path / "out" / "matches" / "step-00000006.png").stat().st_size > 1000
    assert torch.equal(model.queue.ptr, torch.tensor([6 * 4 % 12]))


def test_the_number_of_workers_changes_nothing(views):
    by_workers = [batches(views, workers=workers) for workers in (0, 1, 2)]
    assert len(by_workers[0]) == 6
    for none, one, two in zip(*by_workers, strict=True):
        assert same(none, one) and same(none, two)


def test_a_step_of_the_run_has_the_same_views_from_any_start(views):
    full, tail = batches(views), batches(views, first=4)
    for a, b in zip(full[4:], tail, strict=True):
        assert same(a, b)


def test_epochs_and_seeds_and_the_two_views_differ(kind, views):
    first, second = batches(views)[:3], batches(views)[3:]
    assert not any(same(a, b) for a in first for b in second)
    other = SOURCES[kind](Path(views.source.root)) if kind == "torchvision" else views
    other_seed = batches(other, seed=1)
    assert not any(same(a, b) for a, b in zip(first, other_seed))
    for batch in first:
        assert not any(torch.equal(q, k) for q, k in zip(batch["im_q"], batch["im_k"]))


def test_the_views_of_an_image_differ_in_each_epoch_and_position(views):
    pairs = KeyedDataset(views, 0)
    assert same(pairs[0, 5, 3], pairs[0, 5, 3])
    for key in ((1, 5, 3), (0, 6, 3)):
        assert not same(pairs[0, 5, 3], pairs[key])


def test_making_views_leaves_the_global_generators_unchanged(views):
    def after(work):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        work()
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    assert after(lambda: KeyedDataset(views, 0)[0, 5, 3]) == after(lambda: None)
