"""A machine that is small or odd: shared memory, limits, locks, encodings, left-over variables."""

import ast
import errno
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densecl.data.__main__ import main as data_main
from densecl.runtime import io
from densecl.runtime.io import run_command
from densecl.train import main as train_main

ROOT = Path(__file__).parents[1]
TINY = shlex.split(
    "--data-root images --backbone resnet18-layer2 --image-size 32 --batch-size 6 --queue-len 24 "
    "--lr 0.0075 --lambda-warmup 0 --dim 8 --hidden 16 --threads 1 --amp off --log-every 1 "
    "--max-steps 2 --device cpu --probe ''"
)
SMALL = shlex.split(
    "--data-root VOCdevkit --weights random --backbone resnet18 --batch-size 4 --max-steps 2 "
    "--threads 1 --device cpu"
)
TRAIN = ["densecl.train", "demo", *TINY]
SEGMENT = ["densecl.segment", *SMALL, "--crop-size", "64"]
DETECT = ["densecl.detect", *SMALL]
LMDB = ["densecl.data", "lmdb", "images", "images.lmdb"]
LONG_TEST = pytest.mark.long


@pytest.fixture
def place(tmp_path, monkeypatch, make_images):
    """The current folder: `images` has twelve, `VOCdevkit` eight with masks and boxes."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images")
    base = tmp_path / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "Annotations"):
        (base / name).mkdir(parents=True)
    box = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>60</xmax><ymax>50</ymax></bndbox>"
    text = f"<annotation><object><name>cat</name>{box}</object></annotation>"
    for i in range(8):
        Image.effect_noise((96, 80), 50).convert("RGB").save(base / f"JPEGImages/{i}.jpg")
        mask = np.full((80, 96), i % 3, np.uint8)
        Image.fromarray(mask).save(base / f"SegmentationClass/{i}.png")
        (base / f"Annotations/{i}.xml").write_text(text, encoding="utf-8")
    for folder in ("Segmentation", "Main"):
        (base / "ImageSets" / folder).mkdir(parents=True)
        for split, names in {"train": "0\n1\n2\n3\n4\n5\n", "val": "6\n7\n"}.items():
            (base / f"ImageSets/{folder}/{split}.txt").write_text(names, encoding="utf-8")
    return tmp_path


def start(words, before=(), **env):
    """A command in a process of its own: exit status, lines on stderr that are ours, its output."""
    done = subprocess.run(
        [*before, sys.executable, "-m", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=50,  # each of these once took a minute or never ended
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("densecl: ")]
    return done.returncode, lines, done.stdout


def call(capsys, main, *argv):
    """A command inside this process: exit status and what it wrote to stderr."""
    status = 0
    try:
        run_command(main, [str(word) for word in argv])
    except SystemExit as e:
        status = e.code
    return status, capsys.readouterr().err


def small_shared_memory(size):
    """A prefix that runs a command with a small /dev/shm."""
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    before = ["unshare", "-m", "sh", "-c", script, "sh"]
    if not shutil.which("unshare") or subprocess.run([*before, "true"], check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    return before


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(TRAIN, marks=LONG_TEST),
        pytest.param(SEGMENT, marks=LONG_TEST),
        pytest.param(DETECT, marks=LONG_TEST),
    ],
    ids=["train", "segment", "detect"],
)
def test_shared_memory_that_is_too_small_is_one_line_and_nothing_is_written(command, place):
    before = small_shared_memory("200k")
    status, lines, _ = start([*command, "--workers", "2", "--out", "out"], before)
    assert status == 2 and len(lines) == 1 and "/dev/shm" in lines[0], lines
    assert "--workers 0" in lines[0] and not Path("out").exists()


def test_a_batch_that_cannot_be_sent_ends_the_run(place):
    """The estimate is too low, and the worker's send fails: the loader once waited for ever."""
    Path("start.py").write_text(
        "from densecl.transfer import command\n"
        "from densecl.runtime.io import run_command\n"
        "command.check_shared_memory = lambda *args: None\n"
        "from densecl.detect.__main__ import main\n"
        "run_command(main)\n",
        encoding="utf-8",
    )
    before = [*small_shared_memory("200k"), sys.executable, "start.py"]
    done = subprocess.run(
        [*before, *SMALL, "--workers", "1", "--out", "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "do not fit into shared memory" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "command", [TRAIN, pytest.param(DETECT, marks=LONG_TEST)], ids=["train", "detect"]
)
def test_a_long_tmpdir_is_one_line(command, place):
    folder = place / ("t" * 98)
    folder.mkdir()
    options = ["--workers", "1", "--out", "out"]
    status, lines, _ = start([*command, *options], TMPDIR=str(folder))
    assert status == 2 and len(lines) == 1 and "TMPDIR" in lines[0], lines
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "command", [pytest.param(TRAIN, marks=LONG_TEST), LMDB], ids=["train", "lmdb"]
)
def test_too_few_open_files_is_one_line(command, place):
    before = ["prlimit", "--nofile=24"]
    if not shutil.which("prlimit"):
        pytest.skip("prlimit is not installed")
    status, lines, _ = start([*command, "--workers", "8"], before)
    assert status == 2 and len(lines) == 1 and "ulimit -n" in lines[0], lines
    assert not list(place.glob("*.lmdb*")) and not Path("runs").exists()


