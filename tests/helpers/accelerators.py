"""Small experiments whose programs have the shapes of real ones, compiled for other machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from configs import base
from prism_jax.accelerators import compiling, targets
from prism_jax.accelerators.compiling import Found
from prism_jax.config import Experiment, resolve
from prism_jax.models import ARCHITECTURES

FOUR = base.POOL


def experiment(
    networks: Sequence[str] = FOUR,
    *,
    side: int = 224,
    depth: float = 1.0,
    stem: str = "imagenet",
    **fields: Any,
) -> Experiment:
    """Four classes, two images each, and every network as teacher, labeller and student.

    Args:
      **fields: of the config, dots written as two underscores.
    """
    c = base.get_config()
    c.name = "compiled"
    c.dataset.image_size, c.dataset.num_classes = side, 4
    for name in networks:
        c.networks[name] = base.network(architecture=name, depth=depth, stem=stem)
    c.squeeze.teachers = c.recover.pool = c.relabel.teachers = tuple(networks)
    c.validate.students = tuple(networks)
    c.squeeze.batch_size = c.relabel.batch_size = c.validate.batch_size = 8
    c.recover.primary, c.recover.ipc, c.recover.iterations = networks[0], 2, 4
    c.relabel.ensemble = "mean"
    c.analyse.network = networks[0]
    c.parallel.train_devices = 1
    batch_norms = [ARCHITECTURES[name].batch_norms > 0 for name in networks]
    c.recover.count_no_bn = any(batch_norms) and not all(batch_norms)
    if not any(batch_norms):
        c.recover.alpha_bn = 0.0
    for name, value in fields.items():
        section, field = name.split("__")
        c[section][field] = value
    return resolve(c)


def compiled(made: Experiment, target: str, program: str, **given: Any) -> Found:
    """A program, compiled for a machine; the test is skipped where its compiler is missing.

    A program that does not compile without a device is compiled by the way around; one that then
    ended the process would be seen before.
    """
    machine = targets.parse(target)
    if missing := targets.compiler_missing(machine):
        pytest.skip(missing)
    return compiling.compile_around(made, machine, program, **given)
