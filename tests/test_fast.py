"""The fast pipelines in a run: the same batches for any number of workers, imported on demand."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from densecl.augment import AugmentConfig, TwoViews, denormalize
from densecl.config import validate_config
from densecl.data.dataset import open_source
from densecl.data.fast_augment import FastViews
from densecl.data.loader import KeyedDataset, build_loader, build_views, collate
from densecl.runtime.io import UsageError
from densecl.runtime.workers import init_worker
from densecl.trainer import train
from tiny import TINY

TINY = replace(TINY, augment="fast", device="cpu")
KEYS = ("im_q", "im_k", "affine_q", "affine_k", "index")


@pytest.fixture
def images(make_images, tmp_path):
    """A folder of twelve images: PNGs, and JPEGs, one of them rotated and one truncated."""
    folder = make_images(tmp_path / "images")
    rotated = Image.Exif()
    rotated[0x112] = 6
    for i, path in enumerate(sorted(folder.iterdir())):
        if i % 3 == 0:
            continue
        image = Image.open(path).convert("RGB").resize((160, 120))
        path.unlink()
        image.save(path.with_suffix(".jpg"), exif=rotated if i == 4 else Image.Exif())
    truncated = sorted(folder.glob("*.jpg"))[4]
    truncated.write_bytes(truncated.read_bytes()[:900])
    return folder


def assert_same(a, b):
    assert all(torch.equal(a[key], b[key]) for key in KEYS) and a["bad"] == b["bad"]


def test_batches_are_the_same_for_any_number_of_workers_and_for_a_start_in_the_middle(images):
    config = replace(TINY, data_root=str(images))

    def batches(first, workers):
        loader = build_loader(replace(config, workers=workers), build_views(config), first, 6)
        return list(loader)

    expected = batches(0, workers=0)
    assert len(expected) == 6 and expected[0]["im_q"].dtype == torch.uint8
    for workers in (1, 4):
        for a, b in zip(expected, batches(0, workers), strict=True):
            assert_same(a, b)
    for a, b in zip(expected[4:], batches(4, workers=0), strict=True):
        assert_same(a, b)
    assert not torch.equal(expected[0]["im_q"], expected[3]["im_q"])  # another epoch


def test_spawned_workers_make_the_same_batches(images):
    views = KeyedDataset(FastViews(open_source(str(images)), AugmentConfig(size=32), 3), 3)
    keys = [[(0, p, p) for p in range(4)], [(1, p, p) for p in range(4, 8)]]
    loader = DataLoader(
        views,
        batch_sampler=keys,
        num_workers=1,
        collate_fn=collate,
        worker_init_fn=init_worker,
        multiprocessing_context="spawn",
    )
    for batch, batch_keys in zip(loader, keys, strict=True):
        assert_same(batch, collate([views[key] for key in batch_keys]))


def test_the_pipelines_agree_on_geometry_and_corrupt_images_and_nearly_on_pixels(images):
    config = AugmentConfig(size=64)
    reference_views = TwoViews(open_source(str(images)), config, 0)
    fast_views = FastViews(open_source(str(images)), config, 0)
    corrupt = 0
    for i in range(len(reference_views)):
        reference, fast = reference_views.at(2, i, i), fast_views.at(2, i, i)
        for key in ("affine_q", "affine_k"):
            assert torch.equal(reference[key], fast[key])
        assert (reference["index"], reference["bad"]) == (fast["index"], fast["bad"])
        expected = denormalize(reference["im_q"]).astype(float)
        levels = collate([fast])["im_q"][0].permute(1, 2, 0).numpy()
        assert abs(levels - expected).mean() < 3
        corrupt += len(reference["bad"])
    assert corrupt >= 1


@pytest.mark.parametrize("augment", ["fast", "device"])
def test_a_run_is_the_same_for_any_number_of_workers_and_resumes_exactly(images, tmp_path, augment):
    config = replace(TINY, data_root=str(images), augment=augment)

    def losses(out, **fields):
        train(replace(config, out=str(tmp_path / out), **fields))
        rows = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows]

    expected = losses("complete")
    assert len(expected) == 6 and np.isfinite(expected).all()
    assert losses("workers", workers=2) == expected
    losses("resumed", max_steps=3)
    assert losses("resumed") == expected


def test_the_config_validates_the_pipeline():
    validate_config(TINY)
    with pytest.raises(UsageError, match="--augment quick: choose from reference, fast"):
        validate_config(replace(TINY, augment="quick"))


def test_its_libraries_are_imported_on_demand():
    code = (
        "import sys, densecl.train, densecl.trainer; "
        "print([name for name in ('cv2', 'simplejpeg') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_error_for_missing_libraries_contains_the_command_that_installs_them(monkeypatch):
    monkeypatch.delitem(sys.modules, "densecl.data.fast_augment")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(UsageError, match="pip install opencv-python-headless simplejpeg"):
        build_views(replace(TINY, data_root="photos"))
