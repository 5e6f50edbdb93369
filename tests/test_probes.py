"""`densecl evaluate` as a user calls it, and probes during a training, which must not change it."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from densecl.config import PROBE_NAMES
from densecl.evaluate.__main__ import main
from densecl.runtime.io import UsageError, run_command
from densecl.trainer import train
from tiny import TINY

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data/voc2012-mini/VOCdevkit"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TINY = replace(TINY, data_root="images", device="cpu")
RANDOM = "--weights random --backbone resnet18-layer1"
SMALL = f"{RANDOM} --image-size 32"
COLORS = {"cat": (200, 40, 40), "dog": (40, 200, 40)}
BOX = "<bndbox><xmin>16</xmin><ymin>8</ymin><xmax>56</xmax><ymax>48</ymax></bndbox>"


def make_voc_tree(folder):
    """Twenty images of a colored square, a cat or a dog by its color, in two splits.

    With masks, boxes and four keypoints each.
    """
    names = [f"p{i:02d}" for i in range(20)]
    for subfolder in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (folder / subfolder).mkdir(parents=True)
    images, annotations = [], []
    for i, name in enumerate(names):
        category = i % 2
        word = list(COLORS)[category]
        image = np.random.default_rng(i).integers(90, 140, (56, 72, 3), dtype=np.uint8)
        image[8:48, 16:56] = COLORS[word]
        mask = np.zeros((56, 72), np.uint8)
        mask[8:48, 16:56] = (8, 12)[category]
        Image.fromarray(image).save(folder / f"JPEGImages/{name}.jpg")
        Image.fromarray(mask).save(folder / f"SegmentationClass/{name}.png")
        objects = f"<object><name>{word}</name><difficult>0</difficult>{BOX}</object>"
        xml = f"<annotation>{objects}</annotation>"
        (folder / f"Annotations/{name}.xml").write_text(xml)
        images.append({"id": i, "file_name": f"{name}.jpg", "width": 72, "height": 56})
        keypoints = [17, 9, 2, 54, 9, 2, 17, 46, 2, 54, 46, 2]
        ids = {"id": i, "image_id": i, "category_id": category}
        annotations.append(ids | {"bbox": [16, 8, 40, 40], "keypoints": keypoints})
    categories = [
        {"id": i, "name": name, "keypoints": ["a", "b", "c", "d"]} for i, name in enumerate(COLORS)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "animal_keypoints.json").write_text(json.dumps(content))
    for split, chosen in (("train", names[:10]), ("val", names[10:])):
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(chosen) + "\n")


@pytest.fixture
def folder(tmp_path, monkeypatch, make_images):
    """The current folder: a VOC tree, images without labels, and files that are no weights."""
    monkeypatch.chdir(tmp_path)
    make_voc_tree(tmp_path / "VOC2012")
    make_images(tmp_path / "images")
    Path("empty").mkdir()
    Path("page.pth").write_text("<html>404</html>")
    Path("nothing.pt").write_bytes(b"")
    torch.save({"some": torch.zeros(3)}, "other.pt")
    return tmp_path


def evaluate(capsys, line):
    """(exit status, stdout, stderr) of the command; other exceptions than its own are not caught.

    Args:
        capsys: pytest's fixture
        line: the arguments of the command
    """
    status = 0
    try:
        run_command(main, shlex.split(line))
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err


def contents(folder):
    """Every file below a folder with its time of modification."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in Path(folder).rglob("*")}


@pytest.mark.parametrize("probe", PROBE_NAMES)
def test_every_probe_prints_a_table_and_a_line_of_json(folder, capsys, probe):
    root = "" if probe == "stereo" else "--data-root VOC2012"
    trials = "--trials 2" if probe in ("segment", "linear") else ""
    line = f"{probe} {SMALL} {root} {trials}"
    before = contents(folder)
    status, out, err = evaluate(capsys, line)
    assert status == 0, err
    *table, last = out.splitlines()
    result = json.loads(last)
    rows = result["rows"]
    assert result["probe"] == probe and "untrained backbone" in rows
    assert len(table) == len(rows) + 1
    assert all(np.isfinite(value) for row in rows.values() for value in row.values())
    assert contents(folder) == before
    number = {"knn": "top1", "linear": "top1", "svm": "mAP", "segment": "linear"}.get(probe)
    if number:  # an untrained network is enough for uniform colors
        assert rows["untrained backbone"][number] > 0.8
    if probe != "segment":  # the same seed, the same digits
        assert evaluate(capsys, line)[1] == out


WRONG = {
    "an unknown probe": ("color --weights random", ["color", "match"]),
    "no probe": ("", ["match"]),
    "no weights": ("rank", ["--weights"]),
    "missing weights": ("rank --weights gone.pt", ["gone.pt"]),
    "a web page": ("rank --weights page.pth", ["page.pth"]),
    "an empty file": ("rank --weights nothing.pt", ["nothing.pt"]),
    "other tensors": ("rank --weights other.pt", ["other.pt"]),
    "an unknown backbone": ("rank --weights random --backbone vgg16", ["vgg16", "resnet50"]),
    "an unknown option": ("rank --weights random --limt 3", ["--limt", "did you mean --limit"]),
    "no images": (f"match {RANDOM} --data-root empty", ["empty"]),
    "no masks": (f"segment {RANDOM} --data-root images", ["images", "SegmentationClass"]),
    "no keypoints": (f"keypoints {RANDOM} --data-root images", ["images", "keypoint"]),
    "no classes": (f"knn {RANDOM} --data-root images", ["images", "one folder per class"]),
    "no VOC tree": (f"svm {RANDOM} --data-root images", ["images", "VOC"]),
    "no pair": (f"stereo {RANDOM} --data-root images", ["images", "left.png"]),
    "an image size of zero": ("rank --weights random --image-size 0", ["--image-size 0"]),
    "a limit below zero": ("rank --weights random --limit -1", ["--limit -1"]),
}
for name in PROBE_NAMES:
    WRONG[f"{name} on a missing folder"] = (f"{name} {RANDOM} --data-root gone", ["gone"])


