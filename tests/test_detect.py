"""`densecl detect`: several processes, interrupted runs, wrong input, masks, real labels."""

import itertools
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from densecl.data.labels import VOC_CLASSES, encode_mask
from densecl.detect import boxes
from densecl.detect.__main__ import main
from densecl.detect.average_precision import Detections, coco_ap, voc_ap
from densecl.detect.rcnn import faster_rcnn_c4, mask_rcnn_fpn
from densecl.encoder import build_backbone
from densecl.runtime.io import RunError, UsageError
from densecl.transfer import trials

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
TINY = shlex.split(
    "--backbone resnet18 --batch-size 2 --short-side 48 --roi-batch-size 4 --roi-size 2 "
    "--proposals 8 --precise-bn-iters 2 --workers 0 --threads 1 --device cpu --log-every 1"
)


def detect(*argv, ranks=1, cwd=None):
    """The command, in one or several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    start = [sys.executable, *(launcher if ranks > 1 else [])]
    return subprocess.run(
        [*start, "-m", "densecl.detect", *map(str, argv)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def arguments(root, weights="random", **options):
    """--weights, --data-root and further options; trial_count=2 is --trial-count 2."""
    argv = ["--weights", weights, "--data-root", root]
    for name, value in options.items():
        argv += ["--" + name.replace("_", "-"), value]
    return [str(word) for word in argv]


def noise_image(i):
    """Gray noise with a bright rectangle: (48 x 64 x 3, its box in VOC's numbers)."""
    rng = np.random.default_rng(i)
    image = rng.integers(60, 120, (48, 64, 3), dtype=np.uint8)
    x, y = rng.integers(0, 24, 2).tolist()
    image[y : y + 20, x : x + 24] = (230, 80, 40)
    return image, (x + 1, y + 1, x + 24, y + 20)


SPLITS = {"train": range(6), "val": range(6, 9)}


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """A dataset in VOC's format, without sizes: 6 images to train on, 3 to test on."""
    base = tmp_path_factory.mktemp("voc") / "VOC2012"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / name).mkdir(parents=True)
    for i in range(9):
        image, box = noise_image(i)
        Image.fromarray(image).save(base / f"JPEGImages/{i}.jpg")
        corners = zip(("xmin", "ymin", "xmax", "ymax"), box)
        bndbox = "".join(f"<{corner}>{value}</{corner}>" for corner, value in corners)
        text = f"<object><name>cat</name><bndbox>{bndbox}</bndbox></object>"
        (base / f"Annotations/{i}.xml").write_text(f"<annotation>{text}</annotation>")
    for split, indices in SPLITS.items():
        (base / f"ImageSets/Main/{split}.txt").write_text("\n".join(map(str, indices)))
    return base.parent


