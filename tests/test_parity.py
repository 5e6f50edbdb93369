"""Three training steps against numbers of the authors' implementation (golden/mini_case1.npz)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from densecl.encoder import Encoder
from densecl.model import DenseCL
from densecl.weights.state_dict_keys import load_official, official_state_dict

RECORDED = np.load(Path(__file__).parent / "golden" / "mini_case1.npz")


class Stem(nn.Module):
    """The backbone of the recorded case."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


def assert_close(ours, name):
    """|ours - recorded| <= 1e-6 + 1e-5 max|recorded|, integers exactly."""
    recorded = RECORDED[name]
    ours = ours.detach().numpy()
    if recorded.dtype.kind == "i":
        np.testing.assert_array_equal(ours, recorded, err_msg=name)
    else:
        error = np.abs(ours - recorded).max()
        assert error <= 1e-6 + 1e-5 * np.abs(recorded).max(), f"{name}: off by {error}"


def recorded_names(prefix):
    return [name for name in RECORDED.files if name.startswith(prefix)]


@pytest.mark.parametrize("chunk", [None, 5, 16, 8192, "auto"])
def test_three_steps_equal_the_authors(chunk):
    model = DenseCL(Encoder(Stem(), 16, hidden=24, dim=8), queue_len=16, chunk=chunk)
    initial = {name[5:]: torch.from_numpy(RECORDED[name]) for name in recorded_names("init/")}
    load_official(model, initial)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-4)
    for step in range(3):
        im_q, im_k = torch.from_numpy(RECORDED["img"][step, 0]).unbind(1)
        out = model(im_q, im_k)
        optimizer.zero_grad()
        out["loss"].backward()
        prefix = f"s{step}/"
        assert_close(out["loss_global"], prefix + "r0/raw_loss_single")
        assert_close(out["loss_dense"], prefix + "r0/raw_loss_dense")
        weighted_global = (1 - model.loss_lambda) * out["loss_global"]
        assert_close(weighted_global, prefix + "r0/loss_contra_single")
        assert_close(model.loss_lambda * out["loss_dense"], prefix + "r0/loss_contra_dense")
        assert_close(out["match"], prefix + "r0/sim_ind")
        ours = official_state_dict(model)
        gradients = recorded_names(prefix + "grad/")
        assert len(gradients) == (11 if step == 0 else 0)  # recorded at the first step only
        for name in gradients:
            assert_close(ours[name.split("/", 2)[2]].grad, name)
        optimizer.step()
        after = recorded_names(prefix + "after/")
        assert len(after) >= 4
        for name in after:
            assert_close(ours[name.split("/", 2)[2]], name)
