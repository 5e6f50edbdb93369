"""Backbones through torch.hub, without installing anything: torch.hub.load(REPOSITORY, "densecl_resnet50", weights="coco-800ep")."""
dependencies = ["torch", "torchvision", "numpy"]


def _backbone(base, weights):
    if weights is None:
        import torchvision
        return getattr(torchvision.models, base)()
    from densecl.files import UsageError
    from densecl.weights import backbone_state, load_backbone
    name = backbone_state(weights)[1]
    if name != base: raise UsageError(f"weights={weights}: of a {name}, not of a {base}")
    return load_backbone(weights)


def densecl_resnet50(weights="imagenet-200ep"):
    """torchvision's ResNet-50 with DenseCL's backbone and a fresh fc.

    weights: "coco-800ep", "coco-1600ep", "imagenet-200ep" (fetched into torch.hub's cache), the path of a file of weights, or None."""
    return _backbone("resnet50", weights)


def densecl_resnet101(weights="imagenet-r101-200ep"):
    """torchvision's ResNet-101 with DenseCL's backbone and a fresh fc.

    weights: "imagenet-r101-200ep" (fetched into torch.hub's cache), the path of a file of weights, or None."""
    return _backbone("resnet101", weights)
