"""`python -m densecl.evaluate` as a user meets it, and the same questions asked during a training: they must leave it as it was."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from densecl.config import PROBE_NAMES, Config
from densecl.evaluate.__main__ import main
from densecl.runtime.io import UsageError, run_command
from densecl.trainer import train

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data/voc2012-mini/VOCdevkit"
TINY = Config(
    data_root="pictures",
    backbone="resnet18-layer2",
    image_size=32,
    batch_size=4,
    queue_len=12,
    dim=8,
    hidden=16,
    workers=0,
    threads=1,
    epochs=2,
    log_every=1,
    momentum=0.9,
    lr=0.01,
    device="cpu",
)
RANDOM = ["--weights", "random", "--backbone", "resnet18-layer1", "--image-size", "32"]
COLOURS = {"cat": (200, 40, 40), "dog": (40, 200, 40)}
XML = """<annotation><object><name>{}</name><difficult>{}</difficult><bndbox><xmin>16</xmin><ymin>8</ymin><xmax>56</xmax><ymax>48</ymax></bndbox></object></annotation>"""


def voc_tree(folder):
    """Twenty pictures of a coloured square, a cat or a dog by its colour: with masks, boxes, four keypoints and the lists of two splits."""
    names = [f"p{i:02d}" for i in range(20)]
    for sub in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (folder / sub).mkdir(parents=True)
    held = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": c, "name": n, "keypoints": ["a", "b", "c", "d"]} for c, n in enumerate(COLOURS)
        ],
    }
    for i, name in enumerate(names):
        kind, rng = i % 2, np.random.default_rng(i)
        image, mask = (
            rng.integers(90, 140, (56, 72, 3), dtype=np.uint8),
            np.zeros((56, 72), np.uint8),
        )
        image[8:48, 16:56] = list(COLOURS.values())[kind]
        mask[8:48, 16:56] = (8, 12)[kind]
        Image.fromarray(image).save(folder / f"JPEGImages/{name}.jpg")
        Image.fromarray(mask).save(folder / f"SegmentationClass/{name}.png")
        (folder / f"Annotations/{name}.xml").write_text(XML.format(list(COLOURS)[kind], 0))
        held["images"].append({"id": i, "file_name": f"{name}.jpg", "width": 72, "height": 56})
        held["annotations"].append(
            {
                "id": i,
                "image_id": i,
                "category_id": kind,
                "bbox": [16, 8, 40, 40],
                "keypoints": [17, 9, 2, 54, 9, 2, 17, 46, 2, 54, 46, 2],
            }
        )
    (folder / "animal_keypoints.json").write_text(json.dumps(held))
    for split, some in (("train", names[:10]), ("val", names[10:])):
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(some) + "\n")
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, make_images):
    """The current folder: a VOC tree, plain pictures, and files that are no weights."""
    monkeypatch.chdir(tmp_path)
    voc_tree(tmp_path / "VOC2012")
    make_images(tmp_path / "pictures")
    Path("empty").mkdir()
    Path("page.pth").write_text("<html>404</html>")
    Path("nothing.pt").write_bytes(b"")
    torch.save({"some": torch.zeros(3)}, "other.pt")
    return tmp_path


def said(capsys, *argv):
    """(exit status, stdout, stderr) of the command; an exception that is no message for users would pass through."""
    status = 0
    try:
        run_command(main, list(map(str, argv)))
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err


def contents(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in Path(folder).rglob("*")}


@pytest.mark.parametrize("probe", PROBE_NAMES)
def test_every_probe_prints_a_table_and_a_line_of_json(place, capsys, probe):
    root = ([] if probe == "stereo" else ["--data-root", "VOC2012"]) + (
        ["--trials", "2"] if probe in ("segment", "linear") else []
    )
    before = contents(place)
    status, out, err = said(capsys, probe, *RANDOM, *root)
    assert status == 0, err
    *table, last = out.splitlines()
    got = json.loads(last)
    assert (
        got["probe"] == probe
        and "untrained backbone" in got["rows"]
        and len(table) == len(got["rows"]) + 1
    )
    assert (
        all(np.isfinite(v) for row in got["rows"].values() for v in row.values())
        and contents(place) == before
    )
    number = {"knn": "top1", "linear": "top1", "svm": "mAP", "segment": "linear"}.get(probe)
    if number:
        assert (
            got["rows"]["untrained backbone"][number] > 0.8
        )  # plain colours are read off even an untrained network
    if probe != "segment":
        assert said(capsys, probe, *RANDOM, *root)[1] == out  # the same seed, the same digits


WRONG = {
    "an unknown probe": ("colour --weights random", ["colour", "match"]),
    "no probe": ("", ["match"]),
    "no weights": ("rank", ["--weights"]),
    "missing weights": ("rank --weights gone.pt", ["gone.pt"]),
    "a web page": ("rank --weights page.pth", ["page.pth"]),
    "an empty file": ("rank --weights nothing.pt", ["nothing.pt"]),
    "other tensors": ("rank --weights other.pt", ["other.pt"]),
    "an unknown backbone": ("rank --weights random --backbone vgg16", ["vgg16", "resnet50"]),
    "an unknown option": ("rank --weights random --limt 3", ["--limt", "--limit"]),
    "no pictures": (
        "match --weights random --backbone resnet18-layer1 --data-root empty",
        ["empty"],
    ),
    "no masks": (
        "segment --weights random --backbone resnet18-layer1 --data-root pictures",
        ["pictures", "SegmentationClass"],
    ),
    "no keypoints": (
        "keypoints --weights random --backbone resnet18-layer1 --data-root pictures",
        ["pictures", "keypoint"],
    ),
    "no classes": (
        "knn --weights random --backbone resnet18-layer1 --data-root pictures",
        ["pictures", "folder a class"],
    ),
    "no VOC tree": (
        "svm --weights random --backbone resnet18-layer1 --data-root pictures",
        ["pictures", "VOC"],
    ),
    "no pair": (
        "stereo --weights random --backbone resnet18-layer1 --data-root pictures",
        ["pictures", "left.png"],
    ),
    "a size of nothing": ("rank --weights random --image-size 0", ["--image-size 0"]),
    "a limit below zero": ("rank --weights random --limit -1", ["--limit -1"]),
} | {
    f"{p} on a missing folder": (
        f"{p} --weights random --backbone resnet18-layer1 --data-root gone",
        ["gone"],
    )
    for p in PROBE_NAMES
}


@pytest.mark.parametrize("line, words", WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(place, capsys, line, words):
    before = contents(place)
    status, out, err = said(capsys, *line.split())
    assert status == 2 and out == "" and contents(place) == before
    assert err.startswith("densecl: ") and len(err.splitlines()) == 1, err
    for w in words:
        assert w in err, err


def test_a_mask_that_is_missing_is_named(place, capsys):
    Path("VOC2012/SegmentationClass/p13.png").unlink()
    status, _, err = said(capsys, "segment", *RANDOM, "--data-root", "VOC2012")
    assert status == 2 and "p13.png" in err and len(err.splitlines()) == 1


def test_without_scikit_learn_the_extra_is_named(place, capsys, monkeypatch):
    for name in [m for m in sys.modules if m == "sklearn" or m.startswith("sklearn.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    status, _, err = said(capsys, "svm", *RANDOM, "--data-root", "VOC2012")
    assert status == 2 and "pip install 'densecl[transfer]'" in err and len(err.splitlines()) == 1


def test_as_a_process_on_a_run_of_ours_with_its_own_start_as_the_baseline(place):
    train(replace(TINY, max_steps=2, probe="match", out="run"))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    got = subprocess.run(
        [
            sys.executable,
            "-m",
            "densecl.evaluate",
            "match",
            "--weights",
            "run/last.pt",
            "--image-size",
            "32",
        ],
        env=env,
        capture_output=True,
        text=True,
    )
    assert got.returncode == 0, got.stderr
    rows = json.loads(got.stdout.splitlines()[-1])["rows"]
    first, last = probe_rows("run")["match"]
    for name, row in (("untrained", first), ("run", last)):
        for part in ("backbone", "dense"):
            assert rows[f"{name} {part}"] == pytest.approx(row[part], abs=0.01)


def probe_rows(out):
    """Probe -> its rows in metrics.jsonl, in order."""
    found = {}
    for row in map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines()):
        if "probe" in row:
            found.setdefault(row["probe"], []).append(row)
    return found


def weights(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)


def same(a, b):
    """Whether two saved states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_run_with_probes_ends_in_the_same_bits_as_one_without(place):
    asked = "match,rank,stereo,keypoints,segment,knn,linear,svm"
    train(replace(TINY, max_steps=2, out="without"))
    torch.manual_seed(
        1234
    )  # a probe must neither depend on the generator's state nor change the run's
    train(replace(TINY, max_steps=2, out="with", probe=asked, probe_root="VOC2012"))
    a, b = weights("without"), weights("with")
    for part in ("model", "optimizer", "scaler", "step"):
        assert same(a[part], b[part]), part
    rows = probe_rows("with")
    assert list(rows) == asked.split(",") and all(
        [r["step"] for r in v] == [0, 2] for v in rows.values()
    )
    events = EventAccumulator("with/events", size_guidance={"scalars": 0})
    events.Reload()
    for name, part, number in (
        ("match", "dense", "near"),
        ("rank", "backbone", "rank"),
        ("knn", "backbone", "top1"),
        ("segment", "backbone", "linear"),
    ):
        curve = events.Scalars(f"probe/{name}/{part}/{number}")
        assert [e.step for e in curve] == [0, 2]
        assert [e.value for e in curve] == pytest.approx(
            [r[part][number] for r in rows[name]], rel=1e-5
        )
    assert Path("with/matches/before_after.png").exists()


