"""Where the optimisation of an image starts; for some methods, where it also ends."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from prism_jax import rng
from prism_jax.core import pixels
from prism_jax.data.pipeline import read_images
from prism_jax.data.sources import ImageSource
from prism_jax.errors import UserError
from prism_jax.synthesis.selection import GROUPED, SELECTIONS, Choice, Features
from prism_jax.teachers import Teacher
from prism_jax.types import Array, Normalisation, PyTree

SCORED = 100  # images that a scorer reads at a time
SHUFFLED = 2  # tiles per side that EDC exchanges

# uint8 images_BHWC of one class, and the class -> log-probabilities (B,) that a teacher gives it.
Scorer = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Patches:
    """How mosaics are made of real images (RDED).

    Attributes:
      factor: patches per side of an image; 1: one patch fills it.
      images: real images of a class that are looked at.
      crops: random crops of each of them, of which the scorer keeps the best.
      choice: of the kept ones: the "confident" first (RDED), or those around the "median".
    """

    factor: int = 2
    images: int = 300
    crops: int = 5
    choice: str = "confident"


@dataclasses.dataclass(frozen=True)
class Start:
    """What initialisers are given.

    Attributes:
      source: real images, or those of another set; None for noise alone.
      normalisation, shape: of the images that are wanted; shape is (H, W, C).
      seed: of the experiment.
      ipc: images of each class that will be asked for in all.
      flip: whether a mirrored image still belongs to its class.
      repeat: whether a class with fewer images than are asked for gives some again, in turn.
      patches, scorer: for the initialisers that look for good real images.
      features: of the images of a class, for those that select in them.
      groups: a class's ``ipc`` groups of difficulty, for those that take an image of each.
      kept: ``(class, find) -> find(class)``, or what that found in a run that was stopped.
    """

    source: ImageSource | None
    normalisation: Normalisation
    shape: tuple[int, int, int]
    seed: int
    ipc: int = 1
    flip: bool = False
    repeat: bool = False
    patches: Patches = Patches()
    scorer: Scorer | None = None
    features: Callable[[int], Features] | None = None
    groups: Callable[[int], list[np.ndarray]] | None = None
    kept: Callable[[int, Callable[[int], list]], list] = lambda cls, find: find(cls)
    # What was found per class: whichever slots are asked for, a class is scored once.
    found: dict[int, list] = dataclasses.field(default_factory=dict, compare=False)

    def normalise(self, images_uint8: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        return np.asarray(pixels.normalise(np.asarray(images_uint8), self.normalisation))


# (start, classes, slots) -> float32 images_BHWC in the normalised space.
Initialiser = Callable[[Start, np.ndarray, np.ndarray], np.ndarray]


def noise(start: Start, classes_B: np.ndarray, slots_B: np.ndarray) -> np.ndarray:
    """Standard normal noise in the normalised space (SRe2L as released)."""
    key = rng.root(start.seed)
    images = [
        jax.random.normal(rng.stream(key, "recover/noise", int(c), int(s)), start.shape, "float32")
        for c, s in zip(classes_B, slots_B, strict=True)
    ]
    return np.stack([np.asarray(image) for image in images])


def real(start: Start, classes_B: np.ndarray, slots_B: np.ndarray) -> np.ndarray:
    """The slot-th training image of each class, in the source's order (PRISM, section 1.2)."""
    assert start.source is not None
    at = slot_positions(start.source, classes_B, slots_B, repeat=start.repeat)
    return start.normalise(read_images(start.source, at))


def real_random(start: Start, classes_B: np.ndarray, slots_B: np.ndarray) -> np.ndarray:
    """Random training images of each class, without repetition within a class."""
    assert start.source is not None
    at = random_positions(start.source, classes_B, slots_B, start.seed, repeat=start.repeat)
    return start.normalise(read_images(start.source, at))


def real_squashed(start: Start, classes_B: np.ndarray, slots_B: np.ndarray) -> np.ndarray:
    """The slot-th training image of each class, its sides resized apart to a square (DWA)."""
    assert start.source is not None
    at = slot_positions(start.source, classes_B, slots_B, repeat=start.repeat)
    originals = [start.source.original(i) for i in at]
    return start.normalise([cut(x, Box(0, 0, *x.shape[:2]), start.shape[0]) for x in originals])


