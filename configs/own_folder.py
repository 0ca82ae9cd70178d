"""PRISM on images of your own, teachers and all: one flag says where they are.

    python -m prism_jax.main --config=configs/own_folder.py --config.dataset.path=DIR

DIR holds train/<class>/<image> and test/<class>/<image>, with images of any kind and size. How
many classes there are, and whether the images are grey, is found there; the normalisation is
measured once. Teachers are trained here, at 64 pixels. Other useful flags:

    --config.dataset.name=my_birds       what reports call the set
    --config.dataset.source=tar          one .tar file; npz: arrays
    --config.dataset.image_size=128
    --config.recover.ipc=1               images per class; recover.short_classes=repeat where a
                                         class has fewer

Arguments after the colon, separated by commas:
  cpu      narrow networks and few iterations, for a first look on a laptop
  ipc1     as many images per class (ipc10), as configs/compare/own_folder.py asks for them
"""

import re

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    ipcs = re.findall(r"\bipc([0-9]+)\b", arg)
    words = base.words(arg, "cpu", *(f"ipc{n}" for n in ipcs))
    narrow = 0.25 if "cpu" in words else 1.0
    c = base.get_config()
    c.name = "own_folder"
    c.dataset.name = "own"
    c.dataset.source = "folder"
    c.dataset.image_size = 64
    c.dataset.num_classes = placeholder(int)  # as many as there are folders
    for name in base.POOL:
        c.networks[name] = base.network(architecture=name, stem="small", width=narrow)
    c.networks.shufflenet_v2_x0_5.width = 1.0  # it has no narrower form
    c.networks.convnet = base.network(architecture="convnet_d3", width=narrow)

    c.squeeze.teachers = (*base.POOL, "convnet")
    c.squeeze.epochs = 100
    c.squeeze.least_steps = 2000  # a few hundred images need more epochs
    c.squeeze.batch_size = 64
    c.squeeze.optimiser = "adamw"
    c.squeeze.learning_rate = 1e-3
    c.squeeze.weight_decay = 0.01
    c.squeeze.crop_min = 0.25

    c.recover.ipc = int(ipcs[-1]) if ipcs else 10
    c.recover.iterations = 1000
    c.recover.roll = 9  # 32 of 224 pixels
    c.validate.students = ("resnet18", "convnet")
    c.analyse.network = "convnet"

    if "cpu" in words:
        c.name += "_cpu"
        c.dataset.image_size = 32
        c.squeeze.epochs, c.squeeze.least_steps = 20, 600
        c.squeeze.learning_rate = 3e-3
        c.recover.iterations = 100
        c.recover.roll = 4
        c.relabel.epochs = c.validate.epochs = 50
    return c
