"""What an experiment is, how a config becomes one, and what is refused.

sections.py  the experiment as frozen dataclasses, one per stage
resolve.py   the one way in, from a ConfigDict
rules/       what may not be, one module per section
layout.py    how a set divides into image batches
generation.py  the section generate, in the words of the engine
"""

from prism_jax.config.layout import (
    Layout,
    batch_layout,
    bn_group_of,
    budget_of,
    members,
    unit_budget,
    units,
)
from prism_jax.config.resolve import KINDS, resolve, restore
from prism_jax.config.sections import (
    ANCHOR_CONTROLS,
    CONTROLS,
    GENERATED_CONTROLS,
    HARD_CONTROL,
    SELECTED_CONTROLS,
    SOFT_CONTROLS,
    STAGES,
    Analyse,
    Dataset,
    Dtype,
    Experiment,
    Generate,
    Network,
    Parallel,
    Recover,
    Relabel,
    Squeeze,
    Validate,
    to_dict,
)

__all__ = [
    "ANCHOR_CONTROLS",
    "CONTROLS",
    "GENERATED_CONTROLS",
    "HARD_CONTROL",
    "KINDS",
    "SELECTED_CONTROLS",
    "SOFT_CONTROLS",
    "STAGES",
    "Analyse",
    "Dataset",
    "Dtype",
    "Experiment",
    "Generate",
    "Layout",
    "Network",
    "Parallel",
    "Recover",
    "Relabel",
    "Squeeze",
    "Validate",
    "batch_layout",
    "bn_group_of",
    "budget_of",
    "members",
    "resolve",
    "restore",
    "to_dict",
    "unit_budget",
    "units",
]
