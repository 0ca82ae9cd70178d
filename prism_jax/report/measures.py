"""What networks say of images: features, predictions, and the numbers that follow from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from prism_jax import parallel, rng
from prism_jax.analysis import calibration, diversity, likeness
from prism_jax.analysis.class_order import confusion
from prism_jax.data.lazy import Images
from prism_jax.diffusion.quality import nearest
from prism_jax.errors import UserError
from prism_jax.report.finished import Run
from prism_jax.stages import analyse
from prism_jax.training import TESTED, jitted_forward
from prism_jax.types import PyTree

# Of real images, in bytes: of larger ones no distances of pixels are measured, and of a larger
# split none to images that are not looked at anyway.
MOST_PIXELS = 1e9


class Real(NamedTuple):
    """Real images of a split.

    Attributes:
      images, labels_N: those that are looked at.
      at_N: their positions.
      total: how many there are.
      whole: all of a training split; None: they are too many to be near to.
    """

    images: Images
    labels_N: np.ndarray
    at_N: np.ndarray
    total: int
    whole: Images | None


def real_images(run: Run, split: str, *, most: int, seed: int) -> Real:
    """The real images of a split; of a larger one ``most``, drawn evenly over the classes."""
    inputs = run.context.inputs
    source = inputs.open(split)
    labels_N = np.asarray(source.labels_N)
    at_N, total = evenly(labels_N, most=most, seed=seed), len(labels_N)
    images, whole = inputs.read(source, at_N), None
    if len(at_N) == total:
        whole = images
    elif split == "train" and total * np.prod(inputs.image_shape, dtype=np.int64) <= MOST_PIXELS:
        whole = inputs.read(source)
    return Real(images, labels_N[at_N], at_N, total, whole)


def evenly(labels_N: np.ndarray, *, most: int, seed: int) -> np.ndarray:
    """Positions of at most so many images, as many of each class, in their order."""
    if len(labels_N) <= most:
        return np.arange(len(labels_N))
    classes = np.unique(labels_N)
    each = max(1, most // len(classes))
    found = []
    for label in classes:
        (at,) = np.nonzero(labels_N == label)
        found.append(rng.generator(seed, "report/real", int(label)).permutation(at)[:each])
    return np.sort(np.concatenate(found))


# --- features -------------------------------------------------------------------------------


def network_of(run: Run, wanted: str | None) -> str:
    """Whose features are looked at: the stated one, the run's own choice, a resnet18, a teacher.

    Raises:
      UserError: the stated one is no squeezed network of the run.
    """
    there = run.teachers()
    if wanted is not None:
        if wanted not in there:
            raise UserError(
                f"--network={wanted} is no network that {run.root} has squeezed; it has "
                f"{', '.join(there) or 'none'}"
            )
        return wanted
    alike = [n for n in there if run.config.network(n).architecture == "resnet18"]
    choices = [run.config.analyse.network, *alike, run.config.recover.primary, *there]
    for name in choices:
        if name in there:
            return str(name)
    raise UserError(f"{run.root} has no squeezed network (squeeze/), whose features could be read")


def features_by(run: Run, name: str) -> Callable[[Images], np.ndarray]:
    """A function from uint8 images to a network's penultimate features, float32 (N, D)."""
    variables = jax.device_put(run.context.networks.load(name))
    read = functools.partial(analyse.embedder(run.context, name), variables)
    return lambda images: diversity.embeddings(read, images, batch_size=analyse.EMBEDDED)


class Measures(NamedTuple):
    """Numbers of a set of images in the features of a network; None: not defined for it.

    Attributes:
      cosines: of the pairs of each class.
      vendi: Vendi score of the set; ``vendi_class``: mean over classes.
      manifold, frechet: beside real training images.
      features, pixels: nearness to all training images in either space; of large images in the
        first alone, for which pixels say little.
    """

    cosines: diversity.Cosines
    vendi: float
    vendi_class: float
    manifold: likeness.Manifold | None
    frechet: float | None
    features: likeness.Nearness | None
    pixels: likeness.Nearness | None


class Space(NamedTuple):
    """All training images, as features or as pixels, and how near to them test images are."""

    train_ND: np.ndarray
    of_test: np.ndarray

    def nearness(self, made_ND: np.ndarray) -> likeness.Nearness:
        return likeness.nearness(nearest(made_ND, self.train_ND), self.of_test)


