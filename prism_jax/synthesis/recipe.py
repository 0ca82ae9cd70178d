"""What an experiment asks of the engine, and the records that the engine hands about.

A method is who supervises (the weights a and b of every iteration), which statistics s are
matched, and numbers:

    x~   = view(x; crop, flip, roll) + noise                           one view per batch
    L(x) = alpha_CE * sum_t a_t CE(z_t(x~), y)
           + alpha_BN * sum_t b_t sum_l w_l sum_s ||s_l,t(x~) - s^_l,t||
           + terms of the images alone, and of an encoder of images and texts

PRISM: a is the primary's, b the mean over the drawn teachers, s the mean and variance of
BatchNorms' inputs.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from prism_jax.core import statistics
from prism_jax.types import AnyArray, Array, Draw, Integer, PyTree


class Supervision(NamedTuple):
    """Rows of ``sampling.SAMPLERS``: whose logits, and whose statistics."""

    logits: str
    statistics: str


# A method is who supervises; everything else is a number in the recipe.
METHODS: dict[str, Supervision] = {
    "prism": Supervision("fixed", "subset"),
    "sre2l": Supervision("fixed", "fixed"),
    "cda": Supervision("fixed", "fixed"),
    "dwa": Supervision("fixed", "fixed"),
    "delt": Supervision("fixed", "fixed"),
    "rded": Supervision("fixed", "fixed"),
    "gvbsm": Supervision("round_robin", "round_robin"),
    "edc": Supervision("round_robin", "round_robin"),
    "fadrm": Supervision("round_robin", "round_robin"),
    "psm": Supervision("round_robin", "round_robin"),
    "cvdd": Supervision("committee", "committee"),
    # Images of a denoiser: nobody supervises.
    "d4m": Supervision("fixed", "fixed"),
    "mgd3": Supervision("fixed", "fixed"),
    "ddoq": Supervision("fixed", "fixed"),
    "cao2": Supervision("fixed", "fixed"),
}
GRANULARITIES = ("per_slot", "per_batch", "per_iteration")  # how long a draw holds
FLATNESS_MOMENTUM = 0.99  # of the average images that flatness looks at (EDC)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of the objective and the optimiser; static in the trace.

    Defaults are PRISM's (supplement, table 1b). The fields are those of the config's section
    ``recover``, with teachers as indices into the pool; ``slots`` are the images of a class in
    a batch, and ``rounds`` is 1 unless slots join early and late.
    """

    method: str = "prism"
    logits_by: str | None = None
    statistics_by: str | None = None
    primary: int = 0
    statistic_primary: int | None = None
    granularity: str = "per_slot"
    subset_others: int = 3
    subset_probability: float = 0.5
    committee: str = "random"
    priors: tuple[float, ...] | None = None
    prior_temperature: float = 5.0

    alpha_ce: float = 1.0
    alpha_bn: float = 0.01
    first_bn_multiplier: float = 10.0
    first_layer: str = "bn"
    count_no_bn: bool = False
    match: tuple[str, ...] = ("bn",)
    targets: str = "running"
    variance_weight: float = 1.0
    statistic_patch: int = 16
    class_share: float = 0.0
    class_patch_swapped: bool = False
    ema: float = 0.0
    ema_from_zero: bool = False
    drop: float = 0.0
    alignment_scale: str = "none"

    total_variation: float = 0.0
    image_l2: float = 0.0
    densification: float = 0.0
    flatness: float = 0.0
    clip: float = 0.0

    parametrisation: str = "pixels"
    resolutions: tuple[int, ...] = ()
    learning_rate: float = 0.05
    schedule: str = "cosine"
    betas: tuple[float, float] = (0.5, 0.9)
    crop_min: float = 0.08
    crop_curriculum: str = "constant"
    crop_milestone: float = 1.0
    crop_pad: int | None = None
    flip: bool = True
    roll: int = 32
    roll_centred: bool = False
    view_noise: float = 0.0

    perturb_rho: float = 0.0
    perturb_steps: int = 0
    perturb_probes: bool = False
    slots: int = 1
    rounds: int = 1
    phase_sizes: tuple[int, ...] = ()
    inject: float = 0.0


class UnitBatch(NamedTuple):
    """What makes one image batch itself: its coordinates, its budget and its labels.

    Attributes:
      before: iterations of all batches before it in the set's order, whenever they run.
      weights: the primary's parameters where they are perturbed for this batch (DWA).
      probes_BHWC: what the perturbation left in the images' first gradient, where that counts.
    """

    slot: Integer  # () int32, first slot of the group
    block: Integer  # () int32
    budget: Integer  # () int32, iterations in all
    labels_B: AnyArray  # int32
    before: Integer = np.int32(0)
    weights: PyTree = None
    probes_BHWC: Array | None = None


class Memory(NamedTuple):
    """What is remembered of earlier iterations; None where the recipe has no use for it."""

    statistics_T: tuple[statistics.Memory | None, ...] = ()
    images_BHWC: Array | None = None  # their moving average


class Terms(NamedTuple):
    """One iteration's loss, unweighted, per teacher; NaN for a teacher that was not read.

    ``others`` are terms that only some recipes have: of every teacher (T,), or of the images ().
    """

    step: Integer  # () int32; -1: no such iteration
    loss: Array  # () weighted total
    ce_T: Array
    bn_T: Array
    draw: Draw
    others: dict[str, Array]


class ChunkReport(NamedTuple):
    """The first and last iterations of a chunk, and the first with a loss that is not finite."""

    first: Terms
    last: Terms
    failed: Terms


class Shown(NamedTuple):
    """What a teacher is given in one iteration beside the viewed images."""

    labels_B: AnyArray
    logit_weight: Array
    statistic_weight: Array
    average_BHWC: Array | None = None  # viewed alike
    drop_key: Array | None = None
