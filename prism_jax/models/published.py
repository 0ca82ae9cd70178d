"""The accuracy that published weights are known for, to notice weights that are read wrongly."""

from __future__ import annotations

# Top-1 in per cent on the test images of a data set, as torchvision (IMAGENET1K_V1), timm and the
# authors of the CIFAR networks state it; rounded.
PUBLISHED: dict[str, tuple[str, float]] = {
    "resnet18": ("imagenet", 69.8),
    "resnet34": ("imagenet", 73.3),
    "resnet50": ("imagenet", 76.1),
    "resnet101": ("imagenet", 77.4),
    "wide_resnet50_2": ("imagenet", 78.5),
    "mobilenet_v2": ("imagenet", 71.9),
    "shufflenet_v2_x0_5": ("imagenet", 60.6),
    "shufflenet_v2_x1_0": ("imagenet", 69.4),
    "shufflenet_v2_x2_0": ("imagenet", 76.2),
    "efficientnet_b0": ("imagenet", 77.7),
    "mnasnet1_0": ("imagenet", 73.5),
    "mnasnet1_3": ("imagenet", 76.5),
    "densenet121": ("imagenet", 74.4),
    "vgg11_bn": ("imagenet", 70.4),
    "regnet_y_8gf": ("imagenet", 80.0),
    "alexnet": ("imagenet", 56.5),
    "convnext_tiny": ("imagenet", 82.5),
    "deit_tiny": ("imagenet", 72.2),
    "swin_tiny": ("imagenet", 81.4),
    "resnet20": ("cifar10", 91.7),
    "resnet32": ("cifar10", 92.6),
    "resnet44": ("cifar10", 93.1),
    "resnet56": ("cifar10", 93.4),
}
