"""DD-Ranking's input: images.pt, labels.pt and lr.pt, and a config that is filled from the run.

Its names and constants are those of the package ``ddranking`` 0.2.0.
"""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from prism_jax.data.datasets import DATASETS, IMAGENET_NORMALISATION
from prism_jax.data.sets import torch_file
from prism_jax.data.sets.content import Content
from prism_jax.data.sources.own import default_normalisation, is_own
from prism_jax.types import Normalisation

CONFIG = "config.yaml"

_NAMES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "tiny_imagenet": "TinyImageNet",
    "imagenette": "ImageNette",
    "imagenet": "ImageNet1K",
}
# They test in these spaces, or ImageNet's, whatever a config says of its own images.
_SPACES = {
    name: Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    for name in ("cifar10", "cifar100")
}
# What training on all real images gives is known to them for these; else they train that, too,
# where they have a recipe for it.
_FULL_DATA_KNOWN = {("ImageNet1K", "ResNet-18-BN"), ("TinyImageNet", "ResNet-18-BN")}


def write(folder: str, content: Content) -> None:
    """The tensors as ``torch.load`` gives them, and ``config.yaml``.

    ``images.pt`` is float32 N x C x H x W in the normalised space that the config states.
    ``labels.pt`` is the logarithm of the mean soft labels, whose softmax they are, or without any
    the classes (int64).
    """
    os.makedirs(folder, exist_ok=True)
    space = normalisation_of(content)
    images: np.ndarray = content.images_NHWC[:].astype(np.float32) / np.float32(255)
    images = (images - np.array(space.mean, np.float32)) / np.array(space.std, np.float32)
    labels: np.ndarray = content.labels_N.astype(np.int64)
    if content.soft_NK is not None:
        labels = np.log(np.maximum(content.soft_NK, np.finfo(np.float32).tiny))
    rate = np.array(content.experiment["validate"]["learning_rate"], np.float32)
    files = {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2)), "labels": labels}
    if content.weights_N is not None:
        files["weights"] = content.weights_N
    for name, tensor in {**files, "lr": rate}.items():
        torch_file.save(os.path.join(folder, f"{name}.pt"), tensor)
    with open(os.path.join(folder, CONFIG), "w", encoding="utf-8") as file:
        file.write(config(content, space))


def normalisation_of(content: Content) -> Normalisation:
    """The space that DD-Ranking tests in, or of a set that it does not have, the run's."""
    data = content.experiment["dataset"]
    if data["name"] in _NAMES:
        return _SPACES.get(data["name"], IMAGENET_NORMALISATION)
    if data["mean"]:
        return Normalisation(tuple(data["mean"]), tuple(data["std"]))
    if data["name"] in DATASETS:
        return DATASETS[data["name"]].normalisation
    channels = content.images_NHWC.shape[-1]
    if is_own(data["name"]):
        return default_normalisation(channels)
    grey = channels == 1
    return Normalisation((0.5,), (0.5,)) if grey else IMAGENET_NORMALISATION


