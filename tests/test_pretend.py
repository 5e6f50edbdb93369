"""Training on a pretended CUDA device (pretend.py): no mix of devices, no wait for the device."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretend import pretended_cuda

from densecl import trainer
from tiny import TINY

SMALL = replace(TINY, data_root="photos", out="out", device="cuda", augment="reference")


class Killed(BaseException):
    """The end of a process."""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")


def before_each_step(monkeypatch, call):
    """Call a function with the number of the step that begins."""
    real, count = trainer.next_batch, itertools.count(1)

    def next_batch(*args):
        call(next(count))
        return real(*args)

    monkeypatch.setattr(trainer, "next_batch", next_batch)


def rows():
    """The rows with a loss, without times."""
    found = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    for row in found:
        for name in ("images_per_s", "data_wait", "memory"):
            row.pop(name, None)
    return found


@pytest.mark.parametrize("amp, killed_after", [("off", [2]), ("fp16", [1, 4])])
def test_a_killed_run_continues_with_the_same_rows(monkeypatch, amp, killed_after):
    config = replace(SMALL, amp=amp, log_every=3, save_every=1, max_steps=6, resume="never")
    monkeypatch.setattr(trainer, "step_figure", lambda *args: None)
    with pretended_cuda():
        whole = trainer.train(config).state_dict()
        expected = rows()
        assert [row["step"] for row in expected] == [3, 6]
        for last in killed_after:

            def kill(step, last=last):
                if step == last + 1:
                    raise Killed

            with monkeypatch.context() as patched:
                before_each_step(patched, kill)
                with pytest.raises(Killed):
                    trainer.train(config)
            again = trainer.train(replace(config, resume="auto")).state_dict()
            assert rows() == expected, last
            for name, value in whole.items():
                assert torch.equal(value, again[name]), (last, name)
