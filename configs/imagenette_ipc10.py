"""PRISM on Imagenette at 224 pixels, 10 images per class, with a published ImageNet network.

    python -m prism_jax.main --config=configs/imagenette_ipc10.py

Arguments after the colon, separated by commas:
  cpu      few iterations and epochs, narrow networks: a quarter of an hour on two cores
  folder   images that somebody else made, in --config.recover.initialise_from=DIR

MobileNetV2 (primary) is imported, and ten of its 1,000 outputs are used; a narrow ResNet is
trained here. Weights of another origin may need another normalisation, for TensorFlow's
    --config.networks.mobilenet_v2.mean="(0.5, 0.5, 0.5)" and the same .std
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    words = base.words(arg, "cpu", "folder")
    c = base.get_config()
    c.name = "imagenette_ipc10"
    c.dataset.name = "imagenette"
    c.dataset.path = "data/imagenette2-320"  # train/<wnid>/*.JPEG and val/<wnid>/*.JPEG
    c.dataset.num_classes = 10
    c.networks.mobilenet_v2 = base.network(
        architecture="mobilenet_v2",
        checkpoint="data/teachers/mobilenet_v2-b0353104.pth",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        head_classes=1000,  # cut to the classes that the data has
    )
    c.networks.resnet18_narrow = base.network(architecture="resnet18", width=0.25)

    c.squeeze.teachers = ("mobilenet_v2", "resnet18_narrow")
    c.recover.primary = "mobilenet_v2"
    c.recover.pool = c.squeeze.teachers
    c.relabel.teachers = ("mobilenet_v2",)
    c.validate.students = ("resnet18",)

    if "cpu" in words:
        c.name += "_cpu"
        c.squeeze.epochs = 3
        c.squeeze.batch_size = 50
        c.squeeze.optimiser = "adamw"
        c.squeeze.learning_rate = 3e-3
        c.squeeze.weight_decay = 0.01
        c.squeeze.crop_min = 0.25
        c.recover.iterations = 20
        c.recover.steps_per_dispatch = 5
        c.relabel.epochs = c.validate.epochs = 20
        c.validate.students = ("resnet18_narrow",)
        c.validate.eval_every = 20
    return base.folder(c) if "folder" in words else c