def test_too_few_processes_is_one_line(place):
    """As another user, since the limit does not hold for root; who may still read everything."""
    place.chmod(0o777)
    drop = "setpriv --reuid 65534 --inh-caps +dac_override --ambient-caps +dac_override"
    before = ["prlimit", "--nproc=3", *drop.split(), "--bounding-set", "-all,+dac_override"]
    if not shutil.which("setpriv") or subprocess.run([*before, "true"], check=False).returncode:
        pytest.skip("changing the user is not allowed here")
    status, lines, _ = start([*LMDB, "--workers", "8"], before)
    assert status == 1 and len(lines) == 1, lines
    assert "ulimit -u" in lines[0] and "disk" not in lines[0]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_and_syncs_is_a_warning(number, place, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    def no_folder_sync(handle, real=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(os, "fsync", no_folder_sync)
    for main, argv in (
        (train_main, ["demo", *TINY, "--workers", "0", "--out", "out"]),
        (data_main, LMDB[1:]),
    ):
        monkeypatch.setattr(io, "WARNED", set())
        status, text = call(capsys, main, *argv)
        assert status == 0, text
        assert text.count("cannot be locked") == 1 and text.count("cannot sync") == 1, text
    assert Path("out/last.pt").exists() and Path("images.lmdb").exists()


@pytest.mark.long
def test_a_terminal_without_utf8_prints_the_table(place):
    words = [*SEGMENT, "--workers", "0", "--trials", "2", "--out", "out"]
    status, _, out = start(words, PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert status == 0 and "2 trials, +- one standard deviation" in out, out


def text_files_without_encoding(source):
    """Calls that read or write text in the encoding of the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = [a.value for a in node.args if isinstance(a, ast.Constant)]
        binary = any(isinstance(w, str) and "b" in w and len(w) < 4 for w in words)
        opens = name == "open" or name.endswith((".read_text", ".write_text"))
        if opens and not binary and "encoding" not in {k.arg for k in node.keywords}:
            yield f"{node.lineno}: {ast.unparse(node)}"


def test_text_files_without_encoding_are_found():
    assert len(list(text_files_without_encoding("open(p); open(p, 'w'); p.read_text()"))) == 3
    good = "open(p, 'rb'); open(p, encoding='utf-8'); p.write_text(t, encoding='utf-8')"
    assert not list(text_files_without_encoding(good))


def test_every_text_file_is_utf8():
    for path in sorted((ROOT / "densecl").rglob("*.py")):
        found = list(text_files_without_encoding(path.read_text(encoding="utf-8")))
        assert not found, f"{path.name}: {found}"


def test_modules_that_windows_lacks_are_not_needed(place):
    code = "import sys; sys.modules |= {'fcntl': None, 'resource': None}\n"
    code += "from densecl.runtime.io import run_command\nfrom densecl.train import main\n"
    code += f"run_command(main, {['demo', *TINY, '--workers', '0', '--out', 'out']!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and Path("out/last.pt").exists(), done.stderr


@pytest.mark.long
def test_compile_without_a_compiler_is_one_line_and_nothing_is_written(place):
    words = [*TRAIN, "--compile", "--workers", "0", "--out", "out"]
    cache = str(place / "cache")  # what was compiled before needs no compiler
    env = {"CXX": "/nowhere/g++", "PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": cache}
    status, lines, _ = start(words, **env)
    assert status == 2 and len(lines) == 1 and "--compile" in lines[0], lines
    assert not Path("out").exists()


@pytest.mark.parametrize("left_over", [{"LOCAL_RANK": "3"}, {"RANK": "1"}], ids=str)
def test_a_variable_left_over_from_torchrun_changes_nothing(left_over, place, monkeypatch, capsys):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    status, text = call(capsys, train_main, "demo", "--lr", "nan")
    assert status == 2 and text.startswith("densecl: --lr")
    status, text = call(capsys, train_main, "demo", *TINY, "--workers", "0", "--out", "out")
    assert status == 0 and Path("out/last.pt").exists(), text


@pytest.mark.parametrize(
    "left_over", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "5"}]
)
def test_half_of_torchrun_s_variables_is_one_line(left_over, place, monkeypatch, capsys):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    status, text = call(capsys, train_main, "demo", *TINY, "--workers", "0", "--out", "out")
    assert status == 2 and text.count("\n") == 1 and "torchrun" in text, text


LONG = "n" * 300


@pytest.mark.parametrize(
    "command",
    [
        [*TRAIN, "--out", LONG],
        [*TRAIN, "--data-root", LONG],
        [*TRAIN, "--resume", LONG],
        ["densecl.data.__main__", "lmdb", LONG, "images.lmdb"],
        ["densecl.data.__main__", "lmdb", "images", f"{LONG}.lmdb"],
        ["densecl.data.__main__", "verify", LONG],
        ["densecl.data.__main__", "check", LONG],
        ["densecl.weights.__main__", "extract", LONG, "out.pth"],
        ["densecl.weights.__main__", "extract", "random", LONG],
        ["densecl.doctor", LONG],
        ["densecl.show", LONG, LONG],
        ["densecl.segment.__main__", *SMALL, "--data-root", LONG],
        ["densecl.segment.__main__", *SMALL, "--weights", LONG],
        ["densecl.segment.__main__", *SMALL, "--out", LONG],
        ["densecl.detect.__main__", *SMALL, "--data-root", LONG],
        ["densecl.evaluate.__main__", LONG],
    ],
    ids=lambda c: " ".join(w[:12] for w in (c[0], *c[-2:])),
)
def test_a_name_that_is_too_long_is_one_line(command, place, capsys):
    from importlib import import_module

    before = sorted(place.rglob("*"))
    status, text = call(capsys, import_module(command[0]).main, *command[1:])
    lines = [line for line in text.splitlines() if line.startswith("densecl: ")]
    assert status == 2 and len(lines) == 1, text
    assert sorted(place.rglob("*")) == before
