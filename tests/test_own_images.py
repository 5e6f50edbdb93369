"""The preset `own`: from a folder of images to weights that the transfer commands accept."""

import json
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

from densecl.data.__main__ import describe_dataset
from densecl.data.__main__ import main as data
from densecl.detect.__main__ import main as detect
from densecl.encoder import build_backbone
from densecl.recommend import RECOMMENDED_FIELDS, Device, choices_table, recommend
from densecl.runtime.io import UsageError
from densecl.segment.__main__ import main as segment
from densecl.train import check_run, parse_args
from densecl.train import main as train
from densecl.weights import extract_backbone

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "voc2012-mini" / "VOCdevkit"
SMALL = shlex.split(
    "--image-size 64 --dim 8 --hidden 16 --workers 0 --threads 1 --log-every 1 --device cpu "
    "--max-steps 2"
)
TINY = [*SMALL, "--backbone", "resnet18-layer1"]  # seconds where the backbone does not matter


@pytest.fixture
def place(tmp_path, monkeypatch, make_images):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images")
    return tmp_path


def stored(out="runs/own"):
    return json.loads((Path(out) / "config.json").read_text())


def message(function, *args):
    with pytest.raises(UsageError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def values(*words):
    """The recommended fields of a command line, as a process would train with them."""
    argv = ["own", *words]
    config, choices, _ = check_run(argv, parse_args(argv))
    assert [choice.field for choice in choices] == list(RECOMMENDED_FIELDS)
    return {name: getattr(config, name) for name in RECOMMENDED_FIELDS}


def labeled_images(root, count=4):
    """A dataset in VOC's format with masks and boxes, one bright rectangle per image."""
    base = root / "VOC2012"
    lists = ("ImageSets/Segmentation", "ImageSets/Main")
    for name in ("JPEGImages", "Annotations", "SegmentationClass", *lists):
        (base / name).mkdir(parents=True)
    for i in range(count):
        image = np.random.default_rng(i).integers(60, 120, (48, 64, 3), dtype=np.uint8)
        image[8:30, 10:40] = (230, 80, 40)
        mask = np.zeros((48, 64), np.uint8)
        mask[8:30, 10:40] = 8  # cat
        Image.fromarray(image).save(base / f"JPEGImages/{i}.jpg")
        Image.fromarray(mask).save(base / f"SegmentationClass/{i}.png")
        box = "<xmin>11</xmin><ymin>9</ymin><xmax>40</xmax><ymax>30</ymax>"
        text = f"<object><name>cat</name><bndbox>{box}</bndbox></object>"
        (base / f"Annotations/{i}.xml").write_text(f"<annotation>{text}</annotation>")
    for name in lists:
        (base / name / "train.txt").write_text("0\n1\n")
        (base / name / "val.txt").write_text("2\n3\n")
    return root


def transfer(weights, root):
    """One step of each transfer command."""
    options = ["--weights", weights, "--data-root", str(root), "--max-steps", "1"]
    options += shlex.split("--batch-size 2 --workers 0 --threads 1 --device cpu --eval-images 2")
    segment([*options, "--out", "runs/segment", "--crop-size", "64"])
    small = "--short-side 48 --roi-batch-size 4 --roi-size 2 --proposals 8 --precise-bn-iters 0"
    detect([*options, "--out", "runs/detect", *shlex.split(small)])
    for name in ("segment", "detect"):
        assert json.loads(Path(f"runs/{name}/results.json").read_text())["trials"] == 1


def test_a_folder_of_images_is_trained_extracted_and_accepted_by_both_transfers(place, capsys):
    train(["own", "--data-root", "images", *SMALL])
    config = stored()
    assert {name: config[name] for name in RECOMMENDED_FIELDS} == values("--data-root", "images")
    assert (config["backbone"], config["batch_size"], config["queue_len"]) == ("resnet18", 4, 8)
    assert choices_table(recommend(12, Device("cpu"))) in capsys.readouterr().err
    extract_backbone("runs/own/last.pt", "backbone.pth")
    transfer("backbone.pth", labeled_images(place / "labeled"))


@pytest.mark.long
@pytest.mark.skipif(not REAL.is_dir(), reason="needs the development images")
def test_real_images_are_trained_and_transferred(place):
    photos = sorted((REAL / "VOC2012/JPEGImages").iterdir())[:20]
    (place / "real").mkdir()
    for path in photos:
        shutil.copy(path, place / "real")
    train(["own", "--data-root", "real", *SMALL])
    rows = [json.loads(line) for line in Path("runs/own/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
    transfer("runs/own/last.pt", REAL)


def test_check_and_dry_run_print_the_same_values(place, capsys, monkeypatch):
    data(["check", "images"])
    checked = capsys.readouterr().out.splitlines()
    table = choices_table(recommend(12)).splitlines()
    assert checked[-len(table) :] == table
    command = shlex.split(checked[-len(table) - 1].removeprefix("train: densecl train "))
    assert command == ["own", "--data-root", "images"]
    monkeypatch.setattr(sys.modules["densecl.train"], "print_measured", lambda *args: None)
    train([*command, "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[: len(table)] == table and not Path("runs").exists()


def test_given_options_win_and_the_others_follow_them(place):
    found = values(*shlex.split("--data-root images --batch-size 2 --queue-len=5 --epochs 7"))
    assert (found["batch_size"], found["queue_len"], found["epochs"]) == (2, 5, 7)
    assert found["lr"] == 0.3 * 2 / 256 and found["backbone"] == "resnet18"
    assert values("--data-root", "images", "--lr", "0.5")["lr"] == 0.5
    text = message(values, "--data-root", "images", "--batch-size", "13")
    assert "--batch-size 13: more than the 12 images" in text


@pytest.mark.parametrize("images", [1, 2, 5])
def test_very_few_images(images, place, make_images):
    make_images(place / "few", images)
    found = values("--data-root", "few")
    assert found["batch_size"] == min(images, 4) and found["queue_len"] <= images
    text = describe_dataset(place / "few", device=Device("cpu"))[-1]
    assert f"--batch-size {found['batch_size']} " in text


def test_a_run_that_is_continued_keeps_its_values_on_another_device(place, monkeypatch, capsys):
    small_gpu = Device("cuda", 2.01)  # memory for two images of TINY
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["densecl.train"], "find_device", lambda device: small_gpu)
        train(["own", "--data-root", "images", *TINY, "--max-steps", "1"])
    before = stored()
    assert before["batch_size"] == 2
    assert values("--data-root", "images", "--out", "elsewhere")["batch_size"] == 4
    capsys.readouterr()
    train(["own", "--data-root", "images", *TINY])
    assert "resumed at step 1" in (said := capsys.readouterr().err)
    assert "of the run in runs/own" in said
    after = stored()
    assert {name: after[name] for name in RECOMMENDED_FIELDS} == {
        name: before[name] for name in RECOMMENDED_FIELDS
    }
    path = ["--data-root", "images", "--out", "third", "--resume", "runs/own/last.pt"]
    assert values(*path)["batch_size"] == 2
    assert "batch_size" in message(
        train, ["own", "--data-root", "images", *TINY, "--batch-size", "4"]
    )
    assert values("--data-root", "images", "--resume", "never")["batch_size"] == 4


def test_an_error_names_the_backbone_that_would_be_chosen(place):
    argv = ["own", "--data-root", "images", "--image-size", "32", "--dry-run"]
    assert "resnet18 has a single cell" in message(train, argv)
    assert "resnet50 has a single cell" in message(train, [*argv, "--backbone", "resnet50"])


def test_a_batch_that_exceeds_the_memory_names_accumulate(place, monkeypatch):
    def batch(*words):
        argv = ["own", "--data-root", "images", *words]
        config, choices, _ = check_run(argv, parse_args(argv))
        (reason,) = [c.reason for c in choices if c.field == "batch_size"]
        return config.batch_size, config.accumulate, reason

    small_gpu = Device("cuda", 2.1)  # memory for two images of 224 x 224 pixels
    monkeypatch.setattr(sys.modules["densecl.train"], "find_device", lambda device: small_gpu)
    size, count, reason = batch()
    assert (size, count) == (2, 1) and "resnet18 in the GPU's memory of 2 GB" in reason
    options = reason.rpartition("; or ")[2]
    assert options == "--batch-size 4 --accumulate 2"
    assert batch(*options.split()) == (4, 2, "given")
    assert batch("--accumulate", "2") == (4, 2, "few images")
    assert batch("--batch-size", "4", "--image-size", "112") == (4, 1, "given")
    assert batch("--batch-size", "4") == (4, 1, "given; 2 GB of memory need --accumulate 2")


def test_more_images_are_other_data(place, make_images):
    train(["own", "--data-root", "images", *TINY, "--max-steps", "1"])
    shutil.copy("images/image-00.png", "images/new.png")
    assert "12 images (now 13)" in message(train, ["own", "--data-root", "images", *TINY])
    make_images(place / "few", 2)
    text = message(train, ["own", "--data-root", "few", *TINY])
    assert "of the run in runs/own" in text and "2 images of few" in text


def test_the_processes_of_a_run_agree(place, monkeypatch):
    found = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        found.append(values("--data-root", "images"))
    assert found[0] == found[1] == found[2] and found[0]["batch_size"] == 3


@pytest.mark.long
def test_two_processes_train_with_the_recommended_values(place):
    launcher = shlex.split("-m torch.distributed.run --standalone --nproc_per_node=2 -m")
    got = subprocess.run(
        [sys.executable, *launcher, "densecl.train", "own", "--data-root", "images", *SMALL],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert got.returncode == 0, got.stderr
    assert got.stderr.count("--queue-len 8") == 1 and stored()["batch_size"] == 4


def test_initial_weights_determine_the_backbone(place):
    torch.save(build_backbone("resnet34")[0].state_dict(), "r34.pth")
    found = values("--data-root", "images", "--init", "r34.pth")
    assert found["backbone"] == "resnet34" and found["lr"] == pytest.approx(0.03 * 4 / 256)
    assert values("--data-root", "images", "--init", "imagenet-r101-200ep")["backbone"] == (
        "resnet101"
    )
    assert values("--data-root", "images", "--init", "supervised")["backbone"] == "resnet18"
    given = values("--data-root", "images", "--init", "r34.pth", "--backbone", "resnet50")
    assert given["backbone"] == "resnet50"
    text = message(values, "--data-root", "images", "--init", "timm-pretrained")
    assert "--backbone timm:NAME" in text
    assert "nowhere.pth" in message(values, "--data-root", "images", "--init", "nowhere.pth")


def test_initial_weights_of_a_model_of_timm(place):
    pytest.importorskip("timm")
    name = "timm:convnext_atto"
    tensors = build_backbone(name)[0].state_dict()
    model = {f"encoder_q.backbone.{key}": value for key, value in tensors.items()}
    torch.save({"model": model, "config": {"backbone": name}}, "run.pt")
    torch.save({key.removeprefix("net."): value for key, value in tensors.items()}, "timm.pth")
    assert values("--data-root", "images", "--init", "run.pt")["backbone"] == name
    text = message(values, "--data-root", "images", "--init", "timm.pth")
    assert "give --backbone, too" in text


def test_a_split_of_hugging_face_and_remote_shards(place):
    datasets = pytest.importorskip("datasets")
    fsspec = pytest.importorskip("fsspec")
    paths = sorted(map(str, (place / "images").iterdir()))
    split = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    split.save_to_disk("split")
    subprocess.run(["tar", "-cf", "set.tar", "-C", "images", "."], check=True)
    with fsspec.open("memory://own-images/set.tar", "wb") as file:
        file.write(Path("set.tar").read_bytes())
    data(["index", "memory://own-images/set.tar"])
    expected = values("--data-root", "images")
    for root in ("hf:split", "memory://own-images/set.tar"):
        assert values("--data-root", root) == expected
        assert choices_table(recommend(12)) == describe_dataset(root)[-1]
