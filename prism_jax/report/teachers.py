"""What supervised and what labels the images."""

from __future__ import annotations

import itertools

from prism_jax.analysis import figures, report, words
from prism_jax.analysis.calibration import agreement
from prism_jax.analysis.page import Picture, Table, figure, word
from prism_jax.report import measures
from prism_jax.report.gathered import Gathered
from prism_jax.report.measures import Real


def losses(g: Gathered) -> list[Picture]:
    """Loss terms per teacher over the iterations."""
    found = []
    for number, run in enumerate(g.distinct):
        if not run.config.recover.iterations or not (lines := run.losses()):
            continue
        found.append(Picture(
            f"losses_{number}", f"Loss terms: {run.name}", report.CAPTIONS["recover"][1],
            figures.in_forms(figures.recover_curves, lines, primary=run.config.recover.primary),
        ))  # fmt: skip
    return found


def agreements(g: Gathered, test: Real) -> Table | None:
    """How often two teachers of the first run predict the same class."""
    labellers = list(g.first.config.relabel.teachers)
    names = labellers if len(labellers) > 1 else g.first.teachers()
    if len(names) < 2:
        return None
    columns = {"real test images": test.images} | {run.name: run.images for run in g.distinct}
    found = {
        name: agreement(list(measures.teachers_logits(g.first, names, images).values()))
        for name, images in columns.items()
    }
    rows = [
        [word(f"{names[i]}, {names[j]}"),
         *(figure(float(share_TT[i, j]), words.percent) for share_TT in found.values())]
        for i, j in itertools.combinations(range(len(names)), 2)
    ]  # fmt: skip
    who = "all of which label" if names == labellers else f"of which {labellers[0]} labels"
    return Table(
        "Agreement", ["teachers", *found], rows,
        f"Images on which both predict the same class, per cent: the networks of {g.first.name}, "
        f"{who}.",
    )  # fmt: skip
