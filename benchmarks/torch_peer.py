"""The PyTorch side of the benchmarks: torchvision's networks, and the loops that use them.

``reference`` has the structure of the code released with PRISM; ``fast`` is the same
mathematics with nothing superfluous, as PyTorch runs it best.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch_side import Side as Side

try:
    import torchvision.models as tv
except RuntimeError:  # its compiled operators are of another PyTorch; they are not needed
    for _name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[_name]
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.models as tv

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(name: str, *, small_stem: bool, classes: int = 1000) -> nn.Module:
    """A torchvision network in evaluation mode; a small stem is 3x3, stride 1, without pooling."""
    torch.manual_seed(0)
    net = getattr(tv, name)(weights=None, num_classes=classes)
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
    return net.eval()


@torch.no_grad()
def calibrate(net: nn.Module, size: int) -> nn.Module:
    """Set the running statistics to those of noise; with others maps shrink to denormal numbers."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    net.train()(torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0)))
    for norm in norms:
        norm.momentum = 0.1
    return net.eval()


class Teacher(nn.Module):
    """A frozen network, read for its logits and the misalignment of its BatchNorm statistics."""

    def __init__(self, net: nn.Module, *, first: float = 10.0, released: bool = False):
        """Register the hooks.

        Args:
          net: the network.
          first: multiplier of the first BatchNorm.
          released: take the variance of a permuted copy, as the released code does.
        """
        super().__init__()
        self.net, self._first, self._released = net, first, released
        self._terms: list[torch.Tensor] = []
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._read)

    def _read(self, norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor], output: torch.Tensor):
        x = inputs[0].float()
        mean = x.mean((0, 2, 3))
        if self._released:
            var = x.transpose(0, 1).reshape(x.shape[1], -1).var(1, unbiased=False)
        else:  # in one pass, as ours: twice as fast as torch.var_mean
            var = x.square().mean((0, 2, 3)) - mean.square()
        term = torch.norm(norm.running_var - var) + torch.norm(norm.running_mean - mean)
        self._terms.append(term)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images (B, C, H, W) -> logits (B, K) and the sum over layers of both distances."""
        self._terms = []
        logits = self.net(images)
        return logits, self._first * self._terms[0] + sum(self._terms[1:])


def valid_range(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised values of black and white, (3, 1, 1) each."""
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))
    return -mean / std, (1 - mean) / std


def crop_box(
    size: int, rng: random.Random, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop: top, left, height, width."""
    for _ in range(10):
        area = size * size * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= size and 0 < h <= size:
            return rng.randint(0, size - h), rng.randint(0, size - w), h, w
    return 0, 0, size, size


def resize(images: torch.Tensor, size: int, *, antialias: bool = False) -> torch.Tensor:
    return F.interpolate(
        images, (size, size), mode="bilinear", align_corners=False, antialias=antialias
    )


class Recover:
    """PRISM's loop on one image batch."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        batch: int,
        size: int,
        small_stem: bool,
        released: bool,
        roll: int,
        device: str = "cpu",
        classes: int = 1000,
        alpha_bn: float = 0.01,
        learning_rate: float = 0.05,
        iterations: int = 4000,
    ):
        """Make the teachers and the first images.

        Args:
          names: torchvision's names of the pool; the first is the primary.
          batch, size: images and their side.
          small_stem: see :func:`network`.
          released: the structure of the released code: NCHW, the primary loaded and run twice,
            terms that are in no loss, a look at the loss in every iteration. Otherwise
            channels-last and, on a GPU, bfloat16 autocast and ``torch.compile``.
          roll: the largest shift in pixels.
        """
        self._released, self._roll, self._alpha = released, roll, alpha_bn
        self._rate, self._iterations = learning_rate, iterations
        self._format = torch.contiguous_format if released else torch.channels_last
        quick = device != "cpu" and not released
        self._autocast = (
            torch.autocast("cuda", torch.bfloat16) if quick else contextlib.nullcontext()
        )

        def teacher(name: str) -> nn.Module:
            net = calibrate(network(name, small_stem=small_stem, classes=classes), size)
            made = Teacher(net, released=released).to(device, memory_format=self._format)
            return torch.compile(made) if quick else made

        self._teachers = [teacher(name) for name in names]
        self._logits_of = teacher(names[0]) if released else None
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(batch, 3, size, size, generator=generator)
        self.images = images.to(device, memory_format=self._format).requires_grad_(True)
        self._labels = (torch.arange(batch) % classes).to(device)
        self._optimiser = torch.optim.Adam([self.images], lr=learning_rate, betas=(0.5, 0.9))
        self._low, self._high = valid_range(device)
        self._rng, self._step, self._best = random.Random(0), 0, math.inf

    def view(self, images: torch.Tensor) -> torch.Tensor:
        """One crop, flip and roll for the whole batch."""
        top, left, height, width = crop_box(images.shape[-1], self._rng, (0.08, 1.0))
        viewed = images[..., top : top + height, left : left + width]
        viewed = resize(viewed, images.shape[-1], antialias=self._released)
        if self._rng.random() < 0.5:
            viewed = viewed.flip(-1)
        shift = self._rng.randint(0, self._roll), self._rng.randint(0, self._roll)
        return torch.roll(viewed, shift, (2, 3))

    def loss(self, viewed: torch.Tensor, drawn: Sequence[int]) -> torch.Tensor:
        """The objective for the drawn teachers; the primary, 0, is always one of them."""
        read = {t: self._teachers[t](viewed) for t in drawn}
        logits = self._logits_of.net(viewed) if self._logits_of is not None else read[0][0]
        alignment = sum(term for _, term in read.values()) / len(read)
        if self._released:
            priors(viewed)
        return F.cross_entropy(logits.float(), self._labels) + self._alpha * alignment

    def step(self, drawn: Sequence[int]) -> None:
        """One iteration."""
        decay = 0.5 * (1 + math.cos(math.pi * (self._step % self._iterations) / self._iterations))
        self._optimiser.param_groups[0]["lr"] = decay * self._rate
        self._optimiser.zero_grad()
        with self._autocast:
            loss = self.loss(self.view(self.images), drawn)
        loss.backward()
        self._optimiser.step()
        with torch.no_grad():
            self.images.copy_(self.images.clamp(self._low, self._high))
        if self._released and (value := loss.item()) < self._best:
            self._best, self.best_images = value, self.images.detach().cpu().clone()
        self._step += 1