def config(content: Content, space: Normalisation) -> str:
    """The text of a config of DD-Ranking for this set."""
    experiment, validate = content.experiment, content.experiment["validate"]
    data, size = experiment["dataset"], content.images_NHWC.shape[1]
    method, ipc = experiment["recover"]["method"], content.ipc
    name = _NAMES.get(data["name"])
    students = validate["students"]
    architecture = experiment["networks"].get(students[0], {}).get("architecture", students[0])
    model = _model(architecture)
    schedule, same = _schedule(validate)
    trains = (name, model or "ResNet-18-BN") not in _FULL_DATA_KNOWN
    here = f"{method}/{name or data['name']}/IPC{ipc}"
    scale = experiment["relabel"]["crop_min"]
    lines = [
        f"# {content.title}. What DD-Ranking does not have is marked.",
        "",
        f"dataset: {name or data['name']}" + ("" if name else "  # not one of DD-Ranking's"),
        "real_data_path: ./dataset/",
        f"ipc: {ipc}",
        f"im_size: [{size}, {size}]",
        "",
        f"model_name: {model or 'ResNet-18-BN'}"
        + ("" if model else f"  # the run's student, {architecture}, is not one of DD-Ranking's"),
        "stu_use_torchvision: " + str(size >= 128).lower(),
        "tea_use_torchvision: " + str(size >= 128).lower(),
        "teacher_dir: ./teacher_models",
        "teacher_model_names: []",
        "",
        "# Tensors are shown as they are; custom_train_trans is for image_path. Mode M, in which",
        "# DD-Ranking's own teachers label each view, is the counterpart of the run's protocol:",
        "# export --format=folder, and give its train folder as image_path. Mode S labels random",
        "# real images by a teacher that version 0.2.0 does not load, and ends there.",
        "data_aug_func: none",
        "aug_params: {}",
        "use_zca: false",
        "use_aug_for_hard: false",
        "custom_train_trans:",
        f"  - name: RandomResizedCrop\n    args:\n      size: {size}\n      scale: [{scale}, 1.0]",
        *(["  - name: RandomHorizontalFlip\n    args:\n      p: 0.5"]
          if experiment["relabel"]["flip"] else []),
        "  - name: ToTensor",
        _normalise(space),
        "custom_val_trans:",
        *_test_steps(data, size),
        "  - name: ToTensor",
        _normalise(space),
        "",
        *(["soft_label_mode: S", *_loss(validate)] if content.soft_NK is not None else []),
        f"optimizer: {validate['optimiser']}",
        f"lr_scheduler: {schedule}" + ("" if same else f"  # ours: {validate['schedule']}"),
        "step_size: null",
        f"weight_decay: {_number(validate['weight_decay'])}",
        f"momentum: {_number(validate['momentum'])}",
        "num_eval: 5",
        f"num_epochs: {validate['epochs']}",
        f"syn_batch_size: {validate['batch_size']}",
        "real_batch_size: 256",
        f"default_lr: {_number(validate['learning_rate'])}",
        "num_workers: 4",
        "device: cuda",
        "dist: false",
        f"eval_full_data: {str(trains).lower()}"
        + ("  # of few data sets and networks they have a recipe for it" if trains else ""),
        "random_data_format: image",
        f"random_data_path: ./random_data/{here}/",
        f"save_path: ./results/{here}.csv",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _schedule(validate: dict[str, Any]) -> tuple[str, bool]:
    """Their schedule that is nearest the run's, and whether it is the same; theirs has no warm-up.

    Their "cosineannealing" ends at zero, their "cosine" is ours of zeta = 2, which ends at half.
    """
    name, zeta = validate["schedule"], validate["zeta"]
    ends = {"cosine": zeta or 1.0, "half_cosine": 2.0}.get(name)
    halfway = name in ("cos2", "cos2_continuous", "constant", "half_linear") or ends == 2.0
    same = ends in (1.0, 2.0) and not validate["warmup_epochs"]
    return "cosine" if halfway else "cosineannealing", same


def _normalise(space: Normalisation) -> str:
    mean, std = ([float(x) for x in numbers] for numbers in (space.mean, space.std))
    return f"  - name: Normalize\n    args:\n      mean: {mean}\n      std: {std}"


def _test_steps(data: dict[str, Any], size: int) -> list[str]:
    known = DATASETS.get(data["name"])
    ratio = known.resize_ratio if known else 256 / 224
    if ratio == 1:
        return []
    resize = f"  - name: Resize\n    args:\n      size: {round(ratio * size)}"
    return [resize, f"  - name: CenterCrop\n    args:\n      size: {size}"]


def _loss(validate: dict[str, Any]) -> list[str]:
    """The divergence from the label of each image, and the run's own loss where it is another.

    Their mse_gt needs hard labels beside the soft ones, which mode S does not hand to it.
    """
    divergence = validate["loss"] in ("kl", "kl_t2")
    temperature = _number(validate["temperature"]) if divergence else "1.0"
    scaled = str(validate["loss"] == "kl_t2").lower()
    mse = f"{{mse_weight: 1.0, ce_weight: {_number(validate['ce_weight'])}}}"
    own = f"  # in mode M: mse_gt, {mse}" if validate["loss"] == "mse_gt" else ""
    return [
        f"soft_label_criterion: kl{own}",
        f"loss_fn_kwargs:\n  temperature: {temperature}\n  scale_loss: {scaled}",
    ]


def _number(value: float) -> str:
    """A number as YAML 1.1 reads it: 0.0005, not 5e-05."""
    return np.format_float_positional(value, trim="0")


def _model(architecture: str) -> str | None:
    """Their name of an architecture."""
    if match := re.fullmatch(r"convnet_d([0-9])(_bn)?", architecture):
        return f"ConvNet-{match[1]}{'-BN' if match[2] else ''}"
    if match := re.fullmatch(r"resnet(18|34|50)", architecture):
        return f"ResNet-{match[1]}-BN"
    return "AlexNet" if architecture == "alexnet" else None
