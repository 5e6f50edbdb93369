"""Optimizers, schedules, own models and logs: exact resume, several ranks, and wrong input."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densecl import doctor
from densecl.config import presets, validate_config
from densecl.correspondence import gather_positions
from densecl.encoder import Encoder, build_backbone
from densecl.evaluate.features import load_network
from densecl.hooks import OWN_BACKBONE
from densecl.model import DenseCL, flatten_positions
from densecl.resume import check_resumable
from densecl.runtime.io import UsageError, strict_json
from densecl.train import parse_args
from densecl.trainer import train
from densecl.weights import backbone_state_dict
from tiny import TINY

TESTS = Path(__file__).parent

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


class SimSiam(nn.Module):
    """A model with a single network, dropout, a step counter, and a part of the loss."""

    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        body = (nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.net = nn.Sequential(*body, nn.Flatten(), nn.Linear(8, 8), nn.Dropout(0.2))
        self.head = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, im_q, im_k):
        self.count += 1
        a, b = self.net(im_q), self.net(im_k)
        loss = -F.cosine_similarity(self.head(a), b.detach()).mean()
        return {"loss": loss / self.count, "loss_cosine": loss, "f": 3, "match": "none"}


class Shifted(DenseCL):
    """DenseCL whose positives are the positions to the right."""

    def compute_losses(self, q, k):
        out = super().compute_losses(q, k)
        shifted = gather_positions(k.dense, (out["match"] + 1) % out["match"].shape[1])
        loss = self.contrastive_loss(
            flatten_positions(q.dense), flatten_positions(shifted), self.queue2
        )
        return out | {"loss": out["loss"] + loss}


def shifted():
    torch.manual_seed(3)
    encoder = Encoder(*build_backbone("resnet18-layer2"), 16, 8)
    return Shifted(encoder, 12, momentum=0.9, temperature=0.3, loss_lambda=0.7)


def rmsprop(parameters):
    return torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5)


def halving(config, step, steps_per_epoch):
    return 0.01 / 2**step


def test_an_own_model_optimizer_and_schedule_resume_bit_for_bit(tmp_path, make_images):
    make_images(tmp_path / "images")
    found = same_run(
        tmp_path, TINY, model=SimSiam, optimizer=lambda: rmsprop, schedule=lambda: halving
    )
    assert [row["lr"] for row in found] == [0.01 / 2**step for step in range(6)]
    assert all(row["loss_cosine"] == pytest.approx(row["loss"] * row["step"]) for row in found)
    assert all(row["match_acc"] is row["queue_fill"] is row["pos"] is None for row in found)
    config = replace(TINY, out=str(tmp_path / "part"), data_root=str(tmp_path / "images"))
    config = replace(config, deterministic=True)
    own = {"model": SimSiam(), "optimizer": rmsprop, "schedule": halving}
    others = {
        "model": shifted(),
        "optimizer": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.6),
        "schedule": lambda config, step, steps: 0.02 / 2**step,
    }
    for name, other in others.items():
        for given in (own | {name: other}, own | {name: None}):
            with pytest.raises(UsageError, match="another run: .*\\(now") as e:
                train(config, **given)
            assert "\n" not in str(e.value)


def test_a_subclass_resumes_bit_for_bit_and_its_values_are_those_of_the_run(tmp_path, make_images):
    make_images(tmp_path / "images")
    other = {"temperature": 0.1, "queue_len": 99, "lambda_warmup": 2}
    found = same_run(tmp_path, replace(TINY, **other), model=shifted)
    assert all(0 <= row["match_acc"] <= 1 and row["neg"] < 1 for row in found)
    config = json.loads((tmp_path / "full/config.json").read_text())
    assert [config[name] for name in ("temperature", "queue_len", "loss_lambda")] == [0.3, 12, 0.7]
    assert config["backbone"] == TINY.backbone and (tmp_path / "full/matches").iterdir()
    _, encoder = load_network(str(tmp_path / "full/last.pt"))  # all commands can use the weights
    images = torch.zeros(1, 3, 32, 32)
    saved = torch.load(tmp_path / "full/last.pt", weights_only=True)["model"]
    model = shifted()
    model.load_state_dict(saved)
    assert torch.equal(encoder(images).dense, model.encoder_q.eval()(images).dense)


class Crops(SimSiam):
    batch_keys = ("im_q", "im_k", "crops")

    def forward(self, im_q, im_k, crops):
        assert len(crops) == 2 and crops[1].shape == (4, 3, 16, 16)
        return super().forward(im_q, im_k + crops[1].mean())


class CropViews:
    """Twelve pairs of noise views, each with two smaller crops, drawn by the global generator."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        small = [torch.randn(3, 16, 16) for _ in range(2)]
        return {"im_q": torch.randn(3, 32, 32), "im_k": torch.randn(3, 32, 32), "crops": small}


