"""A set that no table lists: what its storage says of it."""

from __future__ import annotations

import difflib
import functools
import os
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from prism_jax import progress
from prism_jax.data.datasets import DATASETS, IMAGENET_NORMALISATION, TFDS, DatasetInfo
from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sources.arrays import npz_name, open_npz
from prism_jax.data.sources.base import ImageSource, what_is
from prism_jax.data.sources.files import open_folder, open_tar
from prism_jax.errors import UserError
from prism_jax.types import Normalisation

KINDS = {"folder": open_folder, "tar": open_tar, "npz": open_npz}
LOOKED_AT = 32  # images of which one with colour or light says that the set has it
DARK = 32  # the brightest pixel below which something is wrong with their range
MEASURED = 2000  # images whose pixels give the normalisation; that are grey where a set is
SIDE = 64  # at which they are read
MANY = 1 << 20  # more classes than any set has, until they are counted


def is_own(name: str) -> bool:
    """Whether a name is that of a set that no table lists."""
    return name not in DATASETS and not name.startswith(TFDS)


def own_info(name: str, path: str | None) -> DatasetInfo:
    """What is known of a set of one's own: its classes and channels, as they are stored.

    It is normalised by ImageNet's constants unless ``dataset.mean`` and ``.std`` say otherwise.

    Raises:
      UserError: there are no images at ``path``.
    """
    if path is None:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"dataset.name is {name!r}{meant}; it is none of {', '.join(DATASETS)} and "
            f"{TFDS}<builder>, so it is a set of your own: say where its images are with "
            f"--config.dataset.path=DIR (train/<class>/<image> and test/<class>/<image>), and "
            f"dataset.source ({', '.join(KINDS)})"
        )
    return _found(name, path)


@functools.cache
def _found(name: str, path: str) -> DatasetInfo:
    stored = _stored_channels(path)
    source = _open(_info(name, MANY, stored or 3, None), path)
    channels, brightest = _look(source, LOOKED_AT)
    if channels == 1 and not stored and len(source) > LOOKED_AT:
        channels, _ = _look(source, MEASURED)
    if channels == 1 and not stored:
        looked = min(len(source), MEASURED)
        progress.say(f"the images at {path} are taken as grey: all {looked} looked at are")
    if brightest < DARK:
        warnings.warn(
            f"the brightest pixel of {min(len(source), LOOKED_AT)} images at {path} is "
            f"{brightest} of 255. More than 8 bits are scaled by the range of their type: store "
            f"images so that they use it (12-bit ones in a 16-bit file times 16)",
            stacklevel=2,
        )
    return _info(name, _classes(source), stored or channels, source.class_names)


def _kind(path: str) -> str:
    """The row of ``KINDS`` that what is there looks like.

    Raises:
      UserError: it looks like none.
    """
    if os.path.isdir(path):
        return "folder"
    if path.endswith(".npz") and os.path.isfile(path):
        return "npz"
    if "{split}" in path or (path.endswith(".tar") and os.path.isfile(path)):
        return "tar"
    if os.path.isfile(path) and tarfile.is_tarfile(path):
        return "tar"
    raise UserError(
        f"{what_is(path)}; a set of your own is a folder with train/<class>/<image> and "
        f"test/<class>/<image> (dataset.source=folder), an uncompressed .tar file of these (tar), "
        f"or an .npz file with train_images, train_labels, test_images and test_labels (npz)"
    )


def _open(info: DatasetInfo, path: str) -> ImageSource:
    kind = _kind(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said when the set is opened for its images
        return KINDS[kind](info, path, "train", SIDE)


def _info(
    name: str, classes: int, channels: int, class_names: tuple[str, ...] | None
) -> DatasetInfo:
    return DatasetInfo(
        name=name,
        num_classes=classes,
        image_size=224,
        channels=channels,
        normalisation=default_normalisation(channels),
        flip=True,
        class_names=None if class_names is None or len(class_names) != classes else class_names,
        resize_ratio=256 / 224,
    )


def default_normalisation(channels: int) -> Normalisation:
    """ImageNet's constants; for other channels than three, those of its green."""
    own = IMAGENET_NORMALISATION
    if channels == len(own.mean):
        return own
    return Normalisation(own.mean[1:2] * channels, own.std[1:2] * channels)


def _classes(source: ImageSource) -> int:
    named = source.class_names
    return len(named) if named is not None else int(source.labels_N.max()) + 1


def _stored_channels(path: str) -> int | None:
    """The channels of an archive of arrays; None: there are files to be decoded."""
    if not path.endswith(".npz") or not os.path.isfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            name = npz_name(archive.files, "train", "images")
            if name not in archive:
                return None
            shape = archive[name].shape
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None  # said by the source itself
    return shape[-1] if len(shape) == 4 else 1


def _look(source: ImageSource, most: int) -> tuple[int, int]:
    """Channels, 1 where all of some images are grey, however stored; and their brightest pixel."""
    channels, brightest = 1, 0
    for pixels_HWC in _readable(source.original, spread(len(source), most)):
        brightest = max(brightest, int(pixels_HWC.max()))
        if pixels_HWC.shape[-1] == 3 and (pixels_HWC != pixels_HWC[..., :1]).any():
            channels = 3
        if channels == 3 and brightest >= DARK:
            break
    return channels, brightest


def _readable(read: Callable[[int], np.ndarray], positions: list[int]) -> Iterator[np.ndarray]:
    """The images at some positions that can be read; ``dataset.damaged`` decides of the others.

    Raises:
      DamagedFile: none of them can.
    """
    found, damaged = False, None
    for at in positions:
        try:
            image_HWC = read(at)
        except DamagedFile as error:
            damaged = error
            continue
        found = True
        yield image_HWC
    if damaged is not None and not found:
        raise damaged


def spread(count: int, most: int) -> list[int]:
    """At most so many positions, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def measure_normalisation(name: str, path: str | None) -> Normalisation:
    """Mean and standard deviation of the training pixels in [0, 1], per channel.

    Of at most ``MEASURED`` images, evenly spread, that can be read; rounded to four digits.
    """
    info = own_info(name, path)
    assert path is not None  # own_info says so
    source = _open(info, path)
    total, squares, count = np.zeros(info.channels), np.zeros(info.channels), 0
    for image_HWC in _readable(source.image, spread(len(source), MEASURED)):
        pixels = image_HWC.reshape(-1, info.channels) / 255.0
        total += pixels.sum(0)
        squares += np.square(pixels).sum(0)
        count += len(pixels)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 1e-8))
    mean_C, std_C = (tuple(round(float(x), 4) for x in values) for values in (mean, deviation))
    return Normalisation(mean_C, std_C)
