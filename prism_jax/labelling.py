"""Soft labels: the logits of an ensemble of teachers over augmented views of a set."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax import parallel, rng
from prism_jax.core import given
from prism_jax.core.augment import Augment, augment, draw
from prism_jax.core.codec import Coding
from prism_jax.core.ensemble import ENSEMBLES, votes
from prism_jax.data.label_store import LabelPlan, rounded
from prism_jax.data.lazy import Images, read_ahead
from prism_jax.data.pipeline import epoch_order, num_batches
from prism_jax.data.sets.fkd import torch_orders
from prism_jax.errors import UserError
from prism_jax.teachers import TeacherPool, batch_statistics
from prism_jax.types import Mix, Normalisation, SoftLabels, View

VIEWS = "relabel/view"
ORDER = "relabel/order"


@dataclasses.dataclass(frozen=True)
class LabelRecipe:
    """What decides the bits of the logits, beside the images and the teachers.

    Attributes:
      augment: the views and mixes.
      ensemble: how the teachers' logits are combined.
      batch_size: images per record.
      priors, prior_temperature: of the ensemble "committee", see ``core.ensemble.votes``.
      teacher_mode: whose statistics BatchNorm uses: "eval", the running ones, or "train", those
        of the batch.
      bn_group: with "train", images per group that is normalised by itself; None: the batch.
      parts: with ``bn_group``, of the batch, none of which shares a group with another: a student's
        ``accumulate``. It matters where an epoch's last batch is short.
      order: of the images: "own", or "torch" as PyTorch's RandomSampler with the seed 42 gives it,
        whatever the seed.
    """

    augment: Augment
    ensemble: str = "single"
    batch_size: int = 50
    priors: tuple[float, ...] | None = None
    prior_temperature: float = 10.0
    teacher_mode: str = "eval"
    bn_group: int | None = None
    parts: int = 1
    order: str = "own"

    def of_epoch(self, seed: int, epoch: int, count: int) -> np.ndarray:
        """The order of the images in an epoch: int32 (count,)."""
        if self.order == "own":
            return epoch_order(seed, ORDER, epoch, count)
        return _torch_orders(count, 2 ** epoch.bit_length())[epoch]


@functools.lru_cache(maxsize=2)
def _torch_orders(count: int, epochs: int) -> np.ndarray:
    """Those of more epochs begin with those of fewer: doubled when they are used up."""
    return torch_orders(count, epochs).astype(np.int32)


class _Wanted(NamedTuple):
    """A batch of an epoch, and which images it has."""

    batch: int
    index_B: np.ndarray


class Labeller:
    """Labels whole batches, one per device at a time; a batch is never split.

    On part of a batch a dense layer gives other bits, so the batch is the unit of identity:
    any number of devices gives the same labels.
    """

    def __init__(
        self,
        pool: TeacherPool,
        recipe: LabelRecipe,
        *,
        devices: Sequence[jax.Device] | None = None,
        how: str = "shard_map",
    ):
        self.recipe = recipe
        weights_T = votes(recipe.priors, recipe.prior_temperature) if recipe.priors else None
        # Not the pool itself: a shared program outlives this labeller, and not its weights.
        teachers, normalisation = pool.teachers, pool.normalisation

        def label(variables, seed, epoch, batch, images_uint8_BHWC):
            key = rng.stream(rng.root(seed), VIEWS, epoch, batch)
            images_BHWC, _ = augment(key, images_uint8_BHWC, recipe.augment, normalisation)
            statistics: contextlib.AbstractContextManager = contextlib.nullcontext()
            if recipe.teacher_mode == "train":
                statistics = batch_statistics(len(images_BHWC), recipe.bn_group, recipe.parts)
            with statistics:
                logits = [
                    teacher.read(weights, images_BHWC, normalisation, statistics=False).logits_BK
                    for teacher, weights in zip(teachers, variables, strict=True)
                ]
            return ENSEMBLES[recipe.ensemble](jnp.stack(logits), weights_T)

        devices = devices or parallel.devices()[:1]
        self._map = parallel.lane_map(
            label, pool.variables, arity=3, devices=devices, how=how,
            key=("labels", recipe, teachers, normalisation),
        )  # fmt: skip

    def epoch(
        self, images_uint8_NHWC: Images, epoch: int, *, seed: int, start: int = 0
    ) -> Iterator[SoftLabels]:
        """Label one epoch: every image once, in the recipe's order.

        Args:
          start: the first batch that is wanted.

        Yields:
          One record per batch, in order, with float32 logits; the last one is ragged where the
          size does not divide.
        """
        count, size = len(images_uint8_NHWC), self.recipe.batch_size
        order, width = self.recipe.of_epoch(seed, epoch, count), len(self._map)
        wanted = [
            _Wanted(batch, order[batch * size : (batch + 1) * size])
            for batch in range(start, num_batches(count, size))
        ]
        read = read_ahead(images_uint8_NHWC, wanted, lambda one: one.index_B, ahead=width)
        begun: list = []  # on the devices, while the host works on what came before
        while group := list(itertools.islice(read, width)):
            ended, begun = begun, self._begin(epoch, group, seed)
            yield from map(self._end, ended)
        yield from map(self._end, begun)

    def lower(self, image_shape: tuple[int, int, int], size: int) -> jax.stages.Lowered:
        """The program that labels batches of ``size`` images, to be compiled and inspected."""
        images = jax.ShapeDtypeStruct((size, *image_shape), np.uint8)
        return self._map.lower_for(np.int32(0), np.int32(0), images)

    def _end(self, begun: SoftLabels) -> SoftLabels:
        return begun._replace(logits_BK=self._map.fetch(begun.logits_BK))

    def _begin(
        self, epoch: int, group: Sequence[tuple[_Wanted, np.ndarray]], seed: int
    ) -> list[SoftLabels]:
        """Label up to one batch per lane; the logits stay on the devices."""
        begun = []
        for size in dict.fromkeys(len(images) for _, images in group):
            mine = [(one, images) for one, images in group if len(images) == size]
            batches = [(np.int32(epoch), np.int32(one.batch), images) for one, images in mine]
            for (one, _), logits in zip(mine, self._map.spread(seed, batches), strict=True):
                begun.append(SoftLabels(epoch, one.batch, one.index_B.astype(np.int32), logits))
        return begun


@dataclasses.dataclass(frozen=True)
class OnlineLabels:
    """Labels made when they are read, to the bits that a store of the same plan gives back.

    Attributes:
      labeller: makes them.
      images_uint8_NHWC: the set.
      plan: of the store that there could be.
      seed: of the views and mixes.
    """

    labeller: Labeller
    images_uint8_NHWC: Images
    plan: LabelPlan
    seed: int

    def read(self, *, start: int = 0, epochs: int | None = None) -> Iterator[SoftLabels]:
        """The records that ``LabelReader.read`` reads."""
        first, batch = divmod(start, self.plan.batches_per_epoch)
        for number in range(first, self.plan.epochs if epochs is None else epochs):
            epoch = number % self.plan.epochs
            for record in self.labeller.epoch(
                self.images_uint8_NHWC, epoch, seed=self.seed, start=batch
            ):
                yield rounded(record, self.plan.coding)
            batch = 0


@dataclasses.dataclass(frozen=True)
class FixedLabels:
    """One label per image, whatever the view: of those who publish such beside their images.

    Attributes:
      logits_NK: float32.
      plan: batches and epochs; the images stand in them as in labels that are made here.
      seed: of their order.
    """

    logits_NK: np.ndarray
    plan: LabelPlan
    seed: int

    def read(self, *, start: int = 0, epochs: int | None = None) -> Iterator[SoftLabels]:
        """As ``LabelReader.read``."""
        per_epoch, size = self.plan.batches_per_epoch, self.plan.batch_size
        epochs = self.plan.epochs if epochs is None else epochs
        for number in range(start, epochs * per_epoch):
            epoch, batch = divmod(number, per_epoch)
            epoch %= self.plan.epochs
            order = epoch_order(self.seed, ORDER, epoch, self.plan.count)
            index_B = order[batch * size : (batch + 1) * size]
            yield SoftLabels(epoch, batch, index_B, self.logits_NK[index_B])


def shown(
    record: SoftLabels,
    images_uint8_NHWC: np.ndarray,
    view: Mapping[str, Any],
    normalisation: Normalisation,
) -> np.ndarray:
    """The images of a record as its teachers saw them: cropped, flipped and mixed.

    Args:
      record: its coordinates and indices; the logits have no part.
      images_uint8_NHWC: the labelled set.
      view: what a store's manifest says under "view".
      normalisation: of the result.

    Returns:
      float32 images_BHWC.
    """
    how = Augment(**{field.name: view[field.name] for field in dataclasses.fields(Augment)})
    coordinates = np.int32(record.epoch), np.int32(record.batch)
    images_BHWC = images_uint8_NHWC[record.index_B]
    return np.array(_show(how, normalisation, np.uint32(view["seed"]), *coordinates, images_BHWC))


def drawn(
    record: SoftLabels, image_size: tuple[int, int], view: Mapping[str, Any]
) -> tuple[View, Mix]:
    """How the images of a record were cropped, flipped and mixed: arrays of NumPy.

    Args:
      record: its coordinates and the number of its images.
      image_size: (height, width) in pixels.
      view: what a store's manifest says under "view".
    """
    how = Augment(**{field.name: view[field.name] for field in dataclasses.fields(Augment)})
    coordinates = np.int32(record.epoch), np.int32(record.batch)
    seed, count = np.uint32(view["seed"]), len(record.index_B)
    return jax.device_get(_draw(how, image_size, count, seed, *coordinates))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(how: Augment, image_size: tuple[int, int], count: int, seed, epoch, batch):
    key = rng.stream(rng.root(seed), VIEWS, epoch, batch)
    return draw(key, count, image_size, how)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _show(how: Augment, normalisation: Normalisation, seed, epoch, batch, images_uint8_BHWC):
    key = rng.stream(rng.root(seed), VIEWS, epoch, batch)
    return augment(key, images_uint8_BHWC, how, normalisation)[0]


class LabelledEpochs(list[SoftLabels]):
    """Soft labels of a set in memory, with what their views and mixes were drawn by.

    Attributes:
      augment, seed: a student replays the same from them, see ``training.fit``.
    """

    def __init__(self, records: Iterable[SoftLabels], augment: Augment, seed: int):
        super().__init__(records)
        self.augment, self.seed = augment, seed

    def __getitem__(self, at):  # some of the epochs, say
        found = super().__getitem__(at)
        return LabelledEpochs(found, self.augment, self.seed) if isinstance(at, slice) else found


def relabel(
    pool: TeacherPool,
    images_uint8_NHWC: np.ndarray,
    *,
    epochs: int = 300,
    ensemble: str = "single",
    batch_size: int = 50,
    crop_min: float = 0.25,
    flip: bool = True,
    mix: str = "cutmix",
    precision: str = "float16",
    top_k: int | None = None,
    seed: int = 0,
    **recipe,
) -> LabelledEpochs:
    """Label a set in memory.

    Args:
      pool: the label teachers, alone or combined by ``ensemble``.
      images_uint8_NHWC: the set; its order is what the records' indices mean.
      epochs: how many times every image is labelled, each time over another view.
      ensemble, batch_size, crop_min, flip, mix: see ``LabelRecipe`` and ``Augment``.
      precision, top_k: what is kept of the logits, see ``core.codec``.
      **recipe: further fields of ``LabelRecipe``.

    Returns:
      A list of one record per batch and epoch, with float32 logits as they are read from a store.
      It knows ``seed``, ``crop_min``, ``flip`` and ``mix``, from which ``fit`` replays the views.

    Raises:
      UserError: images that are not uint8 NHWC, a field that is none, or a ``top_k`` that drops
        nothing.
    """
    images = given.images("relabel", images_uint8_NHWC)
    classes = given.num_classes(pool.teachers[0].module, images.shape[1:])
    if top_k is not None and not 0 < top_k < classes:
        raise UserError(f"relabel got top_k={top_k}; it must be from 1 to {classes - 1}")
    given.one_of("ensemble", ensemble, ENSEMBLES)
    given.fields_of("relabel", recipe, LabelRecipe)
    how, coding = Augment(crop_min, flip, mix), Coding(precision, top_k)
    labeller = Labeller(pool, LabelRecipe(how, ensemble, batch_size, **recipe))
    records = (
        rounded(record, coding)
        for epoch in range(epochs)
        for record in labeller.epoch(images, epoch, seed=seed)
    )
    return LabelledEpochs(records, how, seed)
