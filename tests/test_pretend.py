"""Training on a pretended CUDA device (pretend.py): no mix of devices, no wait for the device."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pretend import LOG, pretended_cuda
from test_detect import TINY as TINY_DETECTOR
from test_detect import voc  # noqa: F401  a fixture
from test_probes import SMALL as SMALL_NETWORK
from test_probes import make_voc_tree
from test_segment import arguments as segment_arguments
from test_segment import tree  # noqa: F401  a fixture
from torch.testing._internal.distributed.fake_pg import FakeStore

from densecl import trainer
from densecl.config import Match
from densecl.correspondence import best_match, similarity
from densecl.data.loader import CorruptImageCounter, build_loader, build_views
from densecl.detect.__main__ import main as detect
from densecl.encoder import Encoder, build_backbone
from densecl.evaluate.__main__ import main as evaluate
from densecl.runtime.io import UsageError
from densecl.runtime.metrics import Meter
from densecl.runtime.metrics_log import MetricsLog
from densecl.runtime.signals import StopSignal
from densecl.segment.__main__ import main as segment
from densecl.variants import POSITIVES
from densecl.visualize.matches import hover_map, show_matches
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
        for name in ("images_per_s", "data_wait", "loader_cpu", "memory"):
            row.pop(name, None)
    return found


def test_a_killed_run_continues_with_the_same_rows(monkeypatch):
    """It is killed between two rows, and what was measured since the last one is in its file."""
    config = replace(SMALL, amp="fp16", log_every=3, save_every=1, max_steps=4, resume="never")
    monkeypatch.setattr(trainer, "step_figure", lambda *args: None)

    def kill(step):
        if step == 3:
            raise Killed

    with pretended_cuda():
        whole = trainer.train(config).state_dict()
        expected = rows()
        assert [row["step"] for row in expected] == [3, 4]
        with monkeypatch.context() as patched:
            before_each_step(patched, kill)
            with pytest.raises(Killed):
                trainer.train(config)
        again = trainer.train(replace(config, resume="auto")).state_dict()
    assert rows() == expected
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def overflowing_steps(scale, steps=3):
    """The state after some fp16 steps, and the rows of its meter; memory is filled with NaN."""
    config = replace(SMALL, amp="fp16", device="cpu")
    state = trainer.TrainState(config, torch.device("cpu"))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    meter = Meter()
    state.model.train()
    for batch in build_loader(config, build_views(config), 0, steps):
        trainer.add_step(meter, trainer.train_step(state, state.model, batch, 10), batch)
    return state, trainer.log_fields(state, 10, CorruptImageCounter(config)) | meter.row({})


@pytest.fixture
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True)  # fills the result of torch.empty
    yield
    torch.use_deterministic_algorithms(False)


def test_a_first_step_that_fp16_skips_leaves_the_momentum_zero(nan_in_new_memory):
    state, row = overflowing_steps(2.0**40, steps=2)
    initial = trainer.build_model(state.config).encoder_q.state_dict()
    for name, value in state.model.encoder_q.named_parameters():
        assert torch.equal(value, initial[name]), name
    buffers = [entry["momentum_buffer"] for entry in state.optimizer.state.values()]
    assert buffers and all((buffer == 0).all() for buffer in buffers)
    assert (row["skipped"], row["scale"], row["grad"]) == (2, 2.0**38, None)


def test_skipped_steps_are_counted_and_not_averaged(nan_in_new_memory):
    state, row = overflowing_steps(2.0**20, steps=4)
    assert 0 < row["skipped"] < 4 and row["scale"] == 2.0 ** (20 - row["skipped"])
    assert 0 < row["grad"] < 100
    assert all(p.isfinite().all() for p in state.model.parameters())


def test_zero_momentum_does_not_change_the_first_step():
    """A fused optimizer that begins with zeros does what one without buffers does, bit for bit."""
    ours, plain = (
        trainer.TrainState(replace(SMALL, amp=amp), torch.device("cpu")) for amp in ("fp16", "off")
    )
    for _ in range(2):
        for state in (ours, plain):
            torch.manual_seed(0)
            for p in state.optimizer.param_groups[0]["params"]:
                p.grad = torch.randn_like(p)
            state.optimizer.step()
    for a, b in zip(ours.model.parameters(), plain.model.parameters()):
        assert torch.equal(a, b)


def test_rows_are_strict_json():
    log = MetricsLog(".")
    log.row(step=1, loss=float("inf"), probe={"miou": float("nan"), "names": [1.5, -float("inf")]})
    log.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(Path("metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "probe": {"miou": None, "names": [1.5, None]}}


CHOICES = [
    {},
    {"method": "mocov2"},
    {"loss": "reference", "channels_last": True},
    {"amp": "bf16", "augment": "fast"},
    {"amp": "fp16", "augment": "device"},
    {"amp": "fp16", "augment": "device", "accumulate": 2},
    *({"match": kind} for kind in get_args(Match) if kind != "backbone"),
    {"match": "mutual", "negatives": "intra-image"},
    {"negatives": "position"},
    {"negatives": "intra-image", "geometry_warmup": 2},
    {"padding": "reflect", "grid": 3},
]


def waits_of_steps(config, steps=3):
    """Waits for the device in each step, from the batch to the check for signals."""
    state = trainer.TrainState(config, torch.device("cuda", 0))
    state.model.train()
    meter, waits = Meter(), []
    with StopSignal() as stop_signal:
        for batch in build_loader(config, build_views(config), 0, steps):
            LOG.clear()
            trainer.add_step(meter, trainer.train_step(state, state.model, batch, 10), batch)
            stop_signal.any_rank()
            waits.append(list(LOG.waits))
    assert torch.stack(meter.losses).isfinite().all()
    return waits


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_step_never_waits_for_the_device(choice):
    """But for the constants, which are copied in the first step."""
    with pretended_cuda():
        assert waits_of_steps(replace(SMALL, **choice))[1:] == [[], []]


def soft_positives(q, k):
    return similarity(q.features, k.features).softmax(2)


def some_positives(q, k):
    match = best_match(q, k)
    return torch.where(match < 3, -1, match)


@pytest.mark.parametrize("function", [soft_positives, some_positives])
def test_own_positives_are_checked_in_the_first_step_only(function):
    with pretended_cuda(), patch.dict(POSITIVES, backbone=function):
        waits = waits_of_steps(SMALL)
        assert waits[0] and waits[1:] == [[], []]


@pytest.fixture
def eight_ranks():
    """This process is rank 0 of eight; what the others send is not defined."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "choice", [{}, {"match": "geometry", "amp": "bf16"}, {"accumulate": 2}], ids=str
)
def test_a_step_of_one_of_eight_ranks_never_waits_for_the_device(eight_ranks, choice):
    config = replace(SMALL, batch_size=32, **choice)
    with pretended_cuda() as log:
        assert waits_of_steps(config)[1:] == [[], []]
        # the key images, the key encoder's four outputs of each micro-batch; and both queues
        assert log.operations["alltoall_base_"] == 2 * config.accumulate
        assert log.operations["_allgather_base_"] == 2


