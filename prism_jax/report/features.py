"""Sets in the features of a network: where they lie, how diverse and how like real images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from prism_jax.analysis import charts, figures, words
from prism_jax.analysis.page import Picture, Table, figure, word
from prism_jax.data.lazy import Images
from prism_jax.errors import UserError
from prism_jax.report import measures
from prism_jax.report.gathered import Gathered, chosen, count, starts_of
from prism_jax.report.measures import Real, Surroundings

IN_PLANE = 10  # classes of the plane
REAL_IN_PLANE = 200  # real images of each of them
RANDOM = "random real images"


class Measured(NamedTuple):
    """A set in the features of the network.

    Attributes:
      labels_N, features_ND: of its images.
      numbers: what was measured.
      is_reference: real or initial images, not a run's results.
    """

    labels_N: np.ndarray
    features_ND: np.ndarray
    numbers: measures.Measures
    is_reference: bool


def lead(g: Gathered, network: str) -> str:
    """How to read what follows."""
    return (
        f"Measured in the penultimate features of {network}, a network of {g.first.name}; real "
        f"images are those of the training split, unless it says test. Sets of few images are far "
        f"from any other: compare with as many random real ones."
    )


def surroundings(
    g: Gathered, train: Real, test: Real
) -> tuple[str, Surroundings, dict[str, Measured]]:
    """The network, real images in its features, and every set that is measured beside them."""
    network = measures.network_of(g.first, g.options.network)
    read = measures.features_by(g.first, network)
    around = Surroundings(train, test, read, len(g.names_K))
    if train.whole is None:
        g.notes.append(
            f"Nearness and copies: left out. Of a part of the training images they would say too "
            f"little, and all {train.total:,} are more than a gigabyte of pixels: "
            f"--images={train.total} looks at them all."
        )
    sets: dict[str, Measured] = {}

    def measure(name: str, images: Images, labels_N: np.ndarray, is_reference: bool) -> None:
        made_ND = read(images)
        numbers = around.measure(images, labels_N, made_ND)
        sets[name] = Measured(labels_N, made_ND, numbers, is_reference)

    for run in g.distinct:
        measure(run.name, run.images, run.labels_N, False)
    starts = starts_of(g)
    for run in starts:
        name = "initial images" if len(starts) == 1 else f"initial images of {run.name}"
        measure(name, run.initial, run.labels_N, True)
    drawn = {run.manifest["ipc"]: run for run in reversed(g.distinct)}
    for ipc, run in sorted(drawn.items()):
        name = RANDOM if len(drawn) == 1 else f"{RANDOM}, IPC {ipc}"
        try:
            measure(name, run.random_real, run.labels_N, True)
        except UserError as error:
            g.notes.append(f"{name}: left out. {error}")
    sets["real test images"] = Measured(test.labels_N, around.test_ND, around.measure_test(), True)
    return network, around, sets


def cosines(g: Gathered, network: str, sets: Mapping[str, Measured]) -> Picture:
    """PRISM's figure 4: mean and variance of the pairs of every class."""
    drawn = {name: of.numbers.cosines for name, of in sets.items() if not name.startswith(RANDOM)}
    panels = {
        "mean cosine": {name: found.mean_K for name, found in drawn.items()},
        "variance of the cosine": {name: found.variance_K for name, found in drawn.items()},
    }
    references = [name for name in drawn if sets[name].is_reference]
    return Picture(
        "cosines", "Intra-class cosine similarity",
        f"Of the pairs of images of a class in the features of {network}, with the means over "
        f"classes as dashed lines: a lower mean and a higher variance are more diverse.",
        figures.in_forms(
            charts.by_class, panels, references, g.names_K, order_by="real test images"
        ),
    )  # fmt: skip


