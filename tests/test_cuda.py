"""The same numbers and the same run on a CUDA device. Skipped where there is none."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from densecl.encoder import Encoder, build_backbone
from densecl.loss import info_nce
from densecl.model import DenseCL
from densecl.weights import load_official

from test_parity import RECORDED, Stem

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
TINY = ("demo --backbone resnet18-layer2 --image-size 64 --batch-size 8 --queue-len 64 --hidden 16 --dim 8 --epochs 2 --workers 0 --log-every 1 "
        "--save-every 2 --out out").split()


def units(*shape):
    """Random unit vectors along the last dimension, on the device."""
    return F.normalize(torch.randn(*shape, device="cuda"), dim=-1)


def train(*options, processes=0):
    """A training command; its rows."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    got = subprocess.run([sys.executable, *start, "-m", "densecl.train", *TINY, *options], capture_output=True, text=True, timeout=600)
    assert got.returncode == 0, got.stderr
    return [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()], got.stderr


@pytest.mark.parametrize("chunk", [None, 5, 8192])
def test_three_steps_equal_the_authors(chunk):
    model = DenseCL(Encoder(Stem(), 16, hidden=24, dim=8), queue_len=16, chunk=chunk)
    load_official(model, {k[5:]: torch.from_numpy(RECORDED[k]) for k in RECORDED.files if k.startswith("init/")})
    model.cuda()
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], .1, momentum=.9, weight_decay=1e-4, fused=True)
    for step in range(3):
        im_q, im_k = torch.from_numpy(RECORDED["img"][step, 0]).cuda().unbind(1)
        out = model(im_q, im_k)
        opt.zero_grad()
        out["loss"].backward()
        opt.step()
        for ours, theirs in (("loss_global", "raw_loss_single"), ("loss_dense", "raw_loss_dense")):
            assert out[ours].item() == pytest.approx(float(RECORDED[f"s{step}/r0/{theirs}"]), rel=1e-4)
        np.testing.assert_array_equal(out["match"].cpu().numpy(), RECORDED[f"s{step}/r0/sim_ind"])


@pytest.mark.parametrize("shape", [(1, 50, 8, 7), (98, 4096, 128, 1000), (1568, 65536, 128, 8192)])
def test_the_chunked_loss_equals_the_readable_one(shape):
    m, k, dim, chunk = shape
    q, k_pos, keys, found = units(m, dim), units(m, dim), units(k, dim).T, []
    for c in (None, chunk):
        x = q.clone().requires_grad_()
        loss = info_nce(x, k_pos, keys, .2, c)
        loss.backward()
        found.append((loss.item(), x.grad))
    (value, grad), (value_c, grad_c) = found
    assert value_c == pytest.approx(value, rel=1e-5)
    assert (grad - grad_c).abs().max() <= 1e-4*grad.abs().max()


def test_the_chunked_loss_takes_a_fraction_of_the_memory():
    q, k_pos, keys, peaks = units(1568, 128), units(1568, 128), units(65536, 128).T, []
    for chunk in (None, 8192):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        info_nce(q.clone().requires_grad_(), k_pos, keys, .2, chunk).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0]/5, peaks


@pytest.mark.parametrize("options", [[], ["--amp", "bf16"], ["--amp", "fp16"], ["--augment", "device", "--amp", "bf16"], ["--compile"]])
def test_a_run_on_the_device(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    rows, _ = train("--device", "cuda", "--max-steps", "6", *options)
    losses = [r["loss"] for r in rows if "loss" in r]
    assert len(losses) == 6 and np.isfinite(losses).all()


def test_a_checkpoint_of_the_device_is_read_without_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("--device", "cuda", "--amp", "off", "--max-steps", "3")
    saved = torch.load("out/last.pt", weights_only=True, map_location="cpu")
    assert saved["step"] == 3 and saved["model"]["queue.ptr"].item() == 24


def test_one_process_under_torchrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, _ = train("--device", "cuda", "--max-steps", "4", processes=1)
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_processes_with_nccl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, _ = train("--device", "cuda", "--max-steps", "4", processes=2)
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["step.py", "loss.py"])
def test_the_benchmarks_run_unchanged(name):
    small = dict(step=["--backbone", "resnet18", "--image-size", "64", "--rounds", "2", "--rounds-of-parts", "1"], loss=["--rounds", "1"])[name[:-3]]
    script = Path(__file__).parents[1]/"benchmarks"/name
    got = subprocess.run([sys.executable, str(script), "--device", "cuda", *small], capture_output=True, text=True, timeout=600)
    assert got.returncode == 0, got.stderr
    json.loads(got.stdout.splitlines()[-1])


def test_a_backbone_keeps_its_numbers(tmp_path):
    backbone, channels = build_backbone("resnet18-layer2")
    x = torch.randn(2, 3, 64, 64)
    backbone.eval()
    torch.testing.assert_close(backbone(x), backbone.cuda()(x.cuda()).cpu(), rtol=1e-2, atol=1e-2)
