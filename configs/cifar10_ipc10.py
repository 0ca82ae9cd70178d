"""PRISM on CIFAR-10, 10 images per class, with published ResNets for 32 pixels.

    python -m prism_jax.main --config=configs/cifar10_ipc10.py

Arguments after the colon, separated by commas:
  cpu      few iterations and epochs, narrow networks: a quarter of an hour on two cores
  folder   images that somebody else made, in --config.recover.initialise_from=DIR

resnet44 (primary) and resnet20 are imported; a MobileNetV2 and a ShuffleNetV2 are trained here. The
files are those of github.com/akamaster/pytorch_resnet_cifar10; they were trained with ImageNet's
normalisation.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base

# Published, and trained here.
CHECKPOINTS = {"resnet44": "resnet44-014dd654.th", "resnet20": "resnet20-12fca82f.th"}
TRAINED: dict[str, dict[str, Any]] = {
    "mobilenet_v2": dict(architecture="mobilenet_v2", width=0.5, stem="small"),
    "shufflenet_v2_x0_5": dict(architecture="shufflenet_v2_x0_5", stem="small"),
}
NORMALISATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def get_config(arg: str = "") -> ConfigDict:
    words = base.words(arg, "cpu", "folder")
    c = base.get_config()
    c.name = "cifar10_ipc10"
    c.dataset.name = "cifar10"
    c.dataset.source = "cifar"
    c.dataset.path = "data/cifar-10-batches-py"
    c.dataset.image_size = 32
    c.dataset.num_classes = 10
    for name, file in CHECKPOINTS.items():
        c.networks[name] = base.network(
            architecture=name, checkpoint=f"data/teachers/{file}", **NORMALISATION
        )
    for name, network in TRAINED.items():
        c.networks[name] = base.network(**network)

    c.squeeze.teachers = (*CHECKPOINTS, *TRAINED)
    c.squeeze.epochs = 200
    c.squeeze.batch_size = 128
    c.squeeze.weight_decay = 5e-4
    c.squeeze.crop_min = 0.5

    c.recover.primary = "resnet44"
    c.recover.pool = c.squeeze.teachers
    c.recover.roll = 4  # 32 of 224 pixels

    c.relabel.teachers = ("resnet44",)
    c.validate.students = ("resnet20", "convnet_d3")

    if "cpu" in words:
        c.name += "_cpu"
        c.networks.mobilenet_v2.width = 0.35
        c.networks.mobilenet_v2.depth = c.networks.shufflenet_v2_x0_5.depth = 0.25
        c.networks.resnet20_narrow = base.network(architecture="resnet20", width=0.5)
        c.networks.convnet_d3_narrow = base.network(architecture="convnet_d3", width=0.25)
        c.squeeze.epochs = 3
        c.squeeze.optimiser = "adamw"
        c.squeeze.learning_rate = 3e-3
        c.squeeze.weight_decay = 0.01
        c.recover.iterations = 60
        c.relabel.epochs = c.validate.epochs = 100
        c.validate.students = ("resnet20_narrow", "convnet_d3_narrow")
        c.validate.eval_every = 25
    return base.folder(c) if "folder" in words else c
