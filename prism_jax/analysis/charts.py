"""Charts of several sets side by side: where they lie, how diverse, how accurate, how sure.

Every function takes what it draws by the name of a set; runs have the colours of ``figures``,
references are grey. They return PNG bytes, or any format by ``figures.in_forms``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from prism_jax.analysis.calibration import Reliability
from prism_jax.analysis.figures import COLOURS, FAINT, INK, LONGEST_SET, QUIET, short, styled

NAMED = 30  # classes that a chart names one by one
REFERENCES = ("#6B7280", "#A3ABB8", "#C5CAD1")
MARKERS = "osD^vP"
LINES = ("-", "-.", ":")


class Points(NamedTuple):
    """Images of a set in the plane: (N, 2), and their classes."""

    points_N2: np.ndarray
    labels_N: np.ndarray


@styled
def plane(real: Points, sets: Mapping[str, Points], class_names: Mapping[int, str]) -> Figure:
    """Draw where images lie in one embedding: a panel per set, over the real images.

    Args:
      real: drawn small in every panel.
      sets: by name; of the classes that ``class_names`` names, which are at most twenty.
    """
    columns = len(sets) if len(sets) <= 3 else 2
    rows = -(-len(sets) // columns)
    figure = Figure(figsize=(5.4 * columns, 5.0 * rows + 0.5), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    palette = matplotlib.colormaps["tab10" if len(class_names) <= 10 else "tab20"]
    colours = {label: palette(i) for i, label in enumerate(class_names)}
    for axes, (name, of) in zip(panels.flat, sets.items(), strict=False):
        for label, colour in colours.items():
            at, mine = real.labels_N == label, of.labels_N == label
            axes.scatter(
                *real.points_N2[at].T, s=7, color=colour, alpha=0.28, linewidths=0, rasterized=True
            )
            axes.scatter(
                *of.points_N2[mine].T, s=46, color=colour, edgecolors=INK, linewidths=0.9, zorder=3
            )
        axes.set(title=short(name, LONGEST_SET), xticks=(), yticks=())
        axes.spines[:].set_visible(False)
    for axes in panels.flat[len(sets) :]:
        axes.remove()
    handles = [
        Line2D([], [], linestyle="", marker="o", color=colours[label], label=short(name))
        for label, name in class_names.items()
    ]
    handles += [
        Line2D([], [], linestyle="", marker="o", markersize=3, color=QUIET, label="real"),
        Line2D(
            [], [], linestyle="", marker="o", color="white", markeredgecolor=INK, label="of the set"
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=_columns(figure, handles, 6))
    return figure


@styled
def by_class(
    panels: Mapping[str, Mapping[str, np.ndarray]],
    references: Sequence[str],
    class_names: Sequence[str],
    *,
    order_by: str,
    percent: bool = False,
) -> Figure:
    """Draw a number of every class, set beside set; dashed: its mean over classes.

    Args:
      panels: what the number is -> set -> (K,); NaN where a class has none.
      references: the sets that are drawn grey.
      class_names: (K,); written where there are at most ``NAMED``, else classes are ranked.
      order_by: the set whose first number ranks them.
      percent: the numbers are fractions, drawn in per cent.
    """
    styles = _styles(next(iter(panels.values())), references)
    classes, named = len(class_names), len(class_names) <= NAMED
    order_K = np.arange(classes)
    if not named:
        order_K = np.argsort(next(iter(panels.values()))[order_by], kind="stable")
    width = 5.4 * len(panels) if len(panels) > 1 else 8.0
    figure = Figure(figsize=(width, 4.4), dpi=150, layout="constrained")
    for axes, (title, sets) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                   panels.items(), strict=True):  # fmt: skip
        for name, values_K in sets.items():
            style = styles[name] | ({"linestyle": ""} if named else {"marker": ""})
            axes.plot(range(classes), values_K[order_K], **style)
            if not np.isnan(values_K).all():
                mean = float(np.nanmean(values_K))
                axes.axhline(mean, color=style["color"], linewidth=1, linestyle=(0, (5, 3)))
        axes.set(title=title)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if named:
            names = [short(name) for name in class_names]
            axes.set_xticks(range(classes), names)
            axes.set_xlim(-0.6, classes - 0.4)
            if _are_long(names):
                axes.tick_params(axis="x", rotation=60, labelsize=9)
        else:
            axes.set_xlabel(f"classes, by {short(order_by, LONGEST_SET)}")
    handles = _legend(styles)
    figure.legend(handles=handles, loc="outside lower center", ncols=_columns(figure, handles, 3))
    return figure


@styled
def confusions(shares: Mapping[str, np.ndarray], class_names: Sequence[str]) -> Figure:
    """Draw what classes are taken for: a panel per set, a row per class.

    Args:
      shares: (K, K) by name: the share of a class' (row's) images that is taken for a class.
      class_names: (K,); written where there are at most ``NAMED``.
    """
    columns = len(shares) if len(shares) <= 3 else 2
    rows = -(-len(shares) // columns)
    figure = Figure(figsize=(5.4 * columns, 4.9 * rows), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    drawn: Any = None
    for axes, (name, share_KK) in zip(panels.flat, shares.items(), strict=False):
        drawn = axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.grid(False)
        axes.set(title=short(name, LONGEST_SET), xlabel="taken for", ylabel="class")
        if len(class_names) <= NAMED:
            names = [short(name) for name in class_names]
            axes.set_xticks(range(len(names)), names)
            axes.set_yticks(range(len(names)), names)
            if _are_long(names):
                axes.tick_params(axis="x", rotation=60)
                axes.tick_params(labelsize=8)
        if len(class_names) <= 12:
            for k, j in itertools.product(range(len(class_names)), repeat=2):
                if share_KK[k, j] >= 0.005:
                    axes.text(
                        j, k, f"{100 * share_KK[k, j]:.0f}", ha="center", va="center", fontsize=8,
                        color="white" if share_KK[k, j] > 0.6 else INK,
                    )  # fmt: skip
    for axes in panels.flat[len(shares) :]:
        axes.remove()
    axes = list(panels.flat[: len(shares)])
    form = PercentFormatter(1.0, decimals=0)
    figure.colorbar(drawn, ax=axes, format=form, shrink=0.7, pad=0.02)
    return figure


def _are_long(names: Sequence[str]) -> bool:
    """Whether they do not fit side by side."""
    return max(map(len, names)) * len(names) > 40


@styled
def reliabilities(
    students: Mapping[str, Mapping[str, Reliability]], references: Sequence[str]
) -> Figure:
    """Draw accuracy over confidence: a panel per student, a line per set.

    On the diagonal probabilities mean what they say; below it they promise too much. A dot's area
    is the share of the predictions in its bin.
    """
    names = dict.fromkeys(n for of in students.values() for n in of)
    styles = _styles(sorted(names, key=lambda name: name in references), references)
    columns = min(3, len(students))
    rows = -(-len(students) // columns)
    figure = Figure(
        figsize=(max(5.4, 4.6 * columns), 4.4 * rows + 0.5), dpi=150, layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, (student, sets) in zip(panels.flat, students.items(), strict=False):
        axes.plot((0, 1), (0, 1), color=FAINT, linewidth=1.4, zorder=1)
        for name, found in sets.items():
            style: dict[str, Any] = styles[name]
            at = found.count_B > 0
            x, y = found.confidence_B[at], found.accuracy_B[at]
            axes.plot(x, y, color=style["color"], linewidth=style["linewidth"], alpha=0.9)
            area = 12 + 240 * found.count_B[at] / found.count_B.sum()
            axes.scatter(x, y, s=area, color=style["color"], marker=style["marker"], alpha=0.75)
        axes.set(title=short(student), xlabel="confidence", xlim=(0, 1.02), ylim=(0, 1.04))
        _percent(axes)
    for axes in panels.flat[len(students) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("right, on real test images")
    handles = _legend(styles)
    figure.legend(handles=handles, loc="outside lower center", ncols=_columns(figure, handles, 3))
    return figure


def _percent(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _columns(figure: Figure, handles: Sequence[Line2D], most: int) -> int:
    """How many columns of a legend a figure has room for."""
    inches = 0.6 + 0.085 * max(len(str(handle.get_label())) for handle in handles)
    return max(1, min(most, len(handles), int(figure.get_figwidth() / inches)))


def _legend(styles: Mapping[str, Mapping[str, Any]]) -> list[Line2D]:
    return [
        Line2D([], [], label=short(name, LONGEST_SET), **style) for name, style in styles.items()
    ]


def _styles(names: Iterable[str], references: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of every set: runs in colour, references grey and thin.

    Where colours begin again, markers and lines are others.
    """
    found: dict[str, dict[str, Any]] = {}
    counts = {True: 0, False: 0}
    for name in names:
        grey = name in references
        colours = REFERENCES if grey else COLOURS
        number, again = counts[grey] % len(colours), counts[grey] // len(colours)
        counts[grey] += 1
        found[name] = {
            "color": colours[number],
            "marker": "x+1"[again % 3] if grey else MARKERS[(number + again) % len(MARKERS)],
            "linestyle": LINES[again % len(LINES)],
            "markersize": 6,
            "linewidth": 1.3 if grey else 2.0,
        }
    return found
