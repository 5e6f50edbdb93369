"""The plan that --dry-run measures, and what is looked at before a run: for real, alone and in two processes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = ["demo", "--backbone", "resnet18-layer2", "--image-size", "32", "--batch-size", "4", "--queue-len", "16", "--hidden", "8", "--dim", "4",
        "--device", "cpu", "--threads", "1", "--workers", "0", "--amp", "off", "--probe", ""]


def call(*args, world=1):
    """The finished process of a training command, in `world` processes."""
    start = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    return subprocess.run([sys.executable, *start, "-m", "densecl.train", *args], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture
def place(tmp_path, make_pictures, monkeypatch):
    """A folder to stand in, with twelve pictures below it."""
    make_pictures(tmp_path/"pictures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("world", [1, 2])
def test_a_dry_run_counts_and_measures_and_writes_nothing(place, world):
    before = sorted(place.rglob("*"))
    got = call(*TINY, "--data-root", "pictures", "--dry-run", world=world)
    assert got.returncode == 0, got.stderr
    said = {line.split()[0]: line for line in got.stdout.splitlines()}
    assert set(said) >= {"size", "work", "sends", "step", "finish", "memory"}
    assert len(said) == len(got.stdout.splitlines()), "each line once, from one process"
    assert f"for {4//world} made-up pictures on cpu" in said["step"]
    assert "for 225 steps" in said["finish"]                          # 12 pictures // 4, 75 epochs
    assert ("nothing" in said["sends"]) == (world == 1)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("options, words", [
    (["--keep", "1000000000"], ["--out out", "1000000001 checkpoints", "a lower --keep"]),
    (["--workers", "2000000000"], ["--workers 2000000000", "/dev/shm", "--shm-size"]),
])
def test_what_would_end_badly_is_refused_before_the_first_step(place, options, words):
    if "--workers" in options and not Path("/dev/shm").is_dir(): pytest.skip("no /dev/shm here")
    got = call(*TINY, "--data-root", "pictures", "--out", "out", *options)
    assert got.returncode == 2 and "Traceback" not in got.stderr
    line = got.stderr.splitlines()[-1]
    assert all(w in line for w in words), line
    assert not Path("out").exists()


def test_the_benchmark_of_a_step_runs_and_its_last_line_is_json(place):
    here = Path(__file__).parents[1]/"benchmarks"/"step.py"
    size = "--backbone resnet18-layer1 --image-size 32 --batch-size 2 --queue-len 64 --hidden 8 --dim 4 --rounds 1 --rounds-of-parts 1 --no-memory --threads 1"
    got = subprocess.run([sys.executable, str(here), *size.split()], capture_output=True, text=True, timeout=300)
    assert got.returncode == 0, got.stderr
    found = json.loads(got.stdout.splitlines()[-1])
    assert [r["path"] for r in found["results"]] == ["reference", "fp32", "bf16", "mocov2 fp32", "mocov2 bf16"]
    assert all(r["parts"]["backward"] > 0 for r in found["results"])


@pytest.mark.long
def test_compiled_encoders_give_the_same_losses(place):
    found = []
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        got = call(*TINY, "--data-root", "pictures", "--max-steps", "4", "--log-every", "1", "--out", name, *more)
        assert got.returncode == 0, got.stderr
        found.append([json.loads(line)["loss"] for line in (place/name/"metrics.jsonl").read_text().splitlines()])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
