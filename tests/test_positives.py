"""Ways to assign positives: numbers recorded before they were functions of the outputs."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from densecl.config import Config, Match
from densecl.correspondence import positive_index
from densecl.data.loader import to_device
from densecl.memory import estimate_peak
from densecl.optimizers import build_optimizer
from densecl.runtime import distributed
from densecl.trainer import build_model
from tiny import TINY

RECORDED = Path(__file__).parent / "golden" / "positives.json"
KINDS = ("backbone", "centered", "dense", "random", "geometry", "verified", "mutual")
NEGATIVES = ("pooled", "position", "intra-image")
SMALL = replace(TINY, backbone="resnet18-layer1", image_size=16, loss="reference")


@functools.cache
def batches():
    """Two batches of four pairs of views that overlap in part."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        im_q, im_k = torch.randn(2, 4, 3, 16, 16, generator=generator)
        affine = torch.tensor([[16.0, 0, 0], [0, 16.0, 0]]).repeat(2, 4, 1, 1)
        affine *= 0.5 + torch.rand(2, 4, 1, 1, generator=generator)
        affine[..., 2] += 8 * torch.rand(2, 4, 2, generator=generator)
        made.append({"im_q": im_q, "im_k": im_k, "affine_q": affine[0], "affine_k": affine[1]})
    return made


def measure(config: Config) -> list[dict]:
    """Losses, gradient and positives of two steps."""
    model, rows, positives = build_model(config), [], []
    assign = model.assign_positives
    model.assign_positives = lambda q, k: positives.append(assign(q, k)) or positives[-1]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step, batch in enumerate(batches()):
        torch.manual_seed(step)
        out = model(*(batch.get(key) for key in model.batch_keys))
        optimizer.zero_grad()
        out["loss"].backward()
        gradients = [p.grad.flatten() for p in model.encoder_q.parameters() if p.grad is not None]
        norm = torch.cat(gradients).norm()
        optimizer.step()
        names = ("loss_global", "loss_dense")
        row = {name: out[name].item() for name in names} | {"gradient": norm.item()}
        rows.append(row | {"matches": positive_index(positives[-1]).flatten().tolist()})
    return rows


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_trains_as_it_did_before_it_was_a_function(kind, negatives):
    recorded = json.loads(RECORDED.read_text())[f"{kind} {negatives}"]
    for row, before in zip(measure(replace(SMALL, match=kind, negatives=negatives)), recorded):
        assert row.pop("matches") == before.pop("matches")
        assert row == pytest.approx(before, rel=1e-4)


def record():
    """Write the file; the numbers in the repository are of the implementation before."""
    measured = {
        f"{kind} {negatives}": measure(replace(SMALL, match=kind, negatives=negatives))
        for kind in KINDS
        for negatives in NEGATIVES
    }
    text = json.dumps(measured).replace('}], "', '}],\n"')
    RECORDED.write_text(text + "\n")


def test_every_name_of_the_option_has_a_function():
    from densecl.variants import POSITIVES

    assert tuple(POSITIVES) == get_args(Match)


def estimates(config: Config, batch: dict) -> list[int]:
    """Estimated bytes of a step of 4 and of 64 images."""
    model = build_model(config)
    optimizer = build_optimizer(config, [p for p in model.parameters() if p.requires_grad])
    device = torch.device("cpu")
    state = SimpleNamespace(config=config, model=model, optimizer=optimizer, device=device)
    return [estimate_peak(state, batch, images) for images in (4, 64)]


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_a_step_is_known_for_each_choice(kind, negatives):
    small, large = estimates(replace(SMALL, match=kind, negatives=negatives), batches()[0])
    assert 0 < small < large


def test_the_memory_of_a_step_is_known_before_and_after_one_with_views_of_bytes():
    pixels = {"im_q", "im_k"}
    batch = {k: (x * 60).to(torch.uint8) if k in pixels else x for k, x in batches()[0].items()}
    distributed._constants.clear()
    first = estimates(SMALL, batch)
    assert not distributed._constants  # no fake tensor is kept
    to_device(batch, torch.device("cpu"))
    assert distributed._constants
    assert estimates(SMALL, batch) == first