def real_median(start: Start, classes_B: np.ndarray, slots_B: np.ndarray) -> np.ndarray:
    """Real images that the scorer finds neither easy nor hard (DELT).

    A class is ranked by the probability of its label; slots 0, 1, 2, 3, ... take the image at
    the median and those 1 above, 1 below, 2 above it, and so on.
    """
    assert start.source is not None and start.scorer is not None
    source, scores_of = start.source, start.scorer

    def rank(cls: int) -> list[int]:
        at = np.flatnonzero(source.labels_N == cls)
        scores = scores_of(read_images(source, at.tolist()), cls)
        order = at[np.argsort(scores, kind="stable")]
        _enough({cls: order}, np.array([start.ipc - 1]), start.repeat)
        ranks = middle_out(len(order), start.ipc)
        return [int(order[i]) for i in np.resize(ranks, start.ipc)]

    at = [_found(start, int(c), rank)[int(s)] for c, s in zip(classes_B, slots_B, strict=True)]
    return start.normalise(read_images(source, at))


def middle_out(count: int, wanted: int) -> list[int]:
    """The first ranks from the median outwards: above, below, above, ..."""
    outwards = [math.ceil(count / 2) + (s + 1) // 2 * (-1) ** (s + 1) for s in range(2 * count + 2)]
    return [rank for rank in outwards if 0 <= rank < count][:wanted]


def selected(start: Start, classes_B: np.ndarray, slots_B: np.ndarray, *, by: str) -> np.ndarray:
    """Real images that stand for their class, by a row of ``SELECTIONS`` or of ``GROUPED``."""
    assert start.source is not None
    at = selected_positions(start, classes_B, slots_B, by=by)
    return start.normalise(read_images(start.source, at))


def selected_positions(
    start: Start, classes_B: np.ndarray, slots_B: np.ndarray, *, by: str
) -> list[int]:
    """Where those are in the source; a class is looked through once, for all its slots."""
    source = start.source
    assert source is not None

    def choose(cls: int) -> list[int]:
        at = np.flatnonzero(source.labels_N == cls)
        _enough({cls: at}, np.array([start.ipc - 1]), start.repeat)
        if by in GROUPED:
            assert start.groups is not None
            return [int(at[GROUPED[by](group)]) for group in start.groups(cls)]
        assert start.features is not None
        draw = rng.generator(start.seed, "recover/selection", cls)
        count = min(start.ipc, len(at))
        chosen = SELECTIONS[by](Choice(start.features(cls), count, int(draw.integers(2**31))))
        return np.resize(at[chosen], start.ipc).tolist()

    return [_found(start, int(c), choose)[int(s)] for c, s in zip(classes_B, slots_B, strict=True)]


def mosaic(start: Start, classes_B: np.ndarray, slots_B: np.ndarray) -> np.ndarray:
    """Mosaics of the patches of real images that the scorer finds most real (RDED).

    ``patches.factor`` squared patches make an image: the k-th place of slot s has the patch of
    rank k ipc + s of its class.
    """
    return start.normalise(_mosaics(start, classes_B, slots_B))


def mosaic_shuffled(start: Start, classes_B: np.ndarray, slots_B: np.ndarray) -> np.ndarray:
    """Mosaics, half of them flipped, with their four quarters exchanged at random (EDC)."""
    images = _mosaics(start, classes_B, slots_B)
    for i, (cls, slot) in enumerate(zip(classes_B, slots_B, strict=True)):
        draw = rng.generator(start.seed, "recover/shuffle", int(cls), int(slot))
        flipped = images[i][:, ::-1] if start.flip and draw.random() < 0.5 else images[i]
        images[i] = shuffle_tiles(flipped, draw.permutation(SHUFFLED**2))
    return start.normalise(images)


def shuffle_tiles(image_HWC: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Cut an image into 2 x 2 tiles and put the tile ``order[i]`` at place i, row by row."""
    side = image_HWC.shape[0] // SHUFFLED
    places = [(side * r, side * c) for r in range(SHUFFLED) for c in range(SHUFFLED)]
    shuffled = image_HWC.copy()
    for (top, left), source in zip(places, order, strict=True):
        y, x = places[int(source)]
        shuffled[top : top + side, left : left + side] = image_HWC[y : y + side, x : x + side]
    return shuffled


INITIALISERS: dict[str, Initialiser] = {
    "noise": noise,
    "real": real,
    "real_random": real_random,
    "real_squashed": real_squashed,
    "real_median": real_median,
    "mosaic": mosaic,
    "mosaic_shuffled": mosaic_shuffled,
    **{name: functools.partial(selected, by=name) for name in (*SELECTIONS, *GROUPED)},
    "folder": real,  # of an image set that somebody else made, see data.exchange
}
SCORING = ("real_median", "mosaic", "mosaic_shuffled")  # they need a scorer
ASKING = (*SCORING, *SELECTIONS)  # one teacher is asked


# --- patches --------------------------------------------------------------------------------


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def cut(image_HWC: np.ndarray, box: Box, size: int) -> np.ndarray:
    """A box of an image, resized (bilinear, antialiased) to a square of a side."""
    grey = image_HWC.shape[-1] == 1
    picture = Image.fromarray(image_HWC[..., 0] if grey else image_HWC)
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    resized = picture.resize((size, size), Image.Resampling.BILINEAR, box=corners)
    return np.array(resized)[..., None] if grey else np.array(resized)


def random_box(draw: np.random.Generator, height: int, width: int) -> Box:
    """A square crop of 8 to 100 % of the area, as RandomResizedCrop with ratio 1 draws it."""
    for _ in range(10):
        side = round(math.sqrt(draw.uniform(0.08, 1.0) * height * width))
        if 0 < side <= min(height, width):
            top, left = draw.integers(height - side + 1), draw.integers(width - side + 1)
            return Box(int(top), int(left), side, side)
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def _mosaics(start: Start, classes_B: np.ndarray, slots_B: np.ndarray) -> list[np.ndarray]:
    """uint8 mosaics."""
    assert start.source is not None
    factor, size = start.patches.factor, start.shape[0]
    edges = [size * i // factor for i in range(factor + 1)]
    images = []
    for cls, slot in zip(classes_B, slots_B, strict=True):
        ranked = _found(start, int(cls), lambda c: _rank_patches(start, c))
        image = np.zeros(start.shape, np.uint8)
        for k in range(factor**2):
            at, box = ranked[k * start.ipc + int(slot)]
            (top, bottom), (left, right) = (edges[i : i + 2] for i in divmod(k, factor))
            patch = cut(start.source.original(at), Box(*box), size // factor)
            rows = np.arange(bottom - top) * len(patch) // (bottom - top)
            columns = np.arange(right - left) * len(patch) // (right - left)
            image[top:bottom, left:right] = patch[rows][:, columns]  # nearest, where one is wider
        images.append(image)
    return images


def _rank_patches(start: Start, cls: int) -> list[tuple[int, Box]]:
    """The best crop of each of some real images of a class, in the order they are wanted."""
    assert start.source is not None and start.scorer is not None
    patches, size = start.patches, start.shape[0]
    draw = rng.generator(start.seed, "recover/patches", cls)
    members = np.flatnonzero(start.source.labels_N == cls)
    members = draw.permutation(members)[: patches.images]
    needed = start.ipc * patches.factor**2
    if not len(members) or (len(members) < needed and not start.repeat):
        raise UserError(
            f"mosaics of {patches.factor} x {patches.factor} patches at recover.ipc={start.ipc} "
            f"need {needed} images of every class, but class {cls} has {len(members)} to look at "
            f"(recover.patch_images={patches.images}); lower recover.ipc or recover.patch_factor"
        )
    with ThreadPoolExecutor() as threads:
        originals = list(threads.map(start.source.original, members.tolist()))
    boxes = [[random_box(draw, *x.shape[:2]) for _ in range(patches.crops)] for x in originals]
    side = size // patches.factor
    crops = [
        cut(x, box, side) for x, of_image in zip(originals, boxes, strict=True) for box in of_image
    ]
    scores = start.scorer(np.stack(crops), cls)
    scores = scores.reshape(len(members), patches.crops)
    best = scores.argmax(1)
    order = np.argsort(-scores.max(1), kind="stable")
    if patches.choice == "median":
        order = order[middle_out(len(order), needed)]
    return [(int(members[i]), boxes[i][best[i]]) for i in np.resize(order, needed)]


def centred(images_BHWC: np.ndarray, size: int) -> np.ndarray:
    """Normalised images in the middle of larger ones of the mean colour."""
    space = size - images_BHWC.shape[1]
    edges = (space // 2, space - space // 2)
    return np.pad(images_BHWC, ((0, 0), edges, edges, (0, 0)))


def log_probabilities_of(teacher: Teacher, normalisation: Normalisation) -> jax.stages.Wrapped:
    """A teacher's log-probabilities of normalised images, compiled: ``f(variables, images)``."""

    @jax.jit
    def log_probabilities(variables: PyTree, images_BHWC: Array) -> Array:
        reading = teacher.read(variables, images_BHWC, normalisation, statistics=False)
        return jax.nn.log_softmax(reading.logits_BK)

    return log_probabilities


def scorer(teacher: Teacher, variables: PyTree, normalisation: Normalisation, size: int) -> Scorer:
    """How sure a teacher is of images' class; smaller ones are shown in the middle of ``size``.

    It reads batches of one size, so that one program serves all and a score does not depend on
    how many images are asked for.
    """

    log_probabilities = log_probabilities_of(teacher, normalisation)
    placed = jax.device_put(variables)  # once, not with every batch

    def score(images_uint8_BHWC: np.ndarray, cls: int) -> np.ndarray:
        found = []
        for at in range(0, len(images_uint8_BHWC), SCORED):
            rows = np.arange(at, min(at + SCORED, len(images_uint8_BHWC)))
            images = pixels.normalise(images_uint8_BHWC[np.resize(rows, SCORED)], normalisation)
            table = log_probabilities(placed, centred(np.asarray(images), size))
            found.append(np.asarray(table)[: len(rows), cls])
        return np.concatenate(found)

    return score


def _found(start: Start, cls: int, find: Callable[[int], list]) -> list:
    if cls not in start.found:
        start.found[cls] = start.kept(cls, find)
    return start.found[cls]


# --- positions ------------------------------------------------------------------------------


def slot_positions(
    source: ImageSource, classes_B: np.ndarray, slots_B: np.ndarray, *, repeat: bool = False
) -> list[int]:
    """Position in the source of the slot-th image of each class.

    Args:
      repeat: a class with too few images begins again.

    Raises:
      UserError: a class has too few images.
    """
    members = {int(c): np.flatnonzero(source.labels_N == c) for c in np.unique(classes_B)}
    return _picked(members, classes_B, slots_B, repeat)


def random_positions(
    source: ImageSource,
    classes_B: np.ndarray,
    slots_B: np.ndarray,
    seed: int,
    *,
    repeat: bool = False,
) -> list[int]:
    """Position of the slot-th image of each class, after shuffling the class.

    The order of a class is the stream "random_real" of (seed, class): whichever slots are
    asked for, and in whatever batches, the same images come. With ``repeat`` a class with too few
    images begins again.

    Raises:
      UserError: a class has too few images.
    """
    members = {
        int(c): rng.generator(seed, "random_real", int(c)).permutation(
            np.flatnonzero(source.labels_N == c)
        )
        for c in np.unique(classes_B)
    }
    return _picked(members, classes_B, slots_B, repeat)


def _picked(
    members: dict[int, np.ndarray], classes_B: np.ndarray, slots_B: np.ndarray, repeat: bool
) -> list[int]:
    """The slot-th of each class' positions."""
    _enough(members, slots_B, repeat)
    return [
        int(members[int(c)][int(s) % len(members[int(c)])])
        for c, s in zip(classes_B, slots_B, strict=True)
    ]


def _enough(members: dict[int, np.ndarray], slots_B: np.ndarray, repeat: bool) -> None:
    needed = 1 if repeat else int(slots_B.max()) + 1
    if short := {c: len(at) for c, at in members.items() if len(at) < needed}:
        raise UserError(too_few(short, needed))


def needed_images(initialise: str, ipc: int, patches: Patches) -> int:
    """Training images of a class that an initialiser asks for."""
    if initialise in ("noise", "folder"):
        return 0
    return ipc * patches.factor**2 if initialise in ("mosaic", "mosaic_shuffled") else ipc


def too_few(short: dict[int, int], needed: int, names: Sequence[str] | None = None) -> str:
    """What to say of classes with fewer images than are needed, by class.

    Args:
      short: the images of each of them.
      names: of all classes, where they have some.
    """
    called = {c: f"class {c} ({names[c]})" if names else f"class {c}" for c in short}
    some = ", ".join(f"{called[c]} has {n}" for c, n in sorted(short.items())[:5])
    more = f" and {len(short) - 5} more have too few" if len(short) > 5 else ""
    if not min(short.values()):
        empty = ", ".join([called[c] for c, n in sorted(short.items()) if not n][:5])
        return (
            f"no training image: {empty}; labels count from 0 and leave none out, so number the "
            f"classes that have images anew"
        )
    return (
        f"{needed} training images of every class are asked for, but {some}{more}; lower "
        f"recover.ipc, or let such classes give images more than once with "
        f"recover.short_classes=repeat"
    )
