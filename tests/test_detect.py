"""`densecl.detect` as a user meets it: two processes, an interrupted run, wrong input in one line, and a COCO tree with masks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from densecl.detect import boxes as trees
from densecl.detect.__main__ import main
from densecl.detect.average_precision import Detections, coco_ap, voc_ap
from densecl.encoder import build_backbone
from densecl.runtime.io import RunError, UsageError
from densecl.transfer import trials

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
TINY = [
    "--backbone",
    "resnet18",
    "--batch-size",
    "2",
    "--short-side",
    "48",
    "--roi-batch-size",
    "4",
    "--roi-size",
    "2",
    "--proposals",
    "8",
    "--precise-bn-iters",
    "2",
    "--workers",
    "0",
    "--threads",
    "1",
    "--device",
    "cpu",
    "--log-every",
    "1",
]


def detect(*argv, ranks=1, cwd=None):
    """The command, in one or several processes."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(
        [sys.executable, *launch, "-m", "densecl.detect", *map(str, argv)],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )


def picture(i):
    """Grey noise with a bright square: (array, x1, y1, x2, y2 in VOC's numbers)."""
    rng = np.random.default_rng(i)
    a, (x, y) = rng.integers(60, 120, (48, 64, 3), dtype=np.uint8), rng.integers(0, 24, 2)
    a[y : y + 20, x : x + 24] = (230, 80, 40)
    return a, x + 1, y + 1, x + 24, y + 20


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """A VOC tree without a size in its labels: 6 pictures to train on, 3 to test on."""
    base = tmp_path_factory.mktemp("voc") / "VOC2012"
    for d in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / d).mkdir(parents=True)
    for i in range(9):
        a, *b = picture(i)
        Image.fromarray(a).save(base / f"JPEGImages/{i}.jpg")
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), b))
        (base / f"Annotations/{i}.xml").write_text(
            f"<annotation><object><name>cat</name><bndbox>{corners}</bndbox></object></annotation>"
        )
    for split, part in {"train": range(6), "val": range(6, 9)}.items():
        (base / f"ImageSets/Main/{split}.txt").write_text("\n".join(map(str, part)))
    return base.parent


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """The same pictures as a COCO tree with masks: polygons in train, run lengths in val."""
    from pycocotools import mask

    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split, part in {"train": range(6), "val": range(6, 9)}.items():
        (root / f"{split}2017").mkdir()
        images, notes = [], []
        for i in part:
            a, x1, y1, x2, y2 = (
                np.asarray(v).tolist() if n else v for n, v in enumerate(picture(i))
            )
            Image.fromarray(a).save(root / f"{split}2017/{i}.jpg")
            x, y = x1 - 1, y1 - 1
            outline = [[x, y, x2, y, x2, y2, x, y2]]
            if split == "val":
                m = np.zeros((48, 64), np.uint8)
                m[y:y2, x:x2] = 1
                outline = mask.encode(np.asfortranarray(m)) | {"size": [48, 64]}
                outline["counts"] = outline["counts"].decode()
            images.append({"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48})
            notes.append(
                {
                    "id": i + 1,
                    "image_id": i,
                    "category_id": 17,
                    "bbox": [x, y, x2 - x, y2 - y],
                    "area": (x2 - x) * (y2 - y),
                    "iscrowd": 0,
                    "segmentation": outline,
                }
            )
        held = {"images": images, "annotations": notes, "categories": [{"id": 17, "name": "cat"}]}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(held))
    return root


def results(out):
    return json.loads((Path(out) / "results.json").read_text())


def last(out):
    return torch.load(Path(out) / "trial-0/last.pt", weights_only=True)


def test_two_processes_and_two_trials(voc, tmp_path):
    got = detect(
        "--weights",
        "random",
        "--data-root",
        voc,
        "--out",
        "run",
        "--max-steps",
        2,
        "--trials",
        2,
        *TINY,
        ranks=2,
        cwd=tmp_path,
    )
    assert got.returncode == 0, got.stderr
    assert (
        "SyncBN needs GPUs" in got.stderr
        and got.stdout.count("\nours") == 1
        and "paper  DenseCL" in got.stdout
        and "NOT the paper's setting" in got.stdout
    )
    r = results(tmp_path / "run")
    assert {
        "ap_mean",
        "ap_std",
        "ap50",
        "ap75",
        "voc_ap",
        "voc_ap_std",
        "per_class",
        "config",
        "weights",
    } <= set(r)
    assert (
        r["trials"] == 2
        and [x["seed"] for x in r["runs"]] == [0, 1]
        and set(r["per_class"]) == set(trees.VOC_CLASSES[1:])
    )
    assert (tmp_path / "run/trial-1/detections.png").stat().st_size > 1000
    assert [json.loads(l)["step"] for l in (tmp_path / "run/trial-0/metrics.jsonl").open()] == [
        1,
        2,
    ]


def test_an_interrupted_run_goes_on_bit_for_bit(voc, tmp_path, monkeypatch, capfd):
    argv = [
        "--weights",
        "random",
        "--data-root",
        str(voc),
        "--max-steps",
        "3",
        "--save-every",
        "2",
        *TINY,
    ]
    main([*argv, "--out", str(tmp_path / "whole")])
    save = trials.Trial.save

    def killed(self, step, *args):
        save(self, step, *args)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(trials.Trial, "save", killed)
        main([*argv, "--out", str(tmp_path / "broken")])
    assert last(tmp_path / "broken")["step"] == 2
    capfd.readouterr()
    main([*argv, "--out", str(tmp_path / "broken")])
    assert "resumed at step 2" in capfd.readouterr().err
    a, b = last(tmp_path / "whole")["model"], last(tmp_path / "broken")["model"]
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert results(tmp_path / "whole")["runs"] == results(tmp_path / "broken")["runs"]
    main([*argv, "--out", str(tmp_path / "broken")])
    assert "finished before" in capfd.readouterr().err


def test_masks_are_learned_and_scored_on_a_coco_tree(coco, tmp_path, capfd):
    torch.save(build_backbone("resnet18")[0].state_dict(), tmp_path / "weights.pth")
    main(
        [
            "--weights",
            str(tmp_path / "weights.pth"),
            "--data-root",
            str(coco),
            "--out",
            str(tmp_path / "run"),
            "--max-steps",
            "1",
            "--freeze",
            *TINY,
        ]
    )
    r, said = results(tmp_path / "run"), capfd.readouterr().out
    assert (
        {"mask_ap", "mask_ap50", "mask_ap75"} <= set(r)
        and r["config"]["detector"] == "fpn"
        and len(r["weights"]["sha256"]) == 64
    )
    assert (
        "ours" in said and "paper" not in said and "voc_ap" not in r
    )  # the paper's column is VOC's
    first = torch.load(tmp_path / "weights.pth", weights_only=True)
    frozen = {
        k.removeprefix("backbone.body."): v
        for k, v in last(tmp_path / "run")["model"].items()
        if k.startswith("backbone.body.")
    }
    assert set(first) == set(frozen) and all(
        torch.equal(first[k], frozen[k]) for k in first
    )  # --freeze: BN's statistics as well


def spoil(tree, folder, path, old, new):
    """A copy of the tree with one file changed."""
    shutil.copytree(tree, folder)
    (folder / path).write_text((folder / path).read_text().replace(old, new))
    return folder


def test_wrong_input_ends_in_one_line(voc, coco, tmp_path):
    torch.save(build_backbone("resnet18")[0].state_dict(), tmp_path / "r18.pth")
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    dgo = spoil(voc, tmp_path / "dgo", "VOC2012/Annotations/2.xml", "<name>cat", "<name>cta")
    far = spoil(
        coco,
        tmp_path / "far",
        "annotations/instances_val2017.json",
        '"category_id": 17',
        '"category_id": 18',
    )
    bare = spoil(
        coco,
        tmp_path / "bare",
        "annotations/instances_train2017.json",
        '"segmentation"',
        '"outline"',
    )
    none = spoil(voc, tmp_path / "none", "VOC2012/ImageSets/Main/val.txt", "\n", "\n")
    (none / "VOC2012/ImageSets/Main/val.txt").unlink()
    at = lambda tree, weights="random": ["--weights", weights, "--data-root", tree]
    cases = [
        (at(tmp_path / "nowhere"), "no such folder"),
        (at(tmp_path), "no tree with boxes"),
        (at(dgo), "'cta' is none of the 20 classes; did you mean cat?"),
        (at(far), "category 18, which is out of range"),
        (at(none), "no list ImageSets/Main/val.txt"),
        (at(voc, tmp_path / "other.pth"), "other.pth"),
        (at(voc, tmp_path / "page.pth"), "page.pth"),
        (at(voc, "nothing.pth"), "nothing.pth"),
        (at(voc) + ["--preset", "voc"], "the preset voc needs VOC2007"),
        (at(voc) + ["--preset", "coco"], "is a VOC tree"),
        (at(bare) + ["--preset", "coco", "--batch-size", "2"], "not every object has an outline"),
        (
            [*at(voc, tmp_path / "r18.pth"), "--backbone", "resnet50"],
            "is a resnet18, not a resnet50",
        ),
        (at(voc) + ["--short-side", "9"], "--short-side 9: must be at least 32"),
        (at(voc) + ["--batch-size", "7"], "more than the 6 images to train on"),
        (at(voc) + ["--proposal", "9"], "did you mean --proposals?"),
        (at(voc) + ["--baselines", "gone.pth"], "gone.pth"),
    ]
    for argv, hint in cases:
        with pytest.raises(UsageError) as e:
            main([str(a) for a in argv + ["--out", tmp_path / "out"]])
        assert hint in str(e.value) and "\n" not in str(e.value), e.value
    got = detect(*at(far), "--out", tmp_path / "out")
    assert (got.returncode, got.stdout, got.stderr.count("\n")) == (
        2,
        "",
        1,
    ) and got.stderr.startswith("densecl: ")
    assert not (tmp_path / "out").exists()


def test_a_picture_of_another_size_ends_the_run_in_one_line(voc, tmp_path):
    wrong = spoil(
        voc,
        tmp_path / "wrong",
        "VOC2012/Annotations/1.xml",
        "<annotation>",
        "<annotation><size><width>48</width><height>64</height></size>",
    )
    for workers in ("0", "1"):
        with pytest.raises(RunError) as e:
            main(
                [
                    "--weights",
                    "random",
                    "--data-root",
                    str(wrong),
                    "--out",
                    str(tmp_path / f"run{workers}"),
                    "--max-steps",
                    "3",
                    *TINY,
                    "--workers",
                    workers,
                ]
            )
        assert "\n" not in str(e.value) and str(e.value).endswith(
            "1.jpg: its labels are for an image of 48 x 64, this one has 64 x 48"
        )


@pytest.mark.skipif(not (SHARED / "voc2012-mini").is_dir(), reason="needs the development pictures")
def test_the_truth_is_right_on_real_labels():
    for root, count in ((SHARED / "voc2012-mini/VOCdevkit", 200), (SHARED / "coco-mini", 100)):
        b = trees.open_detection(root, "val")
        masks = [tuple(trees.encode_mask(o, *r.size[::-1]) for o in r.outlines) for r in b.rows]
        truth = [
            Detections(r.boxes, r.labels, np.ones(len(r.labels)), m) for r, m in zip(b.rows, masks)
        ]
        assert len(b) == count and voc_ap(b.rows, truth, b.classes)["ap"] == 1
        for kind in ("bbox", "segm") if b.masks else ("bbox",):
            assert coco_ap(b.rows, truth, b.classes, kind)["ap"] == 1
