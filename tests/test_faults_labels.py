"""Labeled data that is unusual or wrong: lists, class files, masks, boxes with own classes."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from densecl.data.labels import SegmentationDataset, class_lookup_table, open_segmentation
from densecl.data.lists import find_voc_root, voc_images
from densecl.data.sources import coco_source, list_source
from densecl.detect.boxes import open_detection
from densecl.evaluate.__main__ import main as evaluate
from densecl.evaluate.classification import open_multi_label, open_single_label
from densecl.evaluate.features import open_images
from densecl.evaluate.keypoints import find_keypoint_file
from densecl.runtime.io import UsageError
from densecl.segment.__main__ import SegmentConfig, hints, open_splits
from densecl.segment.__main__ import main as segment

NAMES = ["img000_jpg.rf.0a1b2c", "cam.000", "cam.001", "a b c", "Zoë", "x"]
BOX = "<xmin>2</xmin><ymin>2</ymin><xmax>44</xmax><ymax>42</ymax>"


def write_list(base, split, text, encoding="utf-8"):
    for folder in ("Main", "Segmentation"):
        (base / f"ImageSets/{folder}/{split}.txt").write_bytes(text.encode(encoding))


def add_image(base, name, i, suffix=".jpg", mask=None):
    """An image, its mask of values 0 and 1, its annotation with one box of cell or wall."""
    rng = np.random.default_rng(i)
    pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(base / f"JPEGImages/{name}{suffix}")
    mask = rng.integers(0, 2, (48, 64)) if mask is None else mask
    Image.fromarray(np.asarray(mask, np.uint8)).save(base / f"SegmentationClass/{name}.png")
    label = f"<name>{('cell', 'wall')[i % 2]}</name><bndbox>{BOX}</bndbox>"
    size = "<size><width>64</width><height>48</height></size>"
    text = f"<annotation>{size}<object>{label}</object></annotation>"
    (base / f"Annotations/{name}.xml").write_text(text, encoding="utf-8")


@pytest.fixture
def base(tmp_path):
    """A VOC tree with own classes and the images NAMES, in both kinds of lists."""
    base = tmp_path / "own"
    for folder in ("JPEGImages", "SegmentationClass", "Annotations"):
        (base / folder).mkdir(parents=True)
    for folder in ("Main", "Segmentation"):
        (base / "ImageSets" / folder).mkdir(parents=True)
    for i, name in enumerate(NAMES):
        add_image(base, name, i)
    (base / "classes.txt").write_text("background\ncell\nwall\n")
    for split in ("train", "val"):
        write_list(base, split, "\n".join(NAMES))
    return base


def files_of(base):
    """The files that each reader of a VOC list finds, for the split train."""
    single = open_single_label(base).train
    multi = open_multi_label(base).train
    masks, views = open_segmentation(base, "train"), open_images(base, "train")
    boxes = open_detection(base, "train")
    return {
        "segment": [masks.images.name(i) for i in range(len(masks))],
        "views": [views.name(i) for i in range(len(views))],
        "detect": [boxes.images.name(i) for i in range(len(boxes))],
        "knn": [str(image.open.args[0]) for image in single],
        "svm": [str(image.open.args[0]) for image in multi],
    }


TEXTS = {
    "plain": "\n".join(NAMES),
    "Windows": "\r\n".join(NAMES) + "\r\n\r\n",
    "suffixes": "\n".join(f"{name}.jpg" for name in NAMES),
    "other case": "\n".join(f"{name}.JPG" for name in NAMES),
    "labels": "\n".join(f"{name}  -1" for name in NAMES),
    "quotes": "\n".join(f'"{name}.jpg" 1' for name in NAMES),
    "pairs": "\n".join(f"/JPEGImages/{n}.jpg /SegmentationClass/{n}.png" for n in NAMES),
}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("text", TEXTS)
def test_all_commands_find_the_same_images_in_a_list(base, text, encoding):
    add_image(base, "cam", 9)  # must not be taken for cam.000
    write_list(base, "train", TEXTS[text], encoding)
    for reader, files in files_of(base).items():
        assert [file.rsplit("/")[-1] for file in files] == [f"{n}.jpg" for n in NAMES], reader


def test_a_missing_image_is_not_replaced_by_a_shorter_name(base):
    add_image(base, "cam", 9)
    (base / "JPEGImages/cam.001.jpg").unlink()
    for reader in (open_segmentation, open_detection, open_images):
        with pytest.raises(UsageError, match=r"1 of 6 images are missing: JPEGImages/cam.001.jpg"):
            reader(base, "train")
    for reader in (open_single_label, open_multi_label):
        with pytest.raises(UsageError, match=r"JPEGImages/cam.001.jpg"):
            reader(base)


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".jpeg", ".tif"])
def test_images_of_any_suffix_are_found(base, suffix):
    for i, name in enumerate(NAMES):
        (base / f"JPEGImages/{name}.jpg").unlink()
        add_image(base, name, i, suffix)
    for reader, files in files_of(base).items():
        assert [file.rsplit("/")[-1] for file in files] == [n + suffix for n in NAMES], reader
    open_segmentation(base, "train").load(0)


def test_folders_below_jpegimages_stay_apart(base):
    for i, camera in enumerate(("left", "right")):
        for folder in ("JPEGImages", "SegmentationClass", "Annotations"):
            (base / folder / camera).mkdir()
        add_image(base, f"{camera}/0", i)
    write_list(base, "train", "left/0\nright/0.jpg\n")
    files = voc_images(base, "train").files
    assert files == ["JPEGImages/left/0.jpg", "JPEGImages/right/0.jpg"]
    write_list(base, "train", "a/x\nb/x\n")  # folders that are not there
    with pytest.raises(UsageError, match=r"names the image x.jpg as a/x and b/x"):
        voc_images(base, "train")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_list_of_images_for_training_is_read_alike(base, encoding):
    path = base / "list.txt"
    lines = ['"JPEGImages/a b c.jpg" 3', "JPEGImages/cam.000.jpg 1", "JPEGImages/Zoë.jpg"]
    path.write_bytes("\r\n".join(lines).encode(encoding))
    source = list_source(path)
    assert [source.load(i).size for i in range(3)] == [(64, 48)] * 3
    assert [source.label(i) for i in range(3)] == ["3", "1", ""]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_one_class_file_for_masks_and_boxes(base, encoding):
    text = 'background\r\n"cell"\r\nwall\r\n\r\n'
    (base / "classes.txt").write_bytes(text.encode(encoding))
    assert open_segmentation(base, "train").classes == ["background", "cell", "wall"]
    assert open_detection(base, "train").classes == ["cell", "wall"]
    assert open_multi_label(base).classes == ["cell", "wall"]
    assert open_single_label(base).classes == ["background", "cell", "wall"]


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"", "an empty file"),
        (b"a\n\nb", "line 2 is empty"),
        (b"a\nb\na", "'a' occurs twice"),
        (b"\x89PNG\r\n\0\0", "not a text file"),
        (b"caf\xe9\nb", "cannot be printed"),
        (b"only", "two or more are needed"),
        (b"\n".join(b"c%d" % i for i in range(256)), "more than the 255 of a mask"),
    ],
)
def test_a_wrong_class_file_is_refused(base, text, reason):
    (base / "classes.txt").write_bytes(text)
    with pytest.raises(UsageError, match=reason):
        open_segmentation(base, "train")


def splits(base, **fields):
    """The hints before a run of `densecl segment`, and its training set."""
    config = SegmentConfig(data_root=str(base), **fields)
    train, _ = open_splits(config)
    return hints(config, train), train


def test_a_class_without_a_pixel_is_named(base):
    (base / "classes.txt").write_text("background\nobject\n")
    for i, name in enumerate(NAMES):
        add_image(base, name, i, mask=np.random.default_rng(i).integers(0, 2, (48, 64)) * 255)
    found, _ = splits(base)
    assert found[0] == (
        "class object: no pixel in the 6 masks of train; 255 is void and not a class"
    )
    for name in NAMES:
        add_image(base, name, 0, mask=np.full((48, 64), 255))
    with pytest.raises(UsageError, match="all pixels of the 6 masks of train are void"):
        splits(base)


def test_the_largest_number_of_classes():
    table = class_lookup_table(range(255))
    assert table[254] == 254 and table[255] == 255
    for values in (range(256), range(301), [0, 255], [0, 0], [-1]):
        with pytest.raises(UsageError):
            class_lookup_table(list(values))
    with pytest.raises(UsageError, match="class number 3"):
        class_lookup_table([1, 3], void=[3])


def test_void_has_a_name(base):
    for i, name in enumerate(NAMES):
        add_image(base, name, i, mask=np.random.default_rng(i).integers(0, 4, (48, 64)))
    with pytest.raises(UsageError, match="class numbers 3 are out of range"):
        splits(base)
    _, train = splits(base, void=3)
    assert train.classes == ["background", "cell", "wall"]
    assert set(np.unique(train.mask(0))) == {0, 1, 2, 255}
    (base / "classes.txt").write_text("unlabeled\ncell\nwall\ndoor\n")
    before = open_segmentation(base, "train").mask(0)
    _, train = splits(base, void=0)  # a class of the file is left out, the others move up
    assert train.classes == ["cell", "wall", "door"]
    assert np.array_equal(train.mask(0), np.where(before == 0, 255, before - 1.0))
    for command, words in ((segment, "--weights random --void 256"), (evaluate, "segment")):
        words = shlex.split(words + " --weights random --void=-1" * (command is evaluate))
        with pytest.raises(UsageError, match="--void .*: must be a value of a mask, 0 to 255"):
            command([*words, "--data-root", str(base)])


def test_without_class_names_there_is_a_hint(base):
    (base / "classes.txt").unlink()
    found, _ = splits(base)
    assert "classes.txt" in found[0] and "VOC's 21 classes" in found[0]
    assert "19 classes bicycle, bird" in found[1]
    (base / "JPEGImages").rename(base / "images")
    with pytest.raises(UsageError, match="no tree with masks"):
        splits(base)


def test_a_wrong_mask_in_the_middle_is_found_before_the_run(base):
    for mask, reason in (
        (np.full((48, 64), 7), "class numbers 7 are out of range"),
        (np.zeros((24, 64)), "a mask of 64 x 24 for an image of 64 x 48"),
    ):
        Image.fromarray(mask.astype(np.uint8)).save(base / "SegmentationClass/cam.001.png")
        line = ["segment", "--data-root", str(base), "--weights", "random", "--device", "cpu"]
        with pytest.raises(UsageError, match=reason):
            splits(base)
        with pytest.raises(UsageError, match=reason):
            evaluate([*line, "--backbone", "resnet18"])


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff\n"])
def test_an_empty_list_is_one_line(base, text):
    write_list(base, "val", text)
    with pytest.raises(UsageError, match=r"the list ImageSets/Segmentation/val.txt is empty"):
        splits(base)
    for reader in (open_single_label, open_multi_label):
        with pytest.raises(UsageError, match=r"the list ImageSets/Main/val.txt is empty"):
            reader(base)


def test_an_empty_split_of_coco_is_one_line(tmp_path):
    pytest.importorskip("pycocotools")
    for name in ("annotations", "val2017"):
        (tmp_path / name).mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cup"}]}
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(content))
    with pytest.raises(UsageError):
        open_segmentation(tmp_path, "val")


def test_boxes_of_own_classes_without_lists_of_masks(base):
    for path in (base / "ImageSets/Segmentation").iterdir():
        path.unlink()
    (base / "ImageSets/Segmentation").rmdir()
    assert find_voc_root(base) is None
    assert len(open_single_label(base).train) == len(open_multi_label(base).val) == 6
    (base / "ImageSets/Main").rename(base / "ImageSets/Other")
    for reader in (open_single_label, open_multi_label):
        with pytest.raises(UsageError, match="but without ImageSets/Main with lists train.txt"):
            reader(base)


def test_wrong_boxes_are_one_line(base):
    path = base / "Annotations/x.xml"
    text = path.read_text()
    for old, new, reason in (
        ("wall", "door", "'door' is none of the 2 classes"),
        ("<xmin>2</xmin>", "", "the wall has no bndbox of four numbers"),
        ("</annotation>", "", "Annotations/x.xml: no XML \\(no element found"),
    ):
        path.write_text(text.replace(old, new))
        for reader in (open_single_label, open_multi_label):
            with pytest.raises(UsageError, match=reason):
                reader(base)


def test_a_name_is_without_its_suffix_only(base):
    dataset = open_segmentation(base, "train")
    assert isinstance(dataset, SegmentationDataset)
    assert [dataset.name(i) for i in range(len(dataset))] == NAMES


@pytest.mark.long
def test_a_run_from_before_void_existed_continues(base, tmp_path):
    line = shlex.split(
        f"--weights random --backbone resnet18 --data-root {base} --out {tmp_path / 'out'} "
        "--crop-size 32 --batch-size 4 --max-steps 2 --workers 0 --threads 1 --device cpu"
    )
    segment(line)
    path = tmp_path / "out/config.json"
    saved = json.loads(path.read_text())
    assert saved.pop("void") == 255
    path.write_text(json.dumps(saved))
    segment(line)
    with pytest.raises(UsageError, match="void 255 "):
        segment([*line, "--void", "2"])


def set_box(base, name, corners):
    """Write the annotation of an image of 64 x 48 with one box, corners as in VOC."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, corners))
    size = "<size><width>64</width><height>48</height></size>"
    text = f"<object><name>cell</name><bndbox>{box}</bndbox></object>"
    (base / f"Annotations/{name}.xml").write_text(f"<annotation>{size}{text}</annotation>")


