"""The trainer takes any source of view pairs, and what is random in a pair depends on its place in the run alone."""
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torchvision import transforms

from densecl.augment import Recipe, TransformTwice, TwoViews
from densecl.config import Config
from densecl.data import open_source
from densecl.feed import ByKey, loader
from densecl.trainer import train

TINY = Config(backbone="resnet18-layer2", image_size=32, batch_size=4, queue_len=12, dim=8, hidden=16, workers=0, threads=1, epochs=2, log_every=1,
              momentum=.9, lr=.01)


class OwnPairs(Dataset):
    """What a user might bring: plain pairs, no geometry, randomness from wherever the user is used to take it."""

    def __init__(self, noise): self.noise = noise
    def __len__(self): return 12
    def __getitem__(self, i): return tuple(torch.full((3, 32, 32), i/12) + self.noise() for _ in range(2))


SOURCES = {
    "two views": lambda folder: TwoViews(open_source(folder), Recipe(size=32), TINY.seed),
    "torchvision": lambda folder: TransformTwice(open_source(folder), transforms.Compose([
        transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip(), transforms.ColorJitter(.4, .4, .4, .1), transforms.ToTensor()]), TINY.seed),
    "own, torch": lambda folder: OwnPairs(lambda: torch.randn(3, 32, 32)),
    "own, random": lambda folder: OwnPairs(lambda: random.random()*torch.linspace(-1, 1, 32)),
    "own, numpy": lambda folder: OwnPairs(lambda: torch.from_numpy(np.random.randn(3, 32, 32).astype(np.float32))),
}


@pytest.fixture(params=SOURCES)
def kind(request): return request.param


@pytest.fixture
def views(kind, tmp_path, make_pictures): return SOURCES[kind](make_pictures(tmp_path/"pictures"))


def batches(views, first=0, last=6, **settings): return list(loader(replace(TINY, **settings), views, first, last))


def same(a, b): return torch.equal(a["im_q"], b["im_q"]) and torch.equal(a["im_k"], b["im_k"])


def test_training_takes_the_views_and_measures_matches_only_with_geometry(kind, views, tmp_path):
    model = train(replace(TINY, out=str(tmp_path/"out")), views=views)
    rows = [json.loads(line) for line in (tmp_path/"out"/"metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite([r["loss"], r["loss_global"], r["loss_dense"]]).all() for r in rows)
    if kind == "two views": assert all(0 <= r["match_acc"] <= 1 for r in rows)
    else: assert all(r["match_acc"] is None for r in rows)
    assert (tmp_path/"out"/"matches"/"step-00000006.png").stat().st_size > 1000
    assert torch.equal(model.queue.ptr, torch.tensor([6*4 % 12]))


def test_the_number_of_workers_changes_nothing(views):
    none, one, two = (batches(views, workers=n) for n in (0, 1, 2))
    assert len(none) == 6
    for a, b, c in zip(none, one, two, strict=True): assert same(a, b) and same(a, c)


def test_a_place_in_the_run_gives_the_same_views_again_from_any_start(views):
    whole, tail = batches(views), batches(views, first=4)
    for a, b in zip(whole[4:], tail, strict=True): assert same(a, b)


def test_epochs_and_seeds_and_the_two_views_differ(kind, views):
    first, second = batches(views)[:3], batches(views)[3:]
    assert not any(same(a, b) for a in first for b in second)
    other = batches(SOURCES[kind](Path(views.source.root)) if kind == "torchvision" else views, seed=1)
    assert not any(same(a, b) for a, b in zip(first, other))
    assert not any(torch.equal(q, k) for b in first for q, k in zip(b["im_q"], b["im_k"]))


def test_a_picture_looks_different_in_each_epoch_and_position(views):
    pairs = ByKey(views, 0)
    assert same(pairs[0, 5, 3], pairs[0, 5, 3])
    for key in ((1, 5, 3), (0, 6, 3)): assert not same(pairs[0, 5, 3], pairs[key])


def test_making_views_leaves_the_callers_randomness_alone(views):
    def after(work):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        work()
        return torch.rand(3).tolist(), random.random(), np.random.rand()
    assert after(lambda: ByKey(views, 0)[0, 5, 3]) == after(lambda: None)
