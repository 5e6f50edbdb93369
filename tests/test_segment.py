"""`densecl segment`: several processes, interrupted runs, wrong input, real masks."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from densecl.data import labels
from densecl.runtime.io import RunError, UsageError
from densecl.segment import __main__ as segment_main
from densecl.segment import fcn
from densecl.transfer.initialization import InitialWeights, build_resnet

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
BACKBONE = shlex.split("--backbone resnet18")
SMALL = shlex.split(
    "--crop-size 32 --batch-size 4 --max-steps 6 --save-every 2 --log-every 1 "
    "--workers 0 --threads 1 --device cpu"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A dataset in VOC's format with three classes: 24 images to train on, 5 to score on."""
    root = tmp_path_factory.mktemp("segment") / "VOCdevkit"
    base = root / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / name).mkdir(parents=True)
    for i in range(29):
        rng = np.random.default_rng(i)
        mask = np.kron(rng.integers(0, 3, (3, 4)), np.ones((16, 16))).astype(np.uint8)  # 48 x 64
        mask[:2] = 255
        blue = rng.integers(0, 256, mask.shape)
        image = np.stack([mask % 3 * 80, 200 - mask % 3 * 60, blue], -1).astype(np.uint8)
        Image.fromarray(image).save(base / f"JPEGImages/{i:02d}.jpg")
        Image.fromarray(mask).save(base / f"SegmentationClass/{i:02d}.png")
    (base / "classes.txt").write_text("ground\none\ntwo\n")
    for split, indices in {"train": range(24), "val": range(24, 29)}.items():
        text = "\n".join(f"{i:02d}" for i in indices)
        (base / f"ImageSets/Segmentation/{split}.txt").write_text(text)
    return root


def arguments(tree, out, *more):
    """Arguments of a small run from random weights."""
    options = ["--weights", "random", "--data-root", tree, "--out", out]
    return [str(word) for word in (*options, *BACKBONE, *SMALL, *more)]


