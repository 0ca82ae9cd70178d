"""What is known about each data set, in one place."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import pathlib
import re
from collections.abc import Sequence

from prism_jax.errors import UserError
from prism_jax.types import Normalisation

IMAGENET_NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# dataset.name = "tfds:<builder>" is any image classification set of TensorFlow Datasets.
TFDS = "tfds:"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """One data set.

    Attributes:
      name: its key in ``DATASETS``.
      num_classes: of the full set.
      image_size: side in pixels that the set is usually used at.
      channels: 1 for grey, 3 for colour.
      normalisation: per-channel constants of the training split.
      flip: whether a mirrored image still belongs to its class.
      class_names: in label order; None where they are not listed here.
      resize_ratio: an image of another size is resized to ``ratio * size`` on its shorter side
        before the central crop (224-type sets: 256 / 224).
      imagenet_indices: the ImageNet class of each class, where the set is a part of ImageNet.
      tfds_name: its name in TensorFlow Datasets, where it is there.
      test_splits: the names under which labelled test images are found, best first.
    """

    name: str
    num_classes: int
    image_size: int
    channels: int
    normalisation: Normalisation
    flip: bool
    class_names: tuple[str, ...] | None = None
    resize_ratio: float = 1.0
    imagenet_indices: tuple[int, ...] | None = None
    tfds_name: str | None = None
    test_splits: tuple[str, ...] = ("test", "val", "validation")

    def __post_init__(self):
        assert len(self.normalisation.mean) == len(self.normalisation.std) == self.channels
        assert self.class_names is None or len(self.class_names) == self.num_classes


_NUMERALS = tuple("0123456789")
_WNID = re.compile(r"n[0-9]{8}")
_VALIDATION = ("val", "validation")  # the test images of these sets come without labels

_CIFAR100_NAMES = tuple(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse
    mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
    porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
    snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television
    tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()
)

_ALL = (
    DatasetInfo(
        name="digits",
        num_classes=10,
        image_size=16,
        channels=1,
        # Of the fixed training split, resized to 16 pixels.
        normalisation=Normalisation((0.3054,), (0.3187,)),
        flip=False,
        class_names=_NUMERALS,
    ),
    DatasetInfo(
        name="mnist",
        num_classes=10,
        image_size=28,
        channels=1,
        normalisation=Normalisation((0.1307,), (0.3081,)),
        flip=False,
        class_names=_NUMERALS,
        tfds_name="mnist",
    ),
    DatasetInfo(
        name="fashion_mnist",
        num_classes=10,
        image_size=28,
        channels=1,
        normalisation=Normalisation((0.2860,), (0.3530,)),
        flip=True,
        class_names=(
            *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
            *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
        ),
        tfds_name="fashion_mnist",
    ),
    DatasetInfo(
        name="cifar10",
        num_classes=10,
        image_size=32,
        channels=3,
        normalisation=Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        flip=True,
        class_names=(
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
        tfds_name="cifar10",
    ),
    DatasetInfo(
        name="cifar100",
        num_classes=100,
        image_size=32,
        channels=3,
        normalisation=Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        flip=True,
        class_names=_CIFAR100_NAMES,
        tfds_name="cifar100",
    ),
    DatasetInfo(
        name="tiny_imagenet",
        num_classes=200,
        image_size=64,
        channels=3,
        normalisation=IMAGENET_NORMALISATION,
        flip=True,
        test_splits=_VALIDATION,
    ),
    DatasetInfo(
        name="imagenette",
        num_classes=10,
        image_size=224,
        channels=3,
        normalisation=IMAGENET_NORMALISATION,
        flip=True,
        class_names=(
            *("tench", "English springer", "cassette player", "chain saw", "church"),
            *("French horn", "garbage truck", "gas pump", "golf ball", "parachute"),
        ),
        resize_ratio=256 / 224,
        imagenet_indices=(0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
        tfds_name="imagenette/320px-v2",
        test_splits=_VALIDATION,
    ),
    DatasetInfo(
        name="imagenet",
        num_classes=1000,
        image_size=224,
        channels=3,
        normalisation=IMAGENET_NORMALISATION,
        flip=True,
        resize_ratio=256 / 224,
        imagenet_indices=tuple(range(1000)),
        tfds_name="imagenet2012",
        test_splits=_VALIDATION,
    ),
)

DATASETS: dict[str, DatasetInfo] = {info.name: info for info in _ALL}


def dataset_info(name: str) -> DatasetInfo:
    """Look up a data set.

    Raises:
      UserError: there is none of that name; the nearest is suggested, all are listed.
    """
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(name, DATASETS, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ";"
    raise UserError(
        f"dataset.name is {name!r}{meant} the data sets are {', '.join(DATASETS)}, and "
        f"{TFDS}<builder> for any other of TensorFlow Datasets"
    )


def plain(name: str) -> str:
    """A class name without case and punctuation: "French horn" is "french_horn"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def spoken(names: Sequence[str] | None, info: DatasetInfo) -> list[str] | None:
    """What people call classes, in the order in which a source has them.

    Args:
      names: the source's, as its folders are called; None: it has the data set's own order.

    Returns:
      The data set's names where the source's are WordNet IDs, numbers or spellings of these, else
      the source's own; None: nobody knows.
    """
    # Of a set that no table lists, the names are its folders' own.
    official = info.class_names if info.name in DATASETS else None
    if names is None:
        return None if official is None else [name.replace("_", " ") for name in official]
    known: dict[str, str] = {}
    if official:
        known = {plain(name): name for name in official}
        known |= {str(k): name for k, name in enumerate(official)}
        if (found := imagenet_positions(names)) and info.imagenet_indices:
            of_index = dict(zip(info.imagenet_indices, official, strict=True))
            known |= {n: of_index[k] for n, k in zip(names, found, strict=True) if k in of_index}
    if not known and (imagenet_positions(names) or all(name.isdecimal() for name in names)):
        return None
    given = [str(int(name)) if name.isdecimal() else name for name in names]
    return [(known.get(n) or known.get(plain(n)) or n).replace("_", " ") for n in given]


def imagenet_positions(class_names: Sequence[str]) -> tuple[int, ...] | None:
    """The ImageNet class of each class whose name is a WordNet ID; None where one is not known.

    ImageNet's classes are its 1,000 IDs in sorted order. A part of them is looked up in the list
    that the package tensorflow-datasets brings along.
    """
    known = {name: i for i, name in enumerate(imagenet_wnids())}
    if not known and len(set(class_names)) == 1000 and all(map(_WNID.fullmatch, class_names)):
        known = {name: i for i, name in enumerate(sorted(class_names))}
    if not class_names or not known.keys() >= set(class_names):
        return None
    return tuple(known[name] for name in class_names)


@functools.cache
def imagenet_wnids() -> tuple[str, ...]:
    """The WordNet IDs of ImageNet's classes in label order; empty where not known."""
    return _listed("labels.txt")


@functools.cache
def imagenet_validation_wnids() -> tuple[str, ...]:
    """The class of each of ImageNet's validation images, by number; empty where not known."""
    return _listed("validation_labels.txt")


def _listed(file: str) -> tuple[str, ...]:
    """A list of WordNet IDs that tensorflow-datasets brings along."""
    package = importlib.util.find_spec("tensorflow_datasets")  # without importing it
    assert package is not None and package.origin is not None  # a dependency of ours
    path = pathlib.Path(package.origin).parent / "datasets" / "imagenet2012" / file
    return tuple(path.read_text().split()) if path.is_file() else ()
