"""COCO files with wrong annotations, orientation tags of labeled images, precise BN, progress."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from densecl.data import decode
from densecl.data.labels import open_segmentation
from densecl.detect import __main__ as detect
from densecl.detect.average_precision import Detections
from densecl.detect.finetune import TrainDataset, score_detections
from densecl.detect.rcnn import precise_bn
from densecl.evaluate.keypoints import open_keypoints
from densecl.evaluate.stereo import open_stereo_pair
from densecl.runtime.io import UsageError
from densecl.segment import __main__ as segment

SQUARE = [[8, 8, 40, 8, 40, 32, 8, 32]]  # in an image of 64 x 48
RUNS = {"size": [48, 64], "counts": [48 * 8, 48 * 32, 48 * 24]}  # columns 8 to 39
SHORT_RUNS = {"size": [48, 64], "counts": "0"}


@pytest.fixture
def coco(tmp_path):
    """A COCO folder: three images per split, each with one object of one of two categories."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        content = {"images": [], "annotations": []}
        content["categories"] = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
        for i in range(3):
            noise = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / f"{split}2017/{i}.jpg")
            content["images"] += [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48}]
            entry = {"id": 10 + i, "image_id": i, "category_id": 7, "bbox": [8, 8, 32, 24]}
            entry |= {"area": 768, "iscrowd": 0, "segmentation": SQUARE}
            content["annotations"].append(entry)
        path(root, split).write_text(json.dumps(content))
    return root


def path(root, split):
    return root / f"annotations/instances_{split}2017.json"


def change(root, edit):
    """Apply `edit` to the content of both files."""
    for split in ("train", "val"):
        content = json.loads(path(root, split).read_text())
        edit(content)
        path(root, split).write_text(json.dumps(content))


def masks_of(root, split="val"):
    dataset = open_segmentation(root, split)
    return [dataset.load(i)[1] for i in range(len(dataset))]


def open_detect(root, detector):
    """Both splits as `densecl detect` opens them; each training sample once; a score of val."""
    config = detect.DetectConfig(data_root=str(root), detector=detector, batch_size=1)
    train, test = detect.open_splits(config)
    samples = TrainDataset(train, (48,), 100, 0, masks=detector == "fpn" and train.has_masks)
    for i in range(len(samples)):
        samples[0, i, i]
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, int), np.zeros(0))
    found = dict.fromkeys(range(len(test)), nothing)
    box = np.float32([[8, 8, 40, 32]])
    found[1] = Detections(box, np.array([2]), np.ones(1))
    return train, test, score_detections(test, found)


def set_first(field, value):
    def edit(content):
        content["annotations"][0][field] = value

    return edit


UNUSABLE_OUTLINES = [
    [[9, 9]],
    [[9, 9, 20, 20]],
    [[]],
    [9, 9, 20, 9, 20, 20],
    [9, 9],
    "outline",
    7,
    {},
    [[9, 9, 20, 9, 20]],
    [[9, 9, 20, 9, 20, 20, 9]],
    [[9, 9, 20, 9, 20, None]],
    [["9", "9", "20", "9", "20", "20"]],
    [[9, 9, 20, 9, float("nan"), 20]],
    [[9, 9, 1e9, 9, -1e9, 20]],
    [[[9, 9], [20, 9], [20, 20]]],
    RUNS | {"counts": [48 * 64 + 1]},
    RUNS | {"counts": [-1, 48 * 64 + 1]},
    RUNS | {"counts": None},
    RUNS | {"counts": "~"},
    RUNS | {"counts": "T"},
    RUNS | {"size": [64, 48]},
    RUNS | {"size": None},
    {"counts": [48 * 64]},
    SHORT_RUNS,
]


@pytest.mark.parametrize("outline", UNUSABLE_OUTLINES, ids=str)
def test_an_unusable_outline_is_left_out_and_named(coco, capfd, outline):
    change(coco, set_first("segmentation", outline))
    masks = masks_of(coco)
    assert masks[0].max() == 0 and masks[1].max() == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "instances_val2017.json: 1 of 3 annotations" in error
    assert "annotation 10" in error

    _, test, scores = open_detect(coco, "c4")  # boxes are enough for it
    assert len(test.annotations[0].boxes) == 1 and scores["ap"] > 0
    assert capfd.readouterr().err == ""

    train, _, scores = open_detect(coco, "fpn")
    assert train.has_masks and len(train.annotations[0].boxes) == 0 and scores["ap"] > 0
    assert capfd.readouterr().err.count("annotation 10") == 2  # train and val


