"""The reference side of the parity tests: the published PyTorch networks, scaled as the case says.

A narrow one is the published network whose layers were given the shapes of our parameters. A
small stem is the published network with the layers changed that ``SMALL_STEMS`` changes.
"""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from models import parity
from torch import nn

from prism_jax.models import ARCHITECTURES

# torchvision's compiled operators are not needed, but it looks for them when imported.
if not hasattr(torch.ops.torchvision, "nms"):
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
import torchvision.models as tv  # noqa: E402
from torchvision.models import convnext, densenet, regnet, swin_transformer, vgg  # noqa: E402
from torchvision.models.efficientnet import EfficientNet, MBConvConfig  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # noqa: E402


def counts(blocks, depth):
    return [max(1, round(count * depth)) for count in blocks]


def resnet(case, block, blocks, **kwargs):
    return ResNet(block, counts(blocks, case.depth), num_classes=case.num_classes, **kwargs)


def mobilenet_v2(case):
    setting = [
        [t, c, counts([n], case.depth)[0], s]
        for t, c, n, s in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
    ]
    return tv.MobileNetV2(case.num_classes, inverted_residual_setting=setting)


def shufflenet(case, features):
    return tv.ShuffleNetV2(counts((4, 8, 4), case.depth), features, case.num_classes)


def efficientnet_b0(case):
    setting = [
        MBConvConfig(*row, counts([n], case.depth)[0], 1.0, 1.0)
        for *row, n in (
            (1, 3, 1, 32, 16, 1),
            (6, 3, 2, 16, 24, 2),
            (6, 5, 2, 24, 40, 2),
            (6, 3, 2, 40, 80, 3),
            (6, 5, 1, 80, 112, 3),
            (6, 5, 2, 112, 192, 4),
            (6, 3, 1, 192, 320, 1),
        )
    ]
    return EfficientNet(setting, 0.2, 0.2, num_classes=case.num_classes)


def mnasnet(case, alpha):
    network = tv.MNASNet(alpha, case.num_classes)
    for i in range(8, 14):
        stack = network.layers[i]
        network.layers[i] = stack[: counts([len(stack)], case.depth)[0]]
    return network


def densenet121(case):
    return densenet.DenseNet(
        32, counts((6, 12, 24, 16), case.depth), 64, num_classes=case.num_classes
    )


def vgg11_bn(case):
    plan = []
    stages = zip((64, 128, 256, 512, 512), counts((1, 1, 2, 2, 2), case.depth), strict=True)
    for features, count in stages:
        plan += [features] * count + ["M"]
    return vgg.VGG(vgg.make_layers(plan, batch_norm=True), case.num_classes)


def regnet_y_8gf(case):
    with torch.device("cpu"):
        parameters = regnet.BlockParams.from_init_params(
            depth=17, w_0=192, w_a=76.82, w_m=2.19, group_width=56, se_ratio=0.25
        )
    parameters.depths = counts(parameters.depths, case.depth)
    return regnet.RegNet(parameters, case.num_classes)


def vit(case, heads, drop_path=0.0):
    return timm.models.vision_transformer.VisionTransformer(
        img_size=case.image_size,
        patch_size=4 if case.stem == "small" else 16,
        drop_path_rate=drop_path,
        embed_dim=64 * heads,
        depth=counts([12], case.depth)[0],
        num_heads=heads,
        num_classes=case.num_classes,
    )


def swin_tiny(case):
    blocks = counts((2, 2, 6, 2), case.depth)
    patch, window = (2, 4) if case.stem == "small" else (4, 7)
    return swin_transformer.SwinTransformer(
        [patch] * 2,
        96,
        blocks,
        [3, 6, 12, 24],
        [window] * 2,
        stochastic_depth_prob=0.2,
        num_classes=case.num_classes,
    )


def convnext_tiny(case):
    blocks = counts((3, 3, 9, 3), case.depth)
    widths = (96, 192, 384, 768, None)
    setting = [
        convnext.CNBlockConfig(widths[i], widths[i + 1], count) for i, count in enumerate(blocks)
    ]
    return convnext.ConvNeXt(setting, 0.1, num_classes=case.num_classes)