def priors(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Total variation in both norms, and the L2 norm: computed by the released code, unused."""
    differences = (
        images[..., :, :-1] - images[..., :, 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )
    l1 = 255.0 * sum((d.abs() / 255.0).mean() for d in differences)
    return l1, sum(d.norm() for d in differences), images.flatten(1).norm(dim=1).mean()


# --- labels and students ---------------------------------------------------------------------


def augment(
    images_uint8: torch.Tensor, rng: random.Random, crop_min: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Normalise; crop and flip each image by itself; CutMix one box of a batch.

    Args:
      images_uint8: (B, 3, H, W), channels-last.

    Returns:
      The images, each one's partner, and the share of an image that is its own.
    """
    mean, std = (torch.tensor(x, device=images_uint8.device).view(3, 1, 1) for x in (MEAN, STD))
    images = (images_uint8.float() / 255 - mean) / std
    count, _, size, _ = images.shape
    views = torch.empty_like(images)
    for i in range(count):
        top, left, height, width = crop_box(size, rng, (crop_min, 1.0))
        view = resize(images[i : i + 1, :, top : top + height, left : left + width], size)
        views[i : i + 1] = view.flip(-1) if rng.random() < 0.5 else view
    side = size * math.sqrt(1 - rng.random())
    low = [int(max(0, rng.randrange(size) - side / 2)) for _ in range(2)]
    high = [int(min(size, at + side)) for at in low]
    partner = torch.randperm(count, device=images.device)
    box = (..., slice(low[0], high[0]), slice(low[1], high[1]))
    views[box] = views[partner][box]
    return views, partner, 1 - (high[0] - low[0]) * (high[1] - low[1]) / size**2


class Labeller:
    """Soft labels: the mean logits of networks over augmented views."""

    def __init__(
        self, names: Sequence[str], *, size: int, small_stem: bool, classes: int, device: str
    ):
        nets = [network(name, small_stem=small_stem, classes=classes) for name in names]
        self._nets = [
            calibrate(net, size).to(device, memory_format=torch.channels_last) for net in nets
        ]
        self._device, self._rng = device, random.Random(0)

    @torch.inference_mode()
    def label(self, images_uint8_BHWC: np.ndarray) -> np.ndarray:
        """float16 logits (B, K)."""
        images = to_device(images_uint8_BHWC, self._device)
        views, _, _ = augment(images, self._rng, 0.25)
        logits = sum(net(views) for net in self._nets) / len(self._nets)
        return logits.half().cpu().numpy()


class Student:
    """A network in training: AdamW on (logits - soft labels)^2 + 0.1 cross entropy, in parts."""

    def __init__(
        self, name: str, *, small_stem: bool, classes: int, device: str, accumulate: int = 2
    ):
        net = network(name, small_stem=small_stem, classes=classes).train()
        net = net.to(device, memory_format=torch.channels_last)
        self._optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
        gpu = device != "cpu"
        self._net = torch.compile(net) if gpu else net
        self._autocast = torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext()
        self._device, self._accumulate, self._rng = device, accumulate, random.Random(0)

    def step(
        self, images_uint8_BHWC: np.ndarray, labels: np.ndarray, soft: np.ndarray
    ) -> torch.Tensor:
        """One step of the optimiser; the loss of the last part."""
        images, own, partner, share = self._batch(images_uint8_BHWC, labels)
        soft = torch.from_numpy(soft).to(self._device).float()
        self._optimiser.zero_grad()
        for part in torch.arange(len(own), device=self._device).chunk(self._accumulate):
            with self._autocast:
                logits = self._net(images[part]).float()
            loss = F.mse_loss(logits, soft[part]) + 0.1 * (
                share * F.cross_entropy(logits, own[part])
                + (1 - share) * F.cross_entropy(logits, own[partner[part]])
            )
            (loss * len(part) / len(own)).backward()
        self._optimiser.step()
        return loss.detach()

    def _batch(self, images_uint8_BHWC: np.ndarray, labels: np.ndarray):
        images = to_device(images_uint8_BHWC, self._device)
        views, partner, share = augment(images, self._rng, 0.25)
        return views, torch.from_numpy(labels).long().to(self._device), partner, share


def to_device(images_uint8_BHWC: np.ndarray, device: str) -> torch.Tensor:
    """(B, 3, H, W), channels-last, without a copy on a CPU."""
    return torch.from_numpy(images_uint8_BHWC).to(device).permute(0, 3, 1, 2)