def test_polygons_without_an_area_beside_others_do_no_harm(coco):
    change(coco, set_first("segmentation", [[9, 9], [], *SQUARE, [1, 1, 2, 2]]))
    first, second, _ = masks_of(coco)
    assert np.array_equal(first, second) and first.max() == 2
    assert open_detect(coco, "fpn")[0].has_masks


@pytest.mark.parametrize("outline", [[[9, 9]], [[]], [], None])
def test_without_any_outline_c4_and_fpn_train_on_boxes_and_segment_refuses(coco, outline):
    def edit(content):
        for entry in content["annotations"]:
            entry["segmentation"] = outline

    change(coco, edit)
    for detector in ("c4", "fpn"):
        train, _, scores = open_detect(coco, detector)
        assert not train.has_masks and len(train.annotations[0].boxes) == 1 and scores["ap"] > 0
    with pytest.raises(UsageError, match="no outline"):
        open_segmentation(coco, "val")


def test_compressed_and_plain_run_lengths_are_one_mask(coco):
    from pycocotools import mask

    compressed = mask.frPyObjects(RUNS, 48, 64)
    text = {"size": [48, 64], "counts": compressed["counts"].decode()}
    change(coco, lambda c: c["annotations"][0].update(segmentation=RUNS))
    change(coco, lambda c: c["annotations"][1].update(segmentation=text))
    first, second, _ = masks_of(coco)
    assert np.array_equal(first, second) and (first == 2).sum() == 48 * 32


def without(*fields):
    """Remove fields from all annotations and images."""

    def edit(content):
        for entry in (*content["annotations"], *content["images"]):
            for field in fields:
                entry.pop(field, None)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        without("area"),
        lambda c: [(a.pop("iscrowd"), a.pop("id")) for a in c["annotations"]],
        without("height"),
        without("height", "width"),
        without("bbox"),
        set_first("area", "large"),
        set_first("iscrowd", "0"),
        set_first("category_id", 7.0),
        set_first("category_id", "7"),
        lambda c: [i.update(id=str(i["id"])) for i in c["images"]],
        lambda c: [i.update(width=float(i["width"]), height="48") for i in c["images"]],
        lambda c: c["categories"].reverse(),
        lambda c: [a.update(id=5) for a in c["annotations"]],
    ],
)
def test_masks_need_neither_areas_nor_sizes_nor_boxes(coco, edit):
    expected = masks_of(coco)
    change(coco, edit)
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(coco), expected))


def test_small_objects_are_drawn_over_large_ones_without_areas_too(coco):
    inner = [[12, 12, 20, 12, 20, 20, 12, 20]]

    def edit(content):
        entry = dict(content["annotations"][0], category_id=3, segmentation=inner)
        content["annotations"].insert(0, entry)

    change(coco, edit)
    change(coco, without("area"))
    mask = masks_of(coco)[0]
    assert mask[16, 16] == 1 and mask[30, 30] == 2


