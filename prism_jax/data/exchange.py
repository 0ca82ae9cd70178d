"""Image sets that somebody else made, in whatever format, as images of the classes of the data."""

from __future__ import annotations

import functools
import hashlib
import io
import warnings
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from prism_jax.data import sets
from prism_jax.data.datasets import DatasetInfo
from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sets.base import NOTHING_STATED, Stated
from prism_jax.data.sets.classes import class_map
from prism_jax.data.sets.columns import in_our_order
from prism_jax.data.sources import ImageSource, decode
from prism_jax.data.sources.decoding import square
from prism_jax.errors import UserError


class ImageSet:
    """A set with equally many images of every class, as an ``ImageSource``.

    Images are class-major, in the order of the set. One of exactly the wanted size is taken as it
    is; another is resized as a whole (its shorter side to ``image_size``, then the centre), and
    that is said once.

    Args:
      root: the file or folder, see ``data.sets``.
      info: the data set that the classes belong to.
      real: its images; see ``data.sets.classes`` for how the set's classes become its labels.
      ipc: images of each class, the first ones.
      image_size: side in pixels.
      whole: the training images with what is held out of ``real``, of which a whitening was
        computed; None: nothing is.
      stated, classes: what a person says of the set, see ``Stated`` and ``class_map``.

    Attributes:
      weights_N: float32 of mean 1; None: the images count alike.
      notes: what a person should know of how it was read.
      places_N: the place of each image in the set's own order; of folders, ImageFolder's.

    Raises:
      UserError: no such set, other classes or another number of them, or too few images.
    """

    def __init__(
        self,
        root: epath.PathLike,
        info: DatasetInfo,
        real: ImageSource,
        *,
        ipc: int,
        image_size: int,
        whole: ImageSource | None = None,
        stated: Stated = NOTHING_STATED,
        classes: tuple[str, ...] | None = None,
    ):
        root = str(root)
        self._found = found = sets.open_set(root, stated, whole or real)
        self._info, self._size, self.notes = info, image_size, found.notes
        self.num_classes = num_classes = real.num_classes
        self.class_names, self.imagenet_indices = real.class_names, real.imagenet_indices
        self.left_out = found.left_out
        self.labels_N = np.repeat(np.arange(num_classes, dtype=np.int32), ipc)
        self._root, self._order_K = root, class_map(root, found, real, info, classes)
        images = {found.classes[at]: np.flatnonzero(found.labels_N == at) for at in self._order_K}
        short = [f"{name} has {len(here)}" for name, here in images.items() if len(here) < ipc]
        most, least = (f(map(len, images.values())) for f in (max, min))
        if short:
            raise UserError(
                f"recover.ipc={ipc} needs {ipc} images of every class, but {len(short)} of the "
                f"{num_classes} classes in {root} have fewer ({', '.join(short[:5])}"
                f"{', ...' if len(short) > 5 else ''}); this set allows up to {least}"
            )
        if most > ipc:
            warnings.warn(
                f"{root} has up to {most} images of a class; the first {ipc} of each are taken, "
                f"because recover.ipc is {ipc}",
                stacklevel=2,
            )
        self.places_N = np.concatenate([here[:ipc] for here in images.values()])
        weights = found.weights_N
        self.weights_N = None if weights is None else _of_mean_one(root, weights[self.places_N])
        self._said_resized = False

    @property
    def soft_NK(self) -> np.ndarray | None:
        """Float32 logits over our labels, one label per image; None: the set has none.

        Raises:
          UserError: they contradict the labels.
        """
        return self._soft[0]

    @property
    def soft_note(self) -> str | None:
        """What a person should know of the order of their columns."""
        return self._soft[1]

    @functools.cached_property
    def _soft(self) -> tuple[np.ndarray | None, str | None]:
        found = self._found
        if found.soft_NK is None:
            return None, None
        official = self._info.class_names
        return in_our_order(
            self._root, found, self._order_K, self.places_N, self.labels_N, official
        )

    def __len__(self) -> int:
        return len(self.places_N)

    def image(self, index: int) -> np.ndarray:
        at = int(self.places_N[index])
        name = self._found.name(at)
        try:
            stored = self._found.read(at)
        except OSError as error:
            raise _unreadable(name, error) from error
        if isinstance(stored, np.ndarray):
            image, size = self._resized(stored, name)
        else:
            image, size = self._decoded(stored, name)
        if size != (self._size, self._size) and not self._said_resized:
            self._said_resized = True
            warnings.warn(
                f"{name} has {size[0]} x {size[1]} pixels; it, and every other image of "
                f"another size than dataset.image_size={self._size}, is resized",
                stacklevel=2,
            )
        return image

    def _resized(self, pixels_HWC: np.ndarray, name: str) -> tuple[np.ndarray, tuple[int, int]]:
        """The image at the wanted size, and its width and height before."""
        height, width, channels = pixels_HWC.shape
        if (height, width, channels) == (self._size, self._size, self._info.channels):
            return pixels_HWC, (width, height)
        picture = Image.fromarray(pixels_HWC[..., 0] if channels == 1 else pixels_HWC)
        return square(picture, self._info.channels, self._size, resize_ratio=1.0), (width, height)

    def _decoded(self, data: bytes, name: str) -> tuple[np.ndarray, tuple[int, int]]:
        try:
            image = decode(
                data, name, channels=self._info.channels, image_size=self._size, resize_ratio=1.0
            )
        except DamagedFile as error:
            raise DamagedFile(error.path, error.problem, _WHOLE) from error
        if self._said_resized:
            return image, (self._size, self._size)
        with Image.open(io.BytesIO(data)) as opened:
            return image, opened.size

    def original(self, index: int) -> np.ndarray:
        return self.image(index)

    def describe(self) -> dict[str, Any]:
        return self._description

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for at in self.places_N.tolist():
            try:
                stamp = self._found.stamp(at)
            except OSError as error:
                raise _unreadable(self._found.name(at), error) from error
            listing.update(stamp.encode("utf-8", "surrogateescape"))
        if self.weights_N is not None:
            listing.update(self.weights_N.tobytes())
        return {
            "name": self._info.name,
            "split": self._found.format,
            "count": len(self),
            "image_size": self._size,
            "digest": listing.hexdigest(),
        }


_WHOLE = "Get a whole copy of the set."


def _unreadable(name: str, error: OSError) -> DamagedFile:
    return DamagedFile(name, f"cannot be read ({error})", _WHOLE)


def _of_mean_one(root: str, weights_N: np.ndarray) -> np.ndarray:
    """Weights that leave the size of a loss as it is."""
    mean = weights_N.mean(dtype=np.float64)
    if not mean:
        raise UserError(f"{root}: the images that recover.ipc takes all have the weight 0")
    return (weights_N / mean).astype(np.float32)
