"""PRISM on ImageNet-1K, 1 image per class.

    python -m prism_jax.main --config=configs/imagenet_ipc1.py

See imagenet.py for the settings and the arguments.
"""

from ml_collections import ConfigDict

from configs import imagenet


def get_config(arg: str = "") -> ConfigDict:
    return imagenet.config(ipc=1, arg=arg)
