"""Image sets that somebody else made, as torchvision's ImageFolder reads them.

<root>/<class>/<image>
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from prism_jax.data.datasets import DatasetInfo, imagenet_wnids
from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sources import ImageSource, class_order, decode, kinds
from prism_jax.data.sources.files import walk
from prism_jax.errors import UserError

_WNID = re.compile(r"n[0-9]{8}")
_NEEDED = (
    "recover.initialise=folder needs recover.initialise_from to be a local folder with one folder "
    "per class and images in it, of any kind that Pillow reads"
)


def wnids(imagenet_indices: Sequence[int] | None) -> tuple[str, ...] | None:
    """The WordNet IDs of classes of ImageNet; None where they are not known."""
    known = imagenet_wnids()
    if imagenet_indices is None or not known:
        return None
    return tuple(known[index] for index in imagenet_indices)


def existing_folder(root: epath.PathLike) -> str:
    """The path of a set.

    Raises:
      UserError: there is no folder.
    """
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root}; {_NEEDED}")
    return os.fspath(root)


class ImageSet:
    """A folder with equally many images of every class, as an ``ImageSource``.

    Images are class-major, in the order of their names. One of exactly the wanted size is taken
    as it is; another is resized as a whole (its shorter side to ``image_size``, then the centre),
    and that is said once.

    Args:
      root: the folder of the class folders; files beside them are ignored.
      info: the data set that the classes belong to.
      real: its images; folders named by WordNet IDs or by its class names get its labels, others
        theirs by their order.
      ipc: images of each class, the first ones.
      image_size: side in pixels.

    Raises:
      UserError: no such folder, other classes or another number of them, or too few images.
    """

    def __init__(
        self,
        root: epath.PathLike,
        info: DatasetInfo,
        real: ImageSource,
        *,
        ipc: int,
        image_size: int,
    ):
        self._root, self._info, self._size = existing_folder(root), info, image_size
        self.num_classes = num_classes = real.num_classes
        self.class_names, self.imagenet_indices = real.class_names, real.imagenet_indices
        self.labels_N = np.repeat(np.arange(num_classes, dtype=np.int32), ipc)
        classes = self._classes(real)
        others = kinds.Others(list)
        images = {name: self._images(name, others) for name in classes}
        self.left_out = kinds.left_out(self._root, others)
        short = [f"{name} has {len(found)}" for name, found in images.items() if len(found) < ipc]
        most, least = (f(map(len, images.values())) for f in (max, min))
        if short:
            raise UserError(
                f"recover.ipc={ipc} needs {ipc} images of every class, but {len(short)} of the "
                f"{num_classes} classes in {root} have fewer ({', '.join(short[:5])}"
                f"{', ...' if len(short) > 5 else ''}); this folder allows up to {least}"
            )
        if most > ipc:
            warnings.warn(
                f"{root} has up to {most} images of a class; the first {ipc} of each are taken, "
                f"because recover.ipc is {ipc}",
                stacklevel=2,
            )
        self._names = [name for found in images.values() for name in found[:ipc]]
        self._said_resized = False

    def _classes(self, real: ImageSource) -> Sequence[str]:
        """The class folders in label order."""
        with os.scandir(self._root) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
        if len(names) != self.num_classes:
            raise UserError(
                f"{self._root} has {len(names)} class folders, but dataset.num_classes is "
                f"{self.num_classes}; {_NEEDED}"
            )
        ids = wnids(real.imagenet_indices)
        for order in (ids, real.class_names, self._info.class_names):
            if order and set(order) == set(names):
                return order
        if ids and all(map(_WNID.fullmatch, names)):
            others = sorted(set(names) - set(ids))
            raise UserError(
                f"{self._root} has {len(others)} class folders of other classes than the data has "
                f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''})"
            )
        return class_order(names)

    def _images(self, cls: str, others: kinds.Others) -> list[str]:
        """The images of a class, relative to the root; ``others`` receives the other files."""
        files = sorted(walk(self._root, others, cls), key=os.path.split)
        return kinds.images_of(
            files, lambda path: open(os.path.join(self._root, path), "rb"), others
        )

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> np.ndarray:
        path = os.path.join(self._root, self._names[index])
        with open(path, "rb") as file:
            data = file.read()
        try:
            image = decode(
                data, path, channels=self._info.channels, image_size=self._size, resize_ratio=1.0
            )
        except DamagedFile as error:
            raise DamagedFile(error.path, error.problem, "Get a whole copy of the set.") from error
        if not self._said_resized:
            with Image.open(io.BytesIO(data)) as stored:
                size = stored.size
            if size != (self._size, self._size):
                self._said_resized = True
                warnings.warn(
                    f"{path} has {size[0]} x {size[1]} pixels; it, and every other image of "
                    f"another size than dataset.image_size={self._size}, is resized",
                    stacklevel=2,
                )
        return image

    def original(self, index: int) -> np.ndarray:
        return self.image(index)

    def describe(self) -> dict[str, Any]:
        return self._description

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for name in self._names:
            size = os.path.getsize(os.path.join(self._root, name))
            listing.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        return {
            "name": self._info.name,
            "split": "folder",
            "count": len(self),
            "image_size": self._size,
            "digest": listing.hexdigest(),
        }
