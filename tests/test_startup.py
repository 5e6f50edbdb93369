"""What a run does besides training steps: imports, probes, and how its time is measured."""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from densecl import measurements, trainer
from densecl.data import loader
from densecl.evaluate import probes
from densecl.runtime import metrics
from tiny import TINY


@pytest.fixture
def tiny(make_images, tmp_path):
    """A config for twelve images; `out` is a new folder."""
    make_images(tmp_path / "images")
    return replace(
        TINY, data_root=str(tmp_path / "images"), device="cpu", out=str(tmp_path / "run")
    )


def test_the_views_of_the_probes_are_made_once_per_run(tiny, monkeypatch):
    made, probe_views = [], probes.probe_views
    for module in (probes, measurements):
        monkeypatch.setattr(
            module, "probe_views", lambda *args: made.append(args) or probe_views(*args)
        )
    trainer.train(replace(tiny, probe="match,rank", probe_every=2))
    assert len(made) == 1
    assert (Path(tiny.out) / "matches/before_after.png").is_file()


def test_rates_leave_probes_and_checkpoints_out(tiny, monkeypatch):
    """A clock on which each probe and each checkpoint takes two weeks."""
    late = [0.0]

    def slow(function):
        def run(*args):
            late[0] += 1e6
            return function(*args)

        return run

    now = lambda: time.perf_counter() + late[0]
    clock = SimpleNamespace(perf_counter=now, thread_time=time.thread_time)
    for module in (loader, metrics):
        monkeypatch.setattr(module, "time", clock)
    for owner, name in ((measurements, "run_probe"), (trainer.RunWriter, "save")):
        monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    trainer.train(replace(tiny, probe="match", probe_every=1, save_every=1, log_every=2))
    rows = [
        json.loads(line) for line in (Path(tiny.out) / "metrics.jsonl").read_text().splitlines()
    ]
    rows = [row for row in rows if "probe" not in row]
    assert late[0] == 7e6 + 6e6 and [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["images_per_s"] > 1e-3 for row in rows)


def test_a_training_starts_without_matplotlib():
    modules = "densecl.train, densecl.trainer, densecl.cost"
    code = f"import sys, {modules}; print(*sorted(sys.modules))"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "densecl.trainer" in loaded
    assert "matplotlib" not in loaded


STAGES = ["data", "pretrain", "resume", "extract", "probes", "detect", "segment", "doctor", "show"]


def smoke(folder, **environment):
    """What `full.sh smoke` prints."""
    script = Path(__file__).parents[1] / "benchmarks/full.sh"
    environment |= os.environ | {"OUT": str(folder), "OMP_NUM_THREADS": "1"}
    tools = Path(sys.executable).parent  # python and torchrun of this environment
    environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
    command = ["bash", str(script), "smoke"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=True
    ).stdout.splitlines()


def test_the_trial_run_of_a_table_row_lists_its_commands_and_writes_nothing(tmp_path):
    lines = smoke(tmp_path, DRY="1")
    assert all(line.startswith("+ ") for line in lines) and len(lines) == len(STAGES) + 5
    assert not list(tmp_path.iterdir())


def test_the_trial_run_without_an_environment_ends_with_one_line(tmp_path):
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(
        "#!/bin/bash\necho \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1\n"
    )
    python.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "OUT": str(tmp_path / "out"),
    }
    script = Path(__file__).parents[1] / "benchmarks/full.sh"
    done = subprocess.run(
        ["bash", str(script), "smoke"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert "No module named 'torch'" in line and ". .venv/bin/activate" in line


@pytest.mark.long
def test_the_trial_run_of_a_table_row_passes_every_stage(tmp_path):
    lines = smoke(tmp_path)
    assert [line.split()[:2] for line in lines] == [["OK", stage] for stage in STAGES]
    assert "resumed at step 10" in (tmp_path / "smoke/resume.log").read_text()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_a_training_on_the_cpu_keeps_the_memory_that_it_frees():
    code = """
import resource, torch
from densecl.runtime import distributed
for device in (None, "cpu"):
    if device:
        distributed.init_distributed(device)
    torch.empty(2**22).fill_(0)  # 16 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        tensors = [torch.empty(2**22).fill_(0) for _ in range(4)]
        del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    faults = [int(line) for line in result.stdout.split()]  # before and after the call
    assert faults[1] < faults[0] / 2
