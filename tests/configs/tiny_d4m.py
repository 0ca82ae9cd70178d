"""The tiny experiment, its images generated: every substage of the second engine in seconds."""

from ml_collections import ConfigDict

from configs import tiny


def get_config(arg: str = "") -> ConfigDict:
    c = tiny.get_config(arg)
    c.name = "tiny_d4m"
    c.squeeze.teachers = ("first", "outside")
    c.recover.maker = "generate"
    c.recover.method = c.preset = "d4m"
    c.recover.iterations = 0
    c.recover.pool = ()
    g = c.generate
    g.denoiser.token, g.denoiser.width, g.denoiser.depth = 4, 32, 1
    g.fit.steps, g.fit.batch_size, g.fit.warmup = 30, 32, 5
    g.steps, g.strength, g.batch_size = 6, 0.5, 8
    return c
