"""Where real images come from: arrays, image folders, tar files, TensorFlow Datasets.

Every source gives square uint8 images of one size by position, and says what it is, so that a
fingerprint can tell one set from another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath

from prism_jax.data.datasets import TFDS, DatasetInfo, dataset_info, imagenet_positions, plain
from prism_jax.data.sources.arrays import ArraySource, open_cifar, open_idx, open_npz, open_sklearn
from prism_jax.data.sources.base import ImageSource, Subset
from prism_jax.data.sources.damaged import without_damaged
from prism_jax.data.sources.decoding import EncodedSource, decode
from prism_jax.data.sources.files import class_order, open_folder, open_tar
from prism_jax.data.sources.own import is_own, own_info
from prism_jax.data.sources.tfds import builder_info, open_tfds
from prism_jax.errors import UserError

__all__ = [
    "SOURCES",
    "ArraySource",
    "EncodedSource",
    "ImageSource",
    "Subset",
    "class_order",
    "decode",
    "info_of",
    "open_source",
    "read_all",
]

# A source: (what is known of the set, dataset.path, "train" or "test", image size) -> images.
SOURCES: dict[str, Callable[[DatasetInfo, str | None, str, int], ImageSource]] = {
    "sklearn": open_sklearn,
    "npz": open_npz,
    "idx": open_idx,
    "cifar": open_cifar,
    "folder": open_folder,
    "tar": open_tar,
    "tfds": open_tfds,
}


def info_of(name: str, path: epath.PathLike | None) -> DatasetInfo:
    """What is known of a data set: its row of the table, what a TFDS builder says of itself, or
    what the storage says of a set that no table lists.

    Raises:
      UserError: "tfds:<builder>" is not prepared at ``path``, or no images of one's own are there.
    """
    if name.startswith(TFDS):
        return builder_info(name, None if path is None else str(path))
    if is_own(name):
        return own_info(name, None if path is None else str(path))
    return dataset_info(name)


def open_source(
    *,
    name: str,
    source: str,
    path: epath.PathLike | None,
    split: str,
    image_size: int,
    damaged: str = "stop",
    threads: int = 8,
) -> ImageSource:
    """Open one split of a data set.

    Args:
      name: a row of ``DATASETS``, or "tfds:<builder>".
      source: a row of ``SOURCES``.
      path: where the data is; the message of a missing path says what belongs there.
      split: "train" or "test".
      image_size: side of the images in pixels.
      damaged: "stop": reading a damaged image raises; "skip": damaged images are left out.
      threads: that look for damaged images.

    Raises:
      UserError: the data is not there, not readable, or not of this data set.
    """
    info = info_of(name, path)
    if source not in SOURCES:
        raise UserError(f"dataset.source is {source!r}; allowed: {', '.join(SOURCES)}")
    assert split in ("train", "test"), split
    opened = SOURCES[source](info, None if path is None else str(path), split, image_size)
    if opened.num_classes > info.num_classes:
        raise UserError(
            f"dataset.path={path} holds {opened.num_classes} classes, but {name} has "
            f"{info.num_classes}; correct dataset.path or dataset.name"
        )
    opened.imagenet_indices = _imagenet_indices(opened, info, path)
    if opened.num_classes < info.num_classes:
        warnings.warn(
            f"{path} holds {opened.num_classes} of the {info.num_classes} classes of {name}; "
            f"labels are positions among these, not those of the full set",
            stacklevel=2,
        )
    elif _permuted(opened, info):
        assert opened.class_names and info.class_names
        warnings.warn(
            f"the classes at {path} are in the order {', '.join(opened.class_names[:3])}, ...; "
            f"networks trained elsewhere on {name} know them as "
            f"{', '.join(info.class_names[:3])}, ...: state networks.NAME.class_indices for them",
            stacklevel=2,
        )
    return opened if damaged == "stop" else without_damaged(opened, threads=threads)


def _imagenet_indices(
    source: ImageSource, info: DatasetInfo, path: epath.PathLike | None
) -> tuple[int, ...] | None:
    """The ImageNet class of each label, where names or numbers of the classes tell it.

    Raises:
      UserError: the names are WordNet IDs of other classes than the set has.
    """
    names, whole = source.class_names, info.imagenet_indices
    if names and (found := imagenet_positions(names)):
        if whole and (others := set(found) - set(whole)):
            raise UserError(
                f"{path} holds other classes of ImageNet than {info.name} has, such as "
                f"{names[found.index(min(others))]}; correct dataset.path or dataset.name"
            )
        return found
    if whole is None or source.num_classes != info.num_classes:
        return None
    if names is None or all(name.isdecimal() for name in names):
        return whole
    if info.class_names and _plainly(names) == _plainly(info.class_names):
        official = list(map(plain, info.class_names))
        return tuple(whole[official.index(plain(name))] for name in names)
    return None


def _permuted(source: ImageSource, info: DatasetInfo) -> bool:
    ours, theirs = source.class_names, info.class_names
    if not ours or not theirs or _plainly(ours) != _plainly(theirs):
        return False
    return list(map(plain, ours)) != list(map(plain, theirs))


def _plainly(names: Sequence[str]) -> list[str]:
    """Names in one order and spelling."""
    return sorted(map(plain, names))


def read_all(source: ImageSource, *, threads: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Read a whole source into memory.

    Returns:
      uint8 images_NHWC in the source's order, int32 labels_N.
    """
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(source.image, range(len(source))))), source.labels_N
