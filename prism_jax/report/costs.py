"""What a set costs: seconds as they were measured, FLOP as they follow from networks, bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax.config.rules.recover import supervised_by
from prism_jax.models import ARCHITECTURES
from prism_jax.models.import_torch import variable_shapes
from prism_jax.report.finished import Run
from prism_jax.stages import costs
from prism_jax.stages.generator import wanted as generates
from prism_jax.synthesis.start import ASKING

# Passes over a network, in units of its forward one: products by weights and by inputs.
FORWARD, BY_PIXELS, BY_WEIGHTS = 1.0, 2.0, 3.0
STAGES = ("squeeze", "recover", "relabel", "validate")


class Cost(NamedTuple):
    """Of a stage.

    Attributes:
      seconds: on the machine of the run; None: not recorded.
      flop: of the networks' forward and backward passes; None: not known.
    """

    seconds: float | None
    flop: float | None


class Bytes(NamedTuple):
    """Of a set: decoded pixels, soft labels as stored, and the decoded pixels of the real set."""

    images: int
    labels: int | None
    real: int | None

    @property
    def whole(self) -> int | None:
        """Images and labels."""
        return None if self.labels is None else self.images + self.labels

    @property
    def share(self) -> float | None:
        """The whole, over the real set."""
        return self.whole / self.real if self.whole and self.real else None


def stages(run: Run) -> dict[str, Cost]:
    """The cost of every stage, of the synthetic set without its controls."""
    return {
        "squeeze": Cost(_squeeze_seconds(run), _known(_squeeze_flop, run)),
        "recover": Cost(_of(run.summary, "recover", "seconds"), _known(_recover_flop, run)),
        "relabel": Cost(_of(run.summary, "relabel", "seconds"), _known(_relabel_flop, run)),
        "validate": Cost(_validate_seconds(run), _known(_validate_flop, run)),
    }


def bytes_of(run: Run) -> Bytes:
    """What the set takes."""
    pixels = int(np.prod(run.images.shape[1:]))
    real = _of(run.summary, "dataset", "train_images")
    return Bytes(len(run.images) * pixels, run.label_bytes, real and real * pixels)


def _of(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _known(count: Callable[[Run], float | None], run: Run) -> float | None:
    return None if generates(run.context) else count(run)


# --- seconds --------------------------------------------------------------------------------


def _squeeze_seconds(run: Run) -> float | None:
    """Of the networks that made images and labels; imported ones take none that counts."""
    names = dict.fromkeys((*costs.makers(run.context), *run.config.relabel.teachers))
    known = [s for name in names if (s := costs.squeezed(run.context, name)) is not None]
    return sum(known) if known else None


def _validate_seconds(run: Run) -> float | None:
    seconds = [entry.get("seconds") for entry in run.summary.get("validate", {}).values()]
    return sum(seconds) if seconds and None not in seconds else None


def _used(run: Run) -> list[str]:
    """Teachers that supervise, choose or label, once each."""
    named = (*costs.makers(run.context), *run.config.relabel.teachers)
    return [name for name in dict.fromkeys(named) if name in run.teachers()]


# --- FLOP -----------------------------------------------------------------------------------


def forward_flop(run: Run, name: str, *, student: bool = False) -> float | None:
    """Of one image's forward pass, as XLA counts them before it optimises; None: it does not."""
    module = run.context.networks.build(name, student=student)
    return _forward_flop(module, run.context.inputs.image_shape)


@functools.cache
def _forward_flop(module: Any, shape: tuple[int, int, int]) -> float | None:
    variables = {"batch_stats": {}, **variable_shapes(module, shape)}
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    counted = jax.jit(lambda v, x: module.apply(v, x)).lower(variables, image).cost_analysis()
    return counted.get("flops") if isinstance(counted, dict) else None


def _sum(terms: list[float | None]) -> float | None:
    return None if None in terms else float(sum(t for t in terms if t is not None))


def _times(count: float, flop: float | None) -> float | None:
    return None if flop is None else count * flop


def _squeeze_flop(run: Run) -> float | None:
    """Of the teachers that were trained here; None where one has weights from elsewhere."""
    names, train = _used(run), _of(run.summary, "dataset", "train_images")
    if train is None or any(run.config.network(name).weights for name in names):
        return None
    images = run.config.squeeze.epochs_over(train) * train
    return _sum([_times(BY_WEIGHTS * images, forward_flop(run, name)) for name in names])


def _recover_flop(run: Run) -> float | None:
    """Of every teacher as often as it was read; None where phases change the images' shape."""
    recover = run.config.recover
    units = run.manifest["units"]
    if recover.phase_sizes or recover.budget == "early_late" or recover.perturb_steps:
        return None
    if recover.clip or recover.flatness or recover.initialise in ASKING:
        return None  # other networks run, or one runs once more
    if recover.inject_from == "retrieved":
        return None  # all real images were read
    if not recover.iterations:
        return 0.0
    if not all("drawn" in unit for unit in units):
        return None
    logits_by, statistics_by = supervised_by(run.config)
    rows = [ARCHITECTURES[run.config.network(name).architecture] for name in recover.pool]
    together = logits_by == statistics_by
    if logits_by != "fixed" and not (together and all(row.batch_norms for row in rows)):
        return None  # who was read for its logits alone is not noted
    read = {name: 0.0 for name in recover.pool}  # images that it read, over all iterations
    for unit in units:
        first, last = unit["classes"]
        images = (last - first + 1) * len(unit["slots"])
        for name in recover.pool:
            share = unit["drawn"][name]
            if name == recover.primary and logits_by == "fixed":
                share = 1.0
            read[name] += unit["iterations"] * images * share
    return _sum([_times(BY_PIXELS * n, forward_flop(run, t)) for t, n in read.items()])


def _relabel_flop(run: Run) -> float | None:
    """Of one set of labels; made while students train, each student makes one."""
    config = run.config
    if not config.soft_labels:
        return 0.0
    if config.relabel.labels_from:
        return None
    epochs = config.relabel.epochs
    if config.relabel.mode == "online":
        trainings = len(config.validate.students) * len(config.validate.seeds)
        epochs = config.validate.epochs * trainings
    views = epochs * len(run.labels_N)
    return _sum([_times(FORWARD * views, forward_flop(run, n)) for n in config.relabel.teachers])


def _validate_flop(run: Run) -> float | None:
    config = run.config.validate
    shown = config.epochs * len(run.labels_N) * len(config.seeds)
    return _sum(
        [_times(BY_WEIGHTS * shown, forward_flop(run, n, student=True)) for n in config.students]
    )
