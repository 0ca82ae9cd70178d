"""D4M on CIFAR-10, 10 images per class, with a generator that is trained here.

    python -m prism_jax.main --config=configs/d4m_cifar10.py

Arguments after the colon:
  cpu      a smaller generator and narrow students, for two cores

Patches of 4 px are latents by twelve of their principal components; a diffusion transformer learns
them. Teachers are the published ResNets of `cifar10_ipc10.py`: resnet44 labels, resnet20 says what
generated images are worth.

The plan's estimate on two cores: 13 hours for the generator (1.2 s a step), with `cpu` a quarter of
an hour (0.17 s), and seconds for the images. What either makes of CIFAR-10 has not been looked at.
"""

from ml_collections import ConfigDict

from configs import base, cifar10_ipc10


def get_config(arg: str = "") -> ConfigDict:
    words = base.words(arg, "cpu")
    c = cifar10_ipc10.get_config(arg)
    c.name = "_".join(["d4m_cifar10", *words])
    c.preset = c.recover.method = "d4m"
    c.squeeze.teachers = tuple(cifar10_ipc10.CHECKPOINTS)
    c.recover.maker = "generate"
    c.recover.iterations = 0
    c.recover.pool = ()
    c.recover.slots_per_batch = 10  # one batch of all
    g = c.generate
    g.codec, g.patch, g.components = "patches", 4, 12
    g.denoiser.token, g.denoiser.width, g.denoiser.depth, g.denoiser.heads = 2, 256, 8, 4
    g.fit.steps, g.fit.batch_size, g.fit.learning_rate, g.fit.average = 40000, 128, 1e-3, 0.9995
    g.judge = "resnet20"
    c.validate.controls = (*c.validate.controls, "medoids", "decoded_anchors", "no_anchors")
    if "cpu" in words:
        g.denoiser.width, g.denoiser.depth = 192, 4
        g.fit.steps, g.fit.batch_size, g.fit.average = 5000, 64, 0.998
    return c
