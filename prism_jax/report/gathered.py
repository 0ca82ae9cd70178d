"""What the parts of a page are made of, and the words that several of them use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from prism_jax.analysis import words
from prism_jax.data.datasets import spoken
from prism_jax.errors import UserError
from prism_jax.report.finished import Run

# PRISM's figure 5, by ImageNet's index.
PAPER_CLASSES = {1: "goldfish", 7: "rooster", 2: "great white shark", 31: "tree frog"}


class Options(NamedTuple):
    """What a person chooses.

    Attributes:
      network: whose features; None: see ``measures.network_of``.
      classes: of the pictures, names or numbers; none: see ``chosen``.
      most: real images of a split that are looked at.
      seed: of the choice of real images, and of UMAP.
    """

    network: str | None = None
    classes: tuple[str, ...] = ()
    most: int = 10_000
    seed: int = 0


@dataclasses.dataclass
class Gathered:
    """What the parts of a page are made of.

    Attributes:
      runs, options: of the page.
      names_K: of the classes.
      notes: what a reader must know; parts add what they lack.
    """

    runs: list[Run]
    options: Options
    names_K: list[str]
    notes: list[str]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def distinct(self) -> list[Run]:
        """The runs with images that no earlier one has."""
        found: dict[str, Run] = {}
        for run in self.runs:
            found.setdefault(run.manifest["digest"], run)
        return list(found.values())


def class_names(run: Run) -> list[str]:
    """What people call the classes, as far as it is known."""
    count = run.config.dataset.num_classes
    known = run.manifest.get("class_names")
    try:
        known = spoken(known, run.context.inputs.info) or known
    except UserError:  # a set of one's own that is not there any more
        pass
    names = [f"class {k}" for k in range(count)] if known is None else list(known[:count])
    for k, index in enumerate(run.manifest.get("imagenet_indices") or ()):
        names[k] = PAPER_CLASSES.get(index, names[k])
    return names


def chosen(g: Gathered, most: int) -> list[int]:
    """The classes of a picture: those that a person names, the paper's of ImageNet, some.

    Raises:
      UserError: there is no such class.
    """
    count = len(g.names_K)
    if g.options.classes:
        found = []
        for name in g.options.classes:
            if name in g.names_K:
                found.append(g.names_K.index(name))
            elif name.isdecimal() and int(name) < count:
                found.append(int(name))
            else:
                shown = ", ".join(g.names_K[:12]) + (", ..." if count > 12 else "")
                raise UserError(
                    f"--classes names {name!r}; the classes are {shown}, or numbers from 0 to "
                    f"{count - 1}"
                )
        return found[:most]
    indices = list(g.first.manifest.get("imagenet_indices") or ())
    if all(index in indices for index in PAPER_CLASSES):
        return [indices.index(index) for index in PAPER_CLASSES][:most]
    return list(range(min(most, count)))


def starts_of(g: Gathered) -> list[Run]:
    """The runs with initial images that no earlier run has; what has none is a note."""
    found: dict[str, Run] = {}
    for run in g.distinct:
        try:
            found.setdefault(run.start, run)
        except UserError as error:
            note = f"The initial images of {run.name}: left out. {error}"
            g.notes += [note] if note not in g.notes else []
    return list(found.values())


def student_names(runs: Sequence[Run]) -> list[str]:
    """Every student of the runs, in order: the first is the one that is drawn."""
    return list(dict.fromkeys(name for run in runs for name in words.students(run.summary)))


def top1_of(run: Run, of: str, student: str) -> float | None:
    """A student's top-1 in the run's summary, by the set that it learned from."""
    return run.sets().get(of, {}).get(student, {}).get("top1")


def points(fraction: float) -> str:
    """A difference of fractions in points, with its sign."""
    return f"{100 * fraction:+.1f}"


def thousandths(value: float) -> str:
    """A score."""
    return f"{value:.3f}"


def count(value: float) -> str:
    """A whole number."""
    return f"{value:,.0f}"
