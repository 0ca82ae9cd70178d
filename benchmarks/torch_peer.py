"""The PyTorch side of the benchmarks: torchvision's networks and the same objective, eager."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# torchvision's compiled operators are not needed, but it looks for them when it is imported.
_library = torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision.models as tv  # noqa: E402


def network(name: str, *, small_stem: bool) -> nn.Module:
    """A torchvision network in evaluation mode; a small stem is 3x3, stride 1, without pooling."""
    torch.manual_seed(0)
    net = getattr(tv, name)(weights=None)
    if small_stem:
        if name.startswith(("resnet", "wide_resnet")):
            net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            net.maxpool = nn.Identity()
        elif name.startswith("shufflenet"):
            net.conv1[0].stride = (1, 1)
            net.maxpool = nn.Identity()
        elif name.startswith(("mobilenet", "efficientnet")):
            # As ours: the first two strides are 1, so that 32 px end as 4x4 maps.
            block = (
                net.features[2].conv if name.startswith("mobilenet") else net.features[2][0].block
            )
            net.features[0][0].stride = block[1][0].stride = (1, 1)
        else:
            raise ValueError(f"no small stem for {name}")
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return net.eval().to(memory_format=torch.channels_last)


class Objective:
    """Cross entropy + alpha * BN alignment, and its gradient by the images."""

    def __init__(self, net: nn.Module, *, alpha_bn: float = 0.01, first: float = 10.0):
        self._net, self._alpha, self._first = net, alpha_bn, first
        self._terms: list[torch.Tensor] = []
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._read)

    def _read(self, bn, inputs, output):
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), unbiased=False)
        term = torch.norm(bn.running_mean - mean) + torch.norm(bn.running_var - var)
        self._terms.append(term * (self._first if not self._terms else 1.0))

    def gradient(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """images (B, C, H, W) channels-last, labels (B,) -> gradient like the images."""
        images = images.detach().requires_grad_(True)
        self._terms = []
        loss = F.cross_entropy(self._net(images), labels)
        if self._terms:
            loss = loss + self._alpha * sum(self._terms)
        loss.backward()
        return images.grad
