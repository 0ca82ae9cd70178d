"""The studies of PRISM's supplement, each a sweep on ImageNet-1K at IPC 10.

    python -m prism_jax.compare --config=configs/compare/studies.py:crop
    python -m prism_jax.compare --config=configs/compare/studies.py:batch
    python -m prism_jax.compare --config=configs/compare/studies.py:selection

  crop       smallest crop of the labelled views. Table 3: 45.0, 45.1, 45.3, 45.7, 45.4, 45.1 %
             for .1, .15, .2, .25, .3, .4
  batch      images optimised together. Table 4: 44.8, 45.2, 45.7 % for 40, 80, 100. 80 does not
             divide 1,000 classes: here it is 40 classes at two slots
  selection  whom to draw, and when (appendix C, see configs/methods/prism_selection.py): one
             teacher, one other for the statistics, always k of the others, or the drawn subset,
             once per IPC index (pre-distillation) or in every iteration (intra)

A second word runs one on another data set: `crop,digits`, `selection,digits`.
"""

from ml_collections import ConfigDict

from configs import base
from configs.methods import recipes
from configs.methods.prism_selection import POOL

PRISM, SELECTION = "configs/methods/prism.py", "configs/methods/prism_selection.py"
CROPS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
BATCHES = {40: 1, 80: 2, 100: 1}  # with how many slots


def get_config(arg: str = "crop") -> ConfigDict:
    study, _, dataset = arg.partition(",")
    dataset = dataset or "imagenet"
    if study not in ROWS or dataset not in recipes.DATASETS:
        raise ValueError(
            f"argument {arg!r}; allowed: {', '.join(ROWS)}, and after a comma a data set"
        )
    c = ConfigDict()
    c.name = f"study_{study}_{dataset}"
    c.argument = dataset
    c.ipcs = (10,)
    c.seeds = (0,)
    c.student_seeds = 1
    c.rows = ConfigDict(ROWS[study](dataset), sort_keys=False)
    c.controls = "random_real"  # no row of that name: every cell has its own
    c.resamples = 10_000
    c.shared = ()
    control = "random_real_hard" if study == "selection" else "random_real"
    c.protocols = ConfigDict({"own": (f"validate.controls={control}",)}, sort_keys=False)
    return c


def _crop(dataset: str) -> dict[str, tuple[str, ...]]:
    return {f"crop_{round(100 * at)}": (PRISM, f"relabel.crop_min={at}") for at in CROPS}


def _batch(dataset: str) -> dict[str, tuple[str, ...]]:
    return {
        f"batch_{size}": (PRISM, f"recover.batch_size={size}", f"recover.slots_per_batch={slots}")
        for size, slots in BATCHES.items()
    }


def _selection(dataset: str) -> dict[str, tuple[str, ...]]:
    others = base.POOL if dataset == "digits" else POOL
    rows: dict[str, tuple[str, ...]] = {"single": (SELECTION, "recover.statistics_by=fixed")}
    for name in others[1:]:
        other = f"recover.statistic_primary={name}"
        rows[f"dual_{name}"] = (*rows["single"], other)
    for k in range(1, len(others)):
        always = "recover.subset_probability=1.0"
        rows[f"with_{k}_others"] = (SELECTION, always, f"recover.subset_others={k}")
    rows["pre"] = (SELECTION,)
    rows["intra"] = (SELECTION, "recover.granularity=per_iteration")
    return rows


ROWS = {"crop": _crop, "batch": _batch, "selection": _selection}