def command(tree, out, *more, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    start = [sys.executable, *(launcher if ranks > 1 else [])]
    return [*start, "-m", "densecl.segment", *arguments(tree, out, *more)]


def call(*args, **options):
    return subprocess.run(
        command(*args, **options),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def rows(out, trial=0):
    return [json.loads(line) for line in (out / f"trial-{trial}/metrics.jsonl").open()]


def test_two_ranks_train_one_network_and_share_the_test_set(tree, tmp_path):
    got = call(tree, tmp_path / "out", "--trials", 2, ranks=2)
    assert got.returncode == 0, got.stderr
    assert "on the CPU each process has its own BN statistics" in got.stderr
    assert got.stdout.count("ours: 2 trials") == 1  # one process prints
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["trials"] == 2 and [run["seed"] for run in results["runs"]] == [0, 1]
    assert [row["step"] for row in rows(tmp_path / "out", 1)] == list(range(1, 7))

    # the same score as one process computes over all images
    model = fcn.build_fcn(InitialWeights("random", "resnet18"), 3, 0)
    model.load_state_dict(torch.load(tmp_path / "out/trial-1/last.pt", weights_only=True)["model"])
    config = segment_main.SegmentConfig(**results["config"])
    dataset = labels.open_segmentation(tree, "val")
    scores = segment_main.evaluate_model(model, dataset, config, "cpu")
    assert abs(scores["miou"] - results["runs"][1]["miou"]) < 1e-9
    assert scores["per_class"] == pytest.approx(results["runs"][1]["per_class"])


def test_a_killed_run_continues_and_ends_the_same(tree, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert call(tree, straight).returncode == 0
    process = subprocess.Popen(
        command(tree, killed),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    checkpoint, deadline = killed / "trial-0/last.pt", time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not (killed / "trial-0/result.json").exists()

    resumed = call(tree, killed, "--trials", 1)
    assert resumed.returncode == 0, resumed.stderr
    assert "trial 0: resumed at step" in resumed.stderr
    assert rows(killed) == rows(straight)
    result = (straight / "trial-0/result.json").read_text()
    assert (killed / "trial-0/result.json").read_text() == result

    other = call(tree, killed, "--lr", "0.5")
    assert other.returncode == 2 and "Traceback" not in other.stderr
    assert "contains another run: lr 0.01 (now 0.5)" in other.stderr


@pytest.fixture
def changed_tree(tree, tmp_path):
    """A function that copies the dataset and changes something in the copy."""

    def make(name, change):
        shutil.copytree(tree, tmp_path / name)
        change(tmp_path / name / "VOC2012")
        return tmp_path / name

    return make


def save_mask(base, name, mask):
    Image.fromarray(np.asarray(mask, np.uint8)).save(base / f"SegmentationClass/{name}.png")


def unknown_class(base):
    save_mask(base, "09", np.full((48, 64), 7))


def colored_mask(base):
    save_mask(base, "00", np.zeros((48, 64, 3)))


def smaller_mask(base):
    save_mask(base, "28", np.zeros((24, 64)))


def missing_masks(base):
    for name in ("07", "11"):
        (base / f"SegmentationClass/{name}.png").unlink()


def missing_list(base):
    (base / "ImageSets/Segmentation/val.txt").unlink()


def missing_images(base):
    (base / "JPEGImages").rename(base / "Images")


@pytest.mark.parametrize(
    "change, hint",
    [
        (
            unknown_class,
            "class numbers 7 are out of range; this set has 3 classes, numbered 0 to 2",
        ),
        (colored_mask, "must be a gray or palette PNG"),
        (smaller_mask, "a mask of 64 x 24 for an image of 64 x 48"),
        (
            missing_masks,
            "2 of 24 masks are missing: SegmentationClass/07.png, SegmentationClass/11.png",
        ),
        (missing_list, "no list val.txt"),
        (missing_images, "no tree with masks"),
    ],
)
def test_a_wrong_dataset_is_refused_in_one_line_and_nothing_is_written(
    changed_tree, tmp_path, change, hint
):
    root = changed_tree("changed", change)
    with pytest.raises(UsageError) as e:
        segment_main.main(arguments(root, tmp_path / "out"))
    assert hint in str(e.value) and "\n" not in str(e.value)
    assert not isinstance(e.value, RunError)
    assert not (tmp_path / "out").exists()


def test_a_corrupt_image_that_is_found_late_ends_the_run_in_one_line(changed_tree, tmp_path):
    def change(base):
        path = base / "JPEGImages/09.jpg"
        path.write_bytes(path.read_bytes()[:700])  # the header is intact

    # 24 images, 6 steps of 4: all are read
    got = call(changed_tree("changed", change), tmp_path / "out", "--workers", 1)
    assert got.returncode == 1 and "Traceback" not in got.stderr
    assert "densecl: JPEGImages/09.jpg: OSError: image file is truncated" in got.stderr


def test_weights_that_do_not_fit_are_refused(tree, tmp_path):
    state_dict = build_resnet(InitialWeights("random", "resnet18"), 0).state_dict()

    def without(*prefixes):
        return {name: v for name, v in state_dict.items() if not name.startswith(prefixes)}

    deep_stem = {f"conv1.{i}.weight": torch.zeros(3, 3, 3, 3) for i in (0, 3, 6)}
    torch.save(without("fc.", "conv1") | deep_stem, tmp_path / "deep.pth")
    torch.save(without("layer4.1"), tmp_path / "incomplete.pth")
    torch.save(without("fc."), tmp_path / "complete.pth")
    for words, hint in (
        (["--weights", "deep.pth"], "deep stem"),
        (["--weights", "incomplete.pth"], "not a ResNet"),
        (["--weights", "complete.pth", "--backbone", "resnet50"], "a resnet18, not a resnet50"),
        (["--weights", "nothing.pth"], "nothing.pth"),
        (["--weights", "random", *BACKBONE, "--baselines", "deep.pth"], "deep stem"),
    ):
        words = [str(tmp_path / word) if word.endswith(".pth") else word for word in words]
        line = ["--data-root", str(tree), "--out", str(tmp_path / "out"), *SMALL, *words]
        with pytest.raises(UsageError) as e:
            segment_main.main(line)
        assert hint in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, split, kind, num_classes",
    [
        ("voc2012-mini", "val", "auto", 21),
        ("coco-mini", "val", "semantic", 133),
        ("coco-mini", "train", "instances", 81),
    ],
)
def test_real_masks_against_themselves_score_one(name, split, kind, num_classes):
    if not (REAL / name).is_dir():
        pytest.skip(f"{name} is not beside the repository")
    dataset = labels.open_segmentation(REAL / name, split, kind)
    masks = [dataset.mask(i) for i in range(0, len(dataset), 5)]
    pairs = ((np.where(mask == 255, 0, mask), mask) for mask in masks)
    scores = labels.mean_iou(pairs, dataset.num_classes)
    assert dataset.num_classes == num_classes and scores["miou"] == scores["accuracy"] == 1
    assert sum(iou is not None for iou in scores["per_class"]) >= 10
    dataset.load(len(dataset) - 1)
