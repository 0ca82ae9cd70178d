"""What may not be, as far as it can be known without the data: one module per section.

A rule is a line for a person: what was given, what is allowed, what to do.
"""

from __future__ import annotations

import itertools

from prism_jax.config.rules import (
    dataset,
    generate,
    networks,
    parallel,
    recover,
    relabel,
    squeeze,
    validate,
)
from prism_jax.config.rules.common import literals, positive, seed
from prism_jax.config.sections import Experiment


def violations(e: Experiment) -> list[str]:
    """Everything wrong with an experiment."""
    return list(
        itertools.chain(
            seed("seed", e.seed),
            literals(e),
            dataset.violations(e),
            squeeze.violations(e),
            networks.violations(e),
            recover.violations(e),
            generate.violations(e),
            relabel.violations(e),
            validate.violations(e),
            positive(e, "analyse", "grid_classes", "grid_slots"),
            parallel.violations(e),
        )
    )
