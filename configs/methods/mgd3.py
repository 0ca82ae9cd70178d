"""MGD3: images from noise alone, drawn towards the modes of their class.

Paper: arXiv 2505.18963. Reports hard labels, on parts of ImageNet and on ImageNet-1K; its numbers
are not those of the other configs' protocol.

    python -m prism_jax.main --config=configs/methods/mgd3.py:imagenet,ipc10
    python -m prism_jax.main --config=configs/methods/mgd3.py:digits

DiT-XL/2 samples with DDPM in 50 steps; each of those numbered 49 to 26 goes 0.1 deviations times
the distance from its estimate towards a mode: a centre of k-means among the latents of images of
which a random half is mirrored. Labels are hard, but for the digits.

:official guides three of a latent's four channels, as the transformer's released code does.
"""

from ml_collections import ConfigDict

from configs.methods import recipes


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin("mgd3", arg, datasets=("imagenet",))
    recipes.generated(c, at)
    recipes.dit(c, at, guidance=4.0)
    g = c.generate
    g.mode_weight, g.mode_window = 0.1, (26, 49)
    if at.dataset != "digits":
        g.flip = True
        c.validate.loss, c.validate.controls = "ce", ("random_real_hard",)
    return recipes.finish(c, at)
