"""Rules of ``dataset``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from prism_jax.config.rules.common import normalisation, not_negative, one_of, positive
from prism_jax.config.sections import Experiment
from prism_jax.data import datasets, sources
from prism_jax.data.sources import own


def violations(e: Experiment) -> Iterator[str]:
    """What is wrong with the section, one line each."""
    d = e.dataset
    yield from positive(e, "dataset", "image_size", "num_classes", "threads")
    yield from not_negative(e, "dataset", "workers", "cache_gigabytes", "held_out_seed")
    if d.num_classes == 1:
        yield (
            "dataset.num_classes is 1, and to tell classes apart takes two; where dataset.path "
            "has more, a folder too many is around them: train/<class>/<image> is read"
        )
    if own.is_own(d.name):
        yield from _own(e)
    elif d.name.startswith(datasets.TFDS) and d.source != "tfds":
        yield f"dataset.source is {d.source!r}; dataset.name={d.name} needs 'tfds'"
    yield from one_of("dataset.source", d.source, sources.SOURCES)
    if d.source == "sklearn" and d.path is not None:
        yield (
            f"dataset.path is {d.path!r}, and dataset.source='sklearn' reads the digits that come "
            f"with scikit-learn, no path; for images of your own see configs/own_folder.py"
        )
    yield from normalisation("dataset.", d.mean, d.std)
    if not 0 <= d.held_out < 1:
        yield (
            f"dataset.held_out is {d.held_out:g}; it is the share of the training images that is "
            f"held out, from 0 (none) to below 1"
        )


def _own(e: Experiment) -> Iterator[str]:
    """A name that no table lists: that of a set of one's own, or a slip."""
    d = e.dataset
    known = [*datasets.DATASETS, f"{datasets.TFDS}<builder>"]
    if near := difflib.get_close_matches(d.name, known, n=1, cutoff=0.75):
        yield (
            f"dataset.name is {d.name!r} (did you mean {near[0]}?); the known ones are "
            f"{', '.join(known)}; a set of your own needs a name that is not so near to them"
        )
    elif not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", d.name):
        yield f"dataset.name is {d.name!r}; a name has letters, digits, '_', '-' and '.'"
    elif d.source not in own.KINDS:
        yield (
            f"dataset.name is {d.name!r}, a set of your own, and dataset.source is {d.source!r}; "
            f"such a set is read from {', '.join(own.KINDS)} (the known sets are "
            f"{', '.join(known)})"
        )