class Surroundings:
    """Real images that sets are measured beside, with what is worked out once for all of them."""

    def __init__(self, train: Real, test: Real, read: Callable[[Images], np.ndarray], classes: int):
        """Read the features of the real images."""
        self.train, self.test, self.classes = train, test, classes
        self.read = read
        self.test_ND = read(test.images)
        self._features: Space | None = None
        self._pixels: Space | None = None
        if train.whole is None:
            self.train_ND = read(train.images)
            return
        all_ND = read(train.whole)
        self.train_ND = all_ND[train.at_N]
        self._features = Space(all_ND, nearest(self.test_ND, all_ND))
        if _is_small(train.whole):
            pixels = _flat(train.whole)
            self._pixels = Space(pixels, nearest(_flat(test.images), pixels))

    def measure(self, images: Images, labels_N: np.ndarray, made_ND: np.ndarray) -> Measures:
        """The numbers of a set."""
        features = pixels = None
        if self._features is not None:
            features = self._features.nearness(made_ND)
        if self._pixels is not None and _is_small(images):
            pixels = self._pixels.nearness(_flat(images))
        return self._measures(labels_N, made_ND, features, pixels)

    def measure_test(self) -> Measures:
        """The same of the test images, which are as near as they are."""
        features, pixels = (
            space and likeness.nearness(space.of_test, space.of_test)
            for space in (self._features, self._pixels)
        )
        return self._measures(self.test.labels_N, self.test_ND, features, pixels)

    def _measures(
        self,
        labels_N: np.ndarray,
        made_ND: np.ndarray,
        features: likeness.Nearness | None,
        pixels: likeness.Nearness | None,
    ) -> Measures:
        by_class = [diversity.vendi(made_ND[labels_N == k]) for k in np.unique(labels_N)]
        return Measures(
            diversity.class_cosines(made_ND, labels_N, self.classes),
            diversity.vendi(made_ND),
            float(np.mean(by_class)),
            likeness.manifold(self.train_ND, made_ND),
            likeness.frechet(made_ND, self.train_ND),
            features,
            pixels,
        )


def _is_small(images: Images) -> bool:
    """Whether all pixels may be in memory at once."""
    return bool(np.prod(images.shape, dtype=np.int64) <= MOST_PIXELS)


def _flat(images: Images) -> np.ndarray:
    return np.asarray(images[:]).reshape(len(images), -1)


# --- predictions ----------------------------------------------------------------------------


class Predictions(NamedTuple):
    """What the students of a set, of one name and all seeds, say of real test images.

    Attributes:
      reliability: of all seeds' predictions together.
      errors: the calibration error of each seed.
      confusion_KK: shares of a class' images that are taken for each class, mean over seeds.
      per_class_K: the share that is right.
    """

    reliability: calibration.Reliability
    errors: list[float]
    confusion_KK: np.ndarray
    per_class_K: np.ndarray


def predictions(run: Run, of: str, student: str, test: Real) -> Predictions | None:
    """Read the test images by trained students; None where a checkpoint is gone."""
    context, logits = run.context, []
    module = context.networks.build(student, student=True, dtype=run.config.validate.dtype)
    for seed in run.summary["seeds"]:
        variables = run.student(of, student, seed)
        if variables is None:
            return None
        logits.append(_logits(module, variables, context.inputs.normalisation, test.images))
    classes = run.config.dataset.num_classes
    labels_N = np.tile(test.labels_N, len(logits))
    together = np.concatenate(logits)
    counts_KK = confusion(together, labels_N, classes)
    share_KK = counts_KK / np.maximum(counts_KK.sum(1, keepdims=True), 1)
    return Predictions(
        calibration.reliability(together, labels_N),
        [calibration.reliability(x, test.labels_N).error for x in logits],
        share_KK,
        np.where(counts_KK.sum(1) > 0, np.diag(share_KK), np.nan),
    )


def teachers_logits(run: Run, names: Sequence[str], images: Images) -> dict[str, np.ndarray]:
    """Every teacher's logits of images, (N, K)."""
    found = {}
    for name in names:
        context = run.context
        logits_NH = _logits(
            context.networks.build(name), context.networks.load(name),
            context.networks.normalisation(name), images,
        )  # fmt: skip
        indices = context.networks.class_indices(name)
        found[name] = logits_NH if indices is None else logits_NH[:, list(indices)]
    return found


def _logits(module: Any, variables: PyTree, normalisation: Any, images: Images) -> np.ndarray:
    """Logits of uint8 images, by the program that tests are made with."""
    mesh = parallel.data_mesh()
    forward = jitted_forward(module, normalisation, mesh)
    placed = jax.device_put(mesh.replicate(variables))
    size = min(TESTED, len(images))
    return diversity.embeddings(lambda part: forward(placed, mesh.put(part)), images, size)
