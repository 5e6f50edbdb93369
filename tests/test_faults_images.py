"""Image datasets with surprises: tones that get lost, unreadable folders, masks, reserved words."""

import io
import os
import shutil
import tarfile
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densecl.config import Config, presets
from densecl.data import __main__ as data_command
from densecl.data.dataset import image_hints, open_source, past_image_hints
from densecl.data.decode import CorruptImageError, decode_image
from densecl.data.sources import folder_source
from densecl.runtime.io import UsageError
from densecl.train import main as train

SHARED = Path(__file__).parents[2] / "shared" / "data"
RAMP = np.linspace(0, 1, 4096).reshape(64, 64)  # 4096 levels from black to white


def as_bytes(values, kind="TIFF", **options):
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **options)
    return file.getvalue()


def unsigned_32_bit_tiff():
    """Pillow writes only signed ones."""
    file = io.BytesIO()
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(file, np.round(RAMP * (2**32 - 1)).astype(np.uint32))
    return file.getvalue()


TONES = {
    "float 0..1": lambda: as_bytes(RAMP.astype(np.float32)),
    "float 0..255": lambda: as_bytes((RAMP * 255).astype(np.float32)),
    "float -1..1": lambda: as_bytes((2 * RAMP - 1).astype(np.float32)),
    "float with a missing value": lambda: as_bytes(
        np.where(RAMP == 0, np.nan, RAMP).astype(np.float32)
    ),
    "float, a portable map": lambda: as_bytes(RAMP.astype(np.float32), "PPM"),
    "10 bits in 16": lambda: as_bytes((RAMP * 1023).astype(np.uint16), "PNG"),
    "12 bits in 16": lambda: as_bytes((RAMP * 4095).astype(np.uint16), "PNG"),
    "12 bits in 16, big endian": lambda: as_bytes((RAMP * 4095).astype(">u2")),
    "16 bits": lambda: as_bytes((RAMP * 65535).astype(np.uint16), "PNG"),
    "a narrow range of 16 bits": lambda: as_bytes((30000 + RAMP * 1023).astype(np.uint16), "PNG"),
    "signed": lambda: as_bytes((RAMP * 4095 - 2048).astype(np.int32)),
    "32 bits": lambda: as_bytes((RAMP * (2**31 - 1)).astype(np.int32)),
    "unsigned 32 bits": unsigned_32_bit_tiff,
}


@pytest.mark.parametrize("kind", TONES)
def test_a_ramp_keeps_its_tones_in_every_number_format(kind):
    gray = np.asarray(decode_image(TONES[kind]()))[..., 0].astype(int)
    assert len(np.unique(gray)) > 200, np.unique(gray)
    assert gray.max() > 250 and gray.min() < 5
    assert (np.diff(gray.ravel()) >= 0).all()  # from black to white, without a wrap


@pytest.mark.parametrize("level, expected", [(0, 0), (128 * 257, 128), (65535, 255)])
def test_an_image_of_one_tone_keeps_it(level, expected):
    flat = np.full((8, 8), level, np.uint16)
    assert decode_image(as_bytes(flat, "PNG")).getpixel((0, 0)) == (expected,) * 3


def test_values_without_any_tone_are_corrupt():
    with pytest.raises(CorruptImageError, match="x.tif: .*no finite"):
        decode_image(as_bytes(np.full((8, 8), np.nan, np.float32)), "x.tif")


def color_16_bit(high):
    """A 16-bit RGB image whose values end at `high`, as OpenCV writes it."""
    cv2 = pytest.importorskip("cv2")
    values = np.round(RAMP[..., None] * [high, high, high]).astype(np.uint16)
    return cv2.imencode(".png", values)[1].tobytes()


