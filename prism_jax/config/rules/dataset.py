"""Rules of ``dataset``."""

from __future__ import annotations

from collections.abc import Iterator

from prism_jax.config.rules.common import not_negative, one_of, positive
from prism_jax.config.sections import Experiment
from prism_jax.data import datasets, sources


def violations(e: Experiment) -> Iterator[str]:
    """What is wrong with the section, one line each."""
    d = e.dataset
    yield from positive(e, "dataset", "image_size", "num_classes", "threads")
    yield from not_negative(e, "dataset", "workers", "cache_gigabytes")
    if not d.name.startswith(datasets.TFDS):
        yield from one_of("dataset.name", d.name, [*datasets.DATASETS, f"{datasets.TFDS}<builder>"])
    elif d.source != "tfds":
        yield f"dataset.source is {d.source!r}; dataset.name={d.name} needs 'tfds'"
    yield from one_of("dataset.source", d.source, sources.SOURCES)
    if (d.mean is None) != (d.std is None) or (d.mean and d.std and len(d.mean) != len(d.std)):
        yield (
            f"dataset.mean is {d.mean} and dataset.std is {d.std}; they belong together, with one "
            f"number per channel each"
        )
    if d.std and min(d.std) <= 0:
        yield f"dataset.std is {d.std}; its numbers must be positive"
