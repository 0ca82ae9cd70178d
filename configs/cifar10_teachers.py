"""Teachers for CIFAR-10 beside the published ResNets: three networks of other kinds.

    python -m prism_jax.main --config=configs/cifar10_teachers.py --stages=squeeze

A tenth of the training images is held out, so that they can say later which of several sets is
best. `configs/compare/cifar10.py` reads what this makes, from runs/cifar10_teachers/squeeze.

Forty epochs: after ten the three are at 84.5, 81.4 and 80.3 % where most of the images are a lossy
copy (benchmarks/cifar10_copies.py).
"""

from ml_collections import ConfigDict

from configs import base, cifar10_ipc10

NETWORKS = {**cifar10_ipc10.TRAINED, "convnet_d3_bn": dict(architecture="convnet_d3_bn")}


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; this config takes none")
    c = cifar10_ipc10.get_config()
    c.name = "cifar10_teachers"
    c.dataset.held_out = 0.1
    c.networks.convnet_d3_bn = base.network(**NETWORKS["convnet_d3_bn"])
    c.squeeze.teachers = c.recover.pool = tuple(NETWORKS)
    c.squeeze.epochs = 40
    c.squeeze.crop_pad = 4
    c.recover.primary = "mobilenet_v2"
    c.relabel.teachers = ("mobilenet_v2",)
    c.validate.students = ("convnet_d3_bn",)
    return c
