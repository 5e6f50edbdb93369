"""Optimizers, schedules, own models and logs: exact resume, several ranks, and wrong input."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from densecl.config import presets, validate_config
from densecl.resume import check_resumable
from densecl.runtime.io import UsageError
from densecl.train import parse_args
from densecl.trainer import train
from tiny import TINY

CHOICES = {
    "adamw": {"optimizer": "adamw", "lr": 1e-3},
    "lars": {"optimizer": "lars", "lr": 1.0},
    "per step, with warm-up": {"schedule": "step", "lr_warmup_epochs": 1},
}


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def same_run(tmp_path, config, **hooks):
    """Train without a stop, and stopped after 4 steps and resumed; the weights are the same."""
    settings = {"data_root": str(tmp_path / "images"), "deterministic": True}
    config = replace(config, **settings, out=str(tmp_path / "full"), save_every=2)
    full = train(config, **{name: hook() for name, hook in hooks.items()}).state_dict()
    part = replace(config, out=str(tmp_path / "part"), max_steps=4)
    train(part, **{name: hook() for name, hook in hooks.items()})
    resumed = train(
        replace(part, max_steps=0), **{name: hook() for name, hook in hooks.items()}
    ).state_dict()
    assert all(torch.equal(full[name], resumed[name]) for name in full)
    timed = {"images_per_s", "data_wait", "loader_cpu", "memory"}
    a, b = (
        [{k: row[k] for k in row.keys() - timed} for row in rows(tmp_path / name)]
        for name in ("full", "part")
    )
    assert a == b and len(a) == 6
    return a


@pytest.mark.parametrize("name", CHOICES)
def test_a_stopped_run_resumes_bit_for_bit(name, tmp_path, make_images):
    make_images(tmp_path / "images")
    found = same_run(tmp_path, replace(TINY, **CHOICES[name]))
    if name.startswith("per step"):
        rates = [row["lr"] / TINY.lr for row in found]
        assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.75, 0.25])


@pytest.mark.parametrize("field", ["optimizer", "schedule", "lr_warmup_epochs"])
def test_a_resume_with_another_optimizer_or_schedule_is_refused(field):
    saved = asdict(TINY)
    for name in ("optimizer", "schedule", "lr_warmup_epochs"):
        del saved[name]  # of a run before these fields
    check_resumable(saved, TINY)
    value = {"optimizer": "adamw", "schedule": "step", "lr_warmup_epochs": 1}[field]
    with pytest.raises(UsageError, match=f"{field} .* \\(now {value}\\)"):
        check_resumable(saved, replace(TINY, **{field: value}))


def test_the_authors_values_are_the_defaults_and_the_options_reach_the_config():
    for config in presets.values():
        assert (config.optimizer, config.schedule, config.lr_warmup_epochs) == ("sgd", "epoch", 0)
    words = ["demo", "--optimizer", "lars", "--schedule", "step", "--lr-warmup-epochs", "10"]
    config = parse_args(words).config
    assert (config.optimizer, config.schedule, config.lr_warmup_epochs) == ("lars", "step", 10)
    with pytest.raises(UsageError, match="--lr-warmup-epochs 2: must be less than --epochs 2"):
        validate_config(replace(TINY, lr_warmup_epochs=2))
    with pytest.raises(UsageError, match="--optimizer: 'adam': choose from sgd, adamw, lars"):
        parse_args(["demo", "--optimizer", "adam"])