class CifarBlock(nn.Module):
    def __init__(self, inputs, features, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.stride = stride

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            extra = (y.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    def __init__(self, case, blocks):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (inputs, features) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            stack = [CifarBlock(inputs, features, 1 if stage == 1 else 2)]
            count = counts([blocks], case.depth)[0]
            stack += [CifarBlock(features, features, 1) for _ in range(count - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*stack))
        self.linear = nn.Linear(64, case.num_classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, inputs, features, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.convShortcut = (
            None if inputs == features else nn.Conv2d(inputs, features, 1, stride, 0, bias=False)
        )

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideStage(nn.Module):
    def __init__(self, inputs, features, stride, count):
        super().__init__()
        blocks = [WideBlock(inputs, features, stride)]
        blocks += [WideBlock(features, features, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, case):
        super().__init__()
        count = counts([2], case.depth)[0]
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = WideStage(16, 32, 1, count)
        self.block2 = WideStage(32, 64, 2, count)
        self.block3 = WideStage(64, 128, 2, count)
        self.bn1 = nn.BatchNorm2d(128)
        self.fc = nn.Linear(128, case.num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class ConvNet(nn.Module):
    def __init__(self, case, blocks, norm):
        super().__init__()
        stack, inputs, features = [], 3, int(128 * case.width)
        for _ in range(blocks):
            stack.append(nn.Conv2d(inputs, features, 3, padding=1))
            if norm == "batch":
                stack.append(nn.BatchNorm2d(features))
            elif norm == "instance":
                stack.append(nn.GroupNorm(features, features))
            stack += [nn.ReLU(), nn.AvgPool2d(2)]
            inputs = features
        self.features = nn.Sequential(*stack)
        side = case.image_size // 2**blocks
        self.classifier = nn.Linear(features * side * side, case.num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


NETWORKS = {
    "resnet18": partial(resnet, block=BasicBlock, blocks=(2, 2, 2, 2)),
    "resnet34": partial(resnet, block=BasicBlock, blocks=(3, 4, 6, 3)),
    "resnet50": partial(resnet, block=Bottleneck, blocks=(3, 4, 6, 3)),
    "resnet101": partial(resnet, block=Bottleneck, blocks=(3, 4, 23, 3)),
    "wide_resnet50_2": partial(resnet, block=Bottleneck, blocks=(3, 4, 6, 3), width_per_group=128),
    "resnet20": partial(CifarResNet, blocks=3),
    "resnet32": partial(CifarResNet, blocks=5),
    "resnet44": partial(CifarResNet, blocks=7),
    "resnet56": partial(CifarResNet, blocks=9),
    "wrn_16_2": WideResNet,
    "mobilenet_v2": mobilenet_v2,
    "shufflenet_v2_x0_5": partial(shufflenet, features=[24, 48, 96, 192, 1024]),
    "shufflenet_v2_x1_0": partial(shufflenet, features=[24, 116, 232, 464, 1024]),
    "shufflenet_v2_x2_0": partial(shufflenet, features=[24, 244, 488, 976, 2048]),
    "efficientnet_b0": efficientnet_b0,
    "mnasnet1_0": partial(mnasnet, alpha=1.0),
    "mnasnet1_3": partial(mnasnet, alpha=1.3),
    "densenet121": densenet121,
    "vgg11_bn": vgg11_bn,
    "regnet_y_8gf": regnet_y_8gf,
    "alexnet": lambda case: tv.AlexNet(case.num_classes),
    "vit_tiny_patch16_224": partial(vit, heads=3),
    "vit_small_patch16_224": partial(vit, heads=6),
    "deit_tiny": partial(vit, heads=3, drop_path=0.1),
    "swin_tiny": swin_tiny,
    "convnext_tiny": convnext_tiny,
    **{
        f"convnet_d{blocks}{suffix}": partial(ConvNet, blocks=blocks, norm=norm)
        for blocks in range(1, 7)
        for suffix, norm in (("", "instance"), ("_bn", "batch"), ("_none", "none"))
    },
}


def small_resnet(net):
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.Identity()


def small_shufflenet(net):
    net.conv1[0].stride = (1, 1)
    net.maxpool = nn.Identity()


def small_mobilenet(net):
    net.features[0][0].stride = net.features[2].conv[1][0].stride = (1, 1)


def small_efficientnet(net):
    net.features[0][0].stride = net.features[2][0].block[1][0].stride = (1, 1)


def small_mnasnet(net):
    net.layers[0].stride = net.layers[8][0].layers[3].stride = (1, 1)


def small_densenet(net):
    net.features.conv0 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.features.pool0 = nn.Identity()


def small_vgg(net):
    first_pool = next(i for i, part in enumerate(net.features) if isinstance(part, nn.MaxPool2d))
    net.features[first_pool] = nn.Identity()
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    net.classifier[0] = nn.Linear(512, 4096)


def small_regnet(net):
    first = net.trunk_output[0][0]
    net.stem[0].stride = first.f.b[0].stride = first.proj[0].stride = (1, 1)


def small_alexnet(net):
    net.features[0] = nn.Conv2d(3, 64, 3, 1, 1)
    net.features[2] = nn.Identity()
    net.avgpool = nn.AdaptiveAvgPool2d(2)
    net.classifier[1] = nn.Linear(256 * 4, 4096)


def small_convnext(net):
    net.features[0][0] = nn.Conv2d(3, 96, 3, 1, 1)


# By family of the registry. The others have one stem, or build it themselves.
SMALL_STEMS = {
    "resnet": small_resnet,
    "wide_resnet": small_resnet,
    "shufflenet": small_shufflenet,
    "mobilenet": small_mobilenet,
    "efficientnet": small_efficientnet,
    "mnasnet": small_mnasnet,
    "densenet": small_densenet,
    "vgg": small_vgg,
    "regnet": small_regnet,
    "alexnet": small_alexnet,
    "convnext": small_convnext,
}


def narrow(net: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give the layers of a network other numbers of channels: parameters of these shapes."""
    for name, part in net.named_modules():
        if isinstance(part, nn.Conv2d):
            part.out_channels, per_group = shapes[f"{name}.weight"][:2]
            # All convolutions with groups keep the number of channels.
            part.groups = 1 if part.groups == 1 else part.out_channels // per_group
            part.in_channels = per_group * part.groups
        elif isinstance(part, nn.BatchNorm2d):
            (part.num_features,) = shapes[f"{name}.weight"]
        elif isinstance(part, nn.LayerNorm):
            part.normalized_shape = shapes[f"{name}.weight"]
        elif isinstance(part, nn.Linear):
            part.out_features, part.in_features = shapes[f"{name}.weight"]
        for leaf, value in [*part.named_parameters(recurse=False)]:
            drawn_later = torch.empty(shapes[f"{name}.{leaf}"], dtype=value.dtype)
            setattr(part, leaf, nn.Parameter(drawn_later))
        for leaf, value in [*part.named_buffers(recurse=False)]:
            if value.ndim:
                part.register_buffer(leaf, torch.empty(shapes[f"{name}.{leaf}"], dtype=value.dtype))


def drop_alike(net: nn.Module) -> None:
    """Make dropout and stochastic depth keep what ``parity.kept`` says, in order of their calls."""
    calls = itertools.count()

    def forward(x, *, part, rate, whole_images):
        if not part.training:
            return x
        shape = x.shape[:1] + (1,) * (x.ndim - 1) if whole_images else x.shape
        return x * torch.from_numpy(parity.kept(next(calls), tuple(shape))) / (1 - rate)

    for part in net.modules():
        kind = type(part).__name__
        rate = getattr(part, "drop_prob" if kind == "DropPath" else "p", 0.0)
        if kind in ("Dropout", "StochasticDepth", "DropPath") and rate > 0:
            whole_images = kind != "Dropout"
            part.forward = partial(forward, part=part, rate=rate, whole_images=whole_images)


def network(case: parity.Case) -> nn.Module:
    """Build the reference in float64 with the case's weights; nothing in it is random."""
    net = NETWORKS[case.architecture](case)
    family = ARCHITECTURES[case.architecture].family
    if case.stem == "small" and family in SMALL_STEMS:
        SMALL_STEMS[family](net)
    net.double()  # with the layers that the small stem put in
    if case.width < 1:
        narrow(net, {n: leaf.torch_shape for n, leaf in parity.leaves_of(case).items()})
    drop_alike(net)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.from_numpy(parity.tensor(name, tuple(value.shape))))
    return net.double().eval()


def outputs(case: parity.Case) -> dict[str, np.ndarray]:
    """Logits, moments of every BatchNorm's input, gradients: by name, in PyTorch's layout."""
    images_BHWC, labels_B = parity.batch(case)
    images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).requires_grad_()
    labels = torch.from_numpy(labels_B).long()
    module, moments, alignment = network(case), {}, []

    def listen(name):
        def hook(norm, inputs):
            mean = inputs[0].mean((0, 2, 3))
            var = inputs[0].var((0, 2, 3), unbiased=False)
            moments[f"moments.{name}.running_mean"] = mean.detach().numpy()
            moments[f"moments.{name}.running_var"] = var.detach().numpy()
            gap = (mean - norm.running_mean).norm() + (var - norm.running_var).norm()
            alignment.append(gap if alignment else parity.FIRST_BN * gap)

        return hook

    hooks = [
        part.register_forward_pre_hook(listen(name))
        for name, part in module.named_modules()
        if isinstance(part, nn.BatchNorm2d)
    ]
    logits = module(images_BCHW)
    (F.cross_entropy(logits, labels) + parity.ALPHA_BN * sum(alignment)).backward()
    found = {
        "logits": logits.detach().numpy(),
        "pixels": images_BCHW.grad.permute(0, 2, 3, 1).numpy(),
        **moments,
    }
    if case.train:
        for hook in hooks:
            hook.remove()
        module.zero_grad()
        F.cross_entropy(module.train()(images_BCHW.detach()), labels).backward()
        found |= {f"gradient.{n}": p.grad.numpy() for n, p in module.named_parameters()}
        running = {n: v for n, v in module.state_dict().items() if ".running_" in n}
        found |= {f"updated.{n}": v.numpy() for n, v in running.items()}
    return found
