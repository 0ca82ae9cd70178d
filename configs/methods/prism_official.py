"""PRISM as released: the repository Brian-Moser/prism where it differs from the paper.

Paper: arXiv 2511.09905, TMLR 2026. Reports 45.7 % (see prism.py).

    python -m prism_jax.main --config=configs/methods/prism_official.py:imagenet,ipc10

AlexNet, which has no BatchNorm, is in the pool and counts in the mean; iterations fall from 4000 to
500 with the slot; four networks label; pixels are truncated and pass through JPEG. One
scheduling quirk is in both presets: the learning rate of students drops sixfold at five sixths of
the run (--config.validate.schedule=cos2_continuous is the same without the drop). For ResNet-50
and -101 as students half of the labels' weight is the primary's:
--config.relabel.ensemble=half_primary.

Not reproduced, because it changes no number: the primary is read twice, and two loss terms are
computed and never added. Nothing is seeded there; here everything is.
"""

from ml_collections import ConfigDict

from configs import base
from configs.methods import prism, recipes


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin(
        "prism",
        arg,
        datasets=("imagenet",),
        not_official="this is what the released code does",
    )
    c = base.official(prism.prism(c, at))
    at = at._replace(method="prism_official")
    return recipes.finish(c, at)
