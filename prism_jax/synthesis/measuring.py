"""Statistics of real images inside a teacher, for methods that match more than BatchNorm keeps.

The running statistics of a BatchNorm are in the weights. Those of convolutions (G-VBSM), of single
classes (EDC) and of groups of images (PSM) need a pass over the training set, as does what is
known of single images: features, and how difficult they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from prism_jax import parallel, rng
from prism_jax.core import augment, pixels, statistics, views
from prism_jax.data.pipeline import Batch
from prism_jax.teachers import Teacher, batch_statistics
from prism_jax.types import Array, Normalisation, PyTree

CONV, CLASSES = "conv_statistics", "class_statistics"  # collections of a teacher's variables
VIEWS = "squeeze/statistics/view"
READ = 100  # images that are read at a time, where each is measured by itself
SMOOTHING = 1.0  # standard deviation in pixels of what complexity is measured after

# A number of images, and the sum over them of their statistics, in float64.
Sum = tuple[int, PyTree]


class Measurer:
    """Measures batches of real images, one per device at a time; a batch is never split."""

    def __init__(
        self,
        teacher: Teacher,
        variables: PyTree,
        normalisation: Normalisation,
        *,
        per_image: bool,
        batch_size: int,
        patch: int,
        crop_min: float,
        flip: bool,
        seed: int,
        crop_pad: int | None = None,
        train: bool = False,
        devices: Sequence[jax.Device] | None = None,
        how: str = "shard_map",
    ):
        """Measure with one teacher.

        Args:
          per_image: every image is a batch of its own (EDC), and BatchNorms' inputs are measured
            beside convolutions'; otherwise a batch is one (G-VBSM), and only those are.
          batch_size: of the batches; where every image is one, shorter batches are padded to it,
            so that one program serves classes of all sizes.
          patch: side of the patches.
          crop_min, crop_pad, flip: the views, one per image, as in training.
          seed: of the views.
          train: BatchNorms normalise with the batch's own statistics, as in training, and their
            inputs alone are measured (PSM).
        """
        self._seed, self._padded = seed, batch_size if per_image else None

        def of_batch(variables, images_BHWC):
            if train:
                with batch_statistics(len(images_BHWC)):
                    reading = teacher.read(variables, images_BHWC, normalisation, statistics=True)
                return {"bn": reading.statistics}
            return _statistics(
                teacher, variables, images_BHWC, normalisation, bn=per_image, patch=patch
            )

        def measure(variables, seed, group, number, images_uint8_BHWC):
            images_BHWC = pixels.normalise(images_uint8_BHWC, normalisation)
            batch, height, width, _ = images_BHWC.shape
            view = views.sample_view(
                rng.stream(rng.root(seed), VIEWS, group, number), (height, width),
                crop_scale=(crop_min, 1.0), crop_pad=crop_pad, flip=flip, roll=0, batch=batch,
            )  # fmt: skip
            images_BHWC = augment.apply(images_BHWC, view, crop_pad, normalisation)
            if not per_image:
                return of_batch(variables, images_BHWC)
            return jax.vmap(of_batch, in_axes=(None, 0))(variables, images_BHWC[:, None])

        devices = devices or parallel.devices()[:1]
        self._map = parallel.LaneMap(measure, variables, arity=3, devices=devices, how=how)

    def total(self, batches: Iterable[Batch], *, group: int) -> Sum:
        """The statistics of some batches, each weighted by its number of images.

        Args:
          group: coordinate of the views, beside the batches' numbers.
        """
        count, total = 0, None
        for weight, tree in self._measure(batches, group):
            wide = jax.tree.map(lambda x, w=weight: w * np.asarray(x, np.float64), tree)
            total = wide if total is None else jax.tree.map(np.add, total, wide)
            count += weight
        return count, total

    def lower(self, image_shape: tuple[int, int, int], size: int) -> jax.stages.Lowered:
        """The program that measures batches of ``size`` images, to be compiled and inspected."""
        images = jax.ShapeDtypeStruct((size, *image_shape), np.uint8)
        return self._map.lower_for(np.int32(0), np.int32(0), images)

    def _measure(self, batches: Iterable[Batch], group: int) -> Iterator[tuple[int, PyTree]]:
        waiting: list[Batch] = []
        for batch in batches:
            other_size = waiting and len(waiting[0].images_BHWC) != len(batch.images_BHWC)
            if other_size and self._padded is None:
                yield from self._run(waiting, group)
                waiting = []
            waiting.append(batch)
            if len(waiting) == len(self._map):
                yield from self._run(waiting, group)
                waiting = []
        if waiting:
            yield from self._run(waiting, group)

    def _run(self, batches: list[Batch], group: int) -> Iterator[tuple[int, PyTree]]:
        """One batch per device; idle ones repeat the first."""
        lanes = [
            tuple(self._map.place(value, lane) for value in self._lane(batch, group))
            for lane, batch in enumerate((batches * len(self._map))[: len(self._map)])
        ]
        for batch, lane in zip(batches, self._map(self._seed, lanes), strict=False):
            count, found = len(batch.images_BHWC), self._map.fetch(lane)
            if self._padded is not None:
                found = jax.tree.map(lambda x, n=count: x[:n].mean(0, dtype=np.float64), found)
            yield count, found

    def _lane(self, batch: Batch, group: int) -> tuple[np.int32, np.int32, np.ndarray]:
        images_BHWC = batch.images_BHWC
        if self._padded is not None:
            images_BHWC = images_BHWC[np.resize(np.arange(len(images_BHWC)), self._padded)]
        return np.int32(group), np.int32(batch.number), images_BHWC


def _statistics(
    teacher: Teacher, variables: PyTree, images_BHWC: Array, normalisation, *, bn: bool, patch: int
) -> PyTree:
    """Of BatchNorms' inputs ("bn") and of convolutions' ("conv"), nested as the modules are."""
    reading = teacher.read(variables, images_BHWC, normalisation, statistics=bn, conv_inputs=True)
    inputs = {p: x["x"] for p, x in statistics.by_layer(reading.conv_inputs).items()}
    conv = statistics.of_inputs(inputs, statistics.OF_CONVOLUTIONS, patch=patch)
    return {"bn": reading.statistics, "conv": traverse_util.unflatten_dict(conv)}


class Reader:
    """Reads every image of a class by itself, in batches of one size, one per device at a time."""

    def __init__(
        self,
        function: Callable[[PyTree, Array, Array], dict[str, Array]],
        variables: PyTree,
        *,
        devices: Sequence[jax.Device] | None = None,
        how: str = "shard_map",
    ):
        """Read with ``(variables, class, uint8 images_BHWC) -> {name: (B, ...)}``."""

        def read(variables, seed, batch):
            del seed
            return function(variables, *batch)

        devices = devices or parallel.devices()[:1]
        self._map = parallel.LaneMap(read, variables, arity=1, devices=devices, how=how)

    def read(self, batches: Iterable[Batch], cls: int) -> dict[str, np.ndarray]:
        """What is read of a class's images, in their order; batches of at most ``READ`` images."""
        counts: list[int] = []

        def padded() -> Iterator[tuple[np.int32, np.ndarray]]:
            for batch in batches:
                counts.append(len(batch.images_BHWC))
                index = np.arange(READ).clip(max=counts[-1] - 1)
                yield np.int32(cls), batch.images_BHWC[index]

        found = list(self._map.stream(0, padded()))
        return {
            name: np.concatenate([x[name][:n] for x, n in zip(found, counts, strict=True)])
            for name in found[0]
        }

    def lower(self, image_shape: tuple[int, int, int]) -> jax.stages.Lowered:
        """The program, to be compiled and inspected."""
        images = jax.ShapeDtypeStruct((READ, *image_shape), np.uint8)
        return self._map.lower_for((np.int32(0), images))


