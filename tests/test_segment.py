"""The segmentation transfer as people call it: processes, kills, wrong input; and real masks where they lie beside the repository."""

import json
import os
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
SMALL = [
    "--backbone",
    "resnet18",
    "--crop-size",
    "32",
    "--batch-size",
    "4",
    "--max-steps",
    "6",
    "--save-every",
    "2",
    "--log-every",
    "1",
    "--workers",
    "0",
    "--threads",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A VOC-style tree of three classes: 24 pictures to train on, 5 to score."""
    root = tmp_path_factory.mktemp("segment") / "VOCdevkit"
    base = root / "VOC2012"
    for d in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / d).mkdir(parents=True)
    for i in range(29):
        rng = np.random.default_rng(i)
        mask = np.kron(rng.integers(0, 3, (3, 4)), np.ones((16, 16))).astype(np.uint8)  # 48 x 64
        mask[:2] = 255
        picture = np.stack(
            [mask % 3 * 80, 200 - mask % 3 * 60, rng.integers(0, 256, mask.shape)], -1
        ).astype(np.uint8)
        Image.fromarray(picture).save(base / f"JPEGImages/{i:02d}.jpg")
        Image.fromarray(mask).save(base / f"SegmentationClass/{i:02d}.png")
    (base / "classes.txt").write_text("ground\none\ntwo\n")
    for name, part in {"train": range(24), "val": range(24, 29)}.items():
        (base / f"ImageSets/Segmentation/{name}.txt").write_text(
            "\n".join(f"{i:02d}" for i in part)
        )
    return root


def command(tree, out, *more, ranks=1):
    start = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else [sys.executable]
    )
    return start + [
        "-m",
        "densecl.segment",
        "--weights",
        "random",
        "--data-root",
        str(tree),
        "--out",
        str(out),
        *SMALL,
        *map(str, more),
    ]


def call(*args, **kind):
    return subprocess.run(
        command(*args, **kind),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def rows(out, trial=0):
    return [json.loads(line) for line in (out / f"trial-{trial}/metrics.jsonl").open()]


def test_two_ranks_train_one_network_and_share_the_test_set(tree, tmp_path):
    got = call(tree, tmp_path / "out", "--trials", 2, ranks=2)
    assert got.returncode == 0, got.stderr
    assert "on the CPU each process has its own BN statistics" in got.stderr
    assert got.stdout.count("ours: 2 trials") == 1  # one process speaks
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["trials"] == 2 and [r["seed"] for r in found["runs"]] == [0, 1]
    assert [r["step"] for r in rows(tmp_path / "out", 1)] == list(range(1, 7))
    model = fcn.build_fcn(InitialWeights("random", "resnet18"), 3, 0)
    model.load_state_dict(torch.load(tmp_path / "out/trial-1/last.pt", weights_only=True)["model"])
    alone = segment_main.evaluate_model(
        model,
        labels.open_segmentation(tree, "val"),
        segment_main.SegmentConfig(**{k: v for k, v in found["config"].items()}),
        "cpu",
    )
    assert (
        abs(alone["miou"] - found["runs"][1]["miou"]) < 1e-9
    )  # the same as one process counts over all pictures
    assert alone["per_class"] == pytest.approx(found["runs"][1]["per_class"])


def test_a_killed_run_goes_on_and_ends_the_same(tree, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert call(tree, straight).returncode == 0
    p = subprocess.Popen(
        command(tree, broken),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 300
    while (
        not (broken / "trial-0/last.pt").exists() and p.poll() is None and time.monotonic() < until
    ):
        time.sleep(0.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert (broken / "trial-0/last.pt").exists() and not (broken / "trial-0/result.json").exists()
    again = call(tree, broken, "--trials", 1)
    assert again.returncode == 0 and "trial 0: resumed at step" in again.stderr, again.stderr
    assert rows(broken) == rows(straight)
    assert (broken / "trial-0/result.json").read_text() == (
        straight / "trial-0/result.json"
    ).read_text()
    third = call(tree, broken, "--lr", "0.5")
    assert (
        third.returncode == 2
        and "holds another run: lr 0.01 (now 0.5)" in third.stderr
        and "Traceback" not in third.stderr
    )


@pytest.fixture
def broken_tree(tree, tmp_path):
    """A function that copies the tree and lets something be broken in it."""

    def make(name, change):
        subprocess.run(["cp", "-r", str(tree), str(tmp_path / name)], check=True)
        change(tmp_path / name / "VOC2012")
        return tmp_path / name

    return make


def test_wrong_trees_are_refused_in_one_line_and_nothing_is_written(broken_tree, tmp_path):
    def foreign(b):
        Image.fromarray(np.full((48, 64), 7, np.uint8)).save(b / "SegmentationClass/00.png")

    def colours(b):
        Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(b / "SegmentationClass/00.png")

    def smaller(b):
        Image.fromarray(np.zeros((24, 64), np.uint8)).save(b / "SegmentationClass/28.png")

    def lost(b):
        [(b / f"SegmentationClass/{i}.png").unlink() for i in ("07", "11")]

    wrong = {
        "foreign": (
            foreign,
            "class numbers 7 are out of range; this set has 3 classes, numbered 0 to 2",
        ),
        "colours": (colours, "must be a gray or palette PNG"),
        "smaller": (smaller, "a mask of 64 x 24 for an image of 64 x 48"),
        "lost": (
            lost,
            "2 of 24 masks are missing: SegmentationClass/07.png, SegmentationClass/11.png",
        ),
        "no list": (lambda b: (b / "ImageSets/Segmentation/val.txt").unlink(), "no list val.txt"),
        "no tree": (lambda b: (b / "JPEGImages").rename(b / "Pictures"), "no tree with masks"),
    }
    for name, (change, hint) in wrong.items():
        with pytest.raises(UsageError) as e:
            segment_main.main(command(broken_tree(name, change), tmp_path / "out")[3:])
        assert (
            hint in str(e.value) and "\n" not in str(e.value) and not isinstance(e.value, RunError)
        )
    assert not (tmp_path / "out").exists()


def test_a_wrong_class_number_far_down_the_list_ends_the_run_in_one_line(broken_tree, tmp_path):
    def foreign(b):
        Image.fromarray(np.full((48, 64), 77, np.uint8)).save(b / "SegmentationClass/09.png")

    got = call(
        broken_tree("foreign", foreign), tmp_path / "out", "--workers", 1
    )  # 24 pictures, 6 steps of 4: all are read
    assert got.returncode == 1 and "Traceback" not in got.stderr
    assert "densecl: SegmentationClass/09.png: class numbers 77 are out of range" in got.stderr


def test_weights_that_do_not_fit_are_refused(tree, tmp_path):
    state = build_resnet(InitialWeights("random", "resnet18"), 0).state_dict()
    deep = {k: v for k, v in state.items() if not k.startswith(("fc.", "conv1"))} | {
        f"conv1.{i}.weight": torch.zeros(3, 3, 3, 3) for i in (0, 3, 6)
    }
    torch.save(deep, tmp_path / "deep.pth")
    torch.save(
        {k: v for k, v in state.items() if not k.startswith("layer4.1")}, tmp_path / "holes.pth"
    )
    torch.save({k: v for k, v in state.items() if not k.startswith("fc.")}, tmp_path / "whole.pth")
    for args, hint in (
        (["--weights", tmp_path / "deep.pth"], "deep stem"),
        (["--weights", tmp_path / "holes.pth"], "not a ResNet"),
        (
            ["--weights", tmp_path / "whole.pth", "--backbone", "resnet50"],
            "is a resnet18, not a resnet50",
        ),
        (["--weights", tmp_path / "nothing.pth"], "nothing.pth"),
        (["--weights", "random", "--baselines", tmp_path / "deep.pth"], "deep stem"),
    ):
        line = ["--data-root", str(tree), "--out", str(tmp_path / "out"), *SMALL, *map(str, args)]
        if "--backbone" not in args and "random" not in args:
            line.remove("--backbone"), line.remove("resnet18")
        with pytest.raises(UsageError) as e:
            segment_main.main(line)
        assert hint in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, split, kind, classes",
    [
        ("voc2012-mini", "val", "auto", 21),
        ("coco-mini", "val", "semantic", 133),
        ("coco-mini", "train", "instances", 81),
    ],
)
def test_real_masks_against_themselves_score_one(name, split, kind, classes):
    if not (REAL / name).is_dir():
        pytest.skip(f"{name} does not lie beside the repository")
    found = labels.open_segmentation(REAL / name, split, kind)
    some = [found.mask(i) for i in range(0, len(found), 5)]
    got = labels.mean_iou(((np.where(m == 255, 0, m), m) for m in some), found.num_classes)
    assert found.num_classes == classes and got["miou"] == got["accuracy"] == 1
    assert sum(v is not None for v in got["per_class"]) >= 10
    found.load(len(found) - 1)