def test_a_run_waits_for_the_device_only_when_a_row_is_due(monkeypatch):
    waits = []
    before_each_step(monkeypatch, lambda step: waits.append(len(LOG.waits)))
    with pretended_cuda():
        trainer.train(replace(SMALL, log_every=4, max_steps=4))
    assert waits[1] == waits[2] == waits[3] > 0


def test_probes_run_on_the_device(capsys):
    """Those that `test_a_run_with_probes_and_its_figures` does not run."""
    make_voc_tree(Path("VOC2012"))
    for probe in ("stereo", "keypoints", "segment", "knn"):
        options = [] if probe == "stereo" else ["--data-root", "VOC2012"]
        options += ["--trials", "1"] if probe == "segment" else []
        with pretended_cuda() as log:
            evaluate([probe, *SMALL_NETWORK.split(), *options, "--device", "cuda"])
        assert log.operations["convolution"], probe
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["probe"] == probe


def test_a_run_with_probes_and_its_figures(monkeypatch):
    with pretended_cuda():
        trainer.train(replace(SMALL, max_steps=1, probe="match,rank"))
    assert Path("out/matches/before_after.png").exists()


def test_segmentation_is_trained_and_scored(tree):  # noqa: F811
    options = segment_arguments(tree, "out", "--device", "cuda", "--trials", "1")
    with pretended_cuda() as log:
        segment([*options, "--max-steps", "2"])
    assert log.operations["convolution_backward"]
    assert 0 <= json.loads(Path("out/results.json").read_text())["miou_mean"] <= 1


def test_detection_is_trained_and_scored(voc):  # noqa: F811
    options = ["--weights", "random", "--data-root", str(voc), "--out", "out", *TINY_DETECTOR]
    with pretended_cuda() as log:
        detect([*options, "--device", "cuda", "--max-steps", "2"])
    assert log.operations["convolution_backward"] and Path("out/results.json").exists()


def test_detection_with_a_model_of_timm_is_trained_and_scored(voc):  # noqa: F811
    pytest.importorskip("timm")
    options = ["--weights", "random", "--data-root", str(voc), "--out", "out", *TINY_DETECTOR]
    options += ["--backbone", "timm:convnext_atto"]
    with pretended_cuda() as log:
        detect([*options, "--device", "cuda", "--max-steps", "2"])
    assert log.operations["native_layer_norm_backward"] and Path("out/results.json").exists()


def test_matches_are_shown_with_a_network_on_the_device():
    encoder = Encoder(*build_backbone("resnet18-layer2"), hidden=8, dim=4).eval()
    images = [Image.fromarray(np.full((32, 48, 3), level, np.uint8)) for level in (50, 200)]
    with pretended_cuda() as log:
        encoder = encoder.to("cuda")
        show_matches(encoder, *images, "dense", 5)
        hover_map(encoder, *images, "backbone").page("two images")
    assert log.operations["convolution"]


@pytest.mark.parametrize("choice", [{"grid": 3}, {"padding": "reflect"}], ids=str)
def test_what_has_no_deterministic_gradient_on_the_device_is_refused(choice):
    option = "--" + " ".join(map(str, *choice.items()))
    config = replace(SMALL, deterministic=True, **choice)
    with pretended_cuda(), pytest.raises(UsageError, match=f"--deterministic {option}: "):
        trainer.train(config)
    assert not torch.are_deterministic_algorithms_enabled() and not Path("out").exists()
