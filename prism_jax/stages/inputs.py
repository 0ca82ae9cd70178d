"""The real images of a run: opened on first use, in memory where they fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath

from prism_jax import rng
from prism_jax.config import Dataset, Experiment, Network
from prism_jax.data.datasets import DatasetInfo, spoken
from prism_jax.data.exchange import ImageSet
from prism_jax.data.lazy import Images, LazyImages, OneByOne, hold
from prism_jax.data.sets import existing
from prism_jax.data.sets.base import Stated
from prism_jax.data.sources import ImageSource, Subset, info_of, open_source
from prism_jax.errors import UserError
from prism_jax.types import Normalisation

T = TypeVar("T")

HELD_OUT = "held_out"  # the split of the training images that nothing is made of


def _kept(ask: Callable[[Inputs, str], T]) -> Callable[[Inputs, str], T]:
    """A question about a split, asked once; the answer lives as long as the inputs do.

    A comparison makes many runs in one process, each with its images.
    """

    @functools.wraps(ask)
    def answer(self: Inputs, split: str) -> T:
        answers = self.__dict__.setdefault(f"_answers_of{ask.__name__}", {})
        if split not in answers:
            answers[split] = ask(self, split)
        return answers[split]

    return answer


class Inputs:
    """The data that an experiment names."""

    def __init__(self, config: Experiment):
        """Open nothing yet."""
        self.config = config

    @functools.cached_property
    def info(self) -> DatasetInfo:
        return info_of(self.config.dataset.name, self.config.dataset.path)

    @property
    def normalisation(self) -> Normalisation:
        own = own_normalisation(self.config.dataset)
        if own and len(own.mean) != self.info.channels:
            raise UserError(
                f"dataset.mean has {len(own.mean)} numbers; {self.info.name} has "
                f"{self.info.channels} channels"
            )
        return own or self.info.normalisation

    @property
    def image_shape(self) -> tuple[int, int, int]:
        size = self.config.dataset.image_size
        return size, size, self.info.channels

    def open(self, split: str) -> ImageSource:
        """The real images of a split ("train", "test", ``HELD_OUT``), opened on first use."""
        return self._open(split)

    @_kept
    def _open(self, split: str) -> ImageSource:
        dataset = self.config.dataset
        if split == HELD_OUT:
            return held_out(self._stored("train"), dataset.held_out, dataset.held_out_seed)[1]
        source = self._stored(split)
        if split == "train" and dataset.held_out:
            return held_out(source, dataset.held_out, dataset.held_out_seed)[0]
        return source

    @_kept
    def _whole(self, split: str) -> ImageSource:
        dataset = self.config.dataset
        return open_source(
            name=dataset.name,
            source=dataset.source,
            path=dataset.path,
            split=split,
            image_size=dataset.image_size,
            damaged=dataset.damaged,
            threads=dataset.threads,
        )

    @_kept
    def _stored(self, split: str) -> ImageSource:
        dataset, source = self.config.dataset, self._whole(split)
        if source.num_classes != dataset.num_classes:
            if dataset.num_classes > source.num_classes:
                raise UserError(
                    f"dataset.num_classes is {dataset.num_classes}, but {dataset.name} at "
                    f"{dataset.path or dataset.source} has {source.num_classes} classes"
                )
            source = first_classes(source, dataset.num_classes)
        return source

    @functools.cached_property
    def called(self) -> list[str] | None:
        """What people call the classes, in the order of the labels, where it is known.

        Without the data, the data set's own order, which folders may have otherwise.
        """
        try:
            names = self.open("train").class_names
        except UserError:
            names = None
        return spoken(names, self.info)

    @functools.cached_property
    def spoken_names(self) -> list[str]:
        """What people call the classes, in the order of the labels.

        Raises:
          UserError: it is not known, or the file that says it has neither a line for each class of
            the data nor, where the data knows which these are, ImageNet's thousand.
        """
        path, wanted = self.config.generate.class_names, self.config.dataset.num_classes
        if path is None:
            known = self.called
            if known is None:
                raise UserError(
                    f"the prompts of {self.info.name} need names of its classes, which are not "
                    f"known here; give a file with a line a class, in the order of the labels: "
                    f"generate.class_names=FILE"
                )
            return known[:wanted]
        file = epath.Path(path)
        if not file.is_file():
            raise UserError(f"there is no file {path}, which generate.class_names gives")
        try:
            lines = file.read_text("utf-8-sig").rstrip().splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no text in UTF-8 ({error}); write it as such") from error
        names, stored = [line.strip() for line in lines], wanted
        try:
            indices = self.open("train").imagenet_indices
            stored = self._whole("train").num_classes
        except UserError:  # who wants the images says so
            indices, stored = None, max(wanted, len(names))
        if indices is not None and len(names) == 1000 != wanted:  # ImageNet's own order
            names = [names[index] for index in indices]
        if len(names) not in (wanted, stored) or not all(names[:wanted]):
            raise UserError(
                f"{path} has {sum(map(bool, names))} names for {wanted} classes; write a line a "
                f"class, in the order of the labels"
            )
        return names[:wanted]

    @functools.cached_property
    def start(self) -> ImageSource:
        """Where recover starts: the training images, or the set that the config names."""
        recover = self.config.recover
        if recover.initialise != "folder":
            return self.open("train")
        assert recover.initialise_from is not None  # a rule of the config
        return ImageSet(
            existing(recover.initialise_from),
            self.info,
            self.open("train"),
            ipc=recover.ipc,
            image_size=self.config.dataset.image_size,
            whole=self._stored("train"),
            stated=Stated(
                recover.initialise_mean, recover.initialise_std, recover.initialise_whitening
            ),
            classes=recover.initialise_classes,
        )

    def hold(self, images: LazyImages) -> Images:
        """Images in memory, where they take less than ``dataset.cache_gigabytes``."""
        return hold(images, limit_bytes=1e9 * self.config.dataset.cache_gigabytes)

    def read(
        self, source: ImageSource, positions: Sequence[int] | np.ndarray | None = None
    ) -> Images:
        """The images of a source at some positions, by default all: read now, or as needed."""
        positions = np.arange(len(source)) if positions is None else np.asarray(positions)
        one_by_one = OneByOne(source.image, threads=self.config.dataset.threads)
        return self.hold(
            LazyImages(lambda at: one_by_one(positions[at]), (len(positions), *self.image_shape))
        )

    def test_set(self) -> tuple[Images, np.ndarray]:
        """The real test images, uint8 NHWC, and their labels."""
        return self.real_set("test")

    @_kept
    def real_set(self, split: str) -> tuple[Images, np.ndarray]:
        """A split's images, uint8 NHWC, and their labels."""
        source = self.open(split)
        return self.read(source), source.labels_N

    def fields(self, source: ImageSource) -> dict[str, Any]:
        """What images are and how they are normalised, for fingerprints: as JSON gives it back."""
        own = own_normalisation(self.config.dataset)
        normalisation = {"mean": [*own.mean], "std": [*own.std]} if own else None
        return source.describe() | ({"normalisation": normalisation} if own else {})


