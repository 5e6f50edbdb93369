"""Pre-trained backbones through torch.hub, without installation of the package.

Usage: torch.hub.load(REPOSITORY, "densecl_resnet50", weights="coco-800ep")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchvision.models import ResNet

dependencies = ["torch", "torchvision"]


def _backbone(base: str, weights: str | None) -> ResNet:
    """Return torchvision's ResNet `base` with these weights."""
    if weights is None:
        import torchvision

        return getattr(torchvision.models, base)()
    from densecl.runtime.io import UsageError
    from densecl.weights import backbone_state_dict, load_backbone

    name = backbone_state_dict(weights)[1]
    if name != base:
        raise UsageError(f"weights={weights}: of a {name}, not of a {base}")
    return load_backbone(weights)


def densecl_resnet50(weights: str | None = "imagenet-200ep") -> ResNet:
    """torchvision's ResNet-50 with DenseCL's backbone and a randomly initialized fc.

    Args:
        weights: "coco-800ep", "coco-1600ep" or "imagenet-200ep" (downloaded into torch.hub's
            cache on first use), the path of a weight file, or None: randomly initialized
    """
    return _backbone("resnet50", weights)


def densecl_resnet101(weights: str | None = "imagenet-r101-200ep") -> ResNet:
    """torchvision's ResNet-101 with DenseCL's backbone and a randomly initialized fc.

    Args:
        weights: "imagenet-r101-200ep" (downloaded into torch.hub's cache on first use), the path
            of a weight file, or None: randomly initialized
    """
    return _backbone("resnet101", weights)
