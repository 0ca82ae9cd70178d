"""Every stage in seconds: the smallest experiment in which each of them has something to do.

Two teachers and a convnet outside the pool on 8-pixel digits; two images of each of four
classes, in four units.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    del arg
    c = base.get_config()
    c.name = "tiny"
    c.dataset.name = "digits"
    c.dataset.source = "sklearn"
    c.dataset.image_size = 8
    c.dataset.num_classes = 4

    c.networks.first = base.network(architecture="convnet_d1_bn", width=0.125)
    c.networks.second = base.network(architecture="convnet_d2_bn", width=0.125)
    c.networks.outside = base.network(architecture="convnet_d1", width=0.125)

    c.squeeze.teachers = ("first", "second", "outside")
    c.squeeze.epochs = 2
    c.squeeze.batch_size = 96
    c.squeeze.optimiser = "adamw"
    c.squeeze.learning_rate = 0.01
    c.squeeze.crop_min = 0.8
    c.squeeze.flip = False

    c.recover.ipc = 2
    c.recover.iterations = 12
    c.recover.primary = "first"
    c.recover.pool = ("first", "second")
    c.recover.granularity = "per_iteration"
    c.recover.batch_size = 2
    c.recover.flip = False
    c.recover.roll = 1
    c.recover.steps_per_dispatch = 3

    c.relabel.teachers = ("first",)
    c.relabel.epochs = c.validate.epochs = 6
    c.relabel.batch_size = c.validate.batch_size = 4
    c.relabel.flip = False

    c.validate.students = ("outside",)
    c.validate.accumulate = 2
    c.validate.ema = 0.8
    c.validate.eval_every = 2

    c.parallel.train_devices = 1  # tests compare students bit for bit

    c.analyse.network = "outside"
    c.analyse.grid_classes = 4
    c.analyse.grid_slots = 2
    return c
