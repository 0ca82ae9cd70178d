"""The first engine: pixels optimised against a pool of teachers.

recipe.py     a method's numbers, and the records that are handed about
objective.py  one teacher's energy: logits, statistics and their targets, terms beside them
sampling.py   who supervises an iteration
guide.py      an encoder of images and texts, as one more energy
parametrisation.py  what is optimised of an image: pixels, or components of several sizes
step.py       the heart: one iteration, and the loop around it
lanes.py      the loop compiled for devices
course.py     a batch from its initial images to its pixels
start.py      initial images
selection.py  which real images stand for their class
measuring.py  statistics and features of real images, where methods need more than weights keep
"""

from prism_jax.synthesis.guide import Guide
from prism_jax.synthesis.lanes import Engine, drawn_share, engine, explain_failure
from prism_jax.synthesis.objective import (
    alignment_scales,
    alignment_weights,
    class_targets,
    first_layer,
    has_statistics,
    misalignment,
    no_terms,
    not_read,
    of_group,
    prior_terms,
    statistic_targets,
    teacher_gradient,
    total,
)
from prism_jax.synthesis.parametrisation import PARAMETRISATIONS, resolutions_of
from prism_jax.synthesis.recipe import (
    FLATNESS_MOMENTUM,
    METHODS,
    ChunkReport,
    Memory,
    Recipe,
    Shown,
    Supervision,
    Terms,
    UnitBatch,
)
from prism_jax.synthesis.step import (
    draw_teachers,
    image_optimiser,
    initial_state,
    noise_of,
    select,
    synthesis_chunk,
    synthesis_step,
    view_of,
)

__all__ = [
    "ChunkReport",
    "Engine",
    "FLATNESS_MOMENTUM",
    "Guide",
    "METHODS",
    "Memory",
    "PARAMETRISATIONS",
    "Recipe",
    "Shown",
    "Supervision",
    "Terms",
    "UnitBatch",
    "alignment_scales",
    "alignment_weights",
    "class_targets",
    "draw_teachers",
    "drawn_share",
    "engine",
    "explain_failure",
    "first_layer",
    "has_statistics",
    "image_optimiser",
    "initial_state",
    "misalignment",
    "no_terms",
    "noise_of",
    "not_read",
    "of_group",
    "prior_terms",
    "resolutions_of",
    "select",
    "statistic_targets",
    "synthesis_chunk",
    "synthesis_step",
    "teacher_gradient",
    "total",
    "view_of",
]
