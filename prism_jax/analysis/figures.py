"""Figures: the images beside those they began as, and the curves of a run.

They are PNG bytes, and any other format where ``in_forms`` draws them.

Names are drawn as they are written (``$`` is no mathematics) and long ones cut: ``short``.
Colours are Okabe and Ito's, which colour-blind readers tell apart; a line style says the same
again. Nothing here keeps global state of matplotlib, and equal inputs give equal bytes.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import io
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from prism_jax.analysis.words import SYNTHETIC, row_label

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SET_STYLES: dict[str, dict[str, Any]] = {
    SYNTHETIC: {"color": "#0072B2", "linewidth": 2.4, "zorder": 3},
    "random_real": {"color": "#D55E00", "linestyle": (0, (5, 1.5))},
    "random_real_hard": {"color": "#E69F00", "linestyle": (0, (1.5, 1.5))},
    "real_herding": {"color": "#009E73", "linestyle": (0, (3, 1, 1, 1))},
    "real_feature_medoids": {"color": "#CC79A7", "linestyle": (0, (3, 1, 1, 1))},
    "real_confident": {"color": "#56B4E9", "linestyle": (0, (3, 1, 1, 1))},
    "real_balanced": {"color": "#E69F00", "linestyle": (0, (3, 1, 1, 1))},
    "synthetic_hard": {"color": "#0072B2", "linestyle": (0, (1.5, 1.5))},
    "medoids": {"color": "#009E73", "linestyle": (0, (5, 1.5))},
    "decoded_anchors": {"color": "#CC79A7", "linestyle": (0, (1.5, 1.5))},
    "no_anchors": {"color": "#56B4E9", "linestyle": (0, (3, 1.5))},
    "full_real": {"color": "#6B7280", "linestyle": (0, (6, 1.5, 1.5, 1.5))},
}
NOT_SUPERVISING: dict[str, Any] = {
    "linestyle": (0, (2, 2)), "linewidth": 1.3,
    "marker": "o", "markersize": 4.5, "markerfacecolor": "white",
}  # fmt: skip
INK, QUIET, FAINT = "#1F2933", "#6B7280", "#E5E7EB"
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "text.parse_math": False,  # a $ in a name is a $; numbers on axes are plain (log_scale)
    "text.color": INK,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": "#C5CAD1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "prism_jax",  # its identifiers are random otherwise
}
LONGEST, LONGEST_SET = 30, 40  # characters of a name in a figure, and of a set's words
FORMS: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}  # what each would say of the moment or the machine


def styled(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """Run a drawing function in the style of this module, and return its figure as PNG bytes."""

    @functools.wraps(draw)
    def to_png(*args: Any, **kwargs: Any) -> bytes:
        return in_forms(draw, *args, forms=("png",), **kwargs)["png"]

    return to_png


def in_forms(
    draw: Callable[..., Any], *args: Any, forms: Sequence[str] = tuple(FORMS), **kwargs: Any
) -> dict[str, bytes]:
    """One drawing in several formats.

    Args:
      draw: a ``styled`` function; it is given the other arguments.
      forms: of ``FORMS``.
    """
    found = {}
    style = matplotlib.rcParamsDefault | STYLE | {"font.family": _fonts()}
    with matplotlib.rc_context(style), _letters_that_no_font_has():
        figure = inspect.unwrap(draw)(*args, **kwargs)
        for form in forms:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, facecolor="white", metadata=FORMS[form])
            found[form] = buffer.getvalue()
    return found


# Of letters that matplotlib's own font lacks, where the machine has one of these.
OTHER_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans"),
    *("Malgun Gothic", "Apple SD Gothic Neo", "NanumGothic", "Noto Sans Devanagari", "Noto Sans"),
    *("Noto Sans Thai", "Arial Unicode MS", "Noto Color Emoji"),
)


@functools.cache
def _fonts() -> list[str]:
    """Matplotlib's own font, and after it those of the machine that have more letters."""
    there = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in OTHER_FONTS if name in there)]


