"""CaO2: of several images from noise alone those that a teacher is surest of, refined.

Paper: arXiv 2506.22637, ICCV 2025. Reports, ResNet-18, ImageNet-1K IPC 10 / 50,
under RDED's protocol: 46.1 / 60.0 %.

    python -m prism_jax.main --config=configs/methods/cao2.py:imagenet,ipc10
    python -m prism_jax.main --config=configs/methods/cao2.py:digits

DiT-XL/2 samples four times as many images as are wanted (twice for ten classes) with DDPM in 50
steps and guidance 2.7; of those that ResNet-18 recognises the most confident are taken. A hundred
steps of Adam then move each latent until the transformer, told the class, predicts better what
noise was added to it, at the times of steps 11 to 1. Labels and students are RDED's, for
shuffled quarters of the images, too.

:official guides three of a latent's four channels, as the transformer's released code does. Not
brought back, for the paper says otherwise: while latents are refined, the released transformer is
told no class (the line that tells it is commented out) and the number of a step in place of its
time; for ImageNette nothing is refined, for other subsets the least confident are. Other than
released, too: the judge reads images at the data set's size under its own normalisation (there at
256 pixels, unnormalised), and where too few are recognised, the surest of the wanted class follow
(there of any class).
"""

from ml_collections import ConfigDict

from configs.methods import recipes


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin("cao2", arg, datasets=("imagenet",))
    recipes.generated(c, at)
    recipes.dit(c, at, guidance=2.7)
    g = c.generate
    g.anchors = "none"
    g.candidates = 2 if c.dataset.num_classes <= 10 else 4
    g.judge = "resnet18"
    g.refine.steps = 20 if "quick" in at.words else 100
    recipes.rded_students(c, at)
    recipes.rded_views(c, at)
    return recipes.finish(c, at)
