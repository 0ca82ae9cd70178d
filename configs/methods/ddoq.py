"""DDOQ: D4M, with images that count as much as their prototype's share of the class.

Paper: arXiv 2501.07681. Reports, ResNet-18, ImageNet-1K IPC 10 / 50 / 100, with Stable Diffusion:
33.1 / 56.2 / 60.1 %; IPC 10 / 50 with DiT: 53.0 / 62.7 %.

    python -m prism_jax.main --config=configs/methods/ddoq.py:imagenet,ipc10
    python -m prism_jax.main --config=configs/methods/ddoq.py:digits

Clustering is quantisation: a prototype stands for all images of its cell, so the student's loss
weighs its image by the cell's share. Everything else is D4M's, with all its defects mended. The
form with DiT starts from prototypes as noise, at a time that is not published: left out.
"""

from ml_collections import ConfigDict

from configs.methods import recipes


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin(
        "ddoq",
        arg,
        datasets=("imagenet",),
        not_official="what is D4M's has all its defects mended, and the rest has none",
    )
    recipes.generated(c, at)
    recipes.stable_diffusion(c, at)
    c.generate.weighted = True
    return recipes.finish(c, at)
