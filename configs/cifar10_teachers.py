"""Teachers for CIFAR-10 beside the published ResNets: three networks of other kinds.

    python -m prism_jax.main --config=configs/cifar10_teachers.py --stages=squeeze

A tenth of the training images is held out, so that they can say later which of several sets is
best. `configs/compare/cifar10.py` reads what this makes, from runs/cifar10_teachers/squeeze.

Forty epochs: after ten the three are at 84.5, 81.4 and 80.3 % where most of the images are a lossy
copy (benchmarks/cifar10_copies.py).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base

NETWORKS: dict[str, dict[str, Any]] = {
    "mobilenet_v2": dict(architecture="mobilenet_v2", width=0.5, stem="small"),
    "shufflenet_v2_x0_5": dict(architecture="shufflenet_v2_x0_5", stem="small"),
    "convnet_d3_bn": dict(architecture="convnet_d3_bn"),
}


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; this config takes none")
    c = base.get_config()
    c.name = "cifar10_teachers"
    c.dataset.name = "cifar10"
    c.dataset.source = "cifar"
    c.dataset.path = "data/cifar-10-batches-py"
    c.dataset.image_size = 32
    c.dataset.num_classes = 10
    c.dataset.held_out = 0.1
    for name, network in NETWORKS.items():
        c.networks[name] = base.network(**network)
    c.squeeze.teachers = tuple(NETWORKS)
    c.squeeze.epochs = 40
    c.squeeze.batch_size = 128
    c.squeeze.weight_decay = 5e-4
    c.squeeze.crop_pad = 4
    c.recover.primary = "mobilenet_v2"
    c.recover.pool = c.squeeze.teachers
    c.recover.roll = 4
    c.relabel.teachers = ("mobilenet_v2",)
    c.validate.students = ("convnet_d3_bn",)
    return c
