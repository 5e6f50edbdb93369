"""`python -m densecl.train` from outside: what it refuses and how, and what a run leaves behind."""

import ast
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import densecl.config
from densecl.config import Config, presets
from densecl.runtime.io import run_command
from densecl.train import main

ROOT = Path(__file__).parents[1]
TINY = shlex.split(
    "demo --data-root images --backbone resnet18-layer2 --image-size 32 --batch-size 4 "
    "--queue-len 12 --lr 0.0075 --lambda-warmup 0 --dim 8 --hidden 16 --workers 0 --threads 1 "
    "--amp off --log-every 1 --probe ''"
)
ROW = set(
    shlex.split(
        "step epoch lr loss loss_global loss_dense match_acc pos neg alike alike_backbone grad "
        "queue_fill images_per_s data_wait loader_cpu memory bad skipped"
    )
)


def command(*argv, before=()):
    """`python -m densecl.train` in the current folder; `before`: first on the Python path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*before, ROOT])), "COLUMNS": "400"}
    return subprocess.run(
        [sys.executable, "-m", "densecl.train", *argv],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def status_and_text(capsys, *argv):
    """The same inside this process, which is faster: exit status, what it wrote to stderr."""
    status = 0
    try:
        run_command(main, list(argv))
    except SystemExit as e:
        status = e.code
    return status, capsys.readouterr().err


def rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def contents(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in Path(folder).rglob("*")}


def one_line_that_names(text, *words):
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("densecl: "), text
    for word in words:
        assert word in lines[0], text


@pytest.fixture
def place(tmp_path, monkeypatch, make_images):
    """The current folder: `images` holds twelve; beside it stands what is no data set."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images")
    for folder in ("empty", "texts"):
        Path(folder).mkdir()
    Path("texts/notes.txt").write_text("no image")
    Path("set.tar").write_bytes(b"")
    Path("empty.txt").write_text("\n")
    Path("gone.txt").write_text("gone.jpg\n")
    Path("binary.txt").write_bytes(b"\x89PNG\xff\xfe\x00\n")
    Path("torn.json").write_text('{"images": [')
    Path("list.json").write_text("[1, 2]")
    Path("gone.json").write_text('{"images": [{"file_name": "gone.jpg"}]}')
    return tmp_path