def features_of(teacher: Teacher, normalisation: Normalisation) -> Callable:
    """What ``selection.Features`` holds, for a ``Reader``."""

    def read(variables, cls, images_uint8_BHWC):
        images_BHWC = pixels.normalise(images_uint8_BHWC, normalisation)
        embedding_BD, logits_BK = teacher.read_features(variables, images_BHWC, normalisation)
        return {
            "embedding_ND": embedding_BD,
            "log_probability_N": jax.nn.log_softmax(logits_BK)[:, cls],
            "complexity_N": complexity(images_uint8_BHWC),
        }

    return read


def complexity(images_uint8_BHWC: Array) -> Array:
    """How unevenly edges are spread over images (RETA), (B,) float32.

    The variance over pixels of the squared gradient of the smoothed grey image in [0, 1].
    """
    from scipy import ndimage  # takes long

    height, width = images_uint8_BHWC.shape[1:3]
    rows, columns = (
        jnp.asarray(ndimage.gaussian_filter1d(np.eye(n), SMOOTHING, axis=0), jnp.float32)
        for n in (height, width)
    )
    grey_BHW = images_uint8_BHWC.astype(jnp.float32).mean(-1) / 255
    smooth_BHW = jnp.einsum("ij,bjk,lk->bil", rows, grey_BHW, columns)
    down_BHW, across_BHW = jnp.gradient(smooth_BHW, axis=(1, 2))
    return (jnp.square(down_BHW) + jnp.square(across_BHW)).var((1, 2))


def difficulty_of(teacher: Teacher, normalisation: Normalisation) -> Callable:
    """How far images' statistics are from a teacher's running ones, for a ``Reader`` (PSM)."""

    def read(variables, cls, images_uint8_BHWC):
        del cls
        images_BHWC = pixels.normalise(images_uint8_BHWC, normalisation)
        running = statistics.by_layer(variables["batch_stats"])

        def one(image_HWC):
            reading = teacher.read(variables, image_HWC[None], normalisation, statistics=True)
            return statistics.deviation(statistics.by_layer(reading.statistics), running)

        return {"difficulty_N": jax.vmap(one)(images_BHWC)}

    return read


def blank(
    teacher: Teacher,
    variables: PyTree,
    image_shape: tuple[int, int, int],
    *,
    patch: int,
    num_classes: int,
) -> dict[str, PyTree]:
    """Both collections full of zeros, where only their shapes matter."""
    images_BHWC = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    own = teacher.normalisation  # any would do
    shapes = jax.eval_shape(
        lambda v, x: _statistics(teacher, v, x, own, bn=True, patch=patch), variables, images_BHWC
    )
    conv = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes["conv"])
    classes = jax.tree.map(lambda x: np.zeros((num_classes, *x.shape), np.float32), shapes)
    return {CONV: conv, CLASSES: classes}


def mean(sums: Sequence[Sum]) -> PyTree:
    """The mean over everything that was added up, as float32."""
    count = sum(images for images, _ in sums)
    total = jax.tree.map(lambda *x: np.sum(x, 0), *(tree for _, tree in sums))
    return jax.tree.map(lambda x: (x / count).astype(np.float32), total)