def test_a_crop_has_the_stored_pixels_of_its_box(base):
    """VOC counts from 1 with the last pixel inside, and boxes ignore the EXIF orientation."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[4:44, 20:60] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(base / "JPEGImages/x.jpg", quality=100, subsampling=0, exif=exif)
    set_box(base, "x", (21, 5, 60, 44))
    images = {image.open.args[0].stem: image for image in open_single_label(base).train}
    crop = np.asarray(images["x"].open())
    assert crop.shape == (40, 40, 3) and crop[..., 0].min() > 200 and crop[..., 1].max() < 60


@pytest.mark.parametrize("corners", [(500, 1, 600, 40), (1, 1, 30_000, 40), (40, 5, 4, 44)])
def test_an_unusable_box_is_left_out_of_the_crops(base, corners, capsys):
    set_box(base, "x", corners)
    images = open_single_label(base).train
    assert "x" not in {image.open.args[0].stem for image in images} and len(images) == 5
    assert "1 of 6 annotations are left out" in capsys.readouterr().err


def test_a_json_named_from_its_own_folder_finds_its_images(tmp_path, monkeypatch):
    images = tmp_path / "val2017"
    images.mkdir()
    (tmp_path / "annotations").mkdir()
    Image.new("RGB", (64, 48)).save(images / "a.jpg")
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], "categories": []}
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(content))
    (tmp_path / "annotations/person_keypoints_val2017.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path / "annotations")
    assert len(coco_source("instances_val2017.json")) == 1
    assert find_keypoint_file("person_keypoints_val2017.json")[1] == images
