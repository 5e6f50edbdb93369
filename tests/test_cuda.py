"""The same values and the same run on a CUDA device. Skipped where there is none."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_parity import RECORDED, Stem

from densecl.encoder import Encoder, build_backbone
from densecl.loss import info_nce
from densecl.model import DenseCL
from densecl.runtime.metrics import Meter
from densecl.weights.state_dict_keys import load_official

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
ROOT = Path(__file__).parents[1]
TINY = shlex.split(
    "demo --backbone resnet18-layer2 --image-size 64 --batch-size 8 --queue-len 64 --hidden 16 "
    "--dim 8 --epochs 2 --workers 0 --log-every 1 --save-every 2 --out out"
)


def unit_vectors(*shape):
    """Random unit vectors along the last dimension, on the device."""
    return F.normalize(torch.randn(*shape, device="cuda"), dim=-1)


def train(*options, processes=0):
    """A training command on the device; the rows with a loss."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = [sys.executable, *(launcher if processes else [])]
    done = subprocess.run(
        [*start, "-m", "densecl.train", *TINY, "--device", "cuda", *options],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("chunk", [None, 5, 8192])
def test_three_steps_equal_the_authors(chunk):
    model = DenseCL(Encoder(Stem(), 16, hidden=24, dim=8), queue_len=16, chunk=chunk)
    names = [name for name in RECORDED.files if name.startswith("init/")]
    load_official(model, {name[5:]: torch.from_numpy(RECORDED[name]) for name in names})
    model.cuda()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    for step in range(3):
        im_q, im_k = torch.from_numpy(RECORDED["img"][step, 0]).cuda().unbind(1)
        out = model(im_q, im_k)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        for ours, theirs in (("loss_global", "raw_loss_single"), ("loss_dense", "raw_loss_dense")):
            expected = float(RECORDED[f"s{step}/r0/{theirs}"])
            assert out[ours].item() == pytest.approx(expected, rel=1e-4)
        np.testing.assert_array_equal(out["match"].cpu().numpy(), RECORDED[f"s{step}/r0/sim_ind"])


@pytest.mark.parametrize("shape", [(1, 50, 8, 7), (98, 4096, 128, 1000), (1568, 65536, 128, 8192)])
def test_the_chunked_loss_equals_the_reference(shape):
    M, K, dim, chunk = shape
    q, k_pos, keys = unit_vectors(M, dim), unit_vectors(M, dim), unit_vectors(K, dim).T
    results = []
    for size in (None, chunk):
        x = q.clone().requires_grad_()
        loss = info_nce(x, k_pos, keys, 0.2, size)
        loss.backward()
        results.append((loss.item(), x.grad))
    (value, grad), (chunked_value, chunked_grad) = results
    assert chunked_value == pytest.approx(value, rel=1e-5)
    assert (grad - chunked_grad).abs().max() <= 1e-4 * grad.abs().max()


def test_the_chunked_loss_takes_a_fraction_of_the_memory():
    q, k_pos, keys = unit_vectors(1568, 128), unit_vectors(1568, 128), unit_vectors(65536, 128).T
    peaks = []
    for chunk in (None, 8192):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        info_nce(q.clone().requires_grad_(), k_pos, keys, 0.2, chunk).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] / 5, peaks


@pytest.mark.parametrize(
    "options",
    ["", "--amp bf16", "--amp fp16", "--augment device --amp bf16", "--compile"],
    ids=lambda options: options or "defaults",
)
def test_a_run_on_the_device(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    losses = [row["loss"] for row in train("--max-steps", "6", *shlex.split(options))]
    assert len(losses) == 6 and np.isfinite(losses).all()


def test_a_checkpoint_of_the_device_is_read_without_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("--amp", "off", "--max-steps", "3")
    saved = torch.load("out/last.pt", weights_only=True, map_location="cpu")
    assert saved["step"] == 3 and saved["model"]["queue.ptr"].item() == 24


def test_a_meter_that_was_saved_between_two_rows_continues_on_the_device():
    def add(meter, value):
        x = torch.tensor(value, device="cuda")
        meter.add(x, x, {"loss_global": x, "loss_dense": x}, images=8)
        meter.add_matches(torch.arange(4, device="cuda")[None], torch.tensor([[0, 9, 9, 9]]))

    before, after = Meter(), Meter()
    add(before, 1.0)
    saved = before.state_dict()
    assert not any(saved[name].is_cuda for name in ("losses", "parts", "counts"))
    after.load_state_dict(saved, "cuda")
    add(after, 3.0)
    row = after.row({})
    assert (row["loss"], row["match_acc"]) == (2.0, 2 / 8)


def test_a_run_killed_between_two_rows_resumes_on_the_device(tmp_path, monkeypatch):
    """The checkpoint of step 2 contains the meter; the row of step 3 is a mean of steps 1 to 3."""
    monkeypatch.chdir(tmp_path)
    Path("start.py").write_text(
        """import os, signal
from densecl.runtime import checkpoint
from densecl.train import main
real = checkpoint.write_checkpoint
def write_checkpoint(*args):
    real(*args)
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.write_checkpoint = write_checkpoint
main(OPTIONS)
""".replace("OPTIONS", repr([*TINY, "--device", "cuda", "--log-every", "3"]))
    )
    killed = subprocess.run(
        [sys.executable, "start.py"], capture_output=True, text=True, check=False
    )
    assert killed.returncode < 0, killed.stderr
    assert torch.load("out/last.pt", weights_only=True, map_location="cpu")["meter"]
    assert [row["step"] for row in train("--log-every", "3", "--max-steps", "6")] == [3, 6]


def test_one_process_under_torchrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [row["step"] for row in train("--max-steps", "4", processes=1)] == [1, 2, 3, 4]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_processes_with_nccl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [row["step"] for row in train("--max-steps", "4", processes=2)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "script, options",
    [
        ("step.py", "--backbone resnet18 --image-size 64 --rounds 2 --rounds-of-parts 1"),
        ("loss.py", "--rounds 1"),
    ],
)
def test_the_benchmarks_run_unchanged(script, options):
    path = ROOT / "benchmarks" / script
    done = subprocess.run(
        [sys.executable, str(path), "--device", "cuda", *shlex.split(options)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout.splitlines()[-1])


def test_a_backbone_keeps_its_outputs():
    backbone, _channels = build_backbone("resnet18-layer2")
    x = torch.randn(2, 3, 64, 64)
    backbone.eval()
    torch.testing.assert_close(backbone(x), backbone.cuda()(x.cuda()).cpu(), rtol=1e-2, atol=1e-2)