@pytest.mark.parametrize(
    "edit, hint",
    [
        (lambda c: c.pop("annotations"), "annotations"),
        (lambda c: c.pop("images"), "images"),
        (lambda c: c.pop("categories"), "categories"),
        (lambda c: c.update(annotations={}), "annotations"),
        (lambda c: c.update(categories=[]), "categories"),
        (lambda c: c.update(images=[]), "images"),
        (lambda c: c["images"].append(7), "images"),
        (lambda c: c["images"][1].pop("id"), "images"),
        (lambda c: c["images"][1].pop("file_name"), "images"),
        (lambda c: c["images"][1].update(file_name=7), "images"),
        (lambda c: c["images"][1].update(id=0), "images"),
        (lambda c: c["images"][1].update(id=[0]), "images"),
        (lambda c: c["categories"][0].update(id=7), "categories"),
        (lambda c: c["categories"][0].update(id=None), "categories"),
        (lambda c: c["categories"][0].update(name="dog"), "categories"),
        (lambda c: c["categories"][0].pop("name"), "categories"),
        (set_first("category_id", 8), "category 8, which is out of range"),
        (set_first("category_id", "cat"), "category cat, which is out of range"),
        (set_first("category_id", [7]), "out of range"),
        (set_first("category_id", None), "out of range"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(coco, edit, hint):
    change(coco, edit)
    for read in (masks_of, lambda root: open_detect(root, "c4")):
        with pytest.raises(UsageError) as e:
            read(coco)
        assert hint in str(e.value) and "instances_" in str(e.value), e.value
        assert "\n" not in str(e.value) and e.value.status == 2


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"7", b'{"images": [', b"\xff\xfe\x00", b"[" * 100_000, b"\x00\x01"],
    ids=len,
)
def test_a_file_that_is_no_json_object_is_refused_in_one_line(coco, raw):
    path(coco, "val").write_bytes(raw)
    for read in (masks_of, lambda root: open_detect(root, "c4")):
        with pytest.raises(UsageError, match=r"^(?!.*\n).*instances_val2017.json"):
            read(coco)


def test_a_byte_order_mark_is_read(coco):
    for split in ("train", "val"):
        path(coco, split).write_bytes(b"\xef\xbb\xbf" + path(coco, split).read_bytes())
    assert masks_of(coco)[0].max() == 2 and open_detect(coco, "fpn")[2]["ap"] > 0


@pytest.mark.parametrize("image_id", [99, None, "x", [1]])
def test_annotations_of_removed_images_are_left_out_and_counted(coco, capfd, image_id):
    def edit(content):
        content["annotations"] += [dict(content["annotations"][0], id=50, image_id=image_id)]

    change(coco, edit)
    masks_of(coco)
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "1 of 4 annotations" in error and "annotation 50" in error
    open_detect(coco, "c4")
    assert capfd.readouterr().err.count("annotation 50") == 2


BOXES = [
    [8, 8, 0, 24],
    [8, 8, -32, -24],
    [8, 8, 32],
    [8, 8, 32, 24, 1],
    [],
    None,
    "8 8 32 24",
    [8, 8, float("nan"), 24],
    [8, 8, float("inf"), 24],
    [8, 8, "32", 24],
    [8, 8, 10**400, 24],
    [64, 8, 32, 24],
    [-40, 8, 32, 24],
    [8, 8, None, 24],
]


@pytest.mark.parametrize("box", BOXES, ids=lambda b: str(b)[:30])
def test_an_unusable_box_is_left_out_and_named(coco, capfd, box):
    change(coco, set_first("bbox", box))
    for detector in ("c4", "fpn"):
        _, test, scores = open_detect(coco, detector)
        assert [len(a.boxes) for a in test.annotations] == [0, 1, 1] and scores["ap"] > 0
        assert capfd.readouterr().err.count("annotation 10") == 2
    assert masks_of(coco)[0].max() == 2 and capfd.readouterr().err == ""


def test_detect_refuses_fewer_images_with_objects_than_a_batch_before_training(coco):
    change(coco, set_first("bbox", None))
    config = detect.DetectConfig(data_root=str(coco), detector="c4", batch_size=3)
    with pytest.raises(UsageError, match="more than the 2 images to train on"):
        detect.open_splits(config)


def test_more_categories_than_a_mask_can_hold_are_refused(coco):
    def edit(content):
        content["categories"] += [{"id": i, "name": f"class {i}"} for i in range(100, 400)]

    change(coco, edit)
    with pytest.raises(UsageError, match="302 categories"):
        open_segmentation(coco, "val")


VOC_OBJECT = (
    "<object><name>cat</name><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


@pytest.fixture
def voc(tmp_path):
    """A VOC folder: one image per split with a box and a mask, without a size."""
    base = tmp_path / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "Annotations", "SegmentationClass"):
        (base / name).mkdir(parents=True)
    for kind in ("Main", "Segmentation"):
        (base / "ImageSets" / kind).mkdir(parents=True)
        for split in ("train", "val"):
            (base / f"ImageSets/{kind}/{split}.txt").write_text(f"{split}\n")
    for split in ("train", "val"):
        save_oriented(base / f"JPEGImages/{split}.jpg", 1)
        Image.fromarray(gray_mask()).save(base / f"SegmentationClass/{split}.png")
        box = VOC_OBJECT.format(1, 1, 16, 48)
        (base / f"Annotations/{split}.xml").write_text(f"<annotation>{box}</annotation>")
    return base


@pytest.mark.parametrize(
    "corners", [(9, 9, 5, 20), ("nan", 1, 16, 48), (1, 1, "inf", 48), (99, 1, 120, 48)]
)
def test_an_unusable_box_of_voc_is_left_out_and_named(voc, capfd, corners):
    size = "<size><width>64</width><height>48</height></size>"
    boxes = VOC_OBJECT.format(1, 1, 16, 48) + VOC_OBJECT.format(*corners)
    (voc / "Annotations/val.xml").write_text(f"<annotation>{size}{boxes}</annotation>")
    _, test, _ = open_voc(voc)
    assert test.annotations[0].boxes.tolist() == [[0, 0, 16, 48]]
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "1 of 2 annotations" in error and "val.xml" in error


@pytest.mark.parametrize(
    "text, hint",
    [
        ("<annotation><size><width>x</width></size></annotation>", "size"),
        ("<annotation><size><width>inf</width></size></annotation>", "size"),
        ('<?xml version="1.0" encoding="nothing"?><annotation/>', "no XML"),
    ],
)
def test_an_unusable_xml_is_refused_in_one_line(voc, text, hint):
    (voc / "Annotations/val.xml").write_text(text)
    with pytest.raises(UsageError, match=hint):
        open_voc(voc)


def open_voc(base):
    config = detect.DetectConfig(data_root=str(base.parent), batch_size=1)
    return *detect.open_splits(config), None


def gray_mask():
    """48 x 64: class 1 in the left quarter."""
    mask = np.zeros((48, 64), np.uint8)
    mask[:, :16] = 1
    return mask


def save_oriented(path, orientation):
    """A 64 x 48 image whose left quarter is white, with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x112] = orientation
    image = np.repeat(gray_mask()[..., None] * 255, 3, 2)
    Image.fromarray(image).save(path, exif=exif, quality=95)


def is_white_where(image, mask):
    return image.size == mask.shape[::-1] and np.array_equal(np.asarray(image)[..., 0] > 128, mask)


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_labels_refer_to_the_stored_pixels(voc, coco, capfd, orientation):
    """`densecl segment` and `detect`: the image is not turned, and one line says so."""
    for split in ("train", "val"):
        save_oriented(voc / f"JPEGImages/{split}.jpg", orientation)
    train, _ = segment.open_splits(segment.SegmentConfig(data_root=str(voc.parent)))
    image, mask = train.load(0)
    assert is_white_where(image, mask == 1)
    image, labels = open_voc(voc)[1].load(0)
    assert is_white_where(image, gray_mask() == 1) and labels.boxes.tolist() == [[0, 0, 16, 48]]
    for i in range(3):
        save_oriented(coco / f"val2017/{i}.jpg", orientation)
    left = [[0, 0, 16, 0, 16, 48, 0, 48]]
    change(coco, lambda c: [a.update(segmentation=left) for a in c["annotations"]])
    for edit in (lambda c: None, without("width", "height")):
        change(coco, edit)
        image, mask = open_segmentation(coco, "val").load(0)
        assert is_white_where(image, mask == 2)
    error = capfd.readouterr().err
    assert error.count("orientation") == error.count("\n") == 1


@pytest.fixture(autouse=True)
def warn_again():
    decode._warned[0] = 0


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_labels_of_the_turned_size_refer_to_the_turned_image(voc, coco, orientation):
    path = voc / "JPEGImages/val.jpg"
    save_oriented(path, orientation)
    turned = np.asarray(Image.open(path).convert("L"))  # stored
    with Image.open(path) as image:
        from PIL import ImageOps

        turned = np.asarray(ImageOps.exif_transpose(image).convert("L")) > 128
    Image.fromarray(turned.astype(np.uint8)).save(voc / "SegmentationClass/val.png")
    size = "<size><width>48</width><height>64</height></size>"
    box = VOC_OBJECT.format(1, 1, 16, 48)
    (voc / "Annotations/val.xml").write_text(f"<annotation>{size}{box}</annotation>")
    image, mask = open_segmentation(voc.parent, "val").load(0)
    assert is_white_where(image, mask == 1) and image.size == (48, 64)
    assert is_white_where(open_voc(voc)[1].load(0)[0], turned)

    shutil.copy(path, coco / "val2017/0.jpg")
    change(coco, lambda c: c["images"][0].update(width=48, height=64))
    assert open_segmentation(coco, "val").load(0)[0].size == (48, 64)


def write_keypoints(folder, orientation, **fields):
    """Two images with an animal each; its two keypoints are corners of the white quarter."""
    folder.mkdir()
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": 1, "name": "cat", "keypoints": ["a", "b"]}]
    for i in range(2):
        save_oriented(folder / f"{i}.jpg", orientation)
        content["images"].append({"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48})
        entry = {"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 32, 48]}
        content["annotations"].append(entry | {"keypoints": [4, 4, 2, 12, 44, 2]} | fields)
        fields = {}
    (folder / "keypoints.json").write_text(json.dumps(content))
    return folder / "keypoints.json"


@pytest.mark.parametrize("orientation", [3, 6])
def test_keypoints_and_disparities_refer_to_the_stored_pixels(tmp_path, orientation):
    plain = open_keypoints(write_keypoints(tmp_path / "plain", 1), min_points=2)
    tagged = open_keypoints(write_keypoints(tmp_path / "tagged", orientation), min_points=2)
    assert np.array_equal(np.asarray(plain.images[0]), np.asarray(tagged.images[0]))

    for name in ("left", "right"):
        save_oriented(tmp_path / f"{name}.jpg", orientation)
    np.save(tmp_path / "disparity.npy", np.zeros((48, 64), np.float32))
    assert is_white_where(open_stereo_pair(tmp_path).left, gray_mask() == 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"image_id": 99},
        {"bbox": None},
        {"bbox": [1, 2, float("nan"), 3]},
        {"keypoints": None},
        {"keypoints": [4, 4, 2, 12, 44]},
        {"keypoints": [4, 4, 2]},
        {"keypoints": [4, 4, 2, "x", 44, 2]},
    ],
)
def test_unusable_keypoints_are_left_out_and_named(tmp_path, capfd, fields):
    path = write_keypoints(tmp_path / "faulty", 1, **fields)
    content = json.loads(path.read_text())
    content["annotations"].append(dict(content["annotations"][1], id=7, image_id=0))
    path.write_text(json.dumps(content))
    dataset = open_keypoints(path, min_points=1)
    assert len(dataset.images) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "1 of 3 annotations" in error and "annotation 0" in error


class Terminal(io.StringIO):
    """A text file that is a terminal, so that progress bars are written to it."""

    def isatty(self):
        return True


def test_a_short_run_measures_bn_on_no_more_batches_than_it_trained_on(coco, tmp_path, monkeypatch):
    sizes = []

    def counted(model, batches):
        batches = [sizes.append(len(images)) or (images, targets) for images, targets in batches]
        precise_bn(model, batches)

    argv = ["--weights", "random", "--backbone", "resnet18", "--data-root", str(coco)]
    argv += ["--detector", "c4", "--max-steps", "2", "--batch-size", "2", "--short-side", "32"]
    argv += ["--roi-batch-size", "4", "--roi-size", "2", "--proposals", "8", "--workers", "0"]
    argv += ["--threads", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(detect, "precise_bn", counted)
    monkeypatch.setattr(sys, "stderr", Terminal())
    detect.main(argv)
    assert sizes == [2, 2]  # not 200 batches
    assert "precise BN" in sys.stderr.getvalue() and "score" in sys.stderr.getvalue()

    # a run that was killed while it was scored ends with the same scores
    result = (tmp_path / "run/trial-0/result.json").read_text()
    (tmp_path / "run/trial-0/result.json").unlink()
    torch.manual_seed(5)
    detect.main(argv)
    assert (tmp_path / "run/trial-0/result.json").read_text() == result