@pytest.mark.parametrize("line, words", WRONG.values(), ids=list(WRONG))
def test_wrong_input_ends_with_one_line_and_writes_nothing(folder, capsys, line, words):
    before = contents(folder)
    status, out, err = evaluate(capsys, line)
    assert status == 2 and out == "" and contents(folder) == before
    assert err.startswith("densecl: ") and len(err.splitlines()) == 1, err
    for word in words:
        assert word in err, err


def test_a_missing_mask_is_named(folder, capsys):
    Path("VOC2012/SegmentationClass/p13.png").unlink()
    status, _, err = evaluate(capsys, f"segment {SMALL} --data-root VOC2012")
    assert status == 2 and "p13.png" in err and len(err.splitlines()) == 1


def test_without_scikit_learn_the_extra_is_named(folder, capsys, monkeypatch):
    for name in [m for m in sys.modules if m == "sklearn" or m.startswith("sklearn.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    status, _, err = evaluate(capsys, f"svm {SMALL} --data-root VOC2012")
    assert status == 2 and "pip install -e '.[transfer]'" in err and len(err.splitlines()) == 1


def probe_rows(out):
    """Probe -> its rows in metrics.jsonl, in order."""
    found = {}
    for row in map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines()):
        if "probe" in row:
            found.setdefault(row["probe"], []).append(row)
    return found


def run_module(module, line):
    """Run `python -m` as a process of its own; its result."""
    return subprocess.run(
        [sys.executable, "-m", module, *shlex.split(line)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_run_is_compared_with_its_own_initial_network(folder):
    train(replace(TINY, max_steps=2, probe="match", out="run"))
    result = run_module("densecl.evaluate", "match --weights run/last.pt --image-size 32")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    first, last = probe_rows("run")["match"]
    for name, row in (("untrained", first), ("run", last)):
        for part in ("backbone", "dense"):
            assert rows[f"{name} {part}"] == pytest.approx(row[part], abs=0.01)


def saved(out):
    """The last checkpoint of a run."""
    return torch.load(Path(out) / "last.pt", weights_only=True)


def equal(a, b):
    """Whether two saved states contain the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_a_run_with_probes_ends_in_the_same_bits_as_one_without(folder):
    probes = "match,rank,stereo,keypoints,segment,knn,linear,svm"
    train(replace(TINY, max_steps=2, out="without"))
    # a probe must neither depend on the generator's state nor change the run's
    torch.manual_seed(1234)
    train(replace(TINY, max_steps=2, out="with", probe=probes, probe_root="VOC2012"))
    without_probes, with_probes = saved("without"), saved("with")
    for part in ("model", "optimizer", "scaler", "step"):
        assert equal(without_probes[part], with_probes[part]), part
    rows = probe_rows("with")
    assert list(rows) == probes.split(",")
    assert all([row["step"] for row in found] == [0, 2] for found in rows.values())
    assert Path("with/matches/before_after.png").exists()
    events = EventAccumulator("with/events", size_guidance={"scalars": 0})
    events.Reload()
    numbers = {"match": ("dense", "near"), "rank": ("backbone", "rank")}
    numbers |= {"knn": ("backbone", "top1"), "segment": ("backbone", "linear")}
    for name, (part, number) in numbers.items():
        curve = events.Scalars(f"probe/{name}/{part}/{number}")
        assert [event.step for event in curve] == [0, 2]
        expected = [row[part][number] for row in rows[name]]
        assert [event.value for event in curve] == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
def test_a_probe_on_rank_0_leaves_two_processes_in_step(folder):
    options = (
        "demo --data-root images --backbone resnet18-layer2 --image-size 32 --batch-size 4 "
        "--queue-len 12 --lr 0.0075 --lambda-warmup 0 --dim 8 --hidden 16 --workers 0 --threads 1 "
        "--amp off --max-steps 2"
    )

    def run(line):
        launch = "--standalone --nproc_per_node=2 -m densecl.train"
        result = run_module("torch.distributed.run", f"{launch} {options} {line}")
        assert result.returncode == 0, result.stderr[-3000:]

    run("--out without --probe ''")
    run("--out with --probe rank,segment --probe-root VOC2012 --probe-every 1")
    assert equal(saved("without")["model"], saved("with")["model"])
    assert [row["step"] for row in probe_rows("with")["segment"]] == [0, 1, 2]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"probe": "color"}, ["color", "rank"]),
        ({"probe": "match,knn"}, ["--probe-root"]),
        ({"probe": "rank", "probe_root": "gone"}, ["gone"]),
    ],
)
def test_a_run_with_a_wrong_probe_is_rejected_before_it_starts(folder, change, words):
    with pytest.raises(UsageError) as e:
        train(replace(TINY, out="run", **change))
    assert all(word in str(e.value) for word in words) and not Path("run").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the images for development are missing")
@pytest.mark.parametrize("probe", [name for name in PROBE_NAMES if name != "stereo"])
def test_real_images_with_labels_are_read(capsys, probe):
    trials = "--trials 1" if probe in ("segment", "linear") else ""
    line = f"{probe} {SMALL} --data-root {SHARED} --limit 60 {trials}"
    status, out, err = evaluate(capsys, line)
    assert status == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert all(np.isfinite(value) for row in rows.values() for value in row.values())