def coco_entry(i, box, as_run_lengths):
    """The entry of an image's object in a COCO file."""
    x1, y1, x2, y2 = box
    x, y, w, h = x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1
    outline = [[x, y, x2, y, x2, y2, x, y2]]
    if as_run_lengths:
        outline = encode_mask(outline, 48, 64)
        outline = {"size": [48, 64], "counts": outline["counts"].decode()}
    return {
        "id": i + 1,
        "image_id": i,
        "category_id": 17,
        "bbox": [x, y, w, h],
        "area": w * h,
        "iscrowd": 0,
        "segmentation": outline,
    }


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """The same images in COCO's format with masks: polygons in train, run lengths in val."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split, indices in SPLITS.items():
        (root / f"{split}2017").mkdir()
        content = {"images": [], "annotations": [], "categories": [{"id": 17, "name": "cat"}]}
        for i in indices:
            image, box = noise_image(i)
            Image.fromarray(image).save(root / f"{split}2017/{i}.jpg")
            entry = {"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48}
            content["images"].append(entry)
            content["annotations"].append(coco_entry(i, box, as_run_lengths=split == "val"))
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return root


def results(out):
    return json.loads((Path(out) / "results.json").read_text())


def last(out):
    return torch.load(Path(out) / "trial-0/last.pt", weights_only=True)


def test_two_processes_and_two_trials(voc, tmp_path):
    argv = arguments(voc, out="run", max_steps=2, trials=2)
    got = detect(*argv, *TINY, ranks=2, cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    assert "SyncBN needs GPUs" in got.stderr and got.stdout.count("\nours") == 1
    assert "paper  DenseCL" in got.stdout and "NOT the paper's setting" in got.stdout
    summary = results(tmp_path / "run")
    scores = {"ap_mean", "ap_std", "ap50", "ap75", "voc_ap", "voc_ap_std"}
    assert scores | {"per_class", "config", "weights"} <= set(summary)
    assert summary["trials"] == 2 and [run["seed"] for run in summary["runs"]] == [0, 1]
    assert set(summary["per_class"]) == set(VOC_CLASSES[1:])
    assert (tmp_path / "run/trial-1/detections.png").stat().st_size > 1000
    lines = (tmp_path / "run/trial-0/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_an_interrupted_run_continues_bit_for_bit(voc, tmp_path, monkeypatch, capfd):
    argv = [*arguments(voc, max_steps=3, save_every=2), *TINY]
    straight = [*argv, "--out", str(tmp_path / "straight")]
    broken = [*argv, "--out", str(tmp_path / "broken")]
    main(straight)
    save = trials.Trial.save

    def interrupted(self, step, *args):
        save(self, step, *args)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trials.Trial, "save", interrupted)
        main(broken)
    assert last(tmp_path / "broken")["step"] == 2
    capfd.readouterr()
    main(broken)
    assert "resumed at step 2" in capfd.readouterr().err
    a, b = last(tmp_path / "straight")["model"], last(tmp_path / "broken")["model"]
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert results(tmp_path / "straight")["runs"] == results(tmp_path / "broken")["runs"]
    main(broken)
    assert "finished before" in capfd.readouterr().err


def test_masks_are_learned_and_scored_on_coco(coco, tmp_path, capfd):
    torch.save(build_backbone("resnet18")[0].state_dict(), tmp_path / "weights.pth")
    argv = arguments(coco, tmp_path / "weights.pth", out=tmp_path / "run", max_steps=1)
    main([*argv, "--freeze", *TINY])
    summary, table = results(tmp_path / "run"), capfd.readouterr().out
    assert {"mask_ap", "mask_ap50", "mask_ap75"} <= set(summary) and "voc_ap" not in summary
    assert summary["config"]["detector"] == "fpn" and len(summary["weights"]["sha256"]) == 64
    assert "ours" in table and "paper" not in table  # the paper's column is VOC's
    # --freeze: the backbone is that of the file, with BN's statistics
    before = torch.load(tmp_path / "weights.pth", weights_only=True)
    prefix = "backbone.body."
    after = {
        name.removeprefix(prefix): value
        for name, value in last(tmp_path / "run")["model"].items()
        if name.startswith(prefix)
    }
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def protocol_anchors(height, width, stride, sizes):
    """detectron2's anchors of one map: cell (i, j) has its anchors around (stride j, stride i)."""
    anchors = []
    for y in range(0, height * stride, stride):
        for x in range(0, width * stride, stride):
            for size, ratio in itertools.product(sizes, (0.5, 1.0, 2.0)):
                w = math.sqrt(size**2 / ratio)
                h = ratio * w
                anchors.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    return anchors


