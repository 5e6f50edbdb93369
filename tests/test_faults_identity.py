"""Which runs are the same: by the content of data and weights, on every rank, in every folder."""

import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.multiprocessing import spawn

from densecl.data.convert import convert_to_lmdb
from densecl.data.dataset import open_source
from densecl.runtime.io import run_command
from densecl.segment import __main__ as segment
from densecl.train import main

OPTIONS = shlex.split(
    "demo --data-root images --out out --backbone resnet18-layer2 --image-size 32 --batch-size 4 "
    "--queue-len 12 --dim 8 --hidden 16 --workers 0 --threads 1 --amp off --log-every 1 "
    "--lambda-warmup 0 --lr 0.0075 --no-channels-last --probe ''"
)
SEGMENT = shlex.split(
    "--weights random --backbone resnet18 --data-root A --out out --crop-size 32 --batch-size 4 "
    "--max-steps 1 --log-every 1 --workers 0 --threads 1 --device cpu"
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images(make_images):
    return make_images(Path("images"))


def call(command, *argv):
    """A command inside this process: exit status, stdout, stderr."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            run_command(command, [str(word) for word in argv])
        except SystemExit as e:
            status = e.code
    return status, out.getvalue(), err.getvalue()


def train(*argv):
    status, _, text = call(main, *OPTIONS, *argv)
    return status, text


def contents(folder):
    """Path -> (bytes, time of the last change) of all files of a folder."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def assert_refused(status, text, *words):
    (line,) = [line for line in text.splitlines() if line.startswith("densecl: ")]
    assert status == 2 and "Traceback" not in text, text
    for word in words:
        assert word in line, line


def remove_some(folder):
    for path in sorted(folder.iterdir())[:3]:
        path.unlink()


def rename_one(folder):
    path = min(folder.iterdir())
    path.rename(folder / f"new{path.suffix}")


def other_content(folder):
    for i, path in enumerate(sorted(folder.iterdir())):
        Image.new("RGB", (64, 48), (20 * i, 0, 90)).save(path)


@pytest.mark.parametrize(
    "change, words",
    [
        (remove_some, "12 images (now 9)"),
        (rename_one, "other names"),
        (other_content, "other images under the same names"),
    ],
)
def test_training_on_a_data_set_that_has_changed_is_refused(images, change, words):
    assert train("--max-steps", 1)[0] == 0
    before = contents("out")
    change(images)
    assert_refused(*train("--max-steps", 2), "--out out", words, "--resume never")
    assert contents("out") == before
    assert train("--max-steps", 1, "--resume", "never")[0] == 0


def test_training_continues_on_the_same_images_in_another_place(images):
    """A trailing slash, a copy, an LMDB of it, and an LMDB of smaller images."""
    assert train("--max-steps", 1)[0] == 0
    status, text = train("--max-steps", 2, "--data-root", "images/")
    assert (status, "data_root" in text) == (0, False), text
    shutil.copytree("images", "node/copy")
    convert_to_lmdb(open_source("images"), "images.lmdb")
    convert_to_lmdb(open_source("images"), "small.lmdb", short_side=40)
    for step, root in enumerate(("node/copy", "images.lmdb", "small.lmdb"), 3):
        status, text = train("--max-steps", step, "--data-root", root)
        assert status == 0 and f"resumed at step {step - 1}" in text, text
        assert f"(now {root}, the same 12 images)" in text
    lines = Path("out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_repaired_image_does_not_make_another_data_set(images):
    assert train("--max-steps", 1)[0] == 0
    max(images.iterdir()).write_bytes(b"no image")
    status, text = train("--max-steps", 2)
    assert status == 0 and "1 of the 12 compared images has changed" in text, text


def test_options_of_speed_may_change_with_a_line(images):
    changed = "--amp bf16 --augment reference --channels-last --loss reference --deterministic"
    slow = shlex.split(changed)
    assert train("--max-steps", 1)[0] == 0
    shutil.copy("out/last.pt", "kept.pt")
    status, text = train("--max-steps", 2, *slow)
    (line,) = [line for line in text.splitlines() if "amp off (now bf16)" in line]
    for words in ("augment fast (now reference)", "channels_last False (now True)", "loss "):
        assert words in line
    status, text = train("--max-steps", 2, "--resume", "kept.pt", "--out", "new", *slow)
    assert status == 0 and text.count("amp off (now bf16)") == 1, text
    status, text = train("--max-steps", 3, *slow)
    assert status == 0 and "(now" not in text
    assert train("--max-steps", 4)[0] == 0  # back
    words = ("queue_len 12 (now 24)", "temperature", "epochs 75 (now 80)")
    more = shlex.split("--queue-len 24 --temperature 0.3 --epochs 80 --amp bf16")
    assert_refused(*train("--max-steps", 5, *more), *words)
    assert_refused(*train("--max-steps", 5, "--resume", "kept.pt", *more), *words)


def test_the_memory_format_may_change_without_a_change_of_the_result(images):
    """The momentum is moved to the format of its parameter."""
    for out in ("out", "whole"):
        assert train("--max-steps", 2, "--out", out)[0] == 0
    assert train("--max-steps", 3, "--channels-last")[0] == 0
    assert train("--max-steps", 3, "--out", "whole")[0] == 0
    a, b = (torch.load(f"{out}/last.pt", weights_only=True)["model"] for out in ("out", "whole"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_an_old_checkpoint_without_a_fingerprint_continues_with_a_line(images):
    assert train("--max-steps", 1)[0] == 0
    saved = torch.load("out/last.pt", weights_only=True)
    del saved["data"]
    torch.save(saved, "out/last.pt")
    shutil.copytree("images", "copy")
    old = contents("out")
    assert_refused(
        *train("--max-steps", 2, "--data-root", "copy"), "without a fingerprint", "images"
    )
    assert contents("out") == old
    status, text = train("--max-steps", 2)
    assert status == 0 and text.count("no fingerprint") == 1, text
    assert "no fingerprint" not in train("--max-steps", 3)[1]


def test_a_finished_run_is_left_as_it_is(images):
    assert train("--max-steps", 2)[0] == 0
    before = contents("out")
    status, text = train("--max-steps", 2, "--log-every", 7, "--amp", "bf16", "--workers", 1)
    assert status == 0 and contents("out") == before
    (line,) = [line for line in text.splitlines() if "finished" in line]
    assert "step 2" in line and "--max-steps" in line and "--out" in line
    assert train("--max-steps", 1)[0] == 0 and contents("out") == before
    assert train("--max-steps", 2, "--resume", "out/last.pt", "--out", "new")[0] == 0
    assert not Path("new").exists()


def make_tree(root, seed, count=10, classes="ground one two"):
    """A data set in VOC's format; the last two images are the test set."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        mask = np.kron(rng.integers(0, 3, (3, 4)), np.ones((16, 16))).astype(np.uint8)  # 48 x 64
        image = np.stack([mask * 80, rng.integers(0, 256, mask.shape), 200 - mask], -1)
        Image.fromarray(image.astype(np.uint8)).save(root / f"JPEGImages/{i}.jpg")
        Image.fromarray(mask).save(root / f"SegmentationClass/{i}.png")
    (root / "classes.txt").write_text(classes.replace(" ", "\n"))
    for split, indices in {"train": range(count - 2), "val": range(count - 2, count)}.items():
        text = "\n".join(map(str, indices))
        (root / f"ImageSets/Segmentation/{split}.txt").write_text(text)
    return root


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A tree A, and a run folder with the scores of one trial on it."""
    folder = tmp_path_factory.mktemp("scored")
    make_tree(folder / "A", 0)
    words = [folder / word if word in ("A", "out") else word for word in SEGMENT]
    assert call(segment.main, *words)[0] == 0
    return folder


@pytest.fixture
def segmented(scored):
    shutil.copytree(scored, ".", dirs_exist_ok=True)
    return Path("A")


def edit_a_mask(root):
    Image.fromarray(np.ones((48, 64), np.uint8)).save(root / "SegmentationClass/9.png")


def other_images(root):
    shutil.rmtree(root)
    make_tree(root, 1)


def another_name(root):
    shutil.rmtree(root)
    make_tree(root, 0, count=12)


def other_classes(root):
    (root / "classes.txt").write_text("ground\ntwo\none")


@pytest.mark.parametrize("change", [edit_a_mask, other_images, another_name, other_classes])
def test_scores_of_other_data_are_never_reported(segmented, change):
    before = contents("out")
    shutil.copytree("A", "B")
    change(Path("B"))
    for more in ((), ("--trials", 2)):
        status, table, text = call(segment.main, *SEGMENT, "--data-root", "B", *more)
        assert_refused(status, text, "--out out", "other data", "give another --out")
        assert "finished before" not in text and not table
    assert contents("out") == before


def test_a_moved_tree_goes_on_and_finished_trials_leave_the_folder_as_it_is(segmented):
    shutil.move("A", "moved")
    before = contents("out")
    status, table, text = call(segment.main, *SEGMENT, "--data-root", "moved/")
    assert status == 0 and "finished before" in text and "mIoU" in table
    assert contents("out") == before
    status, table, text = call(segment.main, *SEGMENT, "--data-root", "moved", "--trials", 2)
    assert status == 0 and text.count("finished before") == 1, text
    two = contents("out")
    assert json.loads(Path("out/results.json").read_text())["trials"] == 2
    assert call(segment.main, *SEGMENT, "--data-root", "moved")[0] == 0  # one trial of the two
    assert contents("out") == two


def test_a_transfer_folder_without_a_fingerprint_continues_with_a_line(segmented):
    for path in ("out/config.json", "out/trial-0/result.json"):
        saved = json.loads(Path(path).read_text())
        del saved["data"]
        if "data_root" in saved:
            saved["data_root"] = "A"
        Path(path).write_text(json.dumps(saved))
    shutil.copytree("A", "B")
    status, _, text = call(segment.main, *SEGMENT, "--data-root", "B")
    assert_refused(status, text, "without a fingerprint")
    status, _, text = call(segment.main, *SEGMENT, "--trials", 2)
    assert status == 0 and text.count("no fingerprint") == 1, text
    assert call(segment.main, *SEGMENT, "--trials", 2)[2].count("no fingerprint") == 0


def test_a_trial_of_other_data_in_the_folder_is_refused(segmented):
    """As when trials are copied together from two machines."""
    path = Path("out/trial-0/result.json")
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"data": "0" * len(result["data"])}))
    status, _, text = call(segment.main, *SEGMENT, "--trials", 2)
    assert_refused(status, text, "trial-0", "other data")


def test_weights_that_were_replaced_under_the_same_path_are_refused(segmented):
    from torchvision.models import resnet18

    def save(seed):
        torch.manual_seed(seed)
        torch.save(resnet18().state_dict(), "w.pth")

    save(0)
    words = [*SEGMENT, "--out", "new", "--baselines", "w.pth"]
    assert call(segment.main, *words)[0] == 0
    save(1)
    before = contents("new")
    status, _, text = call(segment.main, *words, "--trials", 2)
    assert_refused(status, text, "w.pth", "other weights")
    assert contents("new") == before  # the first initialization was not trained, either


# --- several ranks ---


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_rank(rank, folder, jobs):
    """What each process does: every job in the current folder of its rank."""
    torch.set_num_threads(1)
    results = {}
    for name, (port, command, argv) in jobs.items():
        os.chdir(f"{folder}/{rank}/{name}")
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # two machines
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        results[name] = call({"train": main, "segment": segment.main}[command], *argv[rank])
    Path(f"{folder}/{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def two(tmp_path_factory, scored):
    """Name of a job -> the (exit status, stdout, stderr) of both ranks."""
    folder = tmp_path_factory.mktemp("two")
    argv = [*OPTIONS, "--max-steps", "2", "--timeout", "60"]
    lr = [*argv, "--lr", "0.5"]
    more = [*SEGMENT, "--trials", "2"]
    jobs = {
        "images": (free_port(), "train", (argv, argv)),
        "few": (free_port(), "train", (argv, argv)),
        "absent": (free_port(), "train", (argv, argv)),
        "options": (free_port(), "train", (argv, lr)),
        "trees": (free_port(), "segment", (SEGMENT, SEGMENT)),
        "folders": (free_port(), "segment", (more, more)),
    }
    counts = {"images": (12, 8), "few": (12, 2), "absent": (12, 0), "options": (12, 12)}
    for rank in range(2):
        for name in jobs:
            (folder / f"{rank}/{name}").mkdir(parents=True)
        for name, number in counts.items():
            images = folder / f"{rank}/{name}/images"
            images.mkdir()
            for i in range(number[rank]):
                Image.new("RGB", (64, 48), (20 * i, 90, 0)).save(images / f"{i:02}.png")
        shutil.copytree(scored / "A", folder / f"{rank}/folders/A")
        make_tree(folder / f"{rank}/trees/A", rank)
    shutil.copytree(scored / "out", folder / "0/folders/out")  # rank 1 has a disk of its own
    spawn(run_rank, (str(folder), jobs), nprocs=2)
    return {
        name: [json.loads((folder / f"{rank}.json").read_text())[name] for rank in range(2)]
        for name in jobs
    } | {"written": [path.name for path in folder.glob("*/*/out")]}


@pytest.mark.parametrize(
    "job, words",
    [
        ("images", ["12 images", "on rank 0", "8 images", "on rank 1", "--data-root"]),
        ("few", ["rank 1", "--batch-size 4: more than the 2 images"]),
        ("absent", ["images", "rank 1"]),
        ("options", ["lr 0.0075 on rank 0", "0.5 on rank 1"]),
        ("trees", ["data", "on rank 0", "on rank 1"]),
        ("folders", ["trial 0", "on rank 0", "on rank 1", "all machines share"]),
    ],
)
def test_ranks_that_differ_end_with_one_line_that_names_them(two, job, words):
    (first, _, text), (second, _, _) = two[job]
    assert (first, second) == (2, 2), two[job]
    assert_refused(first, text, *words)
    assert "trial 0" in words or "step" not in text.replace("each step", "")


def test_the_index_of_a_shard_is_not_that_of_another_one_of_the_same_size_and_time(monkeypatch):
    """As of archives that were made with a fixed modification time, or copied with it."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    for name in ("one", "two"):
        with tarfile.open(f"{name}.tar", "w") as tar:
            info = tarfile.TarInfo(f"{name}.jpg")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        os.utime(f"{name}.tar", (1, 1))
    os.rename("one.tar", "set.tar")
    assert open_source("set.tar").name(0) == "set.tar/one.jpg"
    os.replace("two.tar", "set.tar")
    assert open_source("set.tar").name(0) == "set.tar/two.jpg"


def start_segment(limit=""):
    """A transfer in a process of its own, `out`; `limit`: commands of the shell before it."""
    words = shlex.join([sys.executable, "-m", "densecl.segment", *map(str, SEGMENT)])
    words = f"{limit} exec {words} --max-steps 300 --save-every 20 --log-every 2"
    return subprocess.Popen(["sh", "-c", words], stderr=subprocess.PIPE, text=True)


def test_a_full_disk_ends_a_transfer_with_one_line():
    make_tree(Path("A"), 0)
    process = start_segment("ulimit -f 200;")
    text = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and "Traceback" not in text, text
    (line,) = [line for line in text.splitlines() if line.startswith("densecl: the disk is full")]
    assert "File too large" in line and "free some space" in line


def test_a_signal_ends_a_transfer_after_a_checkpoint():
    make_tree(Path("A"), 0)
    process = start_segment()
    end = time.monotonic() + 200
    while not Path("out/trial-0/metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.05)
    while not Path("out/trial-0/metrics.jsonl").read_text() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=100)[1]
    assert process.returncode == 75 and "Traceback" not in text, text
    step = torch.load("out/trial-0/last.pt", weights_only=True)["step"]
    assert f"stopped after step {step}" in text and step >= 2