@contextlib.contextmanager
def _letters_that_no_font_has() -> Iterator[None]:
    """One line in place of matplotlib's for every letter and every figure."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    lacking = [one for one in caught if "missing from font" in str(one.message)]
    for one in caught:
        if one not in lacking:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if lacking:
        warnings.warn(
            "no font of this machine has some letters of the names in figures, which stand as "
            "boxes; install one that does (Noto Sans CJK, say)",
            stacklevel=2,
        )


def short(name: str, most: int = LONGEST) -> str:
    """A name as a figure has room for it: of a longer one the beginning and the end."""
    if len(name) <= most:
        return name
    end = most // 3
    return f"{name[: most - end - 1]}…{name[-end:]}"


@styled
def grid(
    initial_NHWC: np.ndarray | None,
    synthetic_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    classes: int = 10,
    slots: int = 10,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Draw each synthetic image to the right of the image it began as, a class per row.

    Args:
      initial_NHWC, synthetic_NHWC: uint8, the same images in the same order; None: they began as
        no images, and stand alone.
      labels_N: the class of each.
      classes, slots: at most how many rows, and pairs in a row.
      class_names: names by class; by default "class 3".

    Returns:
      PNG bytes. Small images are enlarged by a whole factor, without smoothing.
    """
    sets, heading = [synthetic_NHWC], ""
    if initial_NHWC is not None:
        assert initial_NHWC.shape == synthetic_NHWC.shape
        sets = [initial_NHWC, synthetic_NHWC]
        heading = "each pair: the initial image, then the synthetic one"
    rows = [np.flatnonzero(labels_N == label)[:slots] for label in np.unique(labels_N)[:classes]]
    return _mosaic(
        [
            Strip(
                class_names[labels_N[row[0]]] if class_names else f"class {labels_N[row[0]]}",
                [[images[image] for images in sets] for image in row],
            )
            for row in rows
        ],
        heading=heading,
        largest=96,
    )


class Strip(NamedTuple):
    """A row of images: its name, and groups of uint8 (H, W, C) that stand close together."""

    name: str
    groups: Sequence[Sequence[np.ndarray]]


@styled
def strips(rows: Sequence[Strip], *, heading: str = "", columns: Sequence[str] = ()) -> Figure:
    """Draw rows of images.

    Args:
      rows: at least one, of at least one image.
      heading: a line above them.
      columns: instead, a word above each image of the first group.
    """
    return _mosaic(rows, heading=heading, columns=columns, largest=112)


def _mosaic(
    rows: Sequence[Strip], *, heading: str, columns: Sequence[str] = (), largest: int
) -> Figure:
    """Rows of groups of images; small ones are enlarged by a whole factor, without smoothing."""
    side = int(np.clip(1180 // max(sum(map(len, row.groups)) for row in rows), 40, largest))
    enlarged = [[[_resize(x, side=side) for x in group] for group in row.groups] for row in rows]
    every = [image for row in enlarged for group in row for image in group]
    height, width = (max(image.shape[axis] for image in every) for axis in (0, 1))

    inner, gap, top, margin = 2, 14, 48, 20
    names = [short(row.name) for row in rows]
    left = margin + 14 + round(9.5 * max(map(len, names)))
    wide = max(sum(len(g) * (width + inner) - inner + gap for g in row) - gap for row in enlarged)
    canvas_width = max(left + wide, left + 330) + margin
    canvas_height = top + len(rows) * (height + gap) - gap + margin
    canvas = np.full((canvas_height, canvas_width, 3), 255, np.uint8)
    figure = Figure(figsize=(canvas_width / 100, canvas_height / 100), dpi=100)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / canvas_width, 1 - y / canvas_height, text, va="center", **style)

    write(left, top / 2, heading, color=QUIET)
    for number, word in enumerate(columns):
        write(left + number * (width + inner) + width / 2, top / 2, word, color=QUIET, ha="center")
    for index, (name, images) in enumerate(zip(names, enlarged, strict=True)):
        y = top + index * (height + gap)
        write(left - 14, y + height / 2, name, ha="right")
        x = left
        for group in images:
            for image in group:
                canvas[y : y + len(image), x : x + image.shape[1]] = image
                x += width + inner
            x += gap - inner
    figure.figimage(canvas, zorder=-1)
    return figure


@styled
def recover_curves(lines: Iterable[Mapping[str, Any]], *, primary: str) -> Figure:
    """Draw the loss terms of recover: cross entropy, and BN alignment per teacher.

    Args:
      lines: records {"unit": name, "step": int, "ce": {teacher: float or None}, "bn": {...},
        "told": [teacher, ...], "drawn": [...]} of any number of image batches: whose logits and
        whose statistics count. A term that was not read is None; a teacher that was read and does
        not count is dashed, from its first value to its last, over the batches that have both.
      primary: the teacher whose logits count in lines without "told", which are older.

    Returns:
      PNG bytes. Lines are means over image batches, bands run from the least to the greatest.
    """
    lines = list(lines)
    teachers = [primary, *dict.fromkeys(t for line in lines for t in line["bn"] if t != primary)]
    styles: dict[str, dict[str, Any]] = {
        teacher: {"color": colour, "linewidth": 2.4 if teacher == primary else 1.7}
        for teacher, colour in zip(teachers, itertools.cycle(COLOURS), strict=False)
    }
    figure = Figure(figsize=(10.4, 4.3), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, term, title in zip(
        panels, ("ce", "bn"), ("Cross entropy", "BN alignment"), strict=True
    ):
        for teacher in teachers:
            supervising: dict[int, list[float]] = collections.defaultdict(list)
            others: dict[Any, dict[int, float]] = collections.defaultdict(dict)
            for line in lines:
                who = line.get("told", [primary]) if term == "ce" else line["drawn"]
                supervises = teacher in who
                value = line[term].get(teacher)
                if value is not None and value > 0 and supervises:
                    supervising[line["step"]].append(value)
                elif value is not None and value > 0:
                    others[line.get("unit")][line["step"]] = value
            ends = _ends(list(others.values()))
            _mean_and_range(axes, ends, band=False, **styles[teacher] | NOT_SUPERVISING)
            _mean_and_range(axes, supervising, **styles[teacher])
        log_scale(axes, "y")
        axes.set(title=title, xlabel="iteration")
        axes.margins(x=0.02)
    legend = [Line2D([], [], label=short(teacher), **styles[teacher]) for teacher in teachers]
    legend[0].set_label(f"{short(primary)} (primary)")
    legend.append(Line2D([], [], color=QUIET, label="read, not supervising", **NOT_SUPERVISING))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 5))
    return figure


