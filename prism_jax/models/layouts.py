"""The names that other code bases give to the tensors of the zoo's networks.

Ours are torchvision's, and timm's for the plain vision transformers. A file has a layout if one of
its tensors bears the layout's sign; the rules are patterns and replacements, tried in order on
every name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Counters, and index tables that the code computes.
UNUSED = re.compile(r"(^|\.)(num_batches_tracked|relative_position_index|attn_mask)$")

Rules = tuple[tuple[str, str], ...]


class Layout(NamedTuple):
    sign: str = ""  # a pattern
    rules: Rules = ()


def _below(old: str, new: str, parts: dict[str, str]) -> Rules:
    """Rules for a module's parts: ``old`` (a pattern) + old name becomes ``new`` + new name."""
    return tuple((rf"^{old}{part}\.", f"{new}{name}.") for part, name in parts.items())


def _mobilenet_v2() -> Rules:
    first = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
    other = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1"}
    other |= {"conv_pwl": "2", "bn3": "3"}
    rules: Rules = ()
    number = 0  # ours are counted through
    for stage, repeats in enumerate((1, 2, 3, 4, 3, 3, 1)):
        for block in range(repeats):
            number += 1
            old, new = rf"blocks\.{stage}\.{block}\.", f"features.{number}.conv."
            rules += _below(old, new, first if stage == 0 else other)
    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    ends |= {"conv_head": "features.18.0", "bn2": "features.18.1", "classifier": "classifier.1"}
    return rules + _below("", "", ends)


def _efficientnet() -> Rules:
    first = {"conv_dw": "0.0", "bn1": "0.1", r"se\.conv_reduce": "1.fc1"}
    first |= {r"se\.conv_expand": "1.fc2", "conv_pw": "2.0", "bn2": "2.1"}
    other = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1"}
    other |= {r"se\.conv_reduce": "2.fc1", r"se\.conv_expand": "2.fc2"}
    other |= {"conv_pwl": "3.0", "bn3": "3.1"}
    rules = _below(r"blocks\.0\.(\d+)\.", r"features.1.\1.block.", first)
    for stage in range(1, 7):
        new = rf"features.{stage + 1}.\1.block."
        rules += _below(rf"blocks\.{stage}\.(\d+)\.", new, other)
    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    ends |= {"conv_head": "features.8.0", "bn2": "features.8.1", "classifier": "classifier.1"}
    return rules + _below("", "", ends)


def _mnasnet() -> Rules:
    first = {"conv_dw": "3", "bn1": "4", "conv_pw": "6", "bn2": "7"}
    other = {"conv_pw": "0", "bn1": "1", "conv_dw": "3", "bn2": "4", "conv_pwl": "6", "bn3": "7"}
    rules = _below(r"blocks\.0\.0\.", "layers.", first)
    for stage in range(1, 7):
        new = rf"layers.{stage + 7}.\1.layers."
        rules += _below(rf"blocks\.{stage}\.(\d+)\.", new, other)
    ends = {"conv_stem": "layers.0", "bn1": "layers.1"}
    ends |= {"conv_head": "layers.14", "bn2": "layers.15", "classifier": "classifier.1"}
    return rules + _below("", "", ends)


def _regnet() -> Rules:
    rules = _below("", "", {r"stem\.conv": "stem.0", r"stem\.bn": "stem.1", r"head\.fc": "fc"})
    parts = {r"downsample\.conv": "proj.0", r"downsample\.bn": "proj.1", "se": "f.se"}
    for number, letter in enumerate("abc", 1):
        parts |= {rf"conv{number}\.conv": f"f.{letter}.0", rf"conv{number}\.bn": f"f.{letter}.1"}
    for stage in range(1, 5):
        for block in range(1, 11):
            new = f"trunk_output.block{stage}.block{stage}-{block - 1}."
            rules += _below(rf"s{stage}\.b{block}\.", new, parts)
    return rules


