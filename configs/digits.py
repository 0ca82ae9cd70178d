"""PRISM on scikit-learn's handwritten digits, shared by digits_ipc*.py and digits_sre2l_ipc*.py.

1,797 real images that come with scikit-learn: 8x8 grey pixels, enlarged to 16x16. A fixed
stratified split keeps 360 for testing; they are used for nothing else. There is one grey
channel and no conversion to colour: the stems take one channel, PNGs are greyscale.

Four small teachers of different families are trained in a minute, and a plain convnet outside
the pool, which is also a student and measures diversity.
"""

from ml_collections import ConfigDict

from configs import base

SMALL = {"stem": "small"}
NETWORKS = {
    "resnet18": dict(architecture="resnet18", width=0.25, depth=0.5, **SMALL),
    "mobilenet_v2": dict(architecture="mobilenet_v2", width=0.35, depth=0.25, **SMALL),
    "efficientnet_b0": dict(architecture="efficientnet_b0", width=0.25, depth=0.25, **SMALL),
    "shufflenet_v2_x0_5": dict(architecture="shufflenet_v2_x0_5", depth=0.25, **SMALL),
    "convnet": dict(architecture="convnet_d3", width=0.25),
}


def config(ipc: int, method: str = "prism") -> ConfigDict:
    c = base.get_config()
    c.name = f"digits_ipc{ipc}" if method == "prism" else f"digits_{method}_ipc{ipc}"
    c.preset = method
    c.dataset.name = "digits"
    c.dataset.source = "sklearn"
    c.dataset.image_size = 16
    c.dataset.num_classes = 10
    for name, fields in NETWORKS.items():
        c.networks[name] = base.network(**fields)

    c.squeeze.teachers = tuple(NETWORKS)
    c.squeeze.epochs = 10
    c.squeeze.batch_size = 64
    c.squeeze.optimiser = "adamw"
    c.squeeze.learning_rate = 3e-3
    c.squeeze.weight_decay = 0.01
    c.squeeze.crop_min = 0.6
    c.squeeze.flip = False  # a mirrored 2 is no 2

    c.recover.method = method
    c.recover.ipc = ipc
    c.recover.iterations = 500
    c.recover.flip = False
    c.recover.roll = 2  # 32 of 224 pixels
    if method == "sre2l":
        c.recover.pool = ("resnet18",)  # everything else is as in PRISM's config
    elif ipc == 1:
        # One slot is one draw per seed: with probability 1/8 the primary alone.
        c.recover.granularity = "per_iteration"

    c.relabel.epochs = c.validate.epochs = 150
    c.relabel.flip = False
    c.validate.students = ("resnet18", "convnet")
    if ipc == 1:
        c.relabel.epochs = c.validate.epochs = 300
        c.validate.accumulate = 1  # ten images are one BatchNorm group

    c.analyse.network = "convnet"
    return c
