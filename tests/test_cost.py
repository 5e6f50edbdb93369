"""What --dry-run measures, and the checks before a run: for real, alone and in two processes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TINY = shlex.split(
    "demo --backbone resnet18-layer2 --image-size 32 --batch-size 4 --queue-len 16 --hidden 8 "
    "--dim 4 --device cpu --threads 1 --workers 0 --amp off --probe '' --data-root images"
)
STEP_BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "step.py"


def call(*options, world_size=1):
    """The finished process of a training command, in `world_size` processes."""
    start = []
    if world_size > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    return subprocess.run(
        [sys.executable, *start, "-m", "densecl.train", *TINY, *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture
def folder(tmp_path, make_images, monkeypatch):
    """The working folder of a test, with twelve images below it."""
    make_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_dry_run_counts_and_measures_and_writes_nothing(folder, world_size):
    before = sorted(folder.rglob("*"))
    result = call("--dry-run", world_size=world_size)
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert set(lines) >= {"size", "work", "sends", "step", "input", "finish", "memory"}
    assert len(lines) == len(result.stdout.splitlines()), "each line once, from one process"
    assert f"for {4 // world_size} random images on cpu" in lines["step"]
    assert "for 225 steps" in lines["finish"]  # 12 images // 4, 75 epochs
    assert ("nothing" in lines["sends"]) == (world_size == 1)
    assert "at most" in lines["input"] and "training needs" in lines["input"]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ["--keep-checkpoints", "1000000000"],
            ["--out out", "1000000001 checkpoints", "a lower --keep-checkpoints"],
        ),
        (["--workers", "2000000000"], ["--workers 2000000000", "fewer --workers"]),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(folder, options, words):
    if "--workers" in options and not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm here")
    result = call("--out", "out", *options)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert all(word in line for word in words), line
    assert not Path("out").exists()


def test_the_benchmark_of_a_step_runs_and_its_last_line_is_json(folder):
    options = shlex.split(
        "--backbone resnet18-layer1 --image-size 32 --batch-size 2 --queue-len 64 --hidden 8 "
        "--dim 4 --rounds 1 --rounds-of-parts 1 --no-memory --threads 1"
    )
    command = [sys.executable, str(STEP_BENCHMARK), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])["results"]
    paths = ["reference", "contiguous", "fp32", "bf16", "mocov2 fp32", "mocov2 bf16"]
    assert [row["path"] for row in found] == paths
    assert all(row["parts"]["backward"] > 0 for row in found)


@pytest.mark.long
def test_compiled_encoders_give_the_same_losses(folder):
    losses = []
    for name, options in (("plain", []), ("compiled", ["--compile"])):
        result = call("--max-steps", "4", "--log-every", "1", "--out", name, *options)
        assert result.returncode == 0, result.stderr
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
