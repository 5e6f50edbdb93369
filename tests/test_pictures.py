"""Where pictures come from: the conversion to one file under kills and on a full disk, every source alike, rotten input."""
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
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from densecl import source as sources
from densecl.augment import Recipe, TwoViews
from densecl.data import Batches, open_source
from densecl.files import UsageError
from densecl.lmdbfile import verify
from densecl.source import Texts, cache_file, folder, indexed

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent/"shared"/"data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real pictures of ../shared/data are not here")
REAL = {"imagenet": "imagenet-samples/train", "coco": "coco-mini/train2017", "voc": "voc2012-mini/VOCdevkit/VOC2012/JPEGImages"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Each test has a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def start(*argv, code=None, **kw):
    """`python -m densecl.data` (or a few lines of Python) as a process that is left running."""
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    call = [sys.executable, "-c", code] if code else [sys.executable, "-m", "densecl.data"]
    return subprocess.Popen([*call, *map(str, argv)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def data(*argv, **kw):
    """The same, waited for: status, stdout, lines of stderr that are not progress."""
    process = start(*argv, **kw)
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, out.strip(), [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "pictures/s" not in line]


def pictures_of(opened): return [opened.read(i) for i in range(len(opened))]


def as_shards(opened, out, size):
    """A source as tar archives with `size` pictures each, in its order."""
    out.mkdir()
    for s in range(0, len(opened), size):
        with tarfile.open(out/f"set-{s//size:06d}.tar", "w") as tar:
            for i in range(s, min(s + size, len(opened))):
                raw, info = opened.read(i), tarfile.TarInfo(opened.name(i))
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return out


# A conversion with small transactions, each told on stdout, and slow pictures, so that a kill may fall anywhere in it.
SLOW = """
import sys, time
from densecl import convert, data
fill, prepare, add = convert.fill, convert.Prepare.__call__, convert.Unfinished.add
def told(self, records, **about):
    add(self, records, **about)
    print("written", flush=True)
convert.Unfinished.add = told
convert.fill = lambda *a: fill(*a, most=20_000)
def slowly(self, i):
    time.sleep(.004)
    return prepare(self, i)
convert.Prepare.__call__ = slowly
print("begun", flush=True)
data.run_main(data.main, sys.argv[1:])
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_conversion_is_never_taken_for_a_whole_one_and_goes_on(workers, tmp_path, make_pictures):
    make_pictures(tmp_path/"old", 3)
    make_pictures(tmp_path/"set", 120)
    out = tmp_path/"set.lmdb"
    assert data("lmdb", tmp_path/"old", out)[0] == 0
    moments, unfinished, begun = random.Random(workers), tmp_path/"set.lmdb.unfinished"/"pictures", 0
    for _ in range(8):
        goes_on = unfinished.exists()
        process = start("lmdb", tmp_path/"set", out, "--workers", workers, code=SLOW, cwd=tmp_path)
        for _ in range(moments.randint(2, 5)): process.stdout.readline()                       # "begun", and one to four transactions
        time.sleep(moments.uniform(0, .03))                                                   # somewhere in the next one
        process.kill()
        assert ("going on" in process.communicate()[1]) == goes_on
        begun += goes_on
        status, said, _ = data("verify", out)
        assert (status, said) in ((0, "3 pictures, whole"), (0, "120 pictures, whole"))        # the old one or the new one, never a part
        if unfinished.exists():                                                               # whatever it holds, it is not whole without its end mark
            status, said, err = data("verify", unfinished)
            assert status == 2 and said == "" and len(err) == 1 or said == "120 pictures, whole"
    assert begun >= 4
    assert data("lmdb", tmp_path/"set", out, "--workers", workers)[0] == 0
    assert data("verify", out) == (0, "120 pictures, whole", [])
    assert pictures_of(open_source(out)) == pictures_of(folder(tmp_path/"set"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "set", "set.lmdb"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found through /proc")
def test_workers_do_not_outlive_a_killed_conversion(tmp_path, make_pictures):
    make_pictures(tmp_path/"set", 200)
    process = start("lmdb", tmp_path/"set", tmp_path/"x.lmdb", "--workers", 2, code=SLOW)
    assert process.stdout.readline() == "begun\n"
    children, until = [], time.monotonic() + 60
    while len(children) < 2 and time.monotonic() < until: children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    alive = lambda pid: Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    while any(map(alive, children)) and time.monotonic() < until: time.sleep(.05)
    assert len(children) == 2 and not any(map(alive, children))


def test_an_interrupt_is_one_line(tmp_path, make_pictures):
    make_pictures(tmp_path/"set", 200)
    process = start("lmdb", tmp_path/"set", tmp_path/"x.lmdb", code=SLOW)
    assert process.stdout.readline() == "begun\n"
    time.sleep(.2)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 1 and "interrupted" in err and "Traceback" not in err


def limited(size):
    """Make a process that cannot write files of more than `size` bytes; as on a full disk, writing is an error and no signal."""
    def set_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return set_limit


@pytest.mark.parametrize("size", [0, 100, 5_000, 70_000, 200_000])
def test_a_full_disk_is_one_line_and_the_old_database_stays(size, tmp_path, make_pictures):
    make_pictures(tmp_path/"old", 3)
    make_pictures(tmp_path/"set", 60)
    out = tmp_path/"set.lmdb"
    assert data("lmdb", tmp_path/"old", out)[0] == 0
    before = out.read_bytes()
    status, said, err = data("lmdb", tmp_path/"set", out, preexec_fn=limited(size))
    assert status == 1 and said == ""
    assert len(err) == 1 and err[0].startswith("densecl: ") and str(out) in err[0] and "disk full" in err[0]
    assert out.read_bytes() == before and verify(out) == 3
    assert data("lmdb", tmp_path/"set", out)[0] == 0                                          # with room again
    assert data("verify", out) == (0, "60 pictures, whole", [])


def test_a_full_disk_in_the_middle_keeps_what_was_written(tmp_path, make_pictures):
    make_pictures(tmp_path/"set", 100)
    out = tmp_path/"set.lmdb"
    process = start("lmdb", tmp_path/"set", out, code=SLOW, preexec_fn=limited(150_000))
    assert process.wait() == 1 and not out.exists()
    assert process.stderr.read().count("densecl: ") == 1
    status, said, err = data("verify", out)
    assert status == 2 and "unfinished" in err[0]
    status, said, err = data("lmdb", tmp_path/"set", out)
    assert status == 0 and any("going on at picture" in line for line in err)
    assert pictures_of(open_source(out)) == pictures_of(folder(tmp_path/"set"))


def three_ways(root, place, shard):
    """The same pictures from a folder, one file, and tar archives."""
    found = folder(root)
    status, said, err = data("lmdb", root, place/"set.lmdb")
    assert status == 0 and f"{len(found)} pictures" in said, err
    assert data("verify", place/"set.lmdb") == (0, f"{len(found)} pictures, whole", [])
    return [open_source(p) for p in (root, place/"set.lmdb", as_shards(found, place/"shards", shard))]


def assert_same_views(opened, positions):
    """The pictures are the same bytes, and what training sees of them is the same."""
    first = TwoViews(opened[0], Recipe(size=64), seed=3)
    for other in opened[1:]:
        assert len(other) == len(opened[0])
        assert all(other.read(i) == opened[0].read(i) for i in range(len(other)))
        views = TwoViews(other, Recipe(size=64), seed=3)
        for p in positions:
            a, b = first.at(1, p, p % len(other)), views.at(1, p, p % len(other))
            assert all(torch.equal(a[k], b[k]) for k in ("im_q", "im_k", "affine_q", "affine_k"))


def test_folder_lmdb_and_shards_show_the_same_pictures(tmp_path, make_pictures):
    make_pictures(tmp_path/"set", 20)
    make_pictures(tmp_path/"set/deeper/Zoë 1", 7)
    assert_same_views(three_ways(tmp_path/"set", tmp_path, shard=6), range(0, 54, 5))


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_real_pictures_are_the_same_from_everywhere(name, tmp_path):
    assert_same_views(three_ways(SHARED/REAL[name], tmp_path, shard=77), range(0, 200, 40))


@needs_shared
@pytest.mark.parametrize("root, words", [("imagenet-samples", ["ImageNet", "1,000 classes", "1,000 of 1,281,167"]), ("coco-mini", ["COCO", "100 of 118,287", "100 of 5,000"]),
                                         ("voc2012-mini", ["PASCAL VOC", "800 of 17,125", "missing"]), ("imagenet-fullres", ["folder of pictures: 100"])])
def test_check_knows_the_real_sets(root, words):
    status, said, err = data("check", SHARED/root)
    assert status == 0 and err == []
    for word in [*words, "python -m densecl.train", "--data-root"]: assert word in said, word


def test_training_sees_the_same_from_everywhere(tmp_path, make_pictures):
    from densecl.config import Config
    from densecl.trainer import train
    make_pictures(tmp_path/"set", 16)
    losses = []
    for opened, root in zip(("folder", "lmdb", "shards"), [getattr(s, "path", s.root if hasattr(s, "root") else "") for s in three_ways(tmp_path/"set", tmp_path, shard=5)]):
        config = Config(data_root=str(root), backbone="resnet18-layer2", image_size=32, batch_size=4, queue_len=12, dim=8, hidden=16, workers=0, threads=1, epochs=1,
                        lr=.01, device="cpu", log_every=1, out=str(tmp_path/opened))
        train(config)
        losses.append([json.loads(line)["loss"] for line in (tmp_path/opened/"metrics.jsonl").read_text().splitlines()])
    assert len(losses[0]) == 4 and losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_of_either_kind_read_databases_and_shards(start_method, tmp_path, make_pictures):
    make_pictures(tmp_path/"set", 12)
    for opened in three_ways(tmp_path/"set", tmp_path, shard=5)[1:]:
        views = TwoViews(opened, Recipe(size=32), seed=0)
        expected = [views[i]["im_q"] for i in range(12)]                                      # now this process has it open, too
        loader = DataLoader(views, batch_size=None, num_workers=1 if start_method == "spawn" else 2, multiprocessing_context=start_method)
        assert all(torch.equal(a["im_q"], b) for a, b in zip(loader, expected, strict=True))


def test_every_rank_has_its_part_of_every_step_however_few_the_shards(tmp_path, make_pictures):
    make_pictures(tmp_path/"set", 32)
    opened = open_source(as_shards(folder(tmp_path/"set"), tmp_path/"shards", 20))            # 2 shards, 8 ranks
    parts = [[i for batch in Batches(len(opened), 16, 0, 0, 2, rank, world=8) for *_, i in batch] for rank in range(8)]
    assert all(len(p) == 4 for p in parts) and sorted(sum(parts, [])) == list(range(32))


def test_the_webdataset_library_and_we_read_the_same(tmp_path, make_pictures):
    wds = pytest.importorskip("webdataset")
    found = folder(make_pictures(tmp_path/"set", 10))
    (tmp_path/"shards").mkdir()
    with wds.ShardWriter(str(tmp_path/"shards/set-%06d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10): writer.write({"__key__": f"{i:06d}", "png": found.read(i), "cls": str(i % 3)})
    ours = open_source(tmp_path/"shards/set-{000000..000002}.tar")
    theirs = list(wds.WebDataset(str(tmp_path/"shards/set-{000000..000002}.tar"), shardshuffle=False))
    assert [s["png"] for s in theirs] == pictures_of(ours) == pictures_of(found)
    assert [s["__key__"] + ".png" for s in theirs] == [ours.name(i).split("/")[1] for i in range(10)]
    assert [s["cls"].decode() for s in theirs] == [ours.label(i) for i in range(10)]


@pytest.fixture
def rotten(tmp_path, make_pictures):
    """Six good pictures and everything that may lie beside them; what cannot be read begins with `bad`."""
    root = make_pictures(tmp_path/"set", 6)
    good = (root/"picture-00.png").read_bytes()
    jpeg = io.BytesIO()
    Image.new("CMYK", (300, 200)).save(jpeg, "JPEG")
    files = {"bad empty.jpg": b"", "bad page.jpg": b"<!DOCTYPE html>", "bad half.jpg": jpeg.getvalue()[:900], "bad half.png": good[:len(good)//2], "png inside.jpg": good,
             "cmyk inside.png": jpeg.getvalue(), "n"*236 + ".png": good, "雪 Zoë\n2.png": good, ".hidden.png": b"", "notes.txt": b"no picture"}
    for name, raw in files.items(): (root/name).write_bytes(raw)
    (root/os.fsdecode(b"latin \xe9.png")).write_bytes(good)
    Image.new("1", (9000, 9000)).save(root/"bad bomb.png")
    (root/"bad dangling.jpg").symlink_to("nowhere.jpg")
    (root/"bad round.jpg").symlink_to("bad round.jpg")
    (root/"bad folder.jpg").mkdir()
    (root/"loop").symlink_to(root, target_is_directory=True)
    os.mkfifo(root/"bad pipe.jpg")
    return root


def test_rotten_files_are_left_out_of_a_conversion_and_named_once(rotten, tmp_path):
    status, said, err = data("lmdb", rotten, tmp_path/"x.lmdb")
    assert status == 0 and "11 pictures, 8 of 19 left out" in said
    assert len(err) == 8 and all(line.startswith("left out: bad ") for line in err)
    assert data("verify", tmp_path/"x.lmdb") == (0, "11 pictures, whole", [])
    opened = open_source(tmp_path/"x.lmdb")
    assert os.fsdecode(b"latin \xe9.png") in [opened.name(i) for i in range(11)]
    assert all(opened.load(i).mode == "RGB" for i in range(11))


def test_rotten_files_are_replaced_in_training(rotten):
    opened = folder(rotten)
    views, seen = TwoViews(opened, Recipe(size=32), seed=0), set()
    for i in range(len(opened)):
        sample = views.at(0, i, i)
        assert sample["im_q"].shape == (3, 32, 32)
        assert bool(sample["bad"]) == opened.name(i).startswith("bad ")
        for number, text in sample["bad"]:
            assert "\n" not in text and text.startswith("bad ") and opened.name(number).startswith("bad ")
            seen.add(number)
    assert len(seen) == 8


@pytest.mark.parametrize("make", ["Image.new('RGBA', (8192, 8192)), 'PNG'", "Image.new('RGB', (8192, 4096)), 'WEBP'", "Image.new('CMYK', (8192, 8192)), 'JPEG', progressive=True",
                                  "Image.new('1', (30000, 30000)), 'PNG'"])
def test_the_largest_picture_takes_less_than_a_gigabyte(make, tmp_path):
    image, *how = make.rsplit("), '")
    write = f"import sys\nfrom PIL import Image\nImage.MAX_IMAGE_PIXELS = None\n{image}).save(sys.argv[1], '{how[0]})"
    assert start(tmp_path/"x", code=write).wait() == 0
    read = "import resource, sys\nfrom densecl.picture import *\ntry: decode(open(sys.argv[1], 'rb').read(), 'x')\nexcept BadPicture as e: print(e)\n" \
           "if sys.platform == 'darwin': print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n" \
           "else: print(1024*int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]))"   # ru_maxrss would count the parent's
    out, err = start(tmp_path/"x", code=read).communicate()
    assert int(out.split()[-1]) < 10**9, err
    assert "30000" not in make or "more than" in out or "Bomb" in out


def test_a_large_folder_is_looked_through_once(tmp_path, monkeypatch):
    for f in ("a", "b/c"):
        (tmp_path/"set"/f).mkdir(parents=True)
        for i in range(5_001): (tmp_path/f"set/{f}/{i}.jpg").touch()
    for f in ("", "a", "b", "b/c"): os.utime(tmp_path/"set"/f, (time.time() - 60,)*2)
    names, asked, scan = list(indexed(str(tmp_path/"set"))), [], sources.scan
    monkeypatch.setattr(sources, "scan", lambda root: asked.append(root) or scan(root))
    assert list(indexed(str(tmp_path/"set"))) == names and not asked
    (tmp_path/"set/b/c/new.jpg").touch()
    assert len(indexed(str(tmp_path/"set"))) == 10_003 and len(asked) == 1
    os.utime(tmp_path/"set/b/c", (time.time() - 50,)*2)
    indexed(str(tmp_path/"set"))
    file, asked[:] = cache_file("folder1", tmp_path/"set"), []
    whole = file.read_bytes()
    for damage in (whole[:len(whole)//2], b"", os.urandom(1000)):
        file.write_bytes(damage)
        assert len(indexed(str(tmp_path/"set"))) == 10_003
    assert len(asked) == 3 and file.read_bytes()[:2] == b"PK"                                 # rebuilt, and kept again


def test_workers_do_not_copy_the_names(tmp_path):
    names = Texts.pack(f"{i:09d}.jpg" for i in range(200_000))
    assert isinstance(names.text, np.ndarray) and isinstance(names.ends, np.ndarray) and vars(names).keys() == {"text", "ends"}


@pytest.mark.parametrize("name, raw, words", [
    ("x.lmdb", b"", ["not an LMDB", "empty"]), ("x.lmdb", b"<html>" + bytes(9000), ["not an LMDB", "<html>"]), ("x.tar", b"\x1f\x8b" + bytes(99), ["not a whole tar", "x.tar"])])
def test_what_is_no_set_is_refused_by_its_name(name, raw, words, tmp_path):
    (tmp_path/name).write_bytes(raw)
    with pytest.raises(UsageError) as e: open_source(tmp_path/name)
    for word in [*words, "--data-root"]: assert word in str(e.value)


@pytest.mark.parametrize("folder_of_it", [False, True])
def test_the_authors_pyarrow_database_is_refused_with_a_word(folder_of_it, tmp_path):
    import lmdb
    path = tmp_path/"theirs.lmdb"
    with lmdb.open(str(path), subdir=folder_of_it, map_size=2**20) as env, env.begin(write=True) as t:
        for k in (b"0", b"1", b"__len__", b"__keys__"): t.put(k, b"\xff\xff\xff\xff arrow")
    for call in (("verify", path), ("check", path), ("lmdb", path, tmp_path/"new.lmdb")):
        status, said, err = data(*call)
        assert status == 2 and said == "" and len(err) == 1 and "pyarrow" in err[0] and "densecl.data lmdb" in err[0]
    assert not (tmp_path/"new.lmdb").exists()