@pytest.mark.long
def test_a_probe_on_rank_0_leaves_two_processes_in_step(place):
    def run(out, *more):
        line = f"demo --data-root pictures --backbone resnet18-layer2 --image-size 32 --batch-size 4 --queue-len 12 --lr 0.0075 --lambda-warmup 0 --dim 8 --hidden 16 --workers 0 --threads 1 --amp off --max-steps 2 --out {out}"
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        got = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node=2",
                "-m",
                "densecl.train",
                *line.split(),
                *more,
            ],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert got.returncode == 0, got.stderr[-3000:]

    run("without", "--probe", "")
    run("with", "--probe", "rank,segment", "--probe-root", "VOC2012", "--probe-every", "1")
    assert same(weights("without")["model"], weights("with")["model"])
    assert [r["step"] for r in probe_rows("with")["segment"]] == [0, 1, 2]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"probe": "colour"}, ["colour", "rank"]),
        ({"probe": "match,knn"}, ["--probe-root"]),
        ({"probe": "rank", "probe_root": "gone"}, ["gone"]),
    ],
)
def test_a_run_with_a_wrong_probe_is_refused_before_it_begins(place, change, words):
    with pytest.raises(UsageError) as e:
        train(replace(TINY, out="run", **change))
    assert all(w in str(e.value) for w in words) and not Path("run").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the pictures for development are not here")
@pytest.mark.parametrize("probe", [p for p in PROBE_NAMES if p != "stereo"])
def test_real_pictures_with_labels_are_read(capsys, probe):
    status, out, err = said(
        capsys,
        probe,
        *RANDOM,
        "--data-root",
        SHARED,
        "--limit",
        60,
        *(["--trials", 1] if probe in ("segment", "linear") else []),
    )
    assert status == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert all(np.isfinite(v) for row in rows.values() for v in row.values())
