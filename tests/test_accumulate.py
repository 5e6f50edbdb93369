"""Gradient accumulation: a step in several micro-batches is one step, and can be interrupted."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from densecl import DenseCL, accumulate, trainer
from densecl.config import Config
from densecl.runtime.io import RunStopped
from densecl.trainer import build_model
from tiny import TINY

SMALL = replace(TINY, data_root="builtin:photos", batch_size=8, accumulate=4, max_steps=3)


class Killed(BaseException):
    """The end of a process."""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def at_pass(monkeypatch):
    """A function: something happens before forward pass number N of the trainer, from 0."""

    real = accumulate.forward_pass

    def arrange(number, happen):
        passes = []

        def forward_pass(*args):
            if len(passes) == number:
                happen()
            passes.append(args)
            return real(*args)

        monkeypatch.setattr(accumulate, "forward_pass", forward_pass)

    return arrange


def rows(out):
    """The rows of a run without what was measured by a clock."""
    timed = {"images_per_s", "data_wait", "loader_cpu", "memory"}
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def assert_same(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def kill():
    raise Killed


def test_a_run_killed_between_micro_batches_loses_that_step_only(at_pass):
    config = replace(SMALL, save_every=1)
    whole = trainer.train(replace(config, out="whole"))
    at_pass(4 + 2, kill)  # the third micro-batch of the second step
    with pytest.raises(Killed):
        trainer.train(replace(config, out="parts"))
    assert [row["step"] for row in rows("parts")] == [1]
    at_pass(None, kill)
    assert_same(whole, trainer.train(replace(config, out="parts")))
    assert rows("parts") == rows("whole") and rows("whole")[-1]["step"] == 3


def test_a_signal_between_micro_batches_lets_the_step_finish(at_pass):
    at_pass(4 + 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunStopped, match="stopped after step 2"):
        trainer.train(replace(SMALL, out="run"))
    queue = torch.load("run/last.pt", weights_only=True)["model"]["queue.ptr"]
    assert queue.item() == 2 * 8 % SMALL.queue_len


def test_rows_are_per_step_and_count_all_images():
    trainer.train(replace(SMALL, out="run"))
    assert [(row["step"], row["epoch"]) for row in rows("run")] == [(1, 0), (2, 0), (3, 0)]
    assert [row["queue_fill"] for row in rows("run")] == [8 / 12, 1, 1]
    assert all(row["match_acc"] is not None for row in rows("run"))


def test_a_run_continues_with_another_number_of_micro_batches(capsys):
    trainer.train(replace(SMALL, max_steps=1, out="run"))
    trainer.train(replace(SMALL, accumulate=2, loss="reference", out="run"))
    assert "accumulate 4 (now 2), loss chunked (now reference)" in capsys.readouterr().err
    assert [row["step"] for row in rows("run")] == [1, 2, 3]


class Regression(nn.Module):
    """A model without queue and key encoder; `set_micro_batch` is called on its submodules."""

    batch_keys = ("im_q", "im_k")

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.layer.calls = []
        self.layer.set_micro_batch = lambda *args: self.layer.calls.append(args)

    def forward(self, im_q, im_k):
        return {"loss": (self.layer(im_q) - self.layer(im_k)).pow(2).mean()}


@pytest.mark.parametrize("scale", [None, 2.0**10], ids=["float32", "loss scaled as for fp16"])
def test_any_model_accumulates(scale):
    model, batch = Regression(), dict(zip(("im_q", "im_k"), torch.randn(2, 8, 3, 6, 6)))
    model(**batch)["loss"].backward()
    expected = model.layer.weight.grad.clone()
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    state = SimpleNamespace(
        config=Config(accumulate=4), device=torch.device("cpu"), model=model, scaler=scaler
    )
    accumulate.accumulate_gradients(state, model, batch)
    torch.testing.assert_close(model.layer.weight.grad / (scale or 1.0), expected)
    assert model.layer.calls == [(0, 4), (1, 4), (2, 4), (3, 4)]


class OwnHook(DenseCL):
    """A subclass whose `set_micro_batch` does not call that of `DenseCL`."""

    steps = 0

    def set_micro_batch(self, index, count):
        self.steps += index == 0


@pytest.mark.parametrize("count", [1, 2])
def test_a_subclass_with_a_hook_of_its_own_updates_the_key_encoder_once_per_step(count):
    config = replace(SMALL, accumulate=count, max_steps=3, momentum=0.9)
    keys = []
    for kind in (DenseCL, OwnHook):
        torch.manual_seed(0)
        model = kind(build_model(config).encoder_q, queue_len=config.queue_len, momentum=0.9)
        trained = trainer.train(replace(config, out=kind.__name__), model=model)
        keys.append(trained.encoder_k.state_dict())
    assert trained.steps == 3
    for name, x in keys[0].items():
        torch.testing.assert_close(x, keys[1][name], msg=name)
