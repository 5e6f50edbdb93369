"""Image sources: conversions that are killed or run out of disk space, all kinds, corrupt files."""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from densecl.augment import AugmentConfig, TwoViews
from densecl.config import Config
from densecl.data import sources
from densecl.data.dataset import BatchSampler, open_source
from densecl.data.lmdb import verify_lmdb
from densecl.data.sources import PackedStrings, cache_path, folder_source, list_images
from densecl.runtime.io import UsageError
from tiny import TINY

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real images of ../shared/data are not here"
)
REAL = {
    "imagenet": "imagenet-samples/train",
    "coco": "coco-mini/train2017",
    "voc": "voc2012-mini/VOCdevkit/VOC2012/JPEGImages",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Each test has a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def start(*argv, code=None, **options):
    """Start `python -m densecl.data`, or a few lines of Python, as a process."""
    call = [sys.executable, "-c", code] if code else [sys.executable, "-m", "densecl.data"]
    return subprocess.Popen(
        [*call, *map(str, argv)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def data(*argv, **options):
    """Run `python -m densecl.data`: (status, stdout, lines of stderr that are no progress bar)."""
    process = start(*argv, **options)
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    return process.returncode, out.strip(), [line for line in lines if "images/s" not in line]


def read_all(source):
    return [source.read(i) for i in range(len(source))]


def write_shards(source, folder, size):
    """Write a source as tar archives of `size` images each, in its order."""
    folder.mkdir()
    for first in range(0, len(source), size):
        with tarfile.open(folder / f"set-{first // size:06d}.tar", "w") as tar:
            for i in range(first, min(first + size, len(source))):
                raw, info = source.read(i), tarfile.TarInfo(source.name(i))
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return folder


# A conversion with small transactions, each reported on stdout, and slow images, so that a kill
# may hit any of its steps.
SLOW = """
import sys, time
from densecl.data import __main__ as command
from densecl.data import convert
from densecl.runtime.io import run_command

write_records = convert.write_records
encode, add = convert.RecordEncoder.__call__, convert.UnfinishedDatabase.add


def reporting_add(self, records, **progress):
    add(self, records, **progress)
    print("written", flush=True)


def slow_encode(self, index):
    time.sleep(0.004)
    return encode(self, index)


convert.UnfinishedDatabase.add = reporting_add
convert.write_records = lambda *args: write_records(*args, transaction_bytes=20_000)
convert.RecordEncoder.__call__ = slow_encode
print("begun", flush=True)
run_command(command.main, sys.argv[1:])
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_conversion_resumes_and_its_file_is_never_incomplete(
    workers, tmp_path, make_images
):
    make_images(tmp_path / "old", 3)
    make_images(tmp_path / "set", 120)
    out = tmp_path / "set.lmdb"
    convert = ["lmdb", tmp_path / "set", out, "--workers", workers]
    assert data("lmdb", tmp_path / "old", out)[0] == 0
    rng = random.Random(workers)
    unfinished = tmp_path / "set.lmdb.unfinished" / "pictures"
    resumed = 0
    for _ in range(8):
        resumes = unfinished.exists()
        process = start(*convert, code=SLOW, cwd=tmp_path)
        for _ in range(rng.randint(2, 5)):
            process.stdout.readline()  # "begun", and one to four transactions
        time.sleep(rng.uniform(0, 0.03))  # somewhere in the next one
        process.kill()
        assert ("resuming" in process.communicate()[1]) == resumes
        resumed += resumes
        # the old database or the new one, never a part of it
        assert data("verify", out)[:2] in ((0, "3 images, complete"), (0, "120 images, complete"))
        if unfinished.exists():  # without its end mark it is incomplete, whatever it contains
            status, text, err = data("verify", unfinished)
            assert (status == 2 and text == "" and len(err) == 1) or text == "120 images, complete"
    assert resumed >= 4
    assert data(*convert)[0] == 0
    assert data("verify", out) == (0, "120 images, complete", [])
    assert read_all(open_source(out)) == read_all(folder_source(tmp_path / "set"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "set", "set.lmdb"]


def is_alive(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found through /proc")
def test_workers_do_not_outlive_a_killed_conversion(tmp_path, make_images):
    make_images(tmp_path / "set", 200)
    process = start("lmdb", tmp_path / "set", tmp_path / "x.lmdb", "--workers", 2, code=SLOW)
    assert process.stdout.readline() == "begun\n"
    children, end = [], time.monotonic() + 60
    while len(children) < 2 and time.monotonic() < end:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    while any(map(is_alive, children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(children) == 2 and not any(map(is_alive, children))


def test_an_interrupt_is_one_line(tmp_path, make_images):
    make_images(tmp_path / "set", 200)
    process = start("lmdb", tmp_path / "set", tmp_path / "x.lmdb", code=SLOW)
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 1 and "interrupted" in err and "Traceback" not in err


def limited(size):
    """Limit the files of a process to `size` bytes; as on a full disk, writing more is an error."""

    def set_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return set_limit


@pytest.mark.parametrize("size", [0, 100, 5_000, 70_000, 200_000])
def test_a_full_disk_is_one_line_and_the_old_database_stays(size, tmp_path, make_images):
    make_images(tmp_path / "old", 3)
    make_images(tmp_path / "set", 60)
    out = tmp_path / "set.lmdb"
    assert data("lmdb", tmp_path / "old", out)[0] == 0
    before = out.read_bytes()
    status, text, err = data("lmdb", tmp_path / "set", out, preexec_fn=limited(size))
    assert (status, text, len(err)) == (1, "", 1)
    assert err[0].startswith("densecl: ") and str(out) in err[0] and "disk full" in err[0]
    assert out.read_bytes() == before and verify_lmdb(out) == 3
    assert data("lmdb", tmp_path / "set", out)[0] == 0  # with enough space
    assert data("verify", out) == (0, "60 images, complete", [])


def test_a_full_disk_in_the_middle_keeps_what_was_written(tmp_path, make_images):
    make_images(tmp_path / "set", 100)
    out = tmp_path / "set.lmdb"
    process = start("lmdb", tmp_path / "set", out, code=SLOW, preexec_fn=limited(150_000))
    assert process.wait() == 1 and not out.exists()
    assert process.stderr.read().count("densecl: ") == 1
    status, _, err = data("verify", out)
    assert status == 2 and "unfinished" in err[0]
    status, _, err = data("lmdb", tmp_path / "set", out)
    assert status == 0 and any("resuming at image" in line for line in err)
    assert read_all(open_source(out)) == read_all(folder_source(tmp_path / "set"))


def write_all_forms(root, folder, shard_size):
    """Paths of the same images as a folder, one file, and tar archives."""
    source = folder_source(root)
    path = folder / "set.lmdb"
    status, text, err = data("lmdb", root, path)
    assert status == 0 and f"{len(source)} images" in text, err
    assert data("verify", path) == (0, f"{len(source)} images, complete", [])
    return [root, path, write_shards(source, folder / "shards", shard_size)]


def assert_same_views(opened, positions):
    """All sources contain the same bytes, and training uses the same views of them."""
    expected = opened[0]
    expected_views = TwoViews(expected, AugmentConfig(size=64), seed=3)
    for source in opened[1:]:
        assert read_all(source) == read_all(expected)
        views = TwoViews(source, AugmentConfig(size=64), seed=3)
        for position in positions:
            key = (1, position, position % len(source))
            a, b = expected_views.at(*key), views.at(*key)
            for name in ("im_q", "im_k", "affine_q", "affine_k"):
                assert torch.equal(a[name], b[name])


def test_folder_lmdb_and_shards_contain_the_same_images(tmp_path, make_images):
    make_images(tmp_path / "set", 20)
    make_images(tmp_path / "set/deeper/Zoë 1", 7)
    paths = write_all_forms(tmp_path / "set", tmp_path, shard_size=6)
    assert_same_views(list(map(open_source, paths)), range(0, 54, 5))


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_real_images_are_the_same_in_all_forms(name, tmp_path):
    paths = write_all_forms(SHARED / REAL[name], tmp_path, shard_size=77)
    assert_same_views(list(map(open_source, paths)), range(0, 200, 40))


@needs_shared
@pytest.mark.parametrize(
    "root, words",
    [
        ("imagenet-samples", ["ImageNet", "1,000 classes", "1,000 of 1,281,167"]),
        ("coco-mini", ["COCO", "100 of 118,287", "100 of 5,000"]),
        ("voc2012-mini", ["PASCAL VOC", "800 of 17,125", "missing"]),
        ("imagenet-fullres", ["folder of images: 100"]),
    ],
)
def test_check_describes_the_real_datasets(root, words):
    status, text, err = data("check", SHARED / root)
    assert status == 0 and err == []
    for word in [*words, "densecl train own", "--data-root"]:
        assert word in text, word


def losses_of_a_run(root, out):
    from densecl.trainer import train

    config = replace(
        TINY, data_root=str(root), epochs=1, momentum=Config.momentum, device="cpu", out=str(out)
    )
    train(config)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_training_is_the_same_on_all_forms(tmp_path, make_images):
    make_images(tmp_path / "set", 16)
    paths = write_all_forms(tmp_path / "set", tmp_path, shard_size=5)
    folder, lmdb, shards = (losses_of_a_run(p, tmp_path / f"{p.name} run") for p in paths)
    assert len(folder) == 4 and folder == lmdb == shards


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_of_both_kinds_read_databases_and_shards(start_method, tmp_path, make_images):
    make_images(tmp_path / "set", 12)
    for path in write_all_forms(tmp_path / "set", tmp_path, shard_size=5)[1:]:
        views = TwoViews(open_source(path), AugmentConfig(size=32), seed=0)
        expected = [views[i]["im_q"] for i in range(12)]  # now it is open in this process, too
        loader = DataLoader(
            views,
            batch_size=None,
            num_workers=1 if start_method == "spawn" else 2,
            multiprocessing_context=start_method,
        )
        assert all(torch.equal(a["im_q"], b) for a, b in zip(loader, expected, strict=True))


def test_every_rank_has_its_part_of_every_step_with_fewer_shards_than_ranks(tmp_path, make_images):
    source = folder_source(make_images(tmp_path / "set", 32))
    shards = open_source(write_shards(source, tmp_path / "shards", 20))  # 2 shards, 8 ranks
    parts = []
    for rank in range(8):
        sampler = BatchSampler(len(shards), 16, 0, 0, 2, rank, world_size=8)
        parts.append([index for batch in sampler for _, _, index in batch])
    assert all(len(part) == 4 for part in parts)
    assert sorted(index for part in parts for index in part) == list(range(32))


def test_shards_of_the_webdataset_library_are_read_like_the_library_does(tmp_path, make_images):
    webdataset = pytest.importorskip("webdataset")
    source = folder_source(make_images(tmp_path / "set", 10))
    (tmp_path / "shards").mkdir()
    pattern = str(tmp_path / "shards/set-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"{i:06d}", "png": source.read(i), "cls": str(i % 3)})
    span = tmp_path / "shards/set-{000000..000002}.tar"
    ours = open_source(span)
    theirs = list(webdataset.WebDataset(str(span), shardshuffle=False))
    assert [sample["png"] for sample in theirs] == read_all(ours) == read_all(source)
    names = [ours.name(i).split("/")[1] for i in range(10)]
    assert [sample["__key__"] + ".png" for sample in theirs] == names
    assert [sample["cls"].decode() for sample in theirs] == [ours.label(i) for i in range(10)]


@pytest.fixture
def corrupt_folder(tmp_path, make_images):
    """Six images and all kinds of other files; the names of unreadable ones begin with `bad`."""
    root = make_images(tmp_path / "set", 6)
    png = (root / "image-00.png").read_bytes()
    jpeg = io.BytesIO()
    Image.new("CMYK", (300, 200)).save(jpeg, "JPEG")
    files = {
        "bad empty.jpg": b"",
        "bad page.jpg": b"<!DOCTYPE html>",
        "bad half.jpg": jpeg.getvalue()[:900],
        "bad half.png": png[: len(png) // 2],
        "png inside.jpg": png,
        "cmyk inside.png": jpeg.getvalue(),
        "n" * 236 + ".png": png,
        "雪 Zoë\n2.png": png,
        ".hidden.png": b"",
        "notes.txt": b"not an image",
    }
    for name, raw in files.items():
        (root / name).write_bytes(raw)
    (root / os.fsdecode(b"latin \xe9.png")).write_bytes(png)
    Image.new("1", (9000, 9000)).save(root / "bad bomb.png")
    (root / "bad dangling.jpg").symlink_to("nowhere.jpg")
    (root / "bad circular.jpg").symlink_to("bad circular.jpg")
    (root / "bad folder.jpg").mkdir()
    (root / "loop").symlink_to(root, target_is_directory=True)
    os.mkfifo(root / "bad pipe.jpg")
    return root


def test_corrupt_files_are_left_out_of_a_conversion_and_reported_once(corrupt_folder, tmp_path):
    status, text, err = data("lmdb", corrupt_folder, tmp_path / "x.lmdb")
    assert status == 0 and "11 images, 8 of 19 left out" in text
    assert len(err) == 8 and all(line.startswith("left out: bad ") for line in err)
    assert data("verify", tmp_path / "x.lmdb") == (0, "11 images, complete", [])
    source = open_source(tmp_path / "x.lmdb")
    assert os.fsdecode(b"latin \xe9.png") in [source.name(i) for i in range(11)]
    assert all(source.load(i).mode == "RGB" for i in range(11))


def test_corrupt_files_are_replaced_in_training(corrupt_folder):
    source = folder_source(corrupt_folder)
    views, corrupt = TwoViews(source, AugmentConfig(size=32), seed=0), set()
    for i in range(len(source)):
        sample = views.at(0, i, i)
        assert sample["im_q"].shape == (3, 32, 32)
        assert bool(sample["bad"]) == source.name(i).startswith("bad ")
        for index, text in sample["bad"]:
            assert "\n" not in text and text.startswith("bad ")
            assert source.name(index).startswith("bad ")
            corrupt.add(index)
    assert len(corrupt) == 8


WRITE_LARGE = """
import sys
from PIL import Image
Image.MAX_IMAGE_PIXELS = None
mode, width, height, kind = sys.argv[2:]
options = {"progressive": True} if kind == "JPEG" else {}
Image.new(mode, (int(width), int(height))).save(sys.argv[1], kind, **options)
"""
# On Linux ru_maxrss would count the memory of the parent process, too.
DECODE_AND_MEASURE = """
import resource, sys
from densecl.data.decode import CorruptImageError, decode_image
try:
    decode_image(open(sys.argv[1], "rb").read(), "x")
except CorruptImageError as e:
    print(e)
if sys.platform == "darwin":
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
else:
    (peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print(1024 * int(peak.split()[1]))
"""


@pytest.mark.parametrize(
    "image",
    ["RGBA 8192 8192 PNG", "RGB 8192 4096 WEBP", "CMYK 8192 8192 JPEG", "1 30000 30000 PNG"],
)
def test_the_largest_image_takes_less_than_a_gigabyte(image, tmp_path):
    assert start(tmp_path / "x", *image.split(), code=WRITE_LARGE).wait() == 0
    out, err = start(tmp_path / "x", code=DECODE_AND_MEASURE).communicate()
    assert int(out.split()[-1]) < 10**9, err
    assert "30000" not in image or "more than" in out or "Bomb" in out


def test_a_large_folder_is_searched_once(tmp_path, monkeypatch):
    root = tmp_path / "set"
    for name in ("a", "b/c"):
        (root / name).mkdir(parents=True)
        for i in range(5_001):
            (root / name / f"{i}.jpg").touch()
    for name in ("", "a", "b", "b/c"):
        os.utime(root / name, (time.time() - 60,) * 2)
    names, searched, scan_folder = list(list_images(str(root))), [], sources.scan_folder

    def recording_scan(folder, is_excluded):
        searched.append(folder)
        return scan_folder(folder, is_excluded)

    monkeypatch.setattr(sources, "scan_folder", recording_scan)
    assert list(list_images(str(root))) == names and not searched
    (root / "b/c/new.jpg").touch()
    assert len(list_images(str(root))) == 10_003 and len(searched) == 1
    os.utime(root / "b/c", (time.time() - 50,) * 2)
    list_images(str(root))
    searched.clear()
    cache = cache_path("folder2", root)
    complete = cache.read_bytes()
    for damaged in (complete[: len(complete) // 2], b"", os.urandom(1000)):
        cache.write_bytes(damaged)
        assert len(list_images(str(root))) == 10_003
    assert len(searched) == 3 and cache.read_bytes()[:2] == b"PK"  # written again each time


def test_workers_do_not_copy_the_names():
    names = PackedStrings.pack(f"{i:09d}.jpg" for i in range(200_000))
    assert isinstance(names.text, np.ndarray) and isinstance(names.ends, np.ndarray)
    assert vars(names).keys() == {"text", "ends"}


@pytest.mark.parametrize(
    "name, raw, words",
    [
        ("x.lmdb", b"", ["not an LMDB", "empty"]),
        ("x.lmdb", b"<html>" + bytes(9000), ["not an LMDB", "<html>"]),
        ("x.tar", b"\x1f\x8b" + bytes(99), ["not a complete tar", "x.tar"]),
    ],
)
def test_an_invalid_file_is_rejected_by_its_name(name, raw, words, tmp_path):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UsageError) as error:
        open_source(tmp_path / name)
    for word in [*words, "--data-root"]:
        assert word in str(error.value)


@pytest.mark.parametrize("is_folder", [False, True])
def test_the_authors_pyarrow_database_is_rejected_with_its_reason(is_folder, tmp_path):
    path = tmp_path / "theirs.lmdb"
    with (
        lmdb.open(str(path), subdir=is_folder, map_size=2**20) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key in (b"0", b"1", b"__len__", b"__keys__"):
            transaction.put(key, b"\xff\xff\xff\xff arrow")
    for call in (("verify", path), ("check", path), ("lmdb", path, tmp_path / "new.lmdb")):
        status, text, err = data(*call)
        assert (status, text, len(err)) == (2, "", 1)
        assert "pyarrow" in err[0] and "densecl data lmdb" in err[0]
    assert not (tmp_path / "new.lmdb").exists()
