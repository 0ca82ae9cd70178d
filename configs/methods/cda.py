"""CDA: curriculum data augmentation for SRe2L.

Paper: arXiv 2311.18838, TMLR 2024. Reports, ResNet-18: ImageNet-1K IPC 50 / 100 / 200:
53.5 / 58.0 / 63.3 %; Tiny-ImageNet IPC 50 / 100: 48.7 / 53.2 %.

    python -m prism_jax.main --config=configs/methods/cda.py:imagenet,ipc50
    python -m prism_jax.main --config=configs/methods/cda.py:digits

SRe2L whose smallest crop falls from the whole image to 8 % along a cosine. With
--config.recover.crop_milestone=0 it is SRe2L, bit for bit. Students have batch 128, as the paper
says; the repository points to SRe2L's scripts, which have 1024 (:official). Labels, students and
teachers of Tiny-ImageNet are those of sre2l.py. ImageNet-21K, for which the paper also has a
recipe, is no data set of this package.

Mended here, and how to bring it back:
  pixels truncated, JPEG at quality 75   :official
  the verifier ends the program after one batch: there is none
"""

from ml_collections import ConfigDict

from configs.methods import recipes


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin("cda", arg, datasets=("imagenet", "tiny_imagenet"))
    c.recover.crop_curriculum = "cosine"
    if at.dataset == "imagenet" and not at.official:
        c.relabel.batch_size = c.validate.batch_size = 128
        c.validate.accumulate = 1
    if at.dataset == "tiny_imagenet":
        c.recover.learning_rate = 0.4
        c.recover.alpha_bn = 0.05
    if at.official:
        recipes.as_released(c)
    return recipes.finish(c, at)