def test_lists_of_crops_reach_the_model(tmp_path):
    train(replace(TINY, out=str(tmp_path / "run")), CropViews(), Crops())
    assert len(rows(tmp_path / "run")) == 6
    with pytest.raises(UsageError, match="crops is not in the batch, which has im_q"):
        train(replace(TINY, out=str(tmp_path / "no"), data_root="builtin:photos"), model=Crops())
    assert not (tmp_path / "no").exists()


def returning(value):
    """A model whose forward returns a value, or what a function makes of its loss."""

    class Returning(SimSiam):
        def forward(self, im_q, im_k):
            return value(super().forward(im_q, im_k)["loss"]) if callable(value) else value

    return Returning()


WRONG = {
    "no dict": (lambda loss: loss, "returned Tensor; forward must return a dict with loss"),
    "no loss": (lambda loss: {"total": loss}, "a dict with total; forward must return"),
    "a number": ({"loss": 1.0}, "loss is a float"),
    "a vector": (lambda loss: {"loss": loss[None]}, r"shape \(1,\)"),
    "detached": (lambda loss: {"loss": loss.detach()}, "no gradient"),
    "not finite": (lambda loss: {"loss": loss * float("nan")}, "loss of step 1 is not finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_ends_with_one_line(name, tmp_path):
    value, words = WRONG[name]
    with pytest.raises(UsageError, match=words) as e:
        train(replace(TINY, out=str(tmp_path), max_steps=1), CropViews(), returning(value))
    assert "\n" not in str(e.value) and not (tmp_path / "last.pt").exists()


def test_a_log_gets_each_row_and_its_failure_ends_nothing(tmp_path, capfd):
    seen = []

    def log(row):
        seen.append(row)
        if len(seen) > 2:
            raise ConnectionError("no\nnetwork")

    config = replace(TINY, out=str(tmp_path / "run"), probe="match")
    train(config, CropViews(), shifted(), log=log)
    assert (tmp_path / "run/matches/before_after.png").exists()
    assert [json.loads(strict_json(row)) for row in seen] == rows(tmp_path / "run")
    assert [row["step"] for row in seen] == [0, 1, 2, 3, 4, 5, 6, 6]
    error = capfd.readouterr().err
    assert error.count("warning: log failed at step 2 (ConnectionError: no)") == 1
    assert "log failed for 6 rows" in error


def test_unused_parameters_and_a_model_that_is_none_of_the_package(tmp_path):
    model = SimSiam()
    model.unused = nn.Linear(2, 2)
    config = replace(TINY, out=str(tmp_path / "run"), probe="match", max_steps=2)
    train(config, CropViews(), model)
    assert json.loads((tmp_path / "run/config.json").read_text())["backbone"] == OWN_BACKBONE
    for read in (backbone_state_dict, load_network):
        with pytest.raises(UsageError, match="model was given to train") as e:
            read(str(tmp_path / "run/last.pt"))
        assert "\n" not in str(e.value)


SCRIPT = """import sys
from dataclasses import replace
import torch
from densecl.trainer import train
from densecl.runtime import distributed
from test_hooks import CropViews, SimSiam, halving, rmsprop
from tiny import TINY

def run(out, steps, model):
    config = replace(TINY, out=out, max_steps=steps, deterministic=True, device="cpu")
    log = lambda row: print(f"row {distributed.rank()} {row['step']};", flush=True)
    return train(config, CropViews(), model, rmsprop, halving, log)

seed = int(__import__("os").environ["RANK"])  # other weights on each rank, on purpose
full = run("full", 4, SimSiam(seed)).state_dict()
run("part", 2, SimSiam(seed))
part = run("part", 4, SimSiam(seed)).state_dict()
equal = all(torch.equal(full[n], part[n]) for n in full if "running" not in n)
total = sum(float(p.double().sum()) for n, p in part.items() if "running" not in n)
print(f"equal {equal} {total:.17g};", flush=True)
model = SimSiam()
model.unused = torch.nn.Linear(2, 2)
try:
    run("unused", 2, model)
except Exception as e:
    print(f"refused {e}", flush=True)
"""


def test_a_script_with_own_parts_on_two_ranks(tmp_path):
    (tmp_path / "own.py").write_text(SCRIPT)
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + ["own.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    equal = re.findall(r"equal (True|False) ([-\d.e]+);", done.stdout)
    assert len(equal) == 2 and equal[0] == equal[1] and equal[0][0] == "True"
    steps = re.findall(r"row (\d) (\d);", done.stdout)
    assert steps == [("0", str(step)) for step in (1, 2, 3, 4, 1, 2, 3, 4)]
    assert done.stdout.count("refused model: no gradient for unused.weight, unused.bias, and") == 2


def test_the_doctor_judges_a_run_of_an_own_model(tmp_path, capsys):
    train(replace(TINY, out=str(tmp_path)), CropViews(), SimSiam())
    doctor.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert "a custom model after 6 steps" in text and "no reference values" in text
    assert (tmp_path / "doctor.png").exists()