def _swin(downsample_after: bool) -> Rules:
    ends = {r"patch_embed\.proj": "features.0.0", r"patch_embed\.norm": "features.0.2"}
    rules = _below("", "", ends | {r"head\.fc": "head"})
    for stage in range(4):
        place = 2 * stage + (2 if downsample_after else 0)
        parts = {r"blocks\.(\d+)": rf"features.{2 * stage + 1}.\1"}
        rules += _below(rf"layers\.{stage}\.", "", parts | {"downsample": f"features.{place}"})
    return (*rules, (r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.3."))


def _convnext(ends: dict[str, str], downsample: str, block: str) -> Rules:
    """``downsample`` and ``block`` are the original's names of stage ``{}``'s parts."""
    rules = _below("", "", ends)
    for stage in range(4):
        rules += _below(downsample.format(stage), f"features.{2 * stage}", {"": ""})
        rules += _below(block.format(stage), rf"features.{2 * stage + 1}.\1", {"": ""})
    return (
        *rules,
        (r"\.(conv_dw|dwconv)\.", ".block.0."),
        (r"\.norm\.", ".block.2."),
        (r"\.(mlp\.fc|pwconv)1\.", ".block.3."),
        (r"\.(mlp\.fc|pwconv)2\.", ".block.5."),
        (r"\.gamma$", ".layer_scale"),
    )


LAYOUTS: dict[str, Layout] = {
    "torchvision": Layout(),
    "timm": Layout(),  # also for resnets and densenets, whose names are torchvision's
    "cifar": Layout(),
    "cifar_fc": Layout(r"^fc\.", ((r"^fc\.", "linear."),)),
    "kuangliu": Layout(  # pytorch-cifar's, with the small stem
        r"^linear\.", ((r"^linear\.", "fc."), (r"^(layer\d\.\d+)\.shortcut\.", r"\1.downsample."))
    ),
    "condensation": Layout(),
    "densenet_2017": Layout(
        rules=((r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),),
    ),
    "swin_2021": Layout(r"^layers\.0\.downsample\.", _swin(downsample_after=True)),
    "convnext_2022": Layout(
        r"^downsample_layers\.",
        _convnext(
            {"norm": "classifier.0", "head": "classifier.2"},
            downsample=r"downsample_layers\.{}",
            block=r"stages\.{}\.(\d+)",
        ),
    ),
    "timm_mobilenet_v2": Layout(r"^conv_stem\.", _mobilenet_v2()),
    "timm_efficientnet": Layout(r"^conv_stem\.", _efficientnet()),
    "timm_mnasnet": Layout(r"^conv_stem\.", _mnasnet()),
    "timm_regnet": Layout(r"^s1\.b1\.", _regnet()),
    "timm_swin": Layout(r"^layers\.3\.downsample\.", _swin(downsample_after=False)),
    "timm_convnext": Layout(
        r"^stages\.0\.blocks\.",
        _convnext(
            {"stem": "features.0", r"head\.norm": "classifier.0", r"head\.fc": "classifier.2"},
            downsample=r"stages\.{}\.downsample",
            block=r"stages\.{}\.blocks\.(\d+)",
        ),
    ),
    "timm_vgg": Layout(
        r"^pre_logits\.",
        _below("", "", {r"pre_logits\.fc1": "classifier.0", r"pre_logits\.fc2": "classifier.3",
                        r"head\.fc": "classifier.6"}),
    ),
}  # fmt: skip


def rename(tensors: dict[str, np.ndarray], layouts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Give a file's tensors our names and drop what no network needs.

    Args:
      tensors: by the file's names.
      layouts: keys of ``LAYOUTS``; only those whose sign is seen are applied.
    """
    renamed = {}
    for name, ours in new_names(tensors, layouts).items():
        tensor = tensors[name]
        if ours.endswith("layer_scale"):
            tensor = tensor.reshape(-1, 1, 1)
        elif name.startswith("pre_logits.") and tensor.ndim == 4:  # a dense layer as a convolution
            tensor = tensor.reshape(len(tensor), -1)
        renamed[ours] = tensor
    return renamed


def new_names(names: Iterable[str], layouts: tuple[str, ...]) -> dict[str, str]:
    """Our names by the file's, without those that no network needs; see :func:`rename`."""
    names = list(names)
    seen = [LAYOUTS[k] for k in layouts if any(re.search(LAYOUTS[k].sign, n) for n in names)]
    rules = [(re.compile(old), new) for layout in seen for old, new in layout.rules]
    found = {}
    for name in names:
        if UNUSED.search(name):
            continue
        found[name] = name
        for pattern, replacement in rules:
            found[name] = pattern.sub(replacement, found[name])
    return found
