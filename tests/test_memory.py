"""A step that really runs out of memory: one line with options that fit, and the run continues."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from densecl.runtime.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process is Linux's"),
    pytest.mark.long,
]

# during a step, rank 1 (or the only process) may allocate 200 MB more than it has at its start
SCRIPT = """
import os, resource, sys
from pathlib import Path

import torch

from densecl import trainer
from densecl.runtime.io import run_command
from densecl.train import main

real = trainer.train_step

def train_step(state, *args):
    if "LIMITED" not in os.environ or os.environ.get("RANK", "1") != "1":
        return real(state, *args)
    layer = torch.nn.Conv2d(3, 8, 3)  # so that the libraries have started their threads
    layer(torch.randn(2, 3, 32, 32)).sum().backward()
    status = Path("/proc/self/status").read_text().split()
    limit = 1024 * int(status[status.index("VmSize:") + 1]) + 200 * 2**20
    state.memory = 200 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        return real(state, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

trainer.train_step = train_step
run_command(main, sys.argv[1:])
"""
OPTIONS = shlex.split(
    "demo --backbone resnet18-layer2 --image-size 96 --batch-size 96 --queue-len 64 --dim 8 "
    "--hidden 16 --lr 0.18 --amp off --device cpu --threads 1 --workers 0 --log-every 1 "
    "--lambda-warmup 0 --probe= --out run"
)


def call(folder, *options, start=(), limited=True):
    """The finished process of a training command."""
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, *start, "script.py", *OPTIONS, *options],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | ({"LIMITED": "1"} if limited else {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def line_of(result):
    """The line about the memory; there is no traceback."""
    assert "Traceback" not in result.stderr, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "out of memory" in line]
    return line


def test_a_step_out_of_memory_names_options_with_which_the_run_continues(tmp_path):
    first = call(tmp_path, "--accumulate", "8", "--max-steps", "1", limited=False)
    assert first.returncode == 0, first.stderr
    failed = call(tmp_path, "--max-steps", "2")
    assert failed.returncode == 1, failed.stderr
    line = line_of(failed)
    assert "in step 2 with 96 images per forward pass (--batch-size 96 --accumulate 1)" in line
    assert "the run continues from step 1, run/last.pt" in line
    found = re.search(r"--accumulate (\d+) should fit \(about 0\.\d of 0\.2 GiB\)", line)
    assert load_checkpoint(tmp_path / "run/last.pt")["step"] == 1
    resumed = call(tmp_path, "--accumulate", found[1], "--max-steps", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 1" in resumed.stderr + resumed.stdout
    assert load_checkpoint(tmp_path / "run/last.pt")["step"] == 2


def test_all_ranks_end_when_one_runs_out_of_memory(tmp_path):
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = call(tmp_path, "--max-steps", "2", "--batch-size", "192", "--lr", "0.36", start=start)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("densecl: ")]
    (line,) = [line for line in lines if "out of memory" in line]
    assert "96 images per forward pass" in line and "--accumulate" in line
    assert 'script.py", line' not in result.stderr and "/densecl/" not in result.stderr
