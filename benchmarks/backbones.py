"""A backbone of the study: `--backbone benchmarks.backbones:mirrored_margin`, with zero padding.

The image is continued by its mirror image before the first layer, and the cells of the image are
cut from the larger feature map. The weights are those of a plain ResNet-18 up to layer3.
"""

from torch import nn
from torch.nn import functional as F

from densecl.encoder import build_resnet_backbone

STRIDE, MARGIN = 16, 2  # pixels per cell of layer3; cells of the margin


class MirroredMargin(nn.Module):
    """ResNet-18 up to layer3 on an image with a mirrored margin, in training and evaluation."""

    def __init__(self):
        super().__init__()
        self.body, _ = build_resnet_backbone("resnet18-layer3")

    def forward(self, x):
        x = F.pad(x, [MARGIN * STRIDE] * 4, mode="reflect")  # N x 3 x 96 x 96 -> 160 x 160
        return self.body(x)[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]  # N x 256 x 6 x 6


def mirrored_margin():
    """A new `MirroredMargin`."""
    return MirroredMargin()
