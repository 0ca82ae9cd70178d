"""RDED: diverse and realistic mosaics of real patches, without any optimisation.

Paper: arXiv 2312.03526, CVPR 2024. Reports, ResNet-18: ImageNet-1K IPC 1 / 10 / 50:
6.6 / 42.0 / 56.5 %; Tiny-ImageNet IPC 1 / 10 / 50: 9.7 / 41.9 / 58.2 %; CIFAR-10: 22.9 / 37.1 /
62.1 %; CIFAR-100: 11.0 / 42.6 / 62.6 %.

    python -m prism_jax.main --config=configs/methods/rded.py:imagenet,ipc10
    python -m prism_jax.main --config=configs/methods/rded.py:digits

Of 300 real images of a class, each with the best of five random crops, the patches that a teacher
is surest of fill the images, four to an image at 224 pixels and one below. Labels are made for
shuffled patches, while students train.

Mended here, and how to bring it back:
  students see every batch twice, once for nothing but BatchNorm's running statistics: here once
  pixels truncated, JPEG at quality 75   :official (JPEG; without iterations pixels are exact)
  ImageNet's normalisation for every data set   --config.dataset.mean and .std
"""

from ml_collections import ConfigDict

from configs.methods import recipes


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin("rded", arg, datasets=recipes.DATASETS)
    factor = 2 if at.dataset == "imagenet" else 1
    c.recover.iterations = 0
    c.recover.pool = ()
    c.recover.batch_order = "class_major"
    c.recover.batch_size = None
    c.recover.initialise = "mosaic"
    c.recover.scorer = "resnet18"
    c.recover.patch_factor = factor
    if at.dataset == "digits":
        c.recover.patch_images = 100
    recipes.rded_students(c, at)
    c.relabel.mode = "online"
    c.relabel.crop_min = 1 / factor
    c.relabel.patch_shuffle = factor
    if at.official:
        c.recover.jpeg_quality = 75
    return recipes.finish(c, at)