def _ends(batches: Sequence[Mapping[int, float]]) -> dict[int, list[float]]:
    """First and last values of those batches that have theirs at the same iterations as most.

    A batch with one value alone counts where all are such.
    """
    spans = [(min(batch), max(batch)) for batch in batches]
    if not spans:
        return {}
    lines = [span for span in spans if span[0] < span[1]]
    usual = collections.Counter(lines or spans).most_common(1)[0][0]
    of_usual = [batch for batch, span in zip(batches, spans, strict=True) if span == usual]
    return {step: [batch[step] for batch in of_usual] for step in usual}


@styled
def student_curves(
    curves: Mapping[str, Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]],
) -> Figure:
    """Draw the test accuracy of students over their training, synthetic set beside controls.

    Args:
      curves: set ("synthetic", "random_real", ...) -> student -> one list per seed of records
        {"epoch": int, "top1": fraction}; other keys are ignored.

    Returns:
      PNG bytes. Lines are means over seeds, bands run from the least to the greatest. The full
      real set, whose epochs are longer and fewer, is the level that its students end at.
    """
    students = list(dict.fromkeys(name for by_student in curves.values() for name in by_student))
    columns = min(3, len(students))
    rows = -(-len(students) // columns)
    figure = Figure(
        figsize=(max(6.4, 5.2 * columns), 3.6 * rows + 0.6), dpi=150, layout="constrained"
    )
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    handles = {}
    for axes, student in zip(panels.flat, students, strict=False):
        series = {name: _accuracies(by.get(student, ())) for name, by in curves.items()}
        epochs = [epoch for of_set in series.values() for epoch in of_set]
        if full := series.get("full_real"):
            series["full_real"] = dict.fromkeys((min(epochs), max(epochs)), full[max(full)])
        for name, of_set in series.items():
            style = SET_STYLES.get(name, {"color": COLOURS[3]})
            if line := _mean_and_range(axes, of_set, label=row_label(name), **style):
                handles[row_label(name)] = line
        axes.set(title=short(student), xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
    for axes in panels.flat[len(students) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("top-1 on real test images, %")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2 if columns < 2 else 4
    )
    return figure


def _accuracies(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[int, list[float]]:
    """Per epoch the accuracies of all seeds that were tested after it, in per cent."""
    found = collections.defaultdict(list)
    for line in itertools.chain.from_iterable(seeds):
        if line.get("top1") is not None:
            found[line["epoch"]].append(100 * line["top1"])
    return found


def _mean_and_range(
    axes: Axes, series: Mapping[int, list[float]], *, band: bool = True, **style: Any
) -> Any:
    """Plot the mean of the values at each x, over a band from the least to the greatest."""
    if not series:
        return None
    x = sorted(series)
    if band and any(len(series[at]) > 1 for at in x):
        low, high = [min(series[at]) for at in x], [max(series[at]) for at in x]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
    if len(x) == 1:
        style |= {"marker": "o", "markersize": 5}
    (line,) = axes.plot(x, [float(np.mean(series[at])) for at in x], **style)
    return line


def log_scale(axes: Axes, which: str) -> None:
    """Make "x" or "y" logarithmic, with enough plain numbers, also over less than a decade."""
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _resize(image_HWC: np.ndarray, *, side: int) -> np.ndarray:
    """An RGB image of about ``side`` pixels: enlarged by repetition, or reduced smoothly."""
    if image_HWC.shape[-1] == 1:
        image_HWC = np.repeat(image_HWC, 3, axis=-1)
    factor = side // max(image_HWC.shape[:2])
    if factor:
        return image_HWC.repeat(factor, axis=0).repeat(factor, axis=1)
    small = Image.fromarray(image_HWC)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)
