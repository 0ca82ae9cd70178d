"""Images: each result beside the one that it began as, and on the way."""

from __future__ import annotations

import numpy as np

from prism_jax.analysis import figures
from prism_jax.analysis.page import Picture
from prism_jax.data import image_set
from prism_jax.data.lazy import Images
from prism_jax.report.gathered import Gathered, chosen, starts_of

WIDE = 12  # images in a row of the grid
ROWS = 10  # its classes
STRIPS = 5  # classes of a strip


def grid(g: Gathered) -> Picture:
    """Initial images beside every run's results."""
    classes, columns = chosen(g, ROWS), _columns(g)
    slots = min(run.manifest["ipc"] for run in g.distinct)
    slots = max(1, min(slots, WIDE // len(columns)))
    rows = [
        figures.Strip(
            g.names_K[k],
            [[images[k * ipc + slot] for _, images, ipc in columns] for slot in range(slots)],
        )
        for k in classes
    ]
    order = ", ".join(name for name, *_ in columns)
    heading = f"each group: {order}"
    return Picture(
        "grid", "Initial image and result",
        f"One class per row; each group is one image, from left to right: {order}.",
        figures.in_forms(figures.strips, rows, heading=heading), is_chart=False,
    )  # fmt: skip


def _columns(g: Gathered) -> list[tuple[str, Images, int]]:
    """Initial images and results of all runs; images that several began with stand once."""
    found, starts = [], starts_of(g)
    for run in g.distinct:
        if run in starts:
            name = "the initial image" if len(starts) == 1 else f"the initial image of {run.name}"
            found.append((name, run.initial, run.manifest["ipc"]))
        found.append((run.name, run.images, run.manifest["ipc"]))
    return found


def strips(g: Gathered) -> list[Picture]:
    """How images came about, of the runs that kept them."""
    classes, found = chosen(g, STRIPS), []
    for number, run in enumerate(g.distinct):
        if not (kept := run.kept()):
            continue
        ipc, begun = run.manifest["ipc"], starts_of(Gathered([run], g.options, g.names_K, g.notes))
        columns = [*("start" for _ in begun), *map(str, kept), "end"]
        rows = []
        for k in classes:
            paths = [image_set.image_path(folder, k, 0) for folder in kept.values()]
            last = run.images[k * ipc]
            blank = np.full_like(last, 255)  # where a class had fewer iterations
            between = [image_set.read_image(p) if p.exists() else blank for p in paths]
            images = [*(run.initial[k * ipc] for run in begun), *between, last]
            rows.append(figures.Strip(g.names_K[k], [images]))
        found.append(Picture(
            f"evolution_{number}", f"On the way: {run.name}",
            "The first image of a class after so many iterations.",
            figures.in_forms(figures.strips, rows, columns=columns), is_chart=False,
        ))  # fmt: skip
    if not found:
        g.notes.append(
            "On the way: left out. No run kept images while it optimised them "
            "(recover.keep_at=(1, 10, 100), say, of a new run)."
        )
    return found
