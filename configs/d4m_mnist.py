"""D4M on MNIST, 10 images per class, with a generator that is trained here.

    python -m prism_jax.main --config=configs/d4m_mnist.py

The digits' config with MNIST's files (`--config.dataset.path=DIR`): a diffusion transformer of 1.4
million parameters learns the 60,000 training images at 28 px in 12,000 steps. The plan's estimate
on two cores: 6 minutes for it (0.03 s a step), a second for the images; teachers and students come
on top (`--plan`). What it makes of MNIST has not been looked at.
"""

from ml_collections import ConfigDict

from configs import d4m_digits


def get_config(arg: str = "") -> ConfigDict:
    c = d4m_digits.get_config(arg)
    c.name = "d4m_mnist"
    c.dataset.name = "mnist"
    c.dataset.source = "idx"
    c.dataset.path = "data/mnist"
    c.dataset.image_size = 28
    c.squeeze.epochs = 2
    g = c.generate
    g.denoiser.token = 14
    g.fit.steps, g.fit.average = 12000, 0.999
    return c
