"""The fast pipeline in a run: the same whatever the number of workers and however they start, loaded only when asked for."""
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from densecl.augment import Recipe, TwoViews
from densecl.config import Config, check
from densecl.data import open_source
from densecl.fast import FastViews
from densecl.feed import ByKey, collate, loader, one_thread, two_views
from densecl.files import UsageError
from densecl.trainer import train

TINY = Config(backbone="resnet18-layer2", image_size=32, batch_size=4, queue_len=12, hidden=16, dim=8, workers=0, threads=1, epochs=2, log_every=1,
              momentum=.9, lr=.01, augment="fast", device="cpu")
KEYS = ("im_q", "im_k", "affine_q", "affine_k", "index")


@pytest.fixture
def pictures(make_pictures, tmp_path):
    """A folder of twelve: JPEGs, one of them turned and one torn, and PNGs."""
    folder = make_pictures(tmp_path/"pictures")
    turn = Image.Exif()
    turn[0x112] = 6
    for i, name in enumerate(sorted(p.name for p in folder.iterdir())):
        if i % 3 == 0: continue
        image = Image.open(folder/name)
        image.load()
        (folder/name).unlink()
        image.convert("RGB").resize((160, 120)).save(folder/name.replace("png", "jpg"), exif=turn if i == 4 else Image.Exif())
    torn = sorted(folder.glob("*.jpg"))[4]
    torn.write_bytes(torn.read_bytes()[:900])
    return folder


def same(a, b): return all(torch.equal(a[k], b[k]) for k in KEYS) and a["bad"] == b["bad"]


def test_batches_are_the_same_for_any_number_of_workers_and_for_a_start_in_the_middle(pictures):
    config = replace(TINY, data_root=str(pictures))
    alone, one, four = (list(loader(replace(config, workers=n), two_views(config), 0, 6)) for n in (0, 1, 4))
    assert len(alone) == 6 and alone[0]["im_q"].dtype == torch.uint8
    assert all(same(a, b) and same(a, c) for a, b, c in zip(alone, one, four))
    assert all(same(a, b) for a, b in zip(alone[4:], loader(config, two_views(config), 4, 6)))
    assert not torch.equal(alone[0]["im_q"], alone[3]["im_q"])                      # another epoch


def test_workers_that_are_spawned_give_the_same(pictures):
    views = ByKey(FastViews(open_source(str(pictures)), Recipe(size=32), 3), 3)
    keys = [[(0, p, p) for p in range(4)], [(1, p, p) for p in range(4, 8)]]
    made = DataLoader(views, batch_sampler=keys, num_workers=1, collate_fn=collate, worker_init_fn=one_thread, multiprocessing_context="spawn")
    assert all(same(a, collate([views[k] for k in ks])) for a, ks in zip(made, keys))


def test_the_two_pipelines_agree_on_geometry_on_rotten_pictures_and_nearly_on_pixels(pictures):
    slow, quick = (kind(open_source(str(pictures)), Recipe(size=64), 0) for kind in (TwoViews, FastViews))
    bad = 0
    for i in range(len(slow)):
        a, b = slow.at(2, i, i), quick.at(2, i, i)
        assert torch.equal(a["affine_q"], b["affine_q"]) and torch.equal(a["affine_k"], b["affine_k"]) and (a["index"], a["bad"]) == (b["index"], b["bad"])
        floats = collate([b])["im_q"].float()[0]/255
        back = a["im_q"]*torch.tensor((.229, .224, .225))[:, None, None] + torch.tensor((.485, .456, .406))[:, None, None]
        assert (floats - back).abs().mean()*255 < 3
        bad += len(a["bad"])
    assert bad >= 1


@pytest.mark.parametrize("augment", ["fast", "device"])
def test_a_run_with_it_is_the_same_for_any_number_of_workers_and_goes_on_exactly(pictures, tmp_path, augment):
    config = replace(TINY, data_root=str(pictures), augment=augment)
    def losses(out, **settings):
        train(replace(config, out=str(tmp_path/out), **settings))
        return [json.loads(line)["loss"] for line in (tmp_path/out/"metrics.jsonl").read_text().splitlines()]
    whole = losses("whole")
    assert len(whole) == 6 and np.isfinite(whole).all() and losses("workers", workers=2) == whole
    losses("halves", max_steps=3)
    assert losses("halves") == whole


def test_the_config_knows_it():
    check(TINY)
    with pytest.raises(UsageError, match="--augment quick: choose from reference, fast"): check(replace(TINY, augment="quick"))


def test_its_libraries_are_loaded_only_when_it_is_asked_for():
    ask = "import sys, densecl.train, densecl.trainer; print([m for m in ('cv2', 'simplejpeg') if m in sys.modules])"
    got = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert got.stdout == "[]\n", got.stderr


def test_without_its_libraries_it_is_refused_with_the_command_that_helps(monkeypatch):
    monkeypatch.delitem(sys.modules, "densecl.fast")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(UsageError, match="pip install opencv-python-headless simplejpeg"): two_views(replace(TINY, data_root="photos"))
