"""All methods and the bar of real images on Imagenette at 224 px: what `imagenet.py` compares.

    python -m prism_jax.compare --config=configs/compare/imagenette.py
    python -m prism_jax.compare --config=configs/compare/imagenette.py --plan --target=h100

Ten of ImageNet's classes, IPC 1 and 10, three seeds of images with a student of every kind on
each. Methods keep ImageNet's recipes, and its networks, of which ten outputs are used. A tenth of
the training images is held out; the imported networks have seen them.
"""

from ml_collections import ConfigDict

from configs.compare import imagenet


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; this config takes none")
    c = imagenet.config("imagenette", "imagenet,imagenette")
    c.ipcs, c.seeds, c.student_seeds = (1, 10), (0, 1, 2), 1
    c.dataset = ConfigDict({"path": "data/imagenette2-320", "held_out": 0.1})
    c.control_sets = ("random_real_hard", "full_real")
    c.resamples = 10_000
    return c