def first_classes(source: ImageSource, count: int) -> ImageSource:
    """A source restricted to its first classes (``:smoke`` runs, small studies)."""
    at = np.flatnonzero(source.labels_N < count)
    found = Subset(source, at, described={"first_classes": count})
    names, indices = source.class_names, source.imagenet_indices
    found.num_classes = count
    found.class_names = None if names is None else names[:count]
    found.imagenet_indices = None if indices is None else indices[:count]
    return found


def held_out(source: ImageSource, share: float, seed: int) -> tuple[Subset, Subset]:
    """Divide a source: what is left, and a share of every class, drawn by the seed.

    Raises:
      UserError: a class has too few images to be in both.
    """
    out_N, labels_N = np.zeros(len(source), bool), np.asarray(source.labels_N)
    for cls in range(source.num_classes):
        at = np.flatnonzero(labels_N == cls)
        count = round(share * len(at))
        if not 0 < count < len(at):
            raise UserError(
                f"dataset.held_out={share:g} of the {len(at)} training images of class {cls} is "
                f"{count}: at least one must be held out, and one left; choose another share"
            )
        drawn = rng.generator(seed, "dataset/held_out", cls).permutation(len(at))[:count]
        out_N[at[drawn]] = True
    how = {"share": share, "seed": seed}
    return (
        Subset(source, np.flatnonzero(~out_N), described={"without": how}),
        Subset(source, np.flatnonzero(out_N), described={"held_out": how}),
    )


def own_normalisation(of: Network | Dataset) -> Normalisation | None:
    """The normalisation that the config states for imported weights or the data set, if any."""
    if of.mean is None or of.std is None:
        return None
    return Normalisation(of.mean, of.std)
