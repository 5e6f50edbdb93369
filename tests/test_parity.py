"""Three training steps against numbers recorded from the authors' implementation (tests/golden/mini_case1.npz)."""
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from densecl.encoder import Encoder
from densecl.model import DenseCL
from densecl.weights import load_official, official_state_dict

RECORDED = np.load(Path(__file__).parent/"golden"/"mini_case1.npz")


class Stem(nn.Module):
    """The recorded case's stand-in for a backbone."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x): return self.bn(self.conv(x)).relu()


def close(ours, key):
    """|a - b| <= 1e-6 + 1e-5 max|ref|, integers exactly."""
    ref = RECORDED[key]
    ours = ours.detach().numpy()
    if ref.dtype.kind == "i": np.testing.assert_array_equal(ours, ref, err_msg=key)
    else: assert np.abs(ours - ref).max() <= 1e-6 + 1e-5*np.abs(ref).max(), f"{key}: off by {np.abs(ours - ref).max()}"


@pytest.mark.parametrize("chunk", [None, 5, 16, 8192])
def test_three_steps_equal_the_authors(chunk):
    model = DenseCL(Encoder(Stem(), 16, hidden=24, dim=8), queue_len=16, chunk=chunk)
    load_official(model, {k[5:]: torch.from_numpy(RECORDED[k]) for k in RECORDED.files if k.startswith("init/")})
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], .1, momentum=.9, weight_decay=1e-4)
    for step in range(3):
        im_q, im_k = torch.from_numpy(RECORDED["img"][step, 0]).unbind(1)
        out = model(im_q, im_k)
        opt.zero_grad()
        out["loss"].backward()
        at = f"s{step}/"
        close(out["loss_global"], at + "r0/raw_loss_single")
        close(out["loss_dense"], at + "r0/raw_loss_dense")
        close((1 - model.loss_lambda)*out["loss_global"], at + "r0/loss_contra_single")
        close(model.loss_lambda*out["loss_dense"], at + "r0/loss_contra_dense")
        close(out["match"], at + "r0/sim_ind")
        ours = official_state_dict(model)
        grads = [k for k in RECORDED.files if k.startswith(at + "grad/")]
        assert len(grads) == (11 if step == 0 else 0)  # recorded at the first step only
        for k in grads: close(ours[k.split("/", 2)[2]].grad, k)
        opt.step()
        after = [k for k in RECORDED.files if k.startswith(at + "after/")]
        assert len(after) >= 4
        for k in after: close(ours[k.split("/", 2)[2]], k)
