"""Where the optimisation of an image starts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from prism_jax import rng
from prism_jax.core import pixels
from prism_jax.data.pipeline import read_images
from prism_jax.data.sources import ImageSource
from prism_jax.errors import UserError
from prism_jax.types import Normalisation

# An initialiser: (images to start from or None, normalisation, shape, classes, slots, seed) ->
# float32 images_BHWC in the normalised space.
Initialiser = Callable[..., np.ndarray]


def noise(
    source: ImageSource | None,
    normalisation: Normalisation,
    shape: tuple[int, int, int],
    classes_B: np.ndarray,
    slots_B: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Standard normal noise in the normalised space (SRe2L as released)."""
    del source, normalisation
    key = rng.root(seed)
    images = [
        jax.random.normal(rng.stream(key, "recover/noise", int(c), int(s)), shape, "float32")
        for c, s in zip(classes_B, slots_B, strict=True)
    ]
    return np.stack([np.asarray(image) for image in images])


def real(
    source: ImageSource,
    normalisation: Normalisation,
    shape: tuple[int, int, int],
    classes_B: np.ndarray,
    slots_B: np.ndarray,
    seed: int,
) -> np.ndarray:
    """The slot-th training image of each class, in the source's order (PRISM, section 1.2)."""
    del shape, seed
    images = read_images(source, slot_positions(source, classes_B, slots_B))
    return np.asarray(pixels.normalise(images, normalisation))


def real_random(
    source: ImageSource,
    normalisation: Normalisation,
    shape: tuple[int, int, int],
    classes_B: np.ndarray,
    slots_B: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Random training images of each class, without repetition within a class."""
    del shape
    images = read_images(source, random_positions(source, classes_B, slots_B, seed))
    return np.asarray(pixels.normalise(images, normalisation))


INITIALISERS: dict[str, Initialiser] = {
    "noise": noise,
    "real": real,
    "real_random": real_random,
    "folder": real,  # of an image set that somebody else made, see data.exchange
}


def slot_positions(source: ImageSource, classes_B: np.ndarray, slots_B: np.ndarray) -> list[int]:
    """Position in the source of the slot-th image of each class.

    Raises:
      UserError: a class has too few images.
    """
    members = {int(c): np.flatnonzero(source.labels_N == c) for c in np.unique(classes_B)}
    _enough(members, slots_B)
    return [int(members[int(c)][int(s)]) for c, s in zip(classes_B, slots_B, strict=True)]


def random_positions(
    source: ImageSource, classes_B: np.ndarray, slots_B: np.ndarray, seed: int
) -> list[int]:
    """Position of the slot-th image of each class, after shuffling the class.

    The order of a class is the stream "random_real" of (seed, class): whichever slots are
    asked for, and in whatever batches, the same images come.

    Raises:
      UserError: a class has too few images.
    """
    members = {
        int(c): rng.generator(seed, "random_real", int(c)).permutation(
            np.flatnonzero(source.labels_N == c)
        )
        for c in np.unique(classes_B)
    }
    _enough(members, slots_B)
    return [int(members[int(c)][int(s)]) for c, s in zip(classes_B, slots_B, strict=True)]


def _enough(members: dict[int, np.ndarray], slots_B: np.ndarray) -> None:
    needed = int(slots_B.max()) + 1
    short = {c: len(at) for c, at in members.items() if len(at) < needed}
    if short:
        some = ", ".join(f"class {c} has {n}" for c, n in list(short.items())[:5])
        raise UserError(
            f"recover.ipc={needed} needs {needed} training images of every class, but {some}; "
            f"lower recover.ipc or use recover.initialise=noise"
        )