@pytest.mark.parametrize("shape", [(203, 333), (75, 121), (64, 96), (33, 500)])
@pytest.mark.parametrize(
    "build, maps",
    [
        (faster_rcnn_c4, [(16, (32, 64, 128, 256, 512))]),
        (mask_rcnn_fpn, [(4, (32,)), (8, (64,)), (16, (128,)), (32, (256,)), (64, (512,))]),
    ],
)
def test_anchors_have_the_strides_of_the_protocol(build, maps, shape):
    model = build(build_backbone("resnet18")[0], 2).eval()
    images, _ = model.transform([torch.rand(3, *shape), torch.rand(3, 33, 40)])
    with torch.no_grad():
        features = model.backbone(images.tensors)
    grids = [features] if len(maps) == 1 else list(features.values())
    expected = []
    for grid, (stride, sizes) in zip(grids, maps, strict=True):
        expected += protocol_anchors(*grid.shape[2:], stride, sizes)
    found = model.rpn.anchor_generator(images, grids)
    assert len(found) == 2 and torch.equal(*found)
    # sorted, since the order inside a cell may differ
    found, expected = (
        torch.tensor(sorted(anchors, key=lambda anchor: [round(x, 2) for x in anchor]))
        for anchors in (found[0].tolist(), expected)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def changed_copy(source, folder, path, old, new):
    """A copy of a dataset with one file changed."""
    shutil.copytree(source, folder)
    (folder / path).write_text((folder / path).read_text().replace(old, new))
    return folder


def test_wrong_input_ends_in_one_line(voc, coco, tmp_path):
    torch.save(build_backbone("resnet18")[0].state_dict(), tmp_path / "r18.pth")
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    xml = "VOC2012/Annotations/2.xml"
    wrong_name = changed_copy(voc, tmp_path / "wrong_name", xml, "<name>cat", "<name>cta")
    val, train = (f"annotations/instances_{split}2017.json" for split in ("val", "train"))
    category = ('"category_id": 17', '"category_id": 18')
    wrong_category = changed_copy(coco, tmp_path / "wrong_category", val, *category)
    outline = ('"segmentation"', '"outline"')
    no_masks = changed_copy(coco, tmp_path / "no_masks", train, *outline)
    shutil.copytree(voc, tmp_path / "no_list")
    (tmp_path / "no_list/VOC2012/ImageSets/Main/val.txt").unlink()
    cases = [
        (arguments(tmp_path / "nowhere"), "no such folder"),
        (arguments(tmp_path), "no tree with boxes"),
        (arguments(wrong_name), "'cta' is none of the 20 classes; did you mean cat?"),
        (arguments(wrong_category), "category 18, which is out of range"),
        (arguments(tmp_path / "no_list"), "no list ImageSets/Main/val.txt"),
        (arguments(voc, tmp_path / "other.pth"), "other.pth"),
        (arguments(voc, tmp_path / "page.pth"), "page.pth"),
        (arguments(voc, "nothing.pth"), "nothing.pth"),
        (arguments(voc, preset="voc"), "the preset voc needs VOC2007"),
        (arguments(voc, preset="coco"), "is a VOC tree"),
        (arguments(coco, preset="voc"), "is a COCO tree"),
        (
            arguments(no_masks, preset="coco", batch_size=2),
            "not every object has an outline",
        ),
        (
            arguments(voc, tmp_path / "r18.pth", backbone="resnet50"),
            "is a resnet18, not a resnet50",
        ),
        (arguments(voc, short_side=9), "--short-side 9: must be at least 32"),
        (arguments(voc, batch_size=7), "more than the 6 images to train on"),
        (arguments(voc, detector="c5"), "choose from auto, c4, fpn"),
        (arguments(voc, proposal=9), "did you mean --proposals?"),
        (arguments(voc, pool=4), "--pool: renamed to --roi-size"),
        (arguments(voc, baselines="gone.pth"), "gone.pth"),
    ]
    for argv, hint in cases:
        with pytest.raises(UsageError) as e:
            main([*argv, "--out", str(tmp_path / "out")])
        assert hint in str(e.value) and "\n" not in str(e.value), e.value
    got = detect(*arguments(wrong_category), "--out", tmp_path / "out")
    assert (got.returncode, got.stdout, got.stderr.count("\n")) == (2, "", 1)
    assert got.stderr.startswith("densecl: ")
    assert not (tmp_path / "out").exists()


def test_an_image_of_another_size_ends_the_run_in_one_line(voc, tmp_path):
    wrong = changed_copy(
        voc,
        tmp_path / "wrong",
        "VOC2012/Annotations/1.xml",
        "<annotation>",
        "<annotation><size><width>48</width><height>64</height></size>",
    )
    for workers in (0, 1):
        argv = arguments(wrong, out=tmp_path / f"run{workers}", max_steps=3)
        with pytest.raises(RunError) as e:
            main([*argv, *TINY, "--workers", str(workers)])
        expected = "1.jpg: its labels are for an image of 48 x 64, this one has 64 x 48"
        assert "\n" not in str(e.value) and str(e.value).endswith(expected)


@pytest.mark.skipif(not (REAL / "voc2012-mini").is_dir(), reason="needs the development images")
def test_real_labels_against_themselves_score_one():
    for root, count in ((REAL / "voc2012-mini/VOCdevkit", 200), (REAL / "coco-mini", 100)):
        dataset = boxes.open_detection(root, "val")
        annotations, exact = dataset.annotations, []
        for labels in annotations:
            width, height = labels.size
            masks = tuple(encode_mask(outline, height, width) for outline in labels.outlines)
            scores = np.ones(len(labels.labels))
            exact.append(Detections(labels.boxes, labels.labels, scores, masks))
        assert len(dataset) == count
        assert voc_ap(annotations, exact, dataset.classes)["ap"] == 1
        for kind in ("bbox", "segm") if dataset.has_masks else ("bbox",):
            assert coco_ap(annotations, exact, dataset.classes, kind)["ap"] == 1