@pytest.fixture
def no_torch(tmp_path_factory):
    """A folder whose `torch` raises when it is imported."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise SystemError('torch was imported')")
    return folder


# What is refused before torch is loaded: options, and what the message must name.
REFUSED = [
    ("", ["preset", *presets]),
    ("densecl-coco-800", ["densecl-coco-800", *presets]),
    ("densecl-coco-800ep", ["--data-root", "data/coco/train2017"]),
    ("demo --data-root nowhere", ["--data-root", "nowhere"]),
    ("demo --data-root=", ["--data-root"]),
    ("demo --data-root empty", ["--data-root", "empty"]),
    ("demo --data-root texts", ["--data-root", "texts"]),
    ("demo --data-root set.tar", ["--data-root", "set.tar"]),
    ("demo --data-root empty.txt", ["--data-root", "empty.txt"]),
    ("demo --data-root gone.txt", ["--data-root", "gone.txt", "gone.jpg"]),
    ("demo --data-root binary.txt", ["--data-root", "binary.txt"]),
    ("demo --data-root torn.json", ["--data-root", "torn.json"]),
    ("demo --data-root list.json", ["--data-root", "list.json"]),
    ("demo --data-root gone.json", ["--data-root", "gone.json"]),
    ("demo --data-root images --batch-size 13", ["--batch-size 13", "12 images"]),
    ("demo --lr nan", ["--lr", "nan"]),
    ("demo --lr inf", ["--lr", "inf"]),
    ("demo --lr fast", ["--lr", "fast"]),
    ("demo --temperature 0", ["--temperature"]),
    ("demo --momentum 1.5", ["--momentum", "1.5"]),
    ("demo --epochs 0", ["--epochs"]),
    ("demo --batch-size -1", ["--batch-size", "-1"]),
    ("demo --loss-lambda 2", ["--loss-lambda"]),
    ("demo --workers -1", ["--workers"]),
    ("demo --image-size 0", ["--image-size"]),
    ("demo --queue-len 0", ["--queue-len"]),
    ("demo --seed -1", ["--seed"]),
    ("demo --seed 99999999999999999999", ["--seed"]),
    ("demo --amp fp8", ["--amp", "bf16"]),
    ("demo --device toaster", ["--device", "cpu", "cuda"]),
    ("demo --on-bad-image shrug", ["--on-bad-image", "skip", "raise"]),
    ("demo --learning-rate 1", ["--learning-rate"]),
    ("demo --keep 3", ["--keep: renamed to --keep-checkpoints"]),
    ("demo --bad-share 1", ["--bad-share: renamed to --max-corrupt-fraction"]),
    ("demo --match-warmup 9", ["--match-warmup: renamed to --geometry-warmup"]),
    ("demo --match true", ["--match true: renamed to geometry"]),
    ("demo --match agreed", ["--match agreed: renamed to verified"]),
    ("demo --match centred", ["--match centred: renamed to centered"]),
    ("demo --negatives own", ["--negatives own: renamed to intra-image"]),
    ("demo demo", ["demo"]),
]


@pytest.mark.parametrize("options, words", REFUSED, ids=[o or "no preset" for o, _ in REFUSED])
def test_wrong_input_is_one_line_and_status_2_and_never_loads_torch(
    options, words, place, no_torch
):
    before = contents(".")
    got = command(*options.split(), before=[no_torch])
    assert got.returncode == 2, got.stderr
    assert got.stdout == ""
    one_line_that_names(got.stderr, *words)
    assert contents(".") == before


def test_a_batch_that_the_processes_cannot_share_is_refused(place, monkeypatch, capsys):
    launch = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}
    launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    status, text = status_and_text(capsys, "demo", "--batch-size", "32")
    assert status == 2
    one_line_that_names(text, "--batch-size 32", "3 processes")


def test_the_stand_in_for_torch_would_be_noticed(place, no_torch):
    got = command(*TINY, before=[no_torch])
    assert got.returncode == 1 and "torch was imported" in got.stderr


def test_an_unknown_backbone_is_refused(place):
    before = contents(".")
    got = command(*TINY, "--backbone", "vgg16")
    assert got.returncode == 2
    one_line_that_names(got.stderr, "--backbone vgg16", "resnet18", "resnet101")
    assert contents(".") == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(place):
    before = contents(".")
    got = command(*TINY, "--device", "cuda")
    assert got.returncode == 2
    one_line_that_names(got.stderr, "--device cuda", "--device cpu")
    assert contents(".") == before


@pytest.mark.parametrize("backbone", ["resnet18-layer5", "resnet", ""])
def test_a_backbone_cut_where_there_is_no_stage_is_refused(backbone, place, capsys):
    before = contents(".")
    status, text = status_and_text(capsys, *TINY, "--backbone", backbone)
    assert status == 2
    one_line_that_names(text, "--backbone", "resnet18-layer3")
    assert contents(".") == before


@pytest.mark.parametrize("path", ["nowhere.pt", "texts/notes.txt", "empty"])
def test_a_checkpoint_that_is_none_is_refused_and_nothing_written(path, place, capsys):
    before = contents(".")
    status, text = status_and_text(capsys, *TINY, "--resume", path)
    assert status == 2
    one_line_that_names(text, path)
    assert contents(".") == before


def test_an_out_that_is_a_file_is_refused(place, capsys):
    before = contents(".")
    status, text = status_and_text(capsys, *TINY, "--out", "set.tar")
    assert status == 2
    one_line_that_names(text, "--out set.tar")
    assert contents(".") == before


def field_docs():
    """The string below each field of the config: name -> text."""
    groups = [cls for cls in densecl.config.Config.__mro__ if cls is not object]
    bodies = [ast.parse(inspect.getsource(cls)).body[0].body for cls in groups]
    pairs = [(a, b) for body in bodies for a, b in pairwise(body) if isinstance(a, ast.AnnAssign)]
    return {a.target.id: " ".join(b.value.value.split()) for a, b in pairs}


def test_help_names_every_field_with_its_text(no_torch):
    got = command("--help", before=[no_torch])
    assert got.returncode == 0 and got.stderr == ""
    shown, docs = " ".join(got.stdout.split()), field_docs()
    for f in fields(Config):
        assert f"--{f.name.replace('_', '-')} " in shown, f.name
        assert docs[f.name] in shown, f.name


def test_list_names_every_preset(no_torch):
    got = command("--list", before=[no_torch])
    assert got.returncode == 0 and got.stderr == ""
    assert [line.split()[0] for line in got.stdout.splitlines()[1:]] == [*presets, "own"]


def test_dry_run_says_what_would_be_done_and_writes_nothing(place, no_torch):
    before = contents(".")
    got = command(*TINY, "--dry-run", before=[no_torch])
    assert got.returncode == 0 and got.stderr == ""
    assert "12 images, 3 steps per epoch" in got.stdout
    assert contents(".") == before


def test_another_batch_size_and_a_long_queue_bring_hints(place, no_torch):
    got = command(*TINY, "--lr", "0.06", "--queue-len", "512", "--dry-run", before=[no_torch])
    first, second = got.stderr.splitlines()
    assert "--lr 0.0075" in first
    assert "--queue-len 8" in second


def test_a_run_leaves_the_folder_that_the_design_describes(place):
    options = shlex.split("--max-steps 5 --save-every 2 --keep-checkpoints 2 --out out")
    got = command(*TINY, *options)
    assert got.returncode == 0, got.stderr
    assert "Traceback" not in got.stderr
    out = Path("out")
    assert sorted(p.name for p in out.glob("*.pt")) == [
        "last.pt",
        "step-00000004.pt",
        "step-00000005.pt",
    ]
    assert sorted(p.name for p in (out / "matches").iterdir()) == [
        f"step-0000000{s}.png" for s in (2, 4, 5)
    ]
    config = json.loads((out / "config.json").read_text())
    assert set(config) == {f.name for f in fields(Config)}
    assert config["image_size"] == 32 and config["loss_lambda"] == 0.5
    written = rows(out)
    assert [r["step"] for r in written] == [1, 2, 3, 4, 5]
    assert [r["epoch"] for r in written] == [0, 0, 0, 1, 1]
    assert all(set(r) == ROW for r in written)
    assert [r["queue_fill"] for r in written] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])
    assert all(
        r["loss"] == pytest.approx((r["loss_global"] + r["loss_dense"]) / 2) for r in written
    )
    assert all(0 <= r["match_acc"] <= 1 for r in written)
    saved = torch.load(out / "last.pt", weights_only=True)
    assert saved["step"] == 5
    assert {"queue.keys", "queue.ptr", "queue2.keys", "queue2.ptr"} <= set(saved["model"])
    events = EventAccumulator(str(out / "events")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in written])


def test_a_second_call_with_more_steps_goes_on_as_if_never_interrupted(place, capsys):
    assert status_and_text(capsys, *TINY, "--max-steps", "7", "--out", "whole")[0] == 0
    assert status_and_text(capsys, *TINY, "--max-steps", "4", "--out", "halves")[0] == 0
    status, text = status_and_text(capsys, *TINY, "--max-steps", "7", "--out", "halves")
    assert status == 0
    assert "resumed at step 4" in text
    assert [r["step"] for r in rows("halves")] == [1, 2, 3, 4, 5, 6, 7]
    for a, b in zip(rows("whole"), rows("halves")):
        for k in ROW - {"images_per_s", "data_wait", "loader_cpu", "memory"}:
            assert a[k] == b[k], k
    whole, halves = (
        torch.load(f"{o}/last.pt", weights_only=True)["model"] for o in ("whole", "halves")
    )
    assert all(torch.equal(whole[k], halves[k]) for k in whole)


def test_rows_and_half_a_row_after_the_last_checkpoint_are_written_anew(place, capsys):
    assert status_and_text(capsys, *TINY, "--max-steps", "2", "--out", "out")[0] == 0
    lost = rows("out")[-1] | {"step": 3, "loss": 77.0}
    with open("out/metrics.jsonl", "a") as f:
        f.write(json.dumps(lost) + "\n" + '{"step": 4, "lo')
    assert status_and_text(capsys, *TINY, "--max-steps", "4", "--out", "out")[0] == 0
    assert [r["step"] for r in rows("out")] == [1, 2, 3, 4]
    assert 77.0 not in [r["loss"] for r in rows("out")]


def test_a_call_with_other_settings_is_refused_by_their_names(place, capsys):
    assert status_and_text(capsys, *TINY, "--max-steps", "1", "--out", "out")[0] == 0
    before = contents("out")
    status, text = status_and_text(
        capsys, *TINY, "--max-steps", "2", "--out", "out", "--temperature", "0.3", "--seed", "1"
    )
    assert status == 2
    one_line_that_names(text, "--out out", "temperature 0.2 (now 0.3)", "seed 0 (now 1)")
    assert contents("out") == before


def test_resume_never_begins_anew(place, capsys):
    assert status_and_text(capsys, *TINY, "--max-steps", "3", "--out", "out")[0] == 0
    status, text = status_and_text(
        capsys,
        *TINY,
        "--max-steps",
        "2",
        "--out",
        "out",
        "--resume",
        "never",
        "--temperature",
        "0.3",
    )
    assert status == 0
    assert "resumed" not in text and "the run in it is moved to out/replaced" in text
    assert [r["step"] for r in rows("out")] == [1, 2]
    assert [r["step"] for r in rows("out/replaced")] == [1, 2, 3]
    kept = sorted(path.name for path in Path("out").glob("*.pt"))
    assert kept == ["last.pt", "step-00000002.pt"]  # none of the replaced run


def test_a_dry_run_refuses_what_the_run_would_refuse(place, capsys):
    assert status_and_text(capsys, *TINY, "--max-steps", "1", "--out", "out")[0] == 0
    before = contents("out")
    again = (*TINY, "--max-steps", "2", "--out", "out", "--dry-run")
    status, text = status_and_text(capsys, *again, "--temperature", "0.3")
    assert status == 2
    one_line_that_names(text, "--out out", "temperature 0.2 (now 0.3)")
    for options, begins in (((), "from out/last.pt"), (("--resume", "never"), "out/replaced")):
        run_command(main, [*again, *options])
        assert begins in capsys.readouterr().out
    assert contents("out") == before


def test_resume_takes_the_checkpoint_that_it_is_given(place, capsys):
    assert status_and_text(capsys, *TINY, "--max-steps", "2", "--out", "first")[0] == 0
    shutil.copy("first/last.pt", "kept.pt")
    status, text = status_and_text(
        capsys, *TINY, "--max-steps", "3", "--out", "second", "--resume", "kept.pt"
    )
    assert status == 0
    assert "resumed at step 2" in text
    assert [r["step"] for r in rows("second")] == [3]


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(place, capsys):
    long = [*TINY, "--epochs", "100000", "--out", "out"]
    first = subprocess.Popen(
        [sys.executable, "-m", "densecl.train", *long],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 120
        while (
            not Path("out/metrics.jsonl").exists()
            and first.poll() is None
            and time.monotonic() < until
        ):
            time.sleep(0.1)
        assert Path("out/metrics.jsonl").exists()
        status, text = status_and_text(capsys, *long)
        assert first.poll() is None  # the first one is not disturbed
    finally:
        first.kill()
        first.wait()
    assert status == 2
    one_line_that_names(text, "out", "another run")
    assert status_and_text(capsys, *long, "--max-steps", "2", "--resume", "never")[0] == 0
    assert [r["step"] for r in rows("out")] == [1, 2]


@pytest.mark.parametrize("content", [b"", b"no image", "half"], ids=["empty", "text", "torn"])
def test_a_corrupt_image_is_skipped_named_once_and_counted(content, place, capsys):
    corrupt = Path("images/image-05.png")
    corrupt.write_bytes(corrupt.read_bytes()[:200] if content == "half" else content)
    status, text = status_and_text(
        capsys, *TINY, "--epochs", "3", "--out", "out", "--max-corrupt-fraction", "0.5"
    )
    assert status == 0, text
    named = [line for line in text.splitlines() if "image-05.png" in line]
    assert [line.startswith("hint: ") for line in named] == [True, False]
    assert [r["step"] for r in rows("out")] == list(range(1, 10))
    counted = [r["bad"] for r in rows("out")]
    assert counted == sorted(counted)
    assert (
        counted[2] >= 1 and counted[5] >= 2 and counted[8] >= 3
    )  # once an epoch at least; a replacement may hit it again


def test_one_corrupt_image_stops_the_run_on_request(place):
    Path("images/image-05.png").write_bytes(b"no image")
    got = command(*TINY, "--out", "out", "--on-bad-image", "raise", "--log-every", "50")
    assert got.returncode == 1
    assert "Traceback" not in got.stderr
    last = got.stderr.strip().splitlines()[-1]
    assert last.startswith("densecl: ") and "image-05.png" in last
    assert sum(line.startswith("densecl: ") for line in got.stderr.splitlines()) == 1


@pytest.mark.parametrize("corrupt", [8, 12])
def test_a_set_that_is_mostly_corrupt_stops(corrupt, place, capsys):
    for i in range(corrupt):
        Path(f"images/image-{i:02d}.png").write_bytes(b"no image")
    status, text = status_and_text(capsys, *TINY, "--out", "out")
    assert status == 1
    last = text.strip().splitlines()[-1]
    assert last.startswith("densecl: ") and "cannot be decoded" in last
    assert not Path("out/last.pt").exists()


def test_a_set_that_is_mostly_corrupt_stops_when_workers_load_it(place):
    for i in range(12):
        Path(f"images/image-{i:02d}.png").write_bytes(b"no image")
    got = command(*TINY, "--out", "out", "--workers", "1")
    assert got.returncode == 1
    assert "Traceback" not in got.stderr
    assert "densecl: " in got.stderr.strip().splitlines()[-1]


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(place):
    got = command(*TINY, "--lr", "1e30", "--out", "out", "--log-every", "5", "--epochs", "4")
    assert got.returncode == 1
    assert "Traceback" not in got.stderr
    last = got.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("densecl: ") and "loss of step 2 is not finite" in last and "--lr" in last
    )


def test_no_checkpoint_holds_what_is_not_finite(place, capsys):
    status, _text = status_and_text(
        capsys,
        *TINY,
        "--lr",
        "1e30",
        "--out",
        "out",
        "--log-every",
        "5",
        "--save-every",
        "1",
        "--epochs",
        "4",
    )
    assert status == 1
    saved = torch.load("out/last.pt", weights_only=True)["model"]
    assert all(v.isfinite().all() for v in saved.values())