def plane(g: Gathered, network: str, around: Surroundings, sets: Mapping[str, Measured]) -> Picture:
    """PRISM's figure 1: one embedding of real images and every run's.

    Raises:
      UserError: umap-learn is not installed.
    """
    try:
        import umap
    except ImportError as error:
        raise UserError(
            "umap-learn is not installed: pip install 'prism-jax[report]', or umap-learn"
        ) from error
    classes = chosen(g, IN_PLANE)
    if len(classes) < IN_PLANE and not g.options.classes:
        others = np.linspace(0, len(g.names_K) - 1, min(IN_PLANE, len(g.names_K))).round()
        more = [int(k) for k in others if int(k) not in classes]
        classes = [*classes, *more][:IN_PLANE]
    within = np.isin(around.train.labels_N, classes)
    labels_N, real_ND = around.train.labels_N[within], around.train_ND[within]
    at = measures.evenly(labels_N, most=REAL_IN_PLANE * len(classes), seed=g.options.seed)
    parts = [(labels_N[at], real_ND[at])]
    for run in g.distinct:
        of = sets[run.name]
        mine = np.isin(of.labels_N, classes)
        parts.append((of.labels_N[mine], of.features_ND[mine]))
    together_ND = np.concatenate([features_ND for _, features_ND in parts])
    if len(together_ND) < 4:
        raise UserError(f"{len(together_ND)} images are too few for a plane")
    reducer = umap.UMAP(
        n_neighbors=min(15, len(together_ND) - 1), metric="cosine", random_state=g.options.seed,
        n_jobs=1,
    )  # fmt: skip
    points_N2 = reducer.fit_transform(together_ND)
    stops = np.cumsum([len(part) for part, _ in parts])
    each = np.split(points_N2, stops[:-1])
    found = [charts.Points(p, part) for p, (part, _) in zip(each, parts, strict=True)]
    by_run = dict(zip([run.name for run in g.distinct], found[1:], strict=True))
    return Picture(
        "umap", "UMAP",
        f"Real training images (small) and results (large) in one embedding of the features of "
        f"{network}, by cosine; seed {g.options.seed}. Only who is near whom means something.",
        figures.in_forms(charts.plane, found[0], by_run, {k: g.names_K[k] for k in classes}),
    )  # fmt: skip


def likeness_table(network: str, sets: Mapping[str, Measured]) -> Table:
    """All numbers of all sets."""
    rows = []
    for name, of in sets.items():
        n = of.numbers
        near, pixels = n.features, n.pixels
        rows.append([
            word(name), figure(len(of.labels_N), count),
            figure(_mean(n.cosines.mean_K), words.number),
            figure(_mean(n.cosines.variance_K), words.number),
            figure(n.vendi_class, words.number), figure(n.vendi, words.number),
            figure(n.manifold and n.manifold.density, words.number),
            figure(n.manifold and n.manifold.coverage, words.percent),
            figure(n.frechet, words.number),
            figure(near and near.distance, words.number),
            figure(near and near.near, words.percent),
            figure(pixels and pixels.distance, words.number),
            figure(pixels and pixels.near, words.percent),
            figure(pixels and pixels.copies, count),
        ])  # fmt: skip
    heads = [
        "set", "images", "cosine", "its variance", "Vendi, by class", "Vendi", "density",
        "coverage, %", "Fréchet", "nearest", "near, %", "nearest, pixels", "near, pixels, %",
        "copies",
    ]  # fmt: skip
    return Table(
        "Numbers", heads, rows,
        f"Cosine and variance: means over classes. Vendi: how many images that have nothing in "
        f"common are as diverse. Density and coverage: Naeem et al., 5 neighbours. Fréchet: "
        f"distance in the features of {network}, which is no FID. Nearest: median distance to the "
        f"nearest of all training images, over that of test images. Near: the share nearer to one "
        f"than the nearest 1 % of test images are. Copies: training images themselves.",
    )  # fmt: skip


def _mean(values_K: np.ndarray) -> float | None:
    return None if np.isnan(values_K).all() else float(np.nanmean(values_K))
