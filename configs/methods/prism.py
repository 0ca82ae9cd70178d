"""PRISM: priors from diverse source models.

Paper: arXiv 2511.09905, TMLR 2026. Reports, ImageNet-1K, ResNet-18, IPC 10: 45.7 % (supplement,
table 3).

    python -m prism_jax.main --config=configs/methods/prism.py:imagenet,ipc10
    python -m prism_jax.main --config=configs/methods/prism.py:digits

Logits come from one network, the statistics of BatchNorms from a subset that is drawn per IPC
index: the primary, and each of up to three others with probability 1/2. Images start real.
The settings are those of the paper and its supplement; what the released code does differently
is `prism_official.py`. The paper has ImageNet-1K only; the recipes for CIFAR and Tiny-ImageNet are
ours (the same numbers, roll in proportion).

Studies of the paper and its supplement (sweeps: configs/compare/studies.py):
    crop (table 3)    --config.relabel.crop_min=0.1  (0.15, 0.2, 0.25, 0.3, 0.4)
    batch (table 4)   --config.recover.batch_size=40  (80: and slots_per_batch=2; 100)
    when to draw      --config.recover.granularity=per_slot | per_batch | per_iteration
    whom to draw      configs/methods/prism_selection.py (appendix C)
    decoupled at all? --config.recover.statistics_by=fixed (one network for both: SRe2L's loss)
                      and with it --config.recover.statistic_primary=mobilenet_v2 (one other)
    a committee's     --config.recover.statistics_by=committee
    as a pyramid      --config.recover.parametrisation=pyramid (appendix D, as is the next)
    guided            --config.recover.clip=1.0 --config.recover.clip_directory=DIR
"""

from ml_collections import ConfigDict

from configs import base
from configs.methods import recipes


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin(
        "prism",
        arg,
        datasets=recipes.DATASETS,
        not_official="what the released code does is configs/methods/prism_official.py",
    )
    return recipes.finish(prism(c, at), at)


def prism(c: ConfigDict, at: recipes.At) -> ConfigDict:
    """PRISM's own parts: base.py's values, where SRe2L's recipe has others."""
    own = base.get_config()
    c.recover.pool = own.recover.pool
    c.recover.initialise = own.recover.initialise
    c.recover.learning_rate = own.recover.learning_rate
    if at.dataset in recipes.SMALL:
        c.recover.iterations = own.recover.iterations
        c.recover.crop_min, c.recover.flip = own.recover.crop_min, own.recover.flip
    if at.dataset == "tiny_imagenet":
        c.recover.roll = 9
    if at.dataset != "digits":
        flip, epochs = c.relabel.flip, own.relabel.epochs
        c.relabel, c.validate = own.relabel, own.validate
        c.relabel.flip, c.relabel.epochs, c.validate.epochs = flip, epochs, epochs
        # Supplement, table 1a: batch 50 at IPC 10, 100 at IPC 50 and 100.
        c.relabel.batch_size = c.validate.batch_size = 100 if at.ipc >= 50 else 50
        c.validate.controls = ("random_real", "random_real_hard")
    c.validate.loss, c.validate.ce_weight = own.validate.loss, own.validate.ce_weight
    c.validate.schedule = own.validate.schedule
    if at.dataset == "digits" and at.ipc == 1:
        # One slot is one draw per seed: with probability 1/8 the primary alone.
        c.recover.granularity = "per_iteration"
        c.validate.accumulate = 1
    return c
