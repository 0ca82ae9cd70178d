"""D4M on scikit-learn's digits, 10 images per class, with a generator that is trained here.

python -m prism_jax.main --config=configs/d4m_digits.py

A diffusion transformer of 1.3 million parameters learns the 1,437 training images at 16 px in
3,500 steps; the prototypes of each class, under noise, are denoised by it.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; this config takes none")
    c = digits.config(ipc=10, method="d4m")
    c.name = "d4m_digits"
    c.squeeze.teachers = ("resnet18", "convnet")
    c.recover.maker = "generate"
    c.recover.iterations = 0
    c.recover.pool = ()
    c.recover.slots_per_batch = 10  # one batch of all
    c.validate.controls = (*c.validate.controls, "medoids", "decoded_anchors", "no_anchors")
    return c
