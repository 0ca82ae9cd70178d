"""PRISM's study of which teachers to draw: appendix C of its supplement.

Paper: arXiv 2511.09905, TMLR 2026.

    python -m prism_jax.main --config=configs/methods/prism_selection.py:imagenet

A pool of its own, no soft labels, 90 epochs of SGD at batch 256 with a linear learning rate. By
default the subset is drawn as in the main runs, once per IPC index ("pre-distillation"); others:
    single      --config.recover.statistics_by=fixed
    dual        --config.recover.statistics_by=fixed --config.recover.statistic_primary=resnet34
    k teachers  --config.recover.subset_probability=1.0 --config.recover.subset_others=K
    intra       --config.recover.granularity=per_iteration

The appendix does not state IPC, iterations, weight decay and the smallest crop; those of the main
runs and PyTorch's usual 1e-4 are taken.
"""

from ml_collections import ConfigDict

from configs.methods import prism, recipes

POOL = ("resnet18", "resnet34", "shufflenet_v2_x1_0", "mnasnet1_0", "efficientnet_b0")


def get_config(arg: str = "") -> ConfigDict:
    c, at = recipes.begin(
        "prism",
        arg,
        datasets=("imagenet",),
        not_official="the code of this study is not released",
    )
    c = prism.prism(c, at)
    if at.dataset == "imagenet":
        c.recover.pool = POOL
        c.relabel.epochs = c.validate.epochs = 90
        c.relabel.batch_size = c.validate.batch_size = 256
    c.relabel.mix = "none"
    c.validate.loss = "ce"
    c.validate.accumulate = 1
    c.validate.optimiser, c.validate.learning_rate = "sgd", 0.1
    c.validate.weight_decay = 1e-4
    c.validate.schedule = "linear"
    c.validate.controls = ("random_real_hard",)
    return recipes.finish(c, at._replace(method="prism_selection"))
