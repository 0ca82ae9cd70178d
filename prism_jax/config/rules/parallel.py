"""Rules of ``parallel``: what devices can share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prism_jax.config.layout import bn_group_of
from prism_jax.config.rules import recover, validate
from prism_jax.config.rules.common import positive
from prism_jax.config.sections import Experiment
from prism_jax.core import batching


def violations(e: Experiment) -> Iterator[str]:
    """What is wrong with the section, one line each."""
    yield from positive(e, "parallel", "train_devices", "recover_devices")
    if e.parallel.recover_devices > 1:
        yield from _spans(e)
    whole = e.validate.batch_size > 0 and e.validate.accumulate > 0
    if (e.parallel.train_devices or 0) > 0 and whole and not list(validate.batch(e)):
        yield from _shares(e)


def _spans(e: Experiment) -> Iterator[str]:
    """An image batch that spans devices."""
    span = e.parallel.recover_devices
    layout, _ = recover.layout_of(e)
    if layout is None:
        return  # recover's rules say why
    if e.recover.maker != "optimise":
        yield (
            f"parallel.recover_devices is {span}, and recover.maker={e.recover.maker!r} gives "
            f"every device a batch of its own; leave it at 1"
        )
    if any(size % span for size in layout.sizes):
        allowed = [d for d in range(1, layout.size + 1) if not any(n % d for n in layout.sizes)]
        yield (
            f"parallel.recover_devices is {span}, among which the "
            f"{' or '.join(map(str, layout.sizes))} images of a batch do not divide; these do: "
            f"{', '.join(map(str, allowed))}"
        )
    if e.parallel.map == "pmap":
        yield (
            "parallel.map is 'pmap', which gives every device a batch of its own; with "
            f"parallel.recover_devices={span} leave it at 'shard_map'"
        )


def _shares(e: Experiment) -> Iterator[str]:
    """A training's batches, spread over devices."""
    v, devices = e.validate, e.parallel.train_devices
    assert devices is not None
    group: dict[str, Any] = {"accumulate": v.accumulate, "bn_group": bn_group_of(v)}
    batches: dict[str, tuple[int, dict[str, Any]]] = {"validate": (v.batch_size, group)}
    if any(not e.network(name).checkpoint for name in e.squeeze.teachers):
        batches["squeeze"] = e.squeeze.batch_size, {}
    for section, (size, division) in batches.items():
        if size > 0 and not batching.fits(size, devices, **division):
            allowed = [d for d in range(1, size + 1) if batching.fits(size, d, **division)]
            groups = f" in BatchNorm groups of {bn_group_of(v)}" if division else ""
            yield (
                f"parallel.train_devices is {devices}; {section}.batch_size={size}{groups} "
                f"can be shared by {', '.join(map(str, allowed))} device(s)"
            )