def test_color_in_the_low_bits_of_16_is_corrupt_since_pillow_drops_them():
    assert decode_image(color_16_bit(65535)).getextrema() == ((0, 255),) * 3
    with pytest.raises(CorruptImageError, match="low.png: .*16 bits.*convert"):
        decode_image(color_16_bit(4095), "low.png")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def refused(main, *argv):
    """The one line of the error with which a command refuses its input; it writes nothing."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(UsageError) as error:
        main([str(argument) for argument in argv])
    assert error.value.status == 2 and sorted(Path().rglob("*")) == before
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000, text
    return text


def planned(capsys, *argv):
    """(plan, stderr) of a training that is not run."""
    model = ("--backbone", "resnet18-layer2", "--image-size", 32, "--batch-size", 4)
    train(["demo", *map(str, (*model, "--dry-run", *argv))])
    return capsys.readouterr()


@contextmanager
def without_privileges():
    """Permissions do not hold for root, so a test that runs as root becomes another user."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def readable_folder(make_images):
    """Images and a subfolder `secret`, where another user may look (not so in `tmp_path`)."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        make_images(Path(name, "set"), 8)
        make_images(Path(name, "set/secret"), 5)
        yield Path(name, "set")


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_subfolder_that_cannot_be_read_is_named(mode, readable_folder):
    (readable_folder / "secret/deeper").mkdir()
    (readable_folder / "secret").chmod(mode)
    with without_privileges():
        for call in (
            (train, "demo", "--data-root", readable_folder),
            (data_command.main, "check", readable_folder),
            (data_command.main, "lmdb", readable_folder, "x.lmdb"),
        ):
            text = refused(*call)
            assert "secret" in text and "Permission denied" in text and "--exclude" in text
        assert len(open_source(readable_folder, exclude="secret")) == 8


def test_a_root_that_cannot_be_read_is_not_called_empty(readable_folder):
    readable_folder.chmod(0o000)
    with without_privileges():
        for path in (readable_folder, readable_folder / "secret", readable_folder / "x.lmdb"):
            text = refused(data_command.main, "check", path)
            assert "Permission denied" in text and "empty" not in text and "no images" not in text
    readable_folder.chmod(0o755)


def test_a_list_and_a_tar_that_cannot_be_read_are_not_called_damaged(readable_folder):
    for name in ("list.txt", "set.json", "set.tar"):
        path = readable_folder.parent / name
        path.write_bytes(b"")
        path.chmod(0o000)
        with without_privileges():
            text = refused(data_command.main, "check", path)
        assert "Permission denied" in text and "tar archive" not in text, text


def test_a_folder_that_is_removed_during_the_scan_is_named(make_images, monkeypatch):
    make_images(Path("set/a"), 3)
    make_images(Path("set/b"), 3)
    scandir = os.scandir

    def remove_b(path):
        if str(path).endswith("/a"):
            shutil.rmtree("set/b")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", remove_b)
    with pytest.raises(UsageError, match="set/b cannot be read .No such file"):
        open_source("set")


CLASSES = np.arange(40 * 60).reshape(40, 60) // 240  # a mask of ten classes


def save_mask(path, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(CLASSES.astype(np.uint8))
    if mode == "P":
        mask.putpalette(list(range(256)) * 3)
    mask.convert(mode).save(path)


def masks_in_a_folder(make_images):
    """As CamVid."""
    make_images(Path("set/train"), 20)
    for i in range(20):
        save_mask(Path(f"set/trainannot/image-{i:02d}.png"))
    return "set", "trainannot"


def masks_beside_the_images(make_images):
    make_images(Path("set"), 20)
    for i in range(20):
        save_mask(Path(f"set/image-{i:02d}_lbl.png"), "P")
    return "set", "'*lbl.png'"


def color_masks_of_many_cities(make_images):
    """As Cityscapes, with a subfolder per city."""
    for city in "abcdefghij":
        make_images(Path(f"set/images/train/{city}"), 2)
        for i in range(2):
            save_mask(Path(f"set/gtFine/train/{city}/{city}_{i:06d}_color.png"), "RGB")
    return "set", "gtFine/train"


def masks_in_shards(make_images):
    """As WebDataset: a sample has the keys png and seg.png."""
    images = make_images(Path("images"), 20)
    Path("set").mkdir()
    with tarfile.open("set/set-000000.tar", "w") as tar:
        for i in range(20):
            save_mask(Path(f"masks/{i:06d}.seg.png"))
            tar.add(images / f"image-{i:02d}.png", f"{i:06d}.png")
            tar.add(f"masks/{i:06d}.seg.png", f"{i:06d}.seg.png")
    return "set", "'*seg.png'"


MASKS = [masks_in_a_folder, masks_beside_the_images, color_masks_of_many_cities, masks_in_shards]


@pytest.mark.parametrize("write", MASKS, ids=lambda function: function.__name__)
def test_masks_among_the_images_are_reported_and_can_be_excluded(write, make_images, capsys):
    root, pattern = write(make_images)
    err = planned(capsys, "--data-root", root).err
    data_command.main(["check", root])
    out = capsys.readouterr().out
    for text in (err, out):
        hints = [line for line in text.splitlines() if "label masks" in line]
        assert len(hints) == 1 and f"--exclude {pattern}" in hints[0], text
        assert "about 20 of 40 images" in hints[0]
    patterns = pattern.strip("'")
    assert hints == [f"hint: {hint}" for hint in past_image_hints(Config(data_root=root))]
    assert past_image_hints(Config(data_root=root, exclude=patterns)) == []
    data_command.main(["check", root, "--exclude", patterns])
    out = capsys.readouterr().out
    assert ": 20 images" in out and "label masks" not in out
    (command,) = [line for line in out.splitlines() if "densecl train own" in line]
    assert f"--exclude {pattern}" in command  # in the command for training, too
    plan = planned(capsys, "--data-root", root, "--exclude", patterns)
    assert "20 images" in plan.out and "label masks" not in plan.err
    data_command.main(["lmdb", root, "x.lmdb", "--exclude", patterns, "--workers", "0"])
    assert "label masks" not in capsys.readouterr().err
    names = [open_source("x.lmdb").name(i) for i in range(len(open_source("x.lmdb")))]
    assert len(names) == 20 and all("image-" in n or n.count(".") == 2 for n in names)


def test_a_key_selects_the_images_of_shards(make_images):
    root, _ = masks_in_shards(make_images)
    for options in ({"include": "png"}, {"exclude": "seg.png"}):
        assert len(open_source(root, **options)) == 20
    assert "of the 40 images" in refused(train, "demo", "--data-root", root, "--include", "jpg")


def test_of_a_tree_like_voc_only_the_photographs_are_used(make_images, capsys):
    make_images(Path("set/own/JPEGImages"), 8)
    for i in range(8):
        save_mask(Path(f"set/own/SegmentationClass/image-{i:02d}.png"), "P")
    assert len(open_source("set")) == len(open_source("set/own")) == 8
    data_command.main(["check", "set"])
    out = capsys.readouterr().out
    assert "8 images" in out and "JPEGImages" in out and "label masks" not in out
    assert len(open_source("set/own/SegmentationClass")) == 8  # if it is what you want


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images of ../shared/data are not here")
def test_photographs_are_not_taken_for_masks():
    for name in ("imagenet-samples", "imagenet-fullres", "coco-mini/train2017", "voc2012-mini"):
        hints = image_hints(open_source(SHARED / name))
        assert not [hint for hint in hints if "masks" in hint], hints
    (hint,) = image_hints(open_source(SHARED / "coco-mini"))
    assert "--exclude annotations" in hint


def test_an_image_with_a_handful_of_tones_is_reported(make_images, capsys):
    make_images(Path("set"), 8)
    for i in range(8):
        dark = np.random.default_rng(i).integers(0, 15, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(dark).save(f"set/dark_{i}.png")
    data_command.main(["check", "set"])
    assert "8 of 16 images" in capsys.readouterr().out


def test_a_link_in_a_circle_does_not_end_the_check(make_images, capsys):
    make_images(Path("set/train/n01440764"), 6)
    Path("set/train/circle").symlink_to("circle")
    data_command.main(["check", "set"])
    assert "6 images" in capsys.readouterr().out


def test_a_single_black_image_is_no_mask(make_images):
    make_images(Path("set"), 12)
    Image.new("RGB", (64, 48)).save("set/black.png")
    assert image_hints(open_source("set")) == []


def test_links_that_lead_nowhere_are_counted(make_images, capsys):
    make_images(Path("set"), 6)
    Path("set/part 2").symlink_to("/not mounted/images", target_is_directory=True)
    Path("set/circle").symlink_to("circle")
    Path("set/back").symlink_to("../set", target_is_directory=True)
    assert len(open_source("set")) == 6
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "2 broken links" in err and ("part 2" in err or "circle" in err)


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.json", "pipe.tar", "pipe.lmdb", "pipe"])
def test_a_pipe_is_refused_instead_of_waiting_for_it(name, make_images):
    os.mkfifo(name)
    make_images(Path("set"), 4)
    for call in (
        (train, "demo", "--data-root", name),
        (data_command.main, "check", name),
        (data_command.main, "lmdb", name, "x.lmdb"),
    ):
        assert "neither a file nor a folder" in refused(*call)
    if name.endswith(".lmdb"):
        assert "neither" in refused(data_command.main, "verify", name)
        assert name in refused(data_command.main, "lmdb", "set", name)


@pytest.mark.parametrize("name", ["n" * 300, "deep/" * 1000 + "x.lmdb", "n" * 300 + ".tar"])
def test_a_name_that_is_too_long_is_one_line(name, make_images):
    make_images(Path("set"), 4)
    for call in (
        (train, "demo", "--data-root", name),
        (data_command.main, "check", name),
        (data_command.main, "verify", name),
        (data_command.main, "lmdb", name, "x.lmdb"),
        (data_command.main, "lmdb", "set", name),
        (data_command.main, "lmdb", "set", "x" * 245 + ".lmdb"),
    ):
        refused(*call)


def test_a_range_without_end_is_refused():
    text = refused(data_command.main, "check", "set-{000000..999999999999}.tar")
    assert "range of more than" in text


def test_the_scan_of_a_slow_disk_shows_itself(make_images, monkeypatch, capsys):
    make_images(Path("set"), 4)
    scandir, shown = os.scandir, []

    def slow_scandir(path):
        end = time.monotonic() + 60  # a disk that answers only after something was shown
        while not "".join(shown).count("looking for images") and time.monotonic() < end:
            shown.append(capsys.readouterr().err)
            time.sleep(0.05)
        return scandir(path)

    monkeypatch.setattr("densecl.data.sources.os.scandir", slow_scandir)
    assert len(folder_source("set")) == 4
    assert "looking for images in set" in "".join(shown)


def test_the_word_photos_does_not_shadow_a_folder(make_images, capsys):
    assert presets["demo"].data_root == "builtin:photos"
    assert len(open_source("photos")) == len(open_source("builtin:photos")) == 540
    make_images(Path("photos"), 40)
    for call in (
        (train, "demo", "--data-root", "photos"),
        (train, "demo", "--probe-root", "photos"),
        (data_command.main, "check", "photos"),
        (data_command.main, "lmdb", "photos", "x.lmdb"),
    ):
        text = refused(*call)
        assert "./photos" in text and "builtin:photos" in text, text
    data_command.main(["check", "./photos"])
    assert "--data-root ./photos" in capsys.readouterr().out
    assert len(open_source("./photos")) == len(open_source(Path("photos"))) == 40
    plan = planned(capsys, "--data-root", "builtin:photos").out
    assert "540 images" in plan


def test_broken_images_are_reported_by_the_check(make_images, capsys):
    """Error pages of a web server, as in collections of downloaded images."""
    make_images(Path("set"), 7)
    for i in range(40):
        Path(f"set/x{i}.jpg").write_text("<html>404 Not Found")
    data_command.main(["check", "set"])
    (hint,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hint:")]
    count = int(hint.split()[2])
    assert 35 <= count <= 43 and f"about {count} of 47 images cannot be decoded" in hint
    assert "such as x" in hint and "densecl data lmdb" in hint
    assert image_hints(open_source("set", exclude="x*.jpg")) == []
